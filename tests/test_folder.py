"""python -m pytest tests/test_folder.py      (a run's folder: who may write to it, and what is deleted)"""

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from helpers import (
    ROOT,
    SMALL,
    flags,
    join,
    metrics,
    questions,
    refused,
    run,
    slow_sampling,
    start,
    start_ranks,
    steps_of,
)

import evaluate
import train
from configs import TrainConfig, parse
from support import files


@pytest.mark.parametrize("again", ["overwrite", pytest.param("resume", marks=pytest.mark.slow)])
def test_a_second_run_with_the_same_out_is_refused_and_the_first_goes_on(pair, tmp_path, again):
    out = tmp_path / "run"
    first = start(flags(pair, out, **SMALL | dict(steps=3)), slow_sampling)
    while not (out / "metrics.jsonl").exists() or not metrics(out):
        time.sleep(0.01)
    options = {"overwrite": dict(overwrite="true", lr=1.0), "resume": dict(resume="auto", steps=3)}[again]
    os.kill(first.pid, signal.SIGSTOP)  # so that it cannot finish first on a busy machine
    refused(
        flags(pair, out, **SMALL | options), f"is in use by process {first.pid} on .*: stop it, or choose another --out"
    )
    os.kill(first.pid, signal.SIGCONT)
    assert join([first]) == 0
    assert len(metrics(out)) == 3 and json.loads((out / "config.json").read_text())["lr"] == 3e-3


def test_two_evaluations_with_the_same_out_exclude_each_other(tmp_path):
    lock = evaluate.claim(tmp_path, {"a": 1}, overwrite=False)
    with pytest.raises(ValueError, match="is in use by process"):
        evaluate.claim(tmp_path, {"a": 1}, overwrite=True)
    lock.release()
    evaluate.claim(tmp_path, {"a": 1}, overwrite=False).release()


def test_rotation_deletes_only_what_the_run_has_made(pair, tmp_path):
    out = tmp_path / "run"
    run(pair, out, **SMALL | dict(steps=2))
    for name in ("step-1-best", "step-best", "step-0002"):
        shutil.copytree(out / "step-1", out / name)
    shutil.rmtree(out / "step-0002")
    run(pair, out, **SMALL | dict(steps=4, keep=1, resume="true"))
    assert {path.name for path in out.glob("step-*")} == {"step-4", "step-1-best", "step-best"}


def test_overwrite_does_not_delete_what_the_run_is_about_to_read(pair, tmp_path):
    run(pair, tmp_path / "a")
    second = (pair[0], str(tmp_path / "a/final"))
    for out, name in ((tmp_path / "a", "student"), (tmp_path / "a/final", "student")):
        with pytest.raises(SystemExit, match=f"--overwrite would delete --{name} .*/a/final: choose another --out"):
            train.main(parse(TrainConfig, flags(second, out, overwrite="true")))
    assert (tmp_path / "a/final/model.safetensors").exists() and steps_of(tmp_path / "a")
    folder = tmp_path / "a/data"  # of a dataset, with the name of a split after it
    folder.mkdir()
    questions(folder / "test.jsonl", 3)
    with pytest.raises(SystemExit, match="--overwrite would delete --eval_data .*/a/data:test: choose another --out"):
        train.main(parse(TrainConfig, flags(pair, tmp_path / "a", overwrite="true", eval_data=f"{folder}:test")))
    assert (folder / "test.jsonl").exists()
    train.main(parse(TrainConfig, flags(second, tmp_path / "b", overwrite="true")))


def test_an_overwrite_that_is_interrupted_leaves_no_checkpoint_to_a_new_run(pair, tmp_path, monkeypatch):
    run(pair, tmp_path, save_every=1)
    delete, done = files.delete, []

    def interrupted(path):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path.name)
        delete(path)

    monkeypatch.setattr(files, "delete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.claim_folder(tmp_path, "config.json", overwrite=True)
    assert (tmp_path / "config.json").exists() and len(done) == 2
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="already holds a run"):
        train.main(parse(TrainConfig, flags(pair, tmp_path, steps=1)))


def test_an_overwrite_clears_what_a_kill_has_left_under_a_temporary_name(pair, tmp_path):
    """Whichever the file system lists first, final or final.tmp."""
    run(pair, tmp_path, steps=1)
    for name in ("final.tmp", "step-1.tmp", "model.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "torn").touch()
    files.claim_folder(tmp_path, "config.json", overwrite=True).release()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".holder"}


def test_links_in_the_folder_are_never_followed_and_never_the_end_of_a_run(pair, tmp_path):
    """A user moves a checkpoint to another disk and leaves a link, or links a name that the run is about to write."""
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run(pair, out, steps=1, save_every=1)
    kept = []
    for name in ("step-1", "step-2.tmp", "final", "final.tmp", "config.json.tmp", "nothing"):
        kept.append(elsewhere / name / "mine")
        kept[-1].parent.mkdir(parents=True)
        kept[-1].write_text("my only copy")
    shutil.rmtree(elsewhere / "step-1")
    kept.pop(0)
    (out / "step-1").rename(elsewhere / "step-1")
    shutil.rmtree(out / "final")
    (out / "step-2").symlink_to(elsewhere / "missing")
    for name in ("step-1", "step-2.tmp", "final", "final.tmp", "nothing"):
        (out / name).symlink_to(elsewhere / name)
    (out / "config.json.tmp").symlink_to(elsewhere / "config.json.tmp/mine")
    run(pair, out, steps=2, save_every=1, keep=1, resume="true")
    assert steps_of(out) == ["step-2"] and not (out / "step-2").is_symlink() and not (out / "final").is_symlink()
    assert not (out / "config.json").is_symlink() and (elsewhere / "step-1/state.json").exists()
    (out / "step-9").symlink_to(elsewhere / "step-1")
    run(pair, out, steps=1, overwrite="true")
    assert not (out / "step-9").is_symlink() and (elsewhere / "step-1/state.json").exists()
    assert all(path.read_text() == "my only copy" for path in kept)


def test_nodes_with_a_folder_each_are_told_that_it_must_be_shared(pair, tmp_path):
    """Rank 1 found no checkpoint, or rank 0's was all that there was."""

    def one_rank(rank):
        os.makedirs(tmp_path / f"node{rank}")
        os.chdir(tmp_path / f"node{rank}")
        files.TOKEN_SECONDS = 1
        train.main(parse(TrainConfig, flags(pair, "out")))

    assert join(start_ranks(one_rank, 2, log=tmp_path / "log")) == 1
    assert "train.py: rank 1: --out out is not on a disk that all nodes share" in (tmp_path / "log").read_text()


def test_files_of_others_stay_where_they_are(tmp_path):
    (tmp_path / "thesis.tmp").write_text("my only copy")
    files.claim_folder(tmp_path, "config.json", overwrite=True).release()
    assert (tmp_path / "thesis.tmp").exists()


def test_a_run_without_a_checkpoint_is_told_what_works(pair, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="with --resume auto the run starts from the beginning"):
        train.main(parse(TrainConfig, flags(pair, tmp_path, resume="true")))
    train.main(parse(TrainConfig, flags(pair, tmp_path, resume="auto", steps=1)))


@pytest.mark.slow
def test_the_command_that_resumes_works_from_another_folder(pair, tmp_path, monkeypatch):
    from configs import command_line

    monkeypatch.chdir(ROOT)
    out, file = (os.path.relpath(tmp_path / name) for name in ("run", "q.jsonl"))
    questions(tmp_path / "q.jsonl", 3)
    cfg = parse(TrainConfig, flags(pair, out, data=file, template="raw", **SMALL | dict(steps=1)))
    train.main(cfg)
    cfg.steps, cfg.resume = 2, "true"
    command = command_line(cfg).replace("&& python", f"&& {sys.executable}")
    subprocess.run(command, shell=True, cwd="/", check=True, capture_output=True)
    assert len(metrics(tmp_path / "run")) == 2


def test_file_systems_without_locks_and_without_flushing_of_folders(pair, tmp_path, monkeypatch, capsys):
    """tox-dev/filelock#67 (Lustre), rfjakob/gocryptfs#587."""
    fsync = os.fsync

    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def no_folder(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr(fcntl, "flock", no_lock)
    monkeypatch.setattr(os, "fsync", no_folder)
    run(pair, tmp_path / "run", **SMALL)
    assert "run cannot be locked ([Errno 37] No locks available): do not start two runs" in capsys.readouterr().out


def test_a_disk_that_fails_is_still_an_error(tmp_path, monkeypatch):
    def broken(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        files.fsync(tmp_path)
