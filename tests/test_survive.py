"""python -m pytest tests/test_survive.py             (a run is a forked child: no imports to wait for)

PYTHONPATH=. python tests/test_survive.py 10 20 2     # 20 steps straight, and 20 with 10 kills at random moments, on 2 ranks
"""

import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import (
    ENV,
    ROOT,
    SMALL,
    evaluations,
    far,
    finished,
    flags,
    join,
    launch,
    metrics,
    outcome,
    questions,
    refused,
    run,
    same,
    start,
    start_child,
    start_ranks,
    steps_of,
    train_on,
)
from safetensors.torch import load_file, save_file

import data
import evaluate
import policy
import rollout
import train
from configs import TOPK_LOSSES, EvalConfig, TrainConfig, parse
from rollout import Rollout
from support import checkpoint, common, errors, ranks, toy
from support.common import StopSignal
from support.files import append_jsonl, read_jsonl

checkpoint.FILE_BYTES = 50_000  # several files a checkpoint
OPTIONS = dict(steps=5, save_every=1, keep=9, eval_every=3, eval_problems=2, k=1, schedule="constant")


@pytest.fixture(scope="module")
def straight(pair, tmp_path_factory):
    """A finished run of OPTIONS, not stopped once."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert finished(flags(pair, out, **OPTIONS)) == 0
    assert [row["step"] for row in evaluations(out)] == [0, 3, 5] and "rollout/checksum" in metrics(out)[4]
    return out


def test_checkpoint_holds_nothing_that_runs_code(straight):
    """Tensors in safetensors, numbers in JSON."""
    names = [path.name for path in (straight / "step-5").rglob("*") if path.is_file()]
    assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".jinja"}
    assert (
        len([name for name in names if name.endswith(".safetensors")]) > 4
    )  # several files of weights, and of the optimizer's


def cut_back(straight, out, step):
    """A copy of the run as a kill right after a step leaves it."""
    shutil.copytree(straight, out)
    for path in [p for p in out.glob("step-*") if checkpoint.number(p) > step] + [out / "final"]:
        shutil.rmtree(path)
    return out


# -----------------------------------------------------------------------------
# kills and signals


def killed(argv, out, n, longest, ranks=1, seed=0):
    """Runs argv (--resume auto) with n SIGKILLs, each up to `longest` seconds after a start; the newest steps then."""
    rng, left = random.Random(seed), []
    for _ in range(n):
        processes = launch(argv, ranks)
        processes[0].join(rng.uniform(0, longest))
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        left.append(checkpoint.latest(out) and checkpoint.number(checkpoint.latest(out)))
    assert finished(argv, ranks=ranks) == 0
    return left


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_run_ends_bit_for_bit_like_one_that_was_not(pair, straight, tmp_path, ranks):
    argv = flags(pair, tmp_path / "a", resume="auto", **OPTIONS)
    if ranks > 1:
        straight = tmp_path / "straight"
        assert finished(flags(pair, straight, **OPTIONS), ranks=ranks) == 0
    seconds = sum(x for row in metrics(straight) for name, x in row.items() if name.startswith("time"))
    left = killed(argv, tmp_path / "a", 3, 0.5 * ranks + seconds, ranks)
    print("newest checkpoint at each kill:", left)
    assert same(tmp_path / "a", straight)


def slow_sampling():
    draw = rollout.Draw.__call__
    rollout.Draw.__call__ = lambda *args: time.sleep(0.1) or draw(*args)


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "when",
    [
        pytest.param("first step", marks=pytest.mark.slow),
        "sampling",
        pytest.param("evaluating", marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_prints_the_command_that_goes_on(pair, straight, tmp_path, signum, when):
    """A step that samples is given up at once, and so is an evaluation; both come again, the same."""
    out, log = tmp_path / "a", tmp_path / "log"
    step = {"first step": 0, "sampling": 1, "evaluating": 3}[when]
    if when != "first step":
        cut_back(straight, out, 1)
    process = start(flags(pair, out, resume="auto", **OPTIONS | dict(save_every=0)), slow_sampling, log)
    # A resumed run has cut its metrics back. In the first step, wait until the evaluation before it is over.
    while (
        not log.exists()
        or not (out / "evaluations.jsonl").exists()
        or len(metrics(out)) != step
        or not evaluations(out)
    ):
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(process.pid, signum)
    clock = time.time()
    process.join()
    again = log.read_text().splitlines()[-1]
    command, argv = again.split("train.py ")
    assert process.exitcode == 0 and " && python " in command and len(metrics(out)) == step
    assert time.time() - clock < 2.4  # one response takes that long
    assert finished(shlex.split(argv) + ["--save_every", "1"]) == 0 and same(out, straight)


def test_an_error_saves_the_steps_before_it(pair, tmp_path, monkeypatch):
    """Of a single process; of several ranks, one alone may have failed, and saving needs all."""
    sample, calls = rollout.sample_on_all_ranks, []

    def fail_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("the sampler has failed")
        return sample(*args)

    monkeypatch.setattr(rollout, "sample_on_all_ranks", fail_at_the_third)
    with pytest.raises(SystemExit, match="the sampler has failed"):
        train.main(parse(TrainConfig, flags(pair, tmp_path, steps=4, save_every=0)))
    assert steps_of(tmp_path) == ["step-2"] and len(metrics(tmp_path)) == 2


def test_signal_during_the_collective_that_asks_for_it_is_kept(monkeypatch):
    """This rank had nothing to say when the others heard it; it says so the next time."""
    stop = StopSignal()
    monkeypatch.setattr(common, "gather", lambda reason: stop.handle(signal.SIGTERM, None) or [reason, ""])
    assert not stop.requested() and stop.requested_here()
    assert stop.requested()


def test_signal_at_one_rank_stops_all(pair, straight, tmp_path):
    out, log = cut_back(straight, tmp_path / "a", 1), tmp_path / "log"
    first, second = launch(flags(pair, out, resume="true", **OPTIONS | dict(steps=99)), 2, log=log)
    while not log.exists() or len(metrics(out)) != 2:
        time.sleep(0.01)
    os.kill(second.pid, signal.SIGTERM)
    assert (first.join() or first.exitcode, second.join() or second.exitcode) == (0, 0)
    assert " && torchrun --nproc_per_node 2 " in log.read_text().splitlines()[-1]


@pytest.mark.parametrize("before, after", [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on_with_the_same_data_and_seeds(pair, straight, tmp_path, before, after):
    out = tmp_path / "a"
    if before == 1:
        cut_back(straight, out, 2)
    else:
        assert finished(flags(pair, out, **OPTIONS | dict(steps=2, schedule="constant")), ranks=2) == 0
        shutil.rmtree(out / "final")
    assert finished(flags(pair, out, resume="auto", **OPTIONS), ranks=after) == 0
    (rows, _, weights), (expected, _, one) = outcome(out), outcome(straight)
    assert rows[2]["rollout/checksum"] == expected[2]["rollout/checksum"]  # the step after the checkpoint
    assert far(weights, one) < 1e-4


@pytest.mark.slow
def test_killed_rank_ends_the_run_with_a_message(pair, tmp_path):
    """torchrun stops the others, and names the rank and the signal."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command += flags(pair, tmp_path / "a", **OPTIONS | dict(steps=999, eval_every=0))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=log, stderr=log)
    while not (tmp_path / "a" / "metrics.jsonl").exists() or len(metrics(tmp_path / "a")) < 2:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert re.search(r"rank\s*: 1.*exitcode\s*: -9", (tmp_path / "log").read_text(), re.DOTALL)
    assert checkpoint.latest(tmp_path / "a")


# -----------------------------------------------------------------------------
# resuming with other flags; faults of the disk


@pytest.mark.parametrize("options, message", [(dict(lr=0.5), "--lr 0.003, not 0.5"), (dict(seed=3), "--seed 0, not 3")])
def test_changed_flags_are_refused_with_both_values(pair, straight, options, message):
    with pytest.raises(SystemExit, match=message):
        train.main(parse(TrainConfig, flags(pair, straight, resume="auto", **OPTIONS | options)))


def test_more_steps_and_a_torn_metrics_line_are_no_other_run(pair, straight, tmp_path):
    out = tmp_path / "a"
    argv = flags(pair, out, resume="auto", **OPTIONS)
    assert finished([*argv, "--steps", "3"]) == 0
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert finished([*argv, "--sample_every", "1"]) == 0 and same(out, straight)


def test_full_disk_is_one_line_and_the_last_checkpoint_goes_on(pair, straight, tmp_path):
    out, log = cut_back(straight, tmp_path / "a", 2), tmp_path / "log"
    argv = flags(pair, out, resume="true", **OPTIONS)
    assert finished(argv, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)), log) == 1  # bytes a file
    assert (
        log.read_text().splitlines()[-1].startswith("train.py: could not save") and "Traceback" not in log.read_text()
    )
    assert checkpoint.latest(out).name == "step-2" and not list(out.glob("*.tmp"))
    assert finished(argv) == 0 and same(out, straight)


def test_a_row_that_the_disk_takes_a_part_of_is_an_error(tmp_path):
    """can1357/oh-my-pi#8596: the write returns a smaller number, and the next row is joined to the torn one."""

    def child():
        append_jsonl(tmp_path / "rows", [{"step": 1}])
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
        with pytest.raises(OSError):
            append_jsonl(tmp_path / "rows", [{"step": 2}])

    assert join([start_child(child)]) == 0
    assert read_jsonl(tmp_path / "rows") == [{"step": 1}]


WRITE = r"import sys, pathlib; from support.files import write_file; write_file(pathlib.Path(sys.argv[1]), '\u2264')"


@pytest.mark.slow
def test_files_do_not_depend_on_the_locale(tmp_path):
    """huggingface/huggingface_hub#4810: the model card quotes a prompt; the locale of a job may be ASCII or Latin-1."""
    env = ENV | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", WRITE, tmp_path / "card"], cwd=ROOT, env=env, check=True)
    assert (tmp_path / "card").read_text(encoding="utf-8") == "\u2264"


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_that_no_gradient_reaches_do_not_stop_a_resume(tmp_path, fused):
    """PrimeIntellect-ai/prime-rl#2800: torch leaves them out of a checkpoint, and insists on them when it loads one."""

    def make():
        model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 3), "unused": torch.nn.Linear(3, 3)})
        return model, torch.optim.AdamW(model.parameters(), fused=fused)

    model, optimizer = make()
    model["used"](torch.ones(3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert checkpoint.save_optimizer(tmp_path / "optimizer", model, optimizer) is None
    again, fresh = make()
    checkpoint.restore_optimizer(tmp_path, again, fresh)
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert fresh.state[ours]["step"] == name.startswith("used")
        for key, x in optimizer.state[theirs].items():
            assert torch.equal(fresh.state[ours][key], x)


def test_every_file_of_a_checkpoint_is_on_the_disk_before_it_gets_its_name(pair, tmp_path, monkeypatch):
    """ClickHouse/ClickHouse#111373: after a power cut, a file that was not flushed is there, and empty."""
    flushed, fsync = set(), os.fsync

    def watched(fd):
        flushed.add(os.path.realpath(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    run(pair, tmp_path, **SMALL | dict(steps=1))
    files = [f"step-1.tmp/{name}" for name in checkpoint.files_of(tmp_path / "step-1")]
    assert len(files) > 6 and {str(tmp_path / name) for name in files} <= flushed


def test_an_old_checkpoint_that_cannot_be_deleted_ends_nothing(pair, tmp_path, monkeypatch, capsys):
    """huggingface/transformers#13035, #17265: a file that another process has open, as .nfs000123, keeps the folder on NFS."""

    def fail(path):
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(checkpoint, "delete", fail)
    run(pair, tmp_path, **SMALL | dict(steps=3, keep=1))
    assert steps_of(tmp_path) == ["step-1", "step-2", "step-3"] and (tmp_path / "final").exists()
    assert "warning: could not delete" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_never_has_more_checkpoints_on_the_disk_than_it_must(pair, tmp_path, monkeypatch, keep):
    """The newest complete one stays until the new one is complete, so --keep 1 needs room for two, and so does --keep 2."""
    before_save, save = [], checkpoint.dcp.save

    def watched(*args, **options):
        before_save.append(sorted(path.name for path in tmp_path.glob("step-*")))
        save(*args, **options)

    monkeypatch.setattr(checkpoint.dcp, "save", watched)
    train.main(parse(TrainConfig, flags(pair, tmp_path, **OPTIONS | dict(steps=4, keep=keep, eval_every=0))))
    assert before_save == [["step-1.tmp"], ["step-1", "step-2.tmp"], ["step-2", "step-3.tmp"], ["step-3", "step-4.tmp"]]
    assert len(list(tmp_path.glob("step-*"))) == keep


def test_ranks_take_turns_even_if_one_fails(tmp_path):
    def take_a_turn(rank):
        dist.init_process_group("gloo")
        with suppress(ValueError), common.one_rank_at_a_time(), (tmp_path / "log").open("a") as file:
            for word in ("in", "out"):
                file.write(f"{rank} {word} ")
                file.flush()
                time.sleep(0.2)
            if rank == 0:
                raise ValueError

    assert join(start_ranks(take_a_turn, 2)) == 0
    assert (tmp_path / "log").read_text() == "0 in 0 out 1 in 1 out "


def test_folders_that_cannot_be_written_are_one_line(pair, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "b" / "metrics.jsonl").mkdir(parents=True)
    for out, message in (("file/a", "Not a directory"), ("b", "Is a directory")):
        with pytest.raises(SystemExit, match=f"train.py: .*{message}"):
            train.main(parse(TrainConfig, flags(pair, tmp_path / out)))


# -----------------------------------------------------------------------------
# checkpoints that are not whole, other inputs than before


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "model-00002.safetensors": (Path.unlink, "is missing"),
    "model-00001.safetensors": (cut, "is damaged: its size or digest is not that of state.json"),
    "optimizer/*.safetensors": (flip, "is damaged: its size or digest is not that of state.json"),
    "tokenizer.json": (flip, "is damaged"),
    "state.json": (lambda path: path.write_text(""), "is damaged"),
}


@pytest.mark.parametrize("pattern", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_older_one_that_is_whole(straight, tmp_path, pattern):
    """Half of the weights were made up, or there was a traceback."""
    out = cut_back(straight, tmp_path / "a", 4)
    damage, message = DAMAGES[pattern]
    file = min((out / "step-4").glob(pattern))
    damage(file)
    (out / "step-3/tokenizer.json").unlink()  # also damaged: what is proposed has been looked at
    message = f"{file} {message}.*; to go on with --resume from {out}/step-2, which is whole, delete {out}/step-4"
    with pytest.raises(ValueError, match=message):
        checkpoint.check(out / "step-4")


def test_a_damaged_checkpoint_is_not_resumed_from(pair, straight, tmp_path):
    out = cut_back(straight, tmp_path / "a", 4)
    cut(out / "step-4/model-00002.safetensors")
    refused(
        flags(pair, out, resume="true", **OPTIONS), "step-4/model-00002.safetensors is damaged.*step-3, which is whole"
    )
    shutil.rmtree(out / "step-4")
    assert finished(flags(pair, out, resume="true", **OPTIONS)) == 0 and same(out, straight)


def test_a_damaged_checkpoint_is_no_student_and_is_not_evaluated(pair, straight, tmp_path):
    folder = shutil.copytree(straight / "step-5", tmp_path / "copy")
    checkpoint.check(folder)
    shutil.copy(
        Path(pair[1]) / "model.safetensors", folder
    )  # transformers would read it instead of the checkpoint's files
    message = "copy/model.safetensors is not a file of this checkpoint; there is no older one that is whole"
    refused(flags((pair[0], folder), tmp_path / "run"), message)
    with pytest.raises(SystemExit, match=message):
        evaluate.main(parse(EvalConfig, ["--model", str(folder), "--data", "toy", "--out", str(tmp_path / "ev")]))


def test_two_ranks_share_the_look_at_a_checkpoint(straight, tmp_path, monkeypatch):
    out = cut_back(straight, tmp_path / "a", 5)
    (out / "step-5/tokenizer.json").unlink()
    faults = [checkpoint.fault_of(out / "step-5", part, 2) for part in range(2)]
    assert sorted(map(bool, faults)) == [False, True]
    monkeypatch.setattr(checkpoint, "gather", lambda mine: faults)
    with pytest.raises(ValueError, match="tokenizer.json is missing; .*step-4, which is whole"):  # on both ranks
        checkpoint.check(out / "step-5")


def test_a_teacher_and_data_that_moved_are_known_by_their_content(pair, straight, tmp_path):
    out = cut_back(straight, tmp_path / "a", 4)
    teacher = shutil.copytree(pair[0], tmp_path / "moved")
    assert finished(flags((teacher, pair[1]), out, resume="true", **OPTIONS)) == 0 and same(out, straight)


def test_another_teacher_under_the_same_name_is_refused_on_resume(pair, straight, tmp_path):
    """It went on with the new teacher without a word."""
    mine = shutil.copytree(pair[0], tmp_path / "teacher")
    out = tmp_path / "run"
    train.main(parse(TrainConfig, flags((mine, pair[1]), out, steps=1)))
    weights = load_file(mine / "model.safetensors")
    weights["model.norm.weight"] += 0.1
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    refused(
        flags((mine, pair[1]), out, steps=2, resume="true"), "the weights of --teacher .* are not those that the run"
    )


def test_a_student_folder_that_moved_is_not_needed_on_resume(pair, tmp_path):
    student, out = shutil.copytree(pair[1], tmp_path / "student"), tmp_path / "run"
    train.main(parse(TrainConfig, flags((pair[0], student), out, steps=1)))
    student.rename(tmp_path / "moved")
    moved = flags((pair[0], tmp_path / "moved"), out, steps=2, resume="true")
    refused(moved, "was run with --student '.*/student', not .*moved'. It goes on from its checkpoint, even if")
    train.main(parse(TrainConfig, flags((pair[0], student), out, steps=2, resume="true")))


# -----------------------------------------------------------------------------
# ranks


def other_weights(folder):
    weights = load_file(folder / "student/model.safetensors")
    weights["model.embed_tokens.weight"][5, 7] += 0.01
    save_file(weights, folder / "student/model.safetensors", {"format": "pt"})


def other_data(folder):
    questions(folder / "q.jsonl", 5)


UNEQUAL = {"the weights of --student": other_weights, "--data's prompts": other_data, "--lr": lambda folder: None}


@pytest.mark.parametrize("what", UNEQUAL)
def test_nodes_with_other_files_or_flags_end_in_one_line_that_says_which(pair, tmp_path, what):
    """Each rank gave its shards of its own model: half of one revision, and half of another."""
    for node in ("node0", "node1"):
        shutil.copytree(pair[1], tmp_path / node / "student")
        questions(tmp_path / node / "q.jsonl", 4)
    UNEQUAL[what](tmp_path / "node1")
    argv = flags((pair[0], "student"), tmp_path / "out", data="q.jsonl", max_prompt=200, steps=1)

    def one_rank(rank):
        os.chdir(tmp_path / f"node{rank}")
        train_on(argv + ["--lr", str(0.1 + rank)] if what == "--lr" else argv)

    assert join(start_ranks(one_rank, 2, log=tmp_path / "log")) == 1
    host = re.escape(socket.gethostname())
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("train.py:")]
    assert len(lines) == 1 and re.search(
        rf"not the same as on rank 0 \({host}\): {what} on rank 1 \({host}\)$", lines[0]
    )
    assert not steps_of(tmp_path / "out")


def test_what_differs_is_said_for_every_rank(monkeypatch):
    everyones = [("a", {"x": 1, "y": 1}), ("b", {"x": 2, "y": 1}), ("b", {"x": 2})]
    monkeypatch.setattr(ranks, "gather", lambda mine: everyones)
    with pytest.raises(SystemExit, match=r"rank 0 \(a\): x on rank 1 \(b\), 2 \(b\); y on rank 2 \(b\)$"):
        ranks.same_on_all_ranks({})
    everyones[1:] = everyones[:1]
    ranks.same_on_all_ranks({})


def test_settings_that_suit_a_node_may_differ():
    first, second = (parse(TrainConfig, ["--preset", "tiny", "--threads", str(n)]) for n in (1, 2))
    assert ranks.settings_and_code(first) == ranks.settings_and_code(second)


def test_an_error_on_another_rank_says_on_which(monkeypatch):
    monkeypatch.setattr(errors, "gather", lambda mine: [None, "no such file: d.jsonl"])
    with pytest.raises(SystemExit, match="^rank 1: no such file: d.jsonl$"):
        errors.on_all_ranks(lambda: None)


def test_a_rank_that_waits_for_others_in_vain_says_so(monkeypatch):
    """Left by a container or a notebook: WORLD_SIZE without the other ranks. It waited for a day."""
    monkeypatch.setattr(common, "PATIENCE", common.timedelta(seconds=1))
    address = dict(RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(random.randint(20000, 60000)))
    for name, value in ({"WORLD_SIZE": "2"} | address).items():
        monkeypatch.setenv(name, value)
    argv = ["--preset", "tiny", "--device", "cpu"]
    refused(argv, "WORLD_SIZE is 2, but not all of the ranks came within 1 s: start them all with torchrun, or unset")
    monkeypatch.delenv("MASTER_ADDR")
    refused(argv, "WORLD_SIZE is 2, .* MASTER_ADDR expected, but not set")


@pytest.mark.parametrize("program, cls", [("train.py", TrainConfig), ("evaluate.py", EvalConfig)])
def test_windows_is_one_line(monkeypatch, program, cls):
    """It has neither SIGHUP nor a flush of folders."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match=f"^{program}: Linux and macOS only"):
        parse(cls, [])


# -----------------------------------------------------------------------------
# bad numbers, degenerate rollouts


def broken_from(monkeypatch, first, last):
    """Losses of these calls are NaN."""
    calls, base_loss = [], train.base_loss

    def broken(*args):
        loss, info = base_loss(*args)
        calls.append(1)
        return loss * math.nan if first <= len(calls) <= last else loss, info

    monkeypatch.setattr(train, "base_loss", broken)


def test_update_that_is_not_finite_is_skipped_counted_and_named(pair, tmp_path, monkeypatch, capsys):
    broken_from(monkeypatch, 2, 2)
    rows, weights = run(pair, tmp_path / "a", minibatches=1, micro_tokens=10**6)
    assert [row["skipped"] for row in rows] == [1, 0] and all(x.isfinite().all() for x in weights.values())
    assert "update skipped, 1 in a row" in (text := capsys.readouterr().out) and "Problems: toy-" in text


def test_a_log_prob_of_nan_is_noticed_by_a_loss_that_does_not_depend_on_it(pair, tmp_path, monkeypatch):
    outputs_of, calls = train.student_outputs, []

    def with_nan(*args):
        outputs = outputs_of(*args)
        calls.append(1)
        if len(calls) == 2:
            outputs["logp"][0] = math.nan
        return outputs

    monkeypatch.setattr(train, "student_outputs", with_nan)
    rows, weights = run(pair, tmp_path / "a", loss="lsm", minibatches=1, micro_tokens=10**6)
    assert [row["skipped"] for row in rows] == [1, 0] and all(x.isfinite().all() for x in weights.values())


def test_run_of_bad_updates_stops_before_it_saves(pair, straight, tmp_path, monkeypatch):
    out = cut_back(straight, tmp_path / "a", 2)
    broken_from(monkeypatch, 1, 99)
    with pytest.raises(SystemExit, match="4 updates in a row were not finite"):
        train.main(parse(TrainConfig, flags(pair, out, resume="true", max_bad_updates=4, **OPTIONS)))
    assert checkpoint.latest(out).name == "step-2"
    monkeypatch.undo()
    assert finished(flags(pair, out, resume="true", **OPTIONS)) == 0 and same(out, straight)


def test_degenerate_rollouts_are_counted_and_train_by_the_rule(pair, tmp_path, monkeypatch):
    """Truncated and equal ones train; empty ones do not: alone, they update nothing."""
    before = load_file(Path(pair[1]) / "model.safetensors")
    rows, weights = run(pair, tmp_path / "b", max_response=1)
    assert far(weights, before) > 0 and all(row["rollout/truncated"] == 1 for row in rows)
    monkeypatch.setattr(data, "seed_for", lambda *_: 1)
    rows, weights = run(pair, tmp_path / "c")
    assert rows[0]["rollout/distinct"] == 0.5 and far(weights, before) > 0
    empty = [rollout.Rollout([1, 5], [], [], "stop")] * 6
    monkeypatch.setattr(rollout.HFSampler, "sample", lambda *_, **__: empty)
    rows, weights = run(pair, tmp_path / "d")
    assert rows[0]["rollout/empty"] == 1 and far(weights, before) == 0 and "loss" not in rows[0]


@pytest.mark.parametrize("signum", [signal.SIGHUP, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_closed_terminal_and_slurms_warning_stop_a_run_as_a_sigterm_does(pair, tmp_path, signum):
    """modelscope/ms-swift#5884, hiyouga/LlamaFactory#3036: torchrun sends its ranks SIGHUP, even under nohup."""
    out, log = tmp_path / "run", tmp_path / "log"
    child = start(flags(pair, out, **SMALL | dict(steps=99, save_every=0)), slow_sampling, log)
    while not (out / "metrics.jsonl").exists() or not metrics(out):
        time.sleep(0.01)
    os.kill(child.pid, signum)
    assert join([child]) == 0 and f"stopped by {signum.name} after step" in log.read_text()
    assert checkpoint.latest(out).name == f"step-{len(metrics(out))}"


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    stop.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    stop.release()
    assert not stop.requested() and signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_a_stop_during_an_evaluation_saves_the_finished_steps(pair, tmp_path, monkeypatch, capsys):
    """vLLM gives back empty responses then."""
    make = rollout.make_sampler

    def make_sampler(*args, **options):
        sampler = make(*args, **options)
        sample = sampler.sample

        def stopped(prompts, seeds, **sampling):
            if sampling["top_p"] == 1 and len(prompts) == 2:  # of the evaluation's second part
                os.kill(os.getpid(), 15)
                return [Rollout(prompt, [], [], "stopped") for prompt in prompts]
            return sample(prompts, seeds, **sampling)

        sampler.sample = stopped
        return sampler

    monkeypatch.setattr(rollout, "make_sampler", make_sampler)
    options = dict(steps=2, eval_every=1, eval_problems=2, k=2, top_p=0.9)
    cfg = parse(TrainConfig, flags(pair, tmp_path, **options))
    train.main(cfg)
    assert steps_of(tmp_path) == ["step-0"] and "stopped by SIGTERM after step 0" in capsys.readouterr().out


def test_a_teacher_that_goes_during_an_evaluation_costs_no_finished_step(pair, tmp_path, monkeypatch):
    calls = []
    targets = policy.LocalTeacher.targets

    def broken(self, batches):
        calls.append(1)
        if len(calls) == 3:  # evaluation, step 1, evaluation
            raise OSError("the server is gone")
        return targets(self, batches)

    monkeypatch.setattr(policy.LocalTeacher, "targets", broken)
    with pytest.raises(SystemExit, match="the server is gone"):
        train.main(parse(TrainConfig, flags(pair, tmp_path, steps=2, eval_every=1, eval_problems=2, k=1)))
    assert steps_of(tmp_path) == ["step-1"]


def test_a_student_of_nan_is_a_bad_update_and_not_a_sampler_out_of_step(pair, tmp_path, monkeypatch):
    student_outputs = train.student_outputs

    def broken(*args):
        return {name: x * math.nan for name, x in student_outputs(*args).items()}

    monkeypatch.setattr(train, "student_outputs", broken)
    with pytest.raises(SystemExit, match="2 updates in a row were not finite"):
        train.main(parse(TrainConfig, flags(pair, tmp_path, steps=9, minibatches=1, epochs=1, max_bad_updates=2)))


def test_a_sampler_of_nan_is_out_of_step(pair, tmp_path, monkeypatch):
    sample = rollout.HFSampler.sample

    def broken(self, *args, **options):
        rollouts = sample(self, *args, **options)
        rollouts[0].logprobs[0] = math.nan
        return rollouts

    monkeypatch.setattr(rollout.HFSampler, "sample", broken)
    with pytest.raises(SystemExit, match="the sampler is out of step"):
        train.main(parse(TrainConfig, flags(pair, tmp_path, steps=1)))


@pytest.mark.parametrize("loss", TOPK_LOSSES)
def test_a_teacher_that_gives_nan_is_seen_by_every_loss(scene, loss):
    """huggingface/trl#5594, microsoft/LMOps#38. The top-K losses left such tokens out, and trained on the others."""
    student, _, minibatches, cfg, _ = scene(loss=loss)
    batch = minibatches[0][0]
    batch.teacher["topk_logq"][1] = torch.nan
    loss, _ = train.base_loss(train.student_outputs(student, batch, cfg), batch, cfg)
    assert loss.isnan().tolist() == [i == 1 for i in range(len(batch.rows))]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as tmp:
        kills, steps, ranks = map(int, sys.argv[1:])
        options = OPTIONS | dict(steps=steps)
        argv = [
            flags((toy.TEACHER, toy.STUDENT), Path(tmp, name), resume="auto", **options)
            for name in ("straight", "killed")
        ]
        clock = time.time()
        assert finished(argv[0], ranks=ranks) == 0
        left = killed(argv[1], Path(tmp, "killed"), kills, 0.4 * (time.time() - clock), ranks)
        print(f"newest checkpoint at each kill: {left}; the same: {same(Path(tmp, 'killed'), Path(tmp, 'straight'))}")
