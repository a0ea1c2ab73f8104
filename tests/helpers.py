"""What the tests of whole runs share: a short run's flags, and runs in forked children.

Importing it hides the GPUs; test_vllm.py, which takes one, does not.
"""

import json
import multiprocessing
import os
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import train
from configs import TrainConfig, parse

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests compare runs bit by bit, and fork
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real benchmarks and models, which do not come with the repository
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
fork = multiprocessing.get_context("fork")


def flags(pair, out, **options):
    """A short run's command line; options override."""
    values = dict(
        preset="tiny", teacher=pair[0], student=pair[1], out=out, steps=2, prompts=3, group=2, max_response=24,
        loss="opd", eval_every=0, block=4, lr=3e-3, warmup=0, sample_every=0, save_every=0, topk=4,
    )  # fmt: skip
    values |= options
    return [x for name, value in values.items() for x in (f"--{name}", str(value))]


def parse_train(argv):
    return parse(TrainConfig, argv)


def run(pair, out, **options):
    train.main(parse(TrainConfig, flags(pair, out, **options)))
    return metrics(out), load_file(Path(out) / "final" / "model.safetensors")


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def outcome(out):
    """(metrics but times, final weights). The metrics hold a checksum of every step's rollouts."""
    rows = [{k: v for k, v in row.items() if not k.startswith(("time", "tokens_per_s"))} for row in metrics(out)]
    return rows, load_file(Path(out) / "final" / "model.safetensors")


def same(a, b):
    """Whether two finished runs agree bit for bit."""
    return outcome(a)[0] == outcome(b)[0] and far(outcome(a)[1], outcome(b)[1]) == 0


def far(a, b):
    """Largest relative difference of two state dicts' tensors."""
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


# -----------------------------------------------------------------------------
# forked children, which have nothing to import


def start_child(task, log=os.devnull):
    """A child that runs task(); what it prints goes to the file `log`."""

    def child():
        for fd in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
        sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)
        torch.set_num_threads(1)
        task()

    process = fork.Process(target=child)
    process.start()
    return process


def start_ranks(task, ranks, log=os.devnull):
    """Children that run task(rank), with the environment that torchrun would give them."""
    world = dict(WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(random.randint(20000, 60000)))

    def one(rank):
        os.environ.update(world, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
        task(rank)

    return [start_child(lambda rank=rank: one(rank), log) for rank in range(ranks)]


def join(processes):
    """The largest exit code."""
    for process in processes:
        process.join(300)
        process.kill()  # ranks wait for a dead one for hours
        process.join()
    return max(abs(process.exitcode) for process in processes)


def train_on(argv, setup=lambda: None):
    train.plot.draw = lambda out: None  # half of the time of a short run
    setup()
    train.main(parse(TrainConfig, argv))


def start(argv, setup=lambda: None, log=os.devnull):
    """A run of train.py."""
    return start_child(lambda: train_on(argv, setup), log)


def launch(argv, ranks=1, log=os.devnull):
    """The ranks of one run of train.py."""
    return start_ranks(lambda rank: train_on(argv), ranks, log) if ranks > 1 else [start(argv, log=log)]


def finished(argv, setup=lambda: None, log=os.devnull, ranks=1):
    """The largest exit code of a run of train.py."""
    return join(launch(argv, ranks, log) if ranks > 1 else [start(argv, setup, log)])
