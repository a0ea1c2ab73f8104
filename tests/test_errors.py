"""python -m pytest tests/test_errors.py      (a mistake of the user is one line; an error inside a library keeps its traceback)"""

import re
import sys

import pytest
import torch
from helpers import flags, join, parse_train, start_ranks, train_on

import evaluate
import rollout
import train
from configs import EvalConfig, parse


@pytest.fixture
def broken_library(tmp_path, monkeypatch):
    """A package "vllm" whose platforms need a module that is not installed, as on a machine that lacks one of its needs."""
    package = tmp_path / "site-packages" / "vllm"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "platforms.py").write_text("import vllm.deep.inner\n")
    (package / "deep" / "__init__.py").write_text("")
    (package / "deep" / "inner.py").write_text("\nimport no_such_module\n")
    monkeypatch.syspath_prepend(package.parent)
    before = {name for name in sys.modules if name.split(".")[0] == "vllm"}
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


LINE = r"No module named 'no_such_module' \(ModuleNotFoundError at vllm/deep/inner.py:2, called from rollout.py:\d+; "


def test_an_error_in_a_library_names_its_place_and_keeps_its_traceback(pair, tmp_path, capsys, broken_library):
    """Before the run has a folder, the traceback goes to stderr."""
    with pytest.raises(SystemExit, match=f"^train.py: {LINE}traceback above\\)$"):
        train.main(parse_train(flags(pair, tmp_path / "a", rollout="vllm")))
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback") and "deep/inner.py" in printed and not (tmp_path / "a").exists()


def test_once_there_is_a_folder_the_traceback_is_in_it(pair, tmp_path, monkeypatch, capsys, broken_library):
    choose = rollout.choose
    monkeypatch.setattr(rollout, "choose", lambda kind, device: choose("hf", device))
    monkeypatch.setattr(rollout, "make_sampler", lambda *_, **__: rollout.vllm_device())
    with pytest.raises(SystemExit, match=f"^train.py: {LINE}traceback in {tmp_path}/a/error-0.log\\)$"):
        train.main(parse_train(flags(pair, tmp_path / "a")))
    options = ["--model", pair[1], "--data", "toy", "--eval_problems", "2", "--k", "1", "--out", str(tmp_path / "b")]
    with pytest.raises(SystemExit, match=f"^evaluate.py: {LINE}traceback in {tmp_path}/b/error-0.log\\)$"):
        evaluate.main(parse(EvalConfig, options))
    for folder in "ab":
        text = (tmp_path / folder / "error-0.log").read_text()
        assert "Traceback (most recent call last)" in text and "deep/inner.py" in text
    assert "Traceback" not in capsys.readouterr().err


def test_the_rank_that_fails_keeps_its_traceback_and_all_ranks_end(pair, tmp_path):
    def one_rank(rank):
        def broken(*_, **__):
            if rank == 1:
                torch.zeros(2).view(3)  # a RuntimeError

        rollout.make_sampler = broken
        train_on(flags(pair, tmp_path / "a"))

    assert join(start_ranks(one_rank, 2, log=tmp_path / "log")) == 1
    lines = (tmp_path / "log").read_text().splitlines()
    assert re.fullmatch(r"train.py: rank 1: shape '\[3\]' is invalid .*; traceback in .*/error-1.log\)", lines[-1])
    assert "Traceback" not in "".join(lines) and "view(3)" in (tmp_path / "a" / "error-1.log").read_text()
    assert not (tmp_path / "a" / "error-0.log").exists()


@pytest.mark.parametrize(
    "options",
    [dict(student="nowhere"), dict(data="nowhere/at_all"), dict(data="nowhere.jsonl"), dict(topk=999, loss="lsm")],
)
def test_a_mistake_of_the_user_is_one_line(pair, tmp_path, capsys, options):
    with pytest.raises(SystemExit, match="^train.py: .*(nowhere|999)") as end:
        train.main(parse_train(flags(pair, tmp_path / "a", **options)))
    assert "\n" not in end.value.code and "traceback" not in end.value.code
    assert capsys.readouterr().err == ""
