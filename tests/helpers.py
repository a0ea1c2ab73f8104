"""What the tests of whole runs share: a short run's flags, and runs in forked children.

Importing it hides the GPUs; test_vllm.py, which takes one, does not.
"""

import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import rollout
import train
from configs import EvalConfig, TrainConfig, parse
from study.pretrain_toy import model as tiny_model  # noqa: F401  a Qwen3 with random weights
from support import toy

data.TOY_TRAINING = 128  # encoding 4,096 takes longer than a short run
# Pictures take half of the time of a short run. Runs in a Python of their own do draw.
train.draw_or_warn = evaluate.draw_or_warn = lambda *args: None
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


def evaluate_on_toy(model, out, **options):
    """evaluate.py --data toy, on one problem if options do not say otherwise."""
    values = dict(model=model, data="toy", eval_problems=1, out=out) | options
    argv = [x for name, value in values.items() for x in (f"--{name}", str(value))]
    evaluate.main(parse(EvalConfig, argv))


def parse_train(argv):
    return parse(TrainConfig, argv)


def run(pair, out, **options):
    train.main(parse(TrainConfig, flags(pair, out, **options)))
    return metrics(out), load_file(Path(out) / "final" / "model.safetensors")


def metrics(out):
    return rows_of(out, "metrics.jsonl")


def evaluations(out):
    return rows_of(out, "evaluations.jsonl")


def rows_of(out, name):
    return [json.loads(line) for line in (Path(out) / name).read_text().splitlines()]


def outcome(out):
    """(metrics but times, evaluations, final weights). The metrics hold a checksum of every step's rollouts."""
    rows = [{k: v for k, v in row.items() if not k.startswith(("time", "tokens_per_s"))} for row in metrics(out)]
    return rows, evaluations(out), load_file(Path(out) / "final" / "model.safetensors")


def same(a, b):
    """Whether two finished runs agree bit for bit."""
    *ours, our_weights = outcome(a)
    *theirs, their_weights = outcome(b)
    return ours == theirs and far(our_weights, their_weights) == 0


def far(a, b):
    """Largest relative difference of two state dicts' tensors."""
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


SMALL = dict(save_every=1, keep=9, eval_every=0, schedule="constant")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(path, n, length=3):
    return write_jsonl(path, [{"problem": str(i) * length + "=?", "answer": str(i)} for i in range(n)])


def refused(argv, message):
    with pytest.raises(SystemExit, match=message) as stop:
        train.main(parse(TrainConfig, argv))
    assert "\n" not in str(stop.value.code)


def slow_sampling():
    draw = rollout.Draw.__call__
    rollout.Draw.__call__ = lambda *args: time.sleep(0.02) or draw(*args)


def chat_tokenizer(template):
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def graded_row(i, sample):
    return dict(data="q", problem=f"q-{i}", sample=sample, seed=0, tokens=3, finish="stop", gold="1", text="\\boxed{1}",
                answer="1", correct=True, reason="equal")  # fmt: skip


def steps_of(out):
    return sorted(path.name for path in Path(out).glob("step-*"))


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
