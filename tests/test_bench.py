"""python -m pytest tests/test_bench.losses      (tiny sizes; what is installed besides torch is compared too)"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import policy
from bench import losses as bench
from bench import step as bench_step
from configs import TrainConfig, parse
from support.vocabulary import load_tokenizer

GPU_SH = Path(bench.__file__).parent / "gpu.sh"

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


def test_code_that_runs_out_of_memory_is_said_so(capsys, monkeypatch):
    def out_of_memory():
        raise torch.OutOfMemoryError

    def make(x):
        return {"naive": out_of_memory, bench.OURS: lambda: None}, lambda: None

    monkeypatch.setattr(bench, "TASKS", {"opd": ("OPD", make)})
    monkeypatch.setattr(bench, "make_inputs", lambda args: None)
    args = arguments(monkeypatch, "--no_memory", "--tasks", "opd")
    args.device = "cuda"
    bench.losses(args)
    out = capsys.readouterr().out
    assert "| naive | out of memory |" in out and f"| {bench.OURS} | " in out


def run_gpu_sh(folder, *flags):
    """(exit code, what it prints)"""
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([GPU_SH, *flags], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_gpu_sh_runs_at_a_tiny_size():
    code, out = run_gpu_sh(Path(sys.executable).parent, "--tiny")
    assert code == 0 and "FAILED" not in out
    tables = {title: body for title, body in re.findall(r"\n(.+)\n\n((?:\|.*\n)+)", out)}
    steps = {title: body for title, body in tables.items() if title.startswith("A step, ")}
    for title in ("opd: 32 rollouts, sampled", "lsm: 32", "opd: 4 rollouts, made up, 128 response tokens", "lsm: 4"):
        assert sum(title in x for x in steps) == 1, title
    for body in steps.values():
        for phase in ("teacher", "old log-probs", "update 1", "update 2"):
            assert re.search(rf"\| {phase} \| [\d.]+ \| 0 \| \d+ \|", body)
        losses = [float(x) for x in re.findall(r"update .* (\S+) \|\n", body)]
        assert len(losses) == 2 and losses[0] != losses[1]
    # two layers, and once more in the backward pass
    assert "| a training pass | _scaled_dot_product_flash_attention_for_cpu | 4 |" in tables["Attention kernels"]
    assert len(re.findall(r"\| 6[14] \| [\d.]+ \| [\d.]+ \([\d.]+\) \|", out)) == 2  # of the head's positions
    (layers,) = [body for title, body in tables.items() if title.startswith("Decoder layers")]
    assert re.search(
        r"\| compile \| [\d.]+ \| [\d.]+ \| [\d.]+ \| \d+ \| \d\.\de-0[678] \|", layers
    )  # the difference of log-probs
    if importlib.util.find_spec("vllm") is None:
        assert "No vLLM for cpu here" in out
    for title, _ in bench.TASKS.values():
        assert title in out


def test_gpu_sh_goes_on_after_a_failure_and_takes_ten_minutes_at_most(tmp_path, monkeypatch):
    """With a `python` that prints its arguments, and fails for the steps; the flags for a GPU are ones that exist."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *steps*) exit 3;; esac\n')
    python.chmod(0o755)
    code, out = run_gpu_sh(tmp_path)
    lines = out.splitlines()
    failed = ["-m bench.gpu steps", "FAILED: python -m bench.gpu steps"]
    assert code == 1 and lines[:5] == ["-m bench.gpu head", *failed, "-m bench.gpu layers", "-m bench.gpu sampling"]
    args = [arguments(monkeypatch, *line.split()[3:]) for line in lines[5:]]
    assert [x.tasks for x in args] == [["opd", "lsm", "lsm_free", "teacher"], ["rkl", "jsd"]]
    assert all((x.device, x.dtype, x.H, x.Ht) == ("cuda", "bfloat16", 2048, 2560) for x in args)
    limits = [
        int(x)
        for x in re.findall(
            r"^ *run (\d+) python -m bench.(?:gpu|losses losses --device cuda)", GPU_SH.read_text(), re.M
        )
    ]
    assert len(limits) == 5 and sum(limits) + limits[0] <= 600, (
        limits
    )  # bench.losses, the first in the file, runs twice


has_trl = importlib.util.find_spec("trl") is not None


@pytest.fixture(scope="module")
def sizes(pair, tmp_path_factory):
    """As `bench.step trl` makes them, but with 320 tokens in the random pair's vocabulary, and short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_step, "VOCAB", 320)
        patch.setattr(bench_step.toy, "TEACHER", pair[0])
        patch.setattr(bench_step.toy, "STUDENT", pair[1])
        sizes = bench_step.make_sizes(tmp_path_factory.mktemp("random"), *pair)
    return {name: job | {"responses": 2, "max_response": 8, "steps": 2} for name, job in sizes.items()}


@pytest.mark.slow
def test_the_random_pair_uses_its_whole_vocabulary(sizes):
    """Ours works on the tokens that the tokenizers know: with the toy's 42 of 151,936 it would have next to nothing to do."""
    job = sizes["random Qwen3, V 320, 4,096 tokens"]
    flags = ["--preset", "tiny", "--teacher", job["teacher"], "--student", job["student"]]
    cfg = parse(TrainConfig, flags)
    _, vocabulary = load_tokenizer(policy.model_paths(cfg))
    assert vocabulary.size == 320


def test_ours_takes_steps(pair):
    job = dict(teacher=pair[0], student=pair[1], responses=2, max_response=8, steps=2, seed=0)
    steps = bench_step.our_steps(job)
    assert len(steps) == 2 and all(seconds > 0 and 0 < tokens <= 16 for seconds, tokens in steps)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["--teacher, --student"])
@pytest.mark.parametrize(
    "system", ["ours", pytest.param("trl", marks=pytest.mark.skipif(not has_trl, reason="no TRL"))]
)
def test_a_system_takes_steps_in_a_process_of_its_own(sizes, size, system):
    result = bench_step.run_in_child(sizes[size] | {"system": system, "seed": 0})
    assert result["tokens_per_s"] > 0 and 0.1 < result["peak_gb"] < 10


@pytest.mark.slow
def test_the_first_step_does_not_count_and_memory_is_the_process_peak():
    """Steps of 100, 30 and 10 tokens in 1, 1 and 3 s, in a process that held a gigabyte for a moment."""
    code = """
from bench import step

def steps(job):
    len(b"x" * 10**9)
    return [(1, 100), (1, 30), (3, 10)]

step.SYSTEMS["ours"] = steps
step.run_one({"system": "ours"})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=bench_step.ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["tokens_per_s"] == 10 and 1 < result["peak_gb"] < 10


@pytest.mark.parametrize("installed", [True, False])
def test_systems_take_turns_and_the_medians_are_compared(monkeypatch, installed):
    jobs = []

    def run(job):
        jobs.append((job["seed"], job["size"], job["system"]))
        slow = 1 if job["system"] == "ours" else 2
        return {"tokens_per_s": (job["seed"] + 1) ** 3 * 1000 / slow, "peak_gb": slow * (job["seed"] + 1)}

    monkeypatch.setattr(bench_step, "run_in_child", run)
    monkeypatch.setattr(bench_step.importlib.util, "find_spec", lambda name: installed or None)
    rows = bench_step.compare({"a": {"size": "a"}, "b": {"size": "b"}}, runs=3)
    if installed:
        assert jobs[:5] == [(0, "a", "ours"), (0, "a", "trl"), (0, "b", "ours"), (0, "b", "trl"), (1, "a", "ours")]
        assert rows == [[size, "8,000", "4,000", "2.00", "2.00", "4.00", "0.50"] for size in "ab"]
    else:
        assert {system for _, _, system in jobs} == {"ours"}
        assert rows[0] == ["a", "8,000", "not installed", "", "2.00", "not installed", ""]


def test_a_teacher_needs_its_student(capsys):
    with pytest.raises(SystemExit):
        bench_step.main(["trl", "--teacher", "somewhere"])
    assert "--teacher and --student go together" in capsys.readouterr().err


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
