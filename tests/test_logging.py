"""python -m pytest tests/test_logging.py      (metrics, pictures, output)"""

import ast
import importlib.machinery
import io
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from helpers import ENV, ROOT, SMALL, evaluate_on_toy, evaluations, flags, metrics, refused, run

import evaluate
import train
from support import common, plot
from support.errors import draw_or_warn
from support.metrics import by_position


class FakeWandb(types.ModuleType):
    """Remembers its calls; `error` is what init raises, or log. Like wandb 0.28.2, it has no util.generate_id."""

    def __init__(self, offline=False):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.errors = types.SimpleNamespace(Error=KeyError)
        self.offline, self.started, self.logged, self.keys, self.error = offline, [], [], set(), None

    def init(self, **options):
        if self.error:
            raise self.error
        self.started.append(options)
        self.logged.append([])  # a folder of its own for each part of a run
        id = options["id"] or f"id{len(self.started)}"
        return types.SimpleNamespace(id=id, offline=self.offline, log=self.log)

    def log(self, row, step):
        if self.error:
            raise self.error
        self.logged[-1].append(step)
        self.keys |= set(row)


def fake_tensorboard(monkeypatch):
    """(each writer's purge_step, {curve: [(step, value)]}), which a run with --log tensorboard fills."""
    made, curves = [], {}

    class Writer:
        def __init__(self, folder, purge_step):
            made.append(purge_step)

        def add_scalar(self, name, value, step):
            curves.setdefault(name, []).append((step, value))

    for name in ("tensorboard", "torch.utils.tensorboard"):
        fake = types.ModuleType(name)
        fake.__spec__, fake.SummaryWriter = importlib.machinery.ModuleSpec(name, None), Writer
        monkeypatch.setitem(sys.modules, name, fake)
    return made, curves


def test_a_resumed_run_goes_on_as_the_same_wandb_run(pair, tmp_path, monkeypatch):
    """THUDM/slime#2332: wandb 0.28.2 has no util.generate_id."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = tmp_path / "run"
    run(pair, out, **SMALL | dict(log="wandb"))
    run(pair, out, **SMALL | dict(log="wandb", steps=3, resume="true"))
    assert [options["id"] for options in fake.started] == [None, "id1"] and fake.logged == [[1, 2], [3]]
    assert {options["dir"] for options in fake.started} == {str(out)}
    run(pair, out, **SMALL | dict(log="wandb", overwrite="true"))
    assert fake.started[-1]["id"] is None  # another run
    fake.error = KeyError("api_key not configured")
    refused(flags(pair, tmp_path / "b", log="wandb"), "--log wandb: .*api_key not configured")


def test_the_newest_folder_of_an_offline_wandb_run_holds_all_of_it(pair, tmp_path, monkeypatch):
    """wandb/wandb#3841: `wandb sync` replaces what it has of a run by the folder that it sends."""
    fake = FakeWandb(offline=True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = SMALL | dict(log="wandb", eval_every=2, eval_problems=2, k=1)
    run(pair, tmp_path / "run", **options)
    run(pair, tmp_path / "run", **options | dict(steps=3, resume="true"))
    assert fake.logged == [[0, 1, 2, 2], [0, 1, 2, 2, 3, 3]]


def test_a_wandb_that_dies_ends_nothing(pair, tmp_path, monkeypatch, capsys):
    """wandb/wandb#6449: its own process is killed, as by a SIGTERM to all of a Slurm step, and log() fails."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    init = fake.init
    monkeypatch.setattr(fake, "init", lambda **options: (init(**options), setattr(fake, "error", OSError("lost")))[0])
    rows, _ = run(pair, tmp_path / "run", **SMALL | dict(log="wandb"))
    assert len(rows) == 2 and capsys.readouterr().out.count("warning: no more rows for --log wandb: lost") == 1


def test_a_resumed_run_purges_the_steps_that_tensorboard_has_from_before(pair, tmp_path, monkeypatch):
    made, _ = fake_tensorboard(monkeypatch)
    run(pair, tmp_path / "run", **SMALL | dict(log="tensorboard"))
    run(pair, tmp_path / "run", **SMALL | dict(log="tensorboard", steps=3, resume="true"))
    assert made == [None, 3]


def test_every_number_but_the_step_is_a_curve_the_interval_included(pair, tmp_path, monkeypatch):
    _, curves = fake_tensorboard(monkeypatch)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(plot, "draw", lambda out: None)
    options = dict(steps=1, eval_every=1, eval_problems=2, k=2)
    for log in ("tensorboard", "wandb"):
        run(pair, tmp_path / log, log=log, **options)
    rows = metrics(tmp_path / "tensorboard") + evaluations(tmp_path / "tensorboard")
    names = {name for row in rows for name in row}
    assert set(curves) == fake.keys == names - {"step", "rollout/checksum", "gate/by_position"}
    for name in ("eval/pass@2", "eval/pass@2_low", "eval/pass@2_high"):
        assert curves[name] == [(row["step"], row[name]) for row in evaluations(tmp_path / "tensorboard")]


@pytest.mark.slow
def test_a_notebooks_matplotlib_backend_does_not_matter():
    """bmaltais/kohya_ss#2521, deeptools/deepTools#1416: !python train.py in a notebook, from another environment."""
    env = ENV | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", "from support import plot; plot.pyplot()"], cwd=ROOT, env=env, check=True)


def test_a_picture_that_cannot_be_drawn_ends_nothing(pair, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(plot, "draw", fail)
    monkeypatch.setattr(evaluate, "plot_pass_at_k", fail)
    for module in (train, evaluate):
        monkeypatch.setattr(module, "draw_or_warn", draw_or_warn)  # helpers took it out
    run(pair, tmp_path / "run", steps=1)
    _, _, after = capsys.readouterr().out.partition("warning: no picture: no space left\n")
    assert f"student   {tmp_path}/run/final" in after  # it went on to the table at its end
    evaluate_on_toy(pair[1], tmp_path / "ev", k=1, max_response=5)
    printed = capsys.readouterr().out
    assert "warning: no picture: no space left\n" in printed and "samples.jsonl, every completion" in printed


def test_a_stream_goes_on_when_nobody_reads_it():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with pytest.raises(BrokenPipeError):
        os.write(write_end, b"x")
    stream = common.TolerantStream(io.TextIOWrapper(io.FileIO(write_end, "w"), write_through=True))
    print("a line", file=stream, flush=True)


@pytest.mark.slow
def test_output_that_nobody_reads_ends_nothing(pair, tmp_path):
    """pytorch/pytorch#67538: a pipe that was closed, as by | head, or by the end of an SSH session."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, ROOT / "train.py", *flags(pair, tmp_path / "run", sample_every=1)]
    ended = subprocess.run(command, stdout=write_end, stderr=write_end, env=ENV)
    assert ended.returncode == 0 and (tmp_path / "run/final").exists() and len(metrics(tmp_path / "run")) == 2


def test_a_plot_of_a_killed_run_leaves_out_its_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert plot.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    plot.main([str(tmp_path)])
    assert (tmp_path / "curves.png").exists()


def test_positions_without_a_token_have_no_gate(tmp_path):
    position = torch.tensor([(i + 0.5) / 10 for i in range(10)])
    values = by_position(torch.ones(10), position)
    assert values == [None, 1.0] * 10 or values == [1.0, None] * 10
    rows = [{"step": i, "gate/by_position": values} for i in (1, 2)]
    plot.draw_gates(json.loads(json.dumps(rows)), tmp_path / "gates.png", "gates")
    assert (tmp_path / "gates.png").stat().st_size > 3000


def test_a_machine_without_git_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert common.versions.__wrapped__()["commit"] == ""


def test_python_without_asserts_loses_nothing():
    """dpkp/kafka-python#1348, NVIDIA-NeMo/RL#4018: under python -O vLLM would have kept the cache of the old weights."""
    for path in [path for path in ROOT.glob("*.py") if not path.name.startswith("test_")]:
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not found, path
