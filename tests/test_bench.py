"""python -m pytest tests/test_bench.losses      (tiny sizes; what is installed besides torch is compared too)"""

import json
from pathlib import Path

import pytest
import torch

from bench import losses as bench
from bench import step as bench_step

TINY = "--device cpu --dtype float32 --N 48 --H 16 --V 320 --K 4 --runs 1 --threads 1".split()


def arguments(monkeypatch, *flags):
    """The namespace that bench.losses makes of the flags."""
    seen = []
    monkeypatch.setattr(bench, "gates", seen.append)
    bench.main(["gates", *TINY, *flags])
    return seen[0]


def test_every_table_prints_every_row(capsys):
    bench.main(["losses", "scale", "gates", *TINY])
    out = capsys.readouterr().out
    for title, _ in bench.TASKS.values():
        assert title in out
    assert out.count("floor: the matmuls alone | 1.00") == len(bench.TASKS)
    assert out.count(f"| {bench.OURS} |") == len(bench.TASKS)
    for row in ("naive", "Liger", "TRL", "cut-cross-entropy", "linear_cross_entropy", *bench.KINDS):
        assert f"| {row}" in out or f"{row}" in out, row
    for n in (48, 96, 192):
        assert f"| opd | {n} |" in out


def test_the_memory_meter_sees_known_allocations():
    """1,000 and 500 kB at once, then 250: exact to the allocator's rounding of single tensors."""

    def run():
        a, b = torch.empty(250_000), torch.empty(125_000)
        del a
        return b, torch.empty(62_500)

    most, _ = bench.peak(run, "cpu")
    assert 1_500_000 <= most < 1_501_000


def test_the_memory_of_naive_is_at_least_one_matrix(monkeypatch):
    x = bench.make_inputs(arguments(monkeypatch))
    fns, _ = bench.opd(x)
    naive = next(fn for name, fn in fns.items() if name.startswith("naive"))
    assert float(bench.beyond(x, naive)) * bench.MiB > 48 * 320 * 4


def test_the_floor_does_the_matmuls_and_nothing_else(monkeypatch):
    """Counted by torch: 6NHV for a loss, 2NHV for the teacher's pass, 6NHV + 2NHtV for a full KL."""
    from torch.utils.flop_counter import FlopCounterMode

    x = bench.make_inputs(arguments(monkeypatch, "--Ht", "24"))
    NV = 48 * 320
    floors = {"opd": 6 * 16, "lsm": 6 * 16, "teacher": 2 * 16, "rkl": 6 * 16 + 2 * 24}
    for task, expected in floors.items():
        with FlopCounterMode(display=False) as counter:
            bench.TASKS[task][1](x)[1]()
        assert counter.get_total_flops() == expected * NV, task


def test_all_rows_of_a_table_compute_the_same_gradient(monkeypatch):
    """Except Liger's fused KL, which has no gates: it gives the mean."""
    x = bench.make_inputs(arguments(monkeypatch))
    x.logq[:, 1:] = x.logq[:, 1:].log_softmax(-1)
    for task in ("opd", "lsm", "lsm_free", "rkl", "jsd"):
        fns, _ = bench.TASKS[task][1](x)
        grads = {}
        for name, fn in fns.items():
            if fn and "mean only" not in name:
                fn()
                grads[name] = x.h.grad, x.w.grad
        for name, pair in grads.items():
            for ours, theirs in zip(grads[bench.OURS], pair, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-5, msg=f"{task}: {name}")


def test_an_absent_package_is_said_so(capsys, monkeypatch):
    monkeypatch.setattr(bench, "found", lambda name: None)
    bench.main(["losses", *TINY, "--tasks", "opd", "--no_memory"])
    assert capsys.readouterr().out.count("| not installed |") == 3


@pytest.mark.skipif(not Path("out/toy").exists(), reason="the toy pair is not trained: python toy.py")
def test_a_step_runs_on_the_projects_own_functions():
    import data

    step, *_ = bench_step.our_trainer(data.load("toy", limit=2))
    assert 0 < step() <= 200


def test_engines_takes_medians_of_the_later_steps(monkeypatch):
    """Runs that report 1, 2, ... seconds a phase: the first two of five steps do not count."""

    def run(command, **_):
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        slow = 10 * ("--nproc_per_node" in command)
        rows = [
            {f"time/{phase}": slow + i for phase in bench_step.PHASES} | {"tokens_per_s/rollout": i} for i in range(5)
        ]
        (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))

    monkeypatch.setattr(bench_step.subprocess, "run", run)
    monkeypatch.setattr(bench_step.importlib.util, "find_spec", lambda name: None)
    rows = bench_step.engines(runs=2)
    assert rows[0] == ["hf, 1 rank(s)", "3.00", "3.00", "3.00", "9.00", "3"]
    assert rows[1][:2] == ["hf, 2 rank(s)", "13.00"] and rows[2][:2] == ["vllm", "not installed"]
