"""python -m pytest -p tests.vllm_v2 tests/test_vllm.py      (.ci/run names the tests that fit; a minute and a half)

A pytest plugin. It makes vLLM's CPU build run what vLLM 0.32 runs on CUDA and not on a CPU: the second model runner,
with its Triton kernels in Triton's interpreter; asynchronous scheduling; and the engine's side of sleeping. It cannot
show whether a GPU compiles the kernels rightly, or whether sleeping frees memory.
"""

import os
import types

from rollout import VLLMSampler, vllm_device

os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}


class InterpreterDriver:
    """What Triton asks of a driver before it interprets a kernel. Its release has none for CPUs."""

    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", "x86", 1)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def pytest_configure(config):
    register_driver()
    schedule_asynchronously()
    VLLMSampler.__init__ = start_and_check
    VLLMSampler.sleep = sleep


def register_driver():
    from triton.backends import backends
    from triton.runtime import driver

    backends.setdefault("cpu", types.SimpleNamespace(driver=InterpreterDriver, compiler=None))
    driver.set_active(InterpreterDriver())
    assert vllm_device() == "cpu", "tests.vllm_v2 is for vLLM's CPU build"
    import vllm.v1.sample.ops.topk_topp_sampler as topk_topp

    topk_topp.HAS_TRITON = False  # the one kernel that the interpreter cannot run; torch's version takes its place


def schedule_asynchronously():
    from vllm.platforms.cpu import CpuPlatform

    switch_off = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, config):
        switch_off(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


start = VLLMSampler.__init__


def start_and_check(self, *args, **kwargs):
    start(self, *args, **kwargs)
    assert self.llm.collective_rpc(lambda worker: worker.use_v2_model_runner) == [True]
    assert self.llm.llm_engine.vllm_config.scheduler_config.async_scheduling


def sleep(self):
    """VLLMSampler.sleep as on CUDA: the scheduler pauses until it is woken. The CPU's worker does nothing."""
    if not self.is_asleep:
        self.llm.sleep(level=1)
        self.is_asleep = True
