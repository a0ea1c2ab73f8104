"""Fixtures that several test files use."""

import pytest
import torch

import data
import policy
import rollout
import toy
from configs import FULL_VOCABULARY_LOSSES, TrainConfig, parse
from teacher import teacher_targets


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a random teacher and a random student with the toy's tokenizer."""
    root = tmp_path_factory.mktemp("pair")
    torch.set_num_threads(1)
    for role, hidden, heads in (("teacher", 64, 2), ("student", 32, 2)):
        lm = toy.model(hidden, heads, seed=len(role))
        lm.model.embed_tokens.weight.data *= 4  # far enough from uniform to disagree
        lm.save_pretrained(root / role)
        toy.tokenizer().save_pretrained(root / role)
    return str(root / "teacher"), str(root / "student")


def ragged_rollouts():
    """Rollouts of very different lengths, with newlines."""
    g = torch.Generator().manual_seed(0)
    rollouts = []
    for n in (1, 3, 30, 17, 24, 2, 9):
        tokens = torch.randint(4, 42, (n,), generator=g)
        tokens[torch.rand(n, generator=g) < 0.25] = toy.ID["\n"]
        rollouts.append(rollout.Rollout([1, 5, 6, 7][: 1 + n % 4], tokens.tolist(), [-1.0] * n, "stop"))
    return rollouts


def toy_vocabulary(stop_ids=(2,), merged=()):
    """The toy's, or that of the random pair."""
    newline_ids = data.newline_token_ids(toy.tokenizer(), len(toy.VOCAB))
    return data.Vocabulary(len(toy.VOCAB), newline_ids, list(stop_ids), list(merged))


@pytest.fixture
def scene(pair):
    """make(**options) -> (student, teacher, minibatches of scored micro-batches, config, teacher's head or None)."""
    from helpers import flags  # not above: it hides the GPUs, which test_vllm.py needs

    vocabulary = toy_vocabulary()

    def make(**options):
        cfg = parse(TrainConfig, flags(pair, "unused", **options))
        cpu = torch.device("cpu")
        student = policy.load_policy(pair[1], cfg, vocabulary, cpu, trainable=True)
        teacher = policy.load_policy(pair[0], cfg, vocabulary, cpu, trainable=False)
        minibatches = data.make_minibatches(ragged_rollouts(), cfg, 0, vocabulary, "cpu")
        for batch in [batch for minibatch in minibatches for batch in minibatch]:
            batch.teacher = teacher_targets(teacher, batch, cfg)
        head = policy.head_weights(teacher) if cfg.loss in FULL_VOCABULARY_LOSSES else None
        return student, teacher, minibatches, cfg, head

    return make
