"""python -m pytest tests/test_attention.py      (which attention kernels a GPU may run: decided once, the same in every pass)

On a CPU: the attention function is replaced by a spy that notes torch's four switches, which are those of CUDA.
"""

import pytest
import torch
from helpers import flags, parse_train
from torch.nn.attention import SDPBackend, sdpa_kernel

import evaluate
import policy
import rollout
import train
from configs import EvalConfig, parse

CHOSEN = {"flash": True, "mem_efficient": True, "cudnn": False, "math": False}


def switches():
    return {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in CHOSEN}


@pytest.fixture
def cuda_switches():
    """All kernels allowed, as torch starts, and put back after the test."""
    before = switches()
    for name in before:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(True)
    yield
    for name, is_enabled in before.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(is_enabled)


@pytest.fixture
def passes(monkeypatch, cuda_switches):
    """{pass: the switches at each attention of it}, of runs on a CPU that choose kernels as on a GPU."""
    attention = torch.nn.functional.scaled_dot_product_attention
    seen, doing = {}, ["loading"]

    def spy(*args, **options):
        name = "recomputation" if torch._C._current_graph_task_id() >= 0 else doing[-1]
        seen.setdefault(name, []).append(switches())
        with sdpa_kernel(SDPBackend.MATH):
            return attention(*args, **options)

    def named(name, function):
        def run(*args, **options):
            doing.append("training" if doing[-1] == "training" else name)
            try:
                return function(*args, **options)
            finally:
                doing.pop()

        return run

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for module, function, name in (
        (policy, "check_head", "loading"), (train, "student_outputs", "old log-probs"), (train, "update", "training"),
        (train, "evaluate_student", "evaluation"), (rollout.HFSampler, "generate", "generate()"),
        (policy, "teacher_targets", "teacher"),
    ):  # fmt: skip
        monkeypatch.setattr(module, function, named(name, getattr(module, function)))
    choose = policy.choose_attention_kernels
    for module in (train, evaluate):
        monkeypatch.setattr(module, "choose_attention_kernels", lambda device: choose(torch.device("cuda")))
    return seen


def import_vllm():
    torch.backends.cuda.enable_cudnn_sdp(False)  # what `import vllm` does


@pytest.mark.parametrize("moment", ["never", "before the start", "choose", "make_sampler"])
def test_every_pass_of_a_step_may_use_the_same_kernels(pair, tmp_path, monkeypatch, passes, moment):
    if moment == "before the start":
        import_vllm()
    elif moment != "never":
        function = getattr(rollout, moment)
        monkeypatch.setattr(rollout, moment, lambda *args, **options: import_vllm() or function(*args, **options))
    train.main(parse_train(flags(pair, tmp_path, steps=1, grad_ckpt="true", eval_every=1, eval_problems=2, k=1)))
    passes.pop("loading")  # on the CPU, always
    assert passes.keys() == {"old log-probs", "teacher", "training", "recomputation", "evaluation", "generate()"}
    assert all(found == CHOSEN for calls in passes.values() for found in calls), passes


def test_an_evaluation_may_use_the_same_kernels(pair, tmp_path, passes):
    argv = [
        "--model",
        pair[1],
        "--data",
        "toy",
        "--eval_problems",
        "2",
        "--k",
        "1",
        "--max_response",
        "4",
        "--out",
        str(tmp_path),
    ]
    evaluate.main(parse(EvalConfig, argv))
    assert passes.keys() == {"generate()"} and all(found == CHOSEN for found in passes["generate()"])


REFUSAL = (
    "train.py: flash and memory-efficient attention refuse this model on this GPU .*; use a GPU of .*another model"
)


@pytest.mark.parametrize("where", ["training", "recomputation", "generate()"])
def test_a_model_that_no_kernel_takes_ends_the_run_in_one_line(pair, tmp_path, monkeypatch, where):
    """Wherever torch refuses it. Other errors stay what they are."""
    attention = torch.nn.functional.scaled_dot_product_attention
    message = ["No available kernel. Aborting execution."]

    def refuse(q, *args, **options):
        is_generating = q.shape[2] == 1  # one token at a time
        is_here = {"generate()": is_generating, "training": not is_generating and q.requires_grad}
        is_here["recomputation"] = torch._C._current_graph_task_id() >= 0
        if is_here[where]:
            raise RuntimeError(message[0])
        return attention(q, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    argv = flags(pair, tmp_path / "a", steps=1, grad_ckpt="true")
    with pytest.raises(SystemExit, match=REFUSAL) as end:
        train.main(parse_train(argv))
    assert (
        "\n" not in end.value.code and "RuntimeError: No available kernel" in (tmp_path / "a/error-0.log").read_text()
    )
    message[0] = "out of memory"
    with pytest.raises(
        SystemExit, match=r"train.py: out of memory \(RuntimeError at tests/test_attention.py:\d+; traceback in"
    ):
        train.main(parse_train(flags(pair, tmp_path / "b", steps=1, grad_ckpt="true")))
