"""Fixtures that several test files use, and a machine that is the same wherever the tests are started.

There is no network but the loopback, and signals do what they do in a terminal: a shell that starts pytest with & or nohup
makes it ignore some of them.
"""

import os
import signal
import socket

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before these libraries are imported

import pytest
import torch

import data
import policy
import rollout
import train
from configs import FULL_VOCABULARY_LOSSES, TrainConfig, parse
from policy import teacher_targets
from study.pretrain_toy import model as tiny_model
from support import toy
from support.grade import Grader
from support.vocabulary import Vocabulary, newline_ids

# A worker's imports take seconds, and toy answers need none. Evaluations in processes of their own do check the grader.
Grader.check = lambda self: None

for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, handler)

connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo


def connect_here(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not address[0].startswith(("127.", "::1", "localhost")):
        raise OSError(f"no network in tests: {address}")
    return connect(self, address)


def getaddrinfo_here(host, *args, **options):
    if host not in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname()):
        raise socket.gaierror(f"no network in tests: {host}")
    return getaddrinfo(host, *args, **options)


socket.socket.connect, socket.getaddrinfo = connect_here, getaddrinfo_here


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a random teacher and a random student with the toy's tokenizer."""
    root = tmp_path_factory.mktemp("pair")
    torch.set_num_threads(1)
    for role, hidden, heads in (("teacher", 64, 2), ("student", 32, 2)):
        lm = tiny_model(hidden, heads, seed=len(role))
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


@torch.no_grad()
def old_logprobs(student, batch, cfg, teacher_head=None):
    return train.student_outputs(student, batch, cfg, teacher_head)["logp"]


def toy_vocabulary(stop_ids=(2,), merged=()):
    """The toy's, or that of the random pair."""
    newlines = newline_ids(toy.tokenizer(), len(toy.VOCAB))
    return Vocabulary(len(toy.VOCAB), newlines, list(stop_ids), list(merged))


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
        head = policy.whole_head(teacher) if cfg.loss in FULL_VOCABULARY_LOSSES else None
        for batch in [batch for minibatch in minibatches for batch in minibatch]:
            batch.teacher = teacher_targets(teacher, batch, cfg)
            batch.logp_old = old_logprobs(student, batch, cfg, head)
        return student, teacher, minibatches, cfg, head

    return make
