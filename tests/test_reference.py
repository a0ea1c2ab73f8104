"""python -m pytest tests/test_reference.py      train.update's gradient is that of reference.py, the update in plain torch"""

import itertools

import pytest
import reference
import torch
import torch.distributed as dist
from helpers import flags, join, start_ranks
from scenes import ragged_rollouts, toy_vocabulary
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import data
import policy
import train
from configs import FULL_VOCABULARY_LOSSES, TrainConfig, parse
from gating import KINDS, STATS
from policy import teacher_targets
from support import toy

LOSSES = TrainConfig.__dataclass_fields__["loss"].type.__args__
# Every loss with every gate, and every statistic with every gate
COMBINATIONS = [*itertools.product(LOSSES, KINDS, ["mean"]), *itertools.product(["opd"], KINDS, STATS[1:])]
CPU = torch.device("cpu")


def random_model(seed, is_tied):
    torch.manual_seed(seed)
    size = dict(vocab_size=42, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    size |= dict(num_key_value_heads=2, head_dim=16, initializer_range=0.1, tie_word_embeddings=is_tied)
    return Qwen3ForCausalLM(Qwen3Config(**size))


@pytest.fixture(scope="module", params=["tied", "untied"])
def head(request):
    """tied: the embedding is the head, too"""
    return request.param


@pytest.fixture(scope="module")
def combinations(head):
    """(loss, gate, statistic) of the updates to compare; with an untied head some, for other gates make no difference there."""
    return COMBINATIONS if head == "tied" else [(loss, "block", "mean") for loss in LOSSES]


@pytest.fixture(scope="module")
def models(head, tmp_path_factory):
    """Folders {old: the student that sampled, new: the student now, teacher}."""
    folder, is_tied = tmp_path_factory.mktemp("models"), head == "tied"
    student = random_model(3, is_tied)
    student.save_pretrained(folder / "old")
    with torch.no_grad():
        for p in student.parameters():
            p += 0.02 * torch.randn_like(p)
    student.save_pretrained(folder / "new")
    random_model(4, is_tied).save_pretrained(folder / "teacher")
    for role in ("new", "teacher"):
        toy.tokenizer().save_pretrained(folder / role)
    return {role: str(folder / role) for role in ("old", "new", "teacher")}


def config(models, loss, gate, stat):
    sizes = dict(micro_tokens=50, minibatches=1, topk=4, block=4, span_min=2, span_max=6, temperature=0.9)
    paths = (models["teacher"], models["new"])
    return parse(TrainConfig, flags(paths, "unused", loss=loss, gate=gate, stat=stat, grad_clip=0, **sizes))


class Recorder:
    """Stands in for the optimizer: keeps the gradient that a step would be made with."""

    def __init__(self, policy):
        self.policy = policy

    def step(self):
        named = self.policy.lm.named_parameters()
        self.gradient = {name: policy.full_tensor(p.grad).clone() for name, p in named}

    def zero_grad(self):
        self.policy.zero_grad()


def our_gradients(models, combinations, rank=0, world=1):
    """{(loss, gate, stat): {parameter: its gradient}} of train.update, in several micro-batches."""
    cfg, vocabulary = config(models, "opd", "none", "mean"), toy_vocabulary()
    old, new, teacher = (
        policy.load_policy(models[role], cfg, vocabulary, CPU, trainable=role == "new")
        for role in ("old", "new", "teacher")
    )
    teacher_head, found = policy.whole_head(teacher), {}
    for combination in combinations:
        cfg = config(models, *combination)
        (batches,) = data.make_minibatches(ragged_rollouts(), cfg, 0, vocabulary, CPU, rank, world)
        assert len(batches) > 1
        for batch in batches:
            batch.teacher = teacher_targets(teacher, batch, cfg)
            with torch.no_grad():
                batch.logp_old = policy.token_logprobs(old, batch, cfg.temperature)
        recorder = Recorder(new)
        train.update(new, recorder, batches, cfg, teacher_head if cfg.loss in FULL_VOCABULARY_LOSSES else None)
        found[combination] = recorder.gradient
    return found


@pytest.fixture(scope="module")
def exact(models, combinations):
    """{(loss, gate, stat): {parameter: its gradient}} of reference.py, in float64."""
    old, new, teacher = (AutoModelForCausalLM.from_pretrained(models[r]).double() for r in ("old", "new", "teacher"))
    newlines, found = toy_vocabulary().newline_ids, {}
    for combination in combinations:
        cfg = config(models, *combination)
        reference.loss_of_minibatch(new, old, teacher, ragged_rollouts(), cfg, newlines).backward()
        found[combination] = {name: p.grad for name, p in new.named_parameters()}
        new.zero_grad()
    return found


def distance(ours, exact):
    """||ours - exact|| / ||exact|| over all parameters."""
    squares = [((ours[name].double() - x).square().sum(), x.square().sum()) for name, x in exact.items()]
    off, size = (torch.stack(x).sum() for x in zip(*squares, strict=True))
    return float((off / size).sqrt())


def test_the_update_is_the_references(head, models, combinations, exact):
    """On one process."""
    ours = our_gradients(models, combinations)
    off = {c: distance(ours[c], exact[c]) for c in combinations}
    assert {c: x for c, x in off.items() if not x < 1e-5} == {}
    if head == "tied":  # gates and statistics that all did the same would pass as well
        for loss in LOSSES:
            assert distance(ours[loss, "token", "mean"], ours[loss, "none", "mean"]) > 1e-3
        assert distance(ours["opd", "block", "rms"], ours["opd", "block", "mean"]) > 1e-3


@pytest.mark.slow
def test_the_update_on_two_ranks_is_the_references(models, combinations, exact, tmp_path):
    """Sharded with FSDP2, one rank with fewer micro-batches than the other."""

    def one_rank(rank):
        dist.init_process_group("gloo")
        found = our_gradients(models, combinations, rank, 2)
        if rank == 0:
            torch.save(found, tmp_path / "gradients.pt")
        dist.barrier()
        dist.destroy_process_group()

    assert join(start_ranks(one_rank, 2)) == 0
    ours = torch.load(tmp_path / "gradients.pt")
    off = {c: distance(ours[c], exact[c]) for c in combinations}
    assert {c: x for c, x in off.items() if not x < 1e-5} == {}
