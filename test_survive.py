"""python -m pytest test_survive.py      (a child process a run, forked: no imports to wait for)

python test_survive.py 10 20     # 20 steps straight, and 20 with 10 kills: the long form
"""

import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import torch

import checkpoint
import test_train
import train
from configs import TrainConfig, parse
from test_train import far, flags, load_file, metrics

pair = test_train.pair  # random teacher and student
fork = multiprocessing.get_context("fork")


def start(argv, setup=lambda: None, log=os.devnull):
    """A child that runs train.py on argv; what it prints goes to the file `log`."""

    def child():
        for fd in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
        sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)
        torch.set_num_threads(1)
        setup()
        train.main(parse(TrainConfig, argv))

    process = fork.Process(target=child)
    process.start()
    return process


def finished(argv, setup=lambda: None, log=os.devnull):
    process = start(argv, setup, log)
    process.join()
    return process.exitcode


def outcome(out):
    """(metrics but times, final weights). The metrics hold a checksum of every step's rollouts."""
    rows = [{k: v for k, v in row.items() if not k.startswith(("time", "tokens_per_s"))} for row in metrics(out)]
    return rows, load_file(Path(out) / "final" / "model.safetensors")


def wait_for(path, process):
    while not path.exists() and process.is_alive():
        time.sleep(0.01)


def kills(pair, tmp, n, steps, seed=0):
    """Steps straight, and the same with n SIGKILLs at random moments of it: outcomes, and the steps kills left."""
    options = dict(steps=steps, save_every=1, eval_every=2, eval_problems=4, k=2)
    clock = time.time()
    assert finished(flags(pair, tmp / "straight", **options)) == 0
    length, left, rng = time.time() - clock, [], random.Random(seed)
    argv = flags(pair, tmp / "killed", resume="auto", **options)
    while len(left) < n:
        process = start(argv)
        process.join(rng.uniform(0.2, 1.2) * length)
        if process.exitcode == 0:  # it was done before: once more from the beginning
            assert outcome(tmp / "killed")[0] == outcome(tmp / "straight")[0]
            shutil.rmtree(tmp / "killed")
            continue
        process.kill()
        process.join()
        found = checkpoint.latest(tmp / "killed")
        left.append(found and found.name)
    assert finished(argv) == 0
    return outcome(tmp / "straight"), outcome(tmp / "killed"), left


def test_killed_runs_end_bit_for_bit_like_one_that_was_not(pair, tmp_path):
    (rows, weights), (again, resumed), _ = kills(pair, tmp_path, 3, 6)
    assert again == rows and all("rollout/checksum" in row for row in rows[1:])
    assert far(resumed, weights) == 0


if __name__ == "__main__":
    import tempfile

    import toy

    with tempfile.TemporaryDirectory() as tmp:
        (rows, weights), (again, resumed), left = kills(toy.models(), Path(tmp), int(sys.argv[1]), int(sys.argv[2]))
        print(f"killed with, as newest checkpoint: {left}")
        print(f"metrics equal: {again == rows}; largest difference of the final weights: {far(resumed, weights)}")
