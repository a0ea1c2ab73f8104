"""A student and a teacher with random weights, and scored rollouts for them, without a run around them."""

import torch

import data
import policy
import train
from configs import FULL_VOCABULARY_LOSSES, TrainConfig, parse
from policy import teacher_targets
from rollout import Rollout
from study.pretrain_toy import model as tiny_model
from support import toy
from support.vocabulary import Vocabulary, newline_ids


def save_random_pair(folder):
    """(folder of a teacher, folder of a student), with the toy's tokenizer."""
    torch.set_num_threads(1)
    for role, hidden, heads in (("teacher", 64, 2), ("student", 32, 2)):
        lm = tiny_model(hidden, heads, seed=len(role))
        lm.model.embed_tokens.weight.data *= 4  # far enough from uniform to disagree
        lm.save_pretrained(folder / role)
        toy.tokenizer().save_pretrained(folder / role)
    return str(folder / "teacher"), str(folder / "student")


def ragged_rollouts():
    """Rollouts of very different lengths, with newlines."""
    g = torch.Generator().manual_seed(0)
    rollouts = []
    for n in (1, 3, 30, 17, 24, 2, 9):
        tokens = torch.randint(4, 42, (n,), generator=g)
        tokens[torch.rand(n, generator=g) < 0.25] = toy.ID["\n"]
        rollouts.append(Rollout([1, 5, 6, 7][: 1 + n % 4], tokens.tolist(), [-1.0] * n, "stop"))
    return rollouts


@torch.no_grad()
def old_logprobs(student, batch, cfg, teacher_head=None):
    return train.student_outputs(student, batch, cfg, teacher_head)["logp"]


def toy_vocabulary(stop_ids=(2,), merged=()):
    """The toy's, or that of the random pair."""
    newlines = newline_ids(toy.tokenizer(), len(toy.VOCAB))
    return Vocabulary(len(toy.VOCAB), newlines, list(stop_ids), list(merged))


def make_scene(pair, **options):
    """(student, teacher, minibatches of scored micro-batches, config, teacher's head or None)"""
    from helpers import flags  # not above: it hides the GPUs, which test_vllm.py needs

    vocabulary, cpu = toy_vocabulary(), torch.device("cpu")
    cfg = parse(TrainConfig, flags(pair, "unused", **options))
    student = policy.load_policy(pair[1], cfg, vocabulary, cpu, trainable=True)
    teacher = policy.load_policy(pair[0], cfg, vocabulary, cpu, trainable=False)
    minibatches = data.make_minibatches(ragged_rollouts(), cfg, 0, vocabulary, "cpu")
    head = policy.whole_head(teacher) if cfg.loss in FULL_VOCABULARY_LOSSES else None
    for batch in [batch for minibatch in minibatches for batch in minibatch]:
        batch.teacher = teacher_targets(teacher, batch, cfg)
        batch.logp_old = old_logprobs(student, batch, cfg, head)
    return student, teacher, minibatches, cfg, head
