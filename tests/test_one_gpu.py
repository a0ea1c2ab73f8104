"""python -m pytest tests/test_one_gpu.py      (one GPU computes what several compute)

On a CPU with gloo: FSDP2 on one rank and on two, told to compute in bf16, as it does on CUDA.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import flags, join, parse_train, start_ranks
from scenes import old_logprobs, ragged_rollouts, toy_vocabulary

import data
import policy
import train
from policy import teacher_targets
from support import common

CPU = torch.device("cpu")


def dtypes_of_a_step(pair, rank, world):
    """{module: dtypes of its outputs and of its own parameters while it runs} of a teacher's and a student's pass."""
    cfg, vocabulary = parse_train(flags(pair, "unused", loss="lsm", minibatches=1, micro_tokens=60)), toy_vocabulary()
    found = {}

    def note(name, module, outputs):
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else [outputs[0]]
        found[name] = [x.dtype for x in (*outputs, *module.parameters(recurse=False))]

    models = {}
    for role, path in zip(("teacher", "student"), pair, strict=True):
        models[role] = policy.load_policy(path, cfg, vocabulary, CPU, trainable=role == "student")
        for name, module in models[role].named_modules():
            if not list(module.children()):  # the blocks' own parts: linear maps, norms, the embedding
                hook = lambda module, _, out, name=f"{role} {name}": note(name, module, out)  # noqa: E731
                module.register_forward_hook(hook)
    (batches,) = data.make_minibatches(ragged_rollouts(), cfg, 0, vocabulary, CPU, rank, world)
    for batch in batches:
        batch.teacher = teacher_targets(models["teacher"], batch, cfg)
        batch.logp_old = old_logprobs(models["student"], batch, cfg)
    optimizer = torch.optim.AdamW(models["student"].parameters(), 1e-3)
    train.update(models["student"], optimizer, batches, cfg)
    found["gradients and weights"] = {(p.dtype, x["exp_avg"].dtype) for p, x in optimizer.state.items()}
    return found


def test_one_rank_computes_in_the_dtypes_of_two(pair, tmp_path):
    """Every activation, and every weight while it is used; master weights, gradients and moments stay in fp32."""

    def one_rank(rank, world):
        policy.compute_dtype = lambda device: torch.bfloat16
        store = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world == 1 else {}
        dist.init_process_group("gloo", **store)
        torch.save(dtypes_of_a_step(pair, rank, world), tmp_path / f"{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()

    for world in (1, 2):
        log = tmp_path / f"log{world}"
        assert join(start_ranks(lambda rank, world=world: one_rank(rank, world), world, log)) == 0, log.read_text()
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert alone == first == second and len(alone) > 20
    assert alone.pop("gradients and weights") == {(torch.float32, torch.float32)}
    used = {name: dtypes for name, dtypes in alone.items() if "rotary" not in name}
    assert all(set(dtypes) == {torch.bfloat16} for dtypes in used.values()), used


def test_a_single_gpu_is_a_group_of_one(monkeypatch):
    """So it is sharded as several are. A single CPU is not: it has nothing to cast to."""
    groups = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: groups.append((backend, options)))
    for name, value in (("is_available", True), ("device_count", 1), ("set_device", None), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    common.init_device(SimpleNamespace(device="cpu", threads=0, seed=0))
    assert groups == []
    assert common.init_device(SimpleNamespace(device="", threads=0, seed=0)).type == "cuda"
    ((backend, options),) = groups
    assert backend == "cpu:gloo,cuda:nccl" and (options["rank"], options["world_size"]) == (0, 1)


def test_a_rank_that_does_not_see_its_gpu_is_one_line(monkeypatch):
    """pytorch/ignite#3259: srun --gpus-per-task shows each rank one GPU, which is number 0 to all of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="LOCAL_RANK is 1, and this process sees 1 GPU"):
        common.init_device(SimpleNamespace(device="", threads=0, seed=0))
