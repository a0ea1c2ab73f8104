"""What the tests of whole runs share: a random pair of models, a short run's flags, runs in forked children.

Importing it hides the GPUs, so test_vllm.py, which takes one, does not.
"""

import json
import multiprocessing
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import data
import policy
import rollout
import toy
import train
from configs import TrainConfig, parse

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # equal to the digit, and forked
HERE = Path(__file__).parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
fork = multiprocessing.get_context("fork")


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


def flags(pair, out, **options):
    """A short run's command line; options override."""
    values = dict(
        preset="tiny", teacher=pair[0], student=pair[1], out=out, steps=2, prompts=3, group=2, max_response=24
    )
    values |= dict(loss="opd", eval_every=0, block=4, lr=3e-3, warmup=0, sample_every=0, save_every=0, topk=4) | options
    return [x for name, value in values.items() for x in (f"--{name}", str(value))]


def run(pair, out, **options):
    train.main(parse(TrainConfig, flags(pair, out, **options)))
    return metrics(out), load_file(Path(out) / "final" / "model.safetensors")


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def far(a, b):
    """Largest relative difference of two state dicts' tensors."""
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


# -----------------------------------------------------------------------------
# runs in forked children, which have nothing to import


def start(argv, setup=lambda: None, log=os.devnull):
    """A child that runs train.py on argv; what it prints goes to the file `log`."""

    def child():
        for fd in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
        sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)
        torch.set_num_threads(1)
        train.plot.draw = lambda out: None  # half of the time of a short run
        setup()
        train.main(parse(TrainConfig, argv))

    process = fork.Process(target=child)
    process.start()
    return process


def launch(argv, ranks=1, **kwargs):
    """Children that are the ranks of one run."""
    world = dict(WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(random.randint(20000, 60000)))
    env = [world | dict(RANK=str(r), LOCAL_RANK=str(r), LOCAL_WORLD_SIZE=str(ranks)) for r in range(ranks)]
    return [start(argv, lambda r=r: os.environ.update(env[r]) if ranks > 1 else None, **kwargs) for r in range(ranks)]


def finished(argv, setup=lambda: None, log=os.devnull, ranks=1):
    """The largest exit code of a run."""
    processes = launch(argv, ranks, log=log) if ranks > 1 else [start(argv, setup, log)]
    for process in processes:
        process.join(300)
        process.kill()  # ranks wait for a dead one for hours
        process.join()
    return max(abs(process.exitcode) for process in processes)


@pytest.fixture
def scene(pair):
    """make(**options) -> (policy, teacher, micro-batches with targets, config): rollouts of ragged lengths."""
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    newline = data.newline_tokens(tokenizer, 42)
    g = torch.Generator().manual_seed(0)
    rollouts = []
    for n in (1, 3, 30, 17, 24, 2, 9):
        tokens = torch.randint(4, 42, (n,), generator=g)
        tokens[torch.rand(n, generator=g) < 0.25] = toy.ID["\n"]
        rollouts.append(rollout.Rollout([1, 5, 6, 7][: 1 + n % 4], tokens.tolist(), [-1.0] * n, "stop"))

    def make(**options):
        cfg = parse(TrainConfig, flags(pair, "unused", **options))
        student, teacher = (
            policy.load_policy(path, cfg, 42, torch.device("cpu"), trainable=path == pair[1]) for path in pair[::-1]
        )
        minibatches = data.make_batches(rollouts, cfg, 0, 0, 1, newline, "cpu")
        for batch in (b for batches in minibatches for b in batches):
            batch.targets = policy.teacher_targets(teacher, batch, cfg)
        student.teacher_head = policy.head_weights(teacher)
        return student, teacher, minibatches, cfg

    return make
