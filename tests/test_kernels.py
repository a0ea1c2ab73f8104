"""python -m pytest tests/test_kernels.py      (--kernels: compiled decoder layers, and Liger's)

torch.compile runs on a CPU; Liger's kernels need a GPU, where bench/gpu.py compares their log-probs.
"""

import importlib.util
import shutil
import sys
import types

import pytest
import torch
import torch.distributed as dist
from helpers import far, flags, join, parse_train, run, start_ranks, tiny_model
from scenes import ragged_rollouts, toy_vocabulary

import data
import losses
import policy
import train
from policy import teacher_targets
from support import toy


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """As conftest's, but of one layer, since each is compiled by itself."""
    root = tmp_path_factory.mktemp("pair")
    for role, hidden in (("teacher", 64), ("student", 32)):
        tiny_model(hidden, 2, seed=len(role), layers=1).save_pretrained(root / role)
        toy.tokenizer().save_pretrained(root / role)
    return str(root / "teacher"), str(root / "student")


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, such as g++"
)


def two_updates(pair, kernels):
    """(drift at the first update, gradients of a first and a second update) with gradient checkpointing."""
    options = dict(loss="lsm", minibatches=1, micro_tokens=70, grad_ckpt="true", grad_clip=0, kernels=kernels)
    cfg, vocabulary, cpu = parse_train(flags(pair, "unused", **options)), toy_vocabulary(), torch.device("cpu")
    student = policy.load_policy(pair[1], cfg, vocabulary, cpu, trainable=True)
    plain = parse_train(flags(pair, "unused"))
    teacher = policy.load_policy(pair[0], plain, vocabulary, cpu, trainable=False)
    (batches,) = data.make_minibatches(ragged_rollouts(), cfg, 0, vocabulary, cpu)
    assert len(batches) > 1 and all(len(batch.ids) > 1 for batch in batches)  # a single row would be compiled anew
    for batch in batches:
        batch.teacher = teacher_targets(teacher, batch, cfg)
        with torch.set_grad_enabled(policy.uses_compile(cfg)):  # as train.train does
            batch.logp_old = train.student_outputs(student, batch, cfg)["logp"].detach()
    gradients, sgd = [], torch.optim.SGD(student.parameters(), 0.2)

    def step():
        named = student.lm.named_parameters()
        gradients.append({name: policy.full_tensor(p.grad).clone() for name, p in named})
        torch.optim.SGD.step(sgd)

    sgd.step = step
    _, per_token = train.update(student, sgd, batches, cfg)
    train.update(student, sgd, batches, cfg)
    return torch.cat([tensors["d"] for tensors in per_token]), gradients


def without_code_generation():
    """torch.compile traces and checks as ever, but runs torch's own kernels: seconds instead of a minute."""
    compile = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **options: compile(self, backend="aot_eager", **options)


@needs_compiler
@pytest.mark.parametrize("is_sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_layers_give_the_gradients_of_the_plain_ones(pair, tmp_path, is_sharded):
    """In fp32 to 1e-5, and drift of exactly 0 before the first update. Sharded, as on a GPU, without code generation."""

    def one_rank(_):
        if is_sharded:
            without_code_generation()
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        torch.save([two_updates(pair, kernels) for kernels in ("torch", "compile")], tmp_path / "found.pt")

    assert join(start_ranks(one_rank, 1, tmp_path / "log")) == 0, (tmp_path / "log").read_text()[-3000:]
    (_, expected), (drift, found) = torch.load(tmp_path / "found.pt")
    assert (drift == 0).all() and len(drift)
    assert max(far(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5


def test_liger_patches_the_models_before_they_load(pair, tmp_path, monkeypatch):
    """A stand-in for the package notes what it is asked for."""
    asked = []

    def apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True, model=None):
        asked.append((rope, rms_norm, swiglu, cross_entropy, fused_linear_cross_entropy))

    package = types.ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen3": apply}
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, package)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "liger_kernel" or find(name, *rest))
    run(pair, tmp_path / "a", steps=1, kernels="liger")
    assert asked == [(True, True, True, False, False)] * 2  # teacher and student
    assert not losses.FUSED
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {}
    with pytest.raises(SystemExit, match="--kernels: liger-kernel has nothing for models of the type qwen3"):
        run(pair, tmp_path / "b", steps=1, kernels="liger")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(SystemExit):
        parse_train(flags(pair, tmp_path / "c", kernels="both"))


@pytest.mark.slow
def test_a_run_with_compiled_layers_is_the_plain_run(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "FUSED", False)  # put back after the test
    monkeypatch.setattr(torch.nn.Module, "compile", torch.nn.Module.compile)
    without_code_generation()
    options = dict(steps=2, grad_ckpt="true", loss="lsm", micro_tokens=10**6)
    _, plain = run(pair, tmp_path / "plain", **options)
    rows, compiled = run(pair, tmp_path / "compiled", **options, kernels="compile")
    assert far(compiled, plain) < 1e-3 and losses.FUSED and rows[0]["rollout/out_of_step"] < 1e-5
