"""When does gating help? Every cell is one train.py command; differences are paired over training seeds, with intervals.

    python -m study.run                                       # what is missing of the study at toy size, then the report
    python -m study.run --flags "--device cuda --prompts 32"  # the same at another size: the flags join every command
    python -m study.run --size paper --launch "torchrun --nproc_per_node 8" --probes 0
    python -m study.run --report study/study.jsonl           # tables and figures of a study that has run

It may be stopped at any time: a finished cell is a line of OUT/study.jsonl, and is not run again. Cells of one loss,
reuse and seed see the same prompts, rollout seeds and held-out problems. A probe is an ungated run that also records
what each gate would do to each of its updates.
"""

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from plot import pyplot

SIZES = {  # both reuses of tiny were chosen on ungated runs of seed 99, which is in no table
    "tiny": dict(
        common="--preset tiny --eval_problems 128 --eval_every 9999 --save_every 0 --sample_every 0",
        reuse=dict(light="--epochs 2 --steps 30 --lr 6e-4", heavy="--epochs 6 --steps 16 --lr 1e-3"),
        blocks=(4, 16, 64),
    ),
    "paper": dict(
        common="--preset qwen3 --eval_data math500,aime24,aime25,amc23 --eval_every 9999",
        reuse=dict(light="--epochs 2 --steps 200", heavy="--epochs 6 --steps 100 --lr 5e-6"),
        blocks=(16, 64, 256),
    ),
}
PAIRS = [(loss, reuse) for reuse in ("light", "heavy") for loss in ("opd", "lsm")]
MAIN = ("none", "block", "span", "token", "sequence")
SWEEP = {
    "absmean": "--gate block --stat absmean", "rms": "--gate block --stat rms",
    "tau_0.3": "--gate block --tau 0.3", "tau_3": "--gate block --tau 3",
    "small_blocks": "--gate block --block {0}", "large_blocks": "--gate block --block {2}",
}  # fmt: skip
# Recorded at commit 0d7abf8, where --gate_on let a gate see only drift toward the teacher or away from it. Nothing came of it.
RETIRED = ("toward", "away")
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


# -----------------------------------------------------------------------------
# cells


def cells(args):
    """{LOSS/REUSE/VARIANT/SEED: flags of train.py}, in the order to run them."""
    size, found = SIZES[args.size], {}

    def add(variants, seeds, pairs=PAIRS[::-1]):
        for seed in range(seeds):
            for loss, reuse in pairs:
                for variant, flags in variants.items():
                    parts = size["common"], size["reuse"][reuse], f"--loss {loss} --block {size['blocks'][1]}"
                    found[f"{loss}/{reuse}/{variant}/{seed}"] = " ".join([*parts, flags, f"--seed {seed}", args.flags])

    add({name: f"--gate {name}" for name in MAIN}, args.seeds)
    add({"probe": "--gate none"}, args.probes)
    for pairs in (PAIRS[2:], PAIRS[:2]):  # heavy reuse first
        add({name: flags.format(*size["blocks"]) for name, flags in SWEEP.items()}, args.sweep_seeds, pairs)
    return found


def run_cell(name, flags, args):
    """Runs one cell: its line of study.jsonl, or None where it did not finish."""
    folder, began = Path(args.out) / name, time.time()
    program = "python -m study.probe" if "/probe/" in name else f"{args.launch} train.py"
    command = f"{program} {' '.join(flags.split())} --overwrite --out {folder}"
    argv = [sys.executable if part == "python" else part for part in shlex.split(command)]
    with Path(f"{folder}.log").open("w") as log:
        code = subprocess.run(argv, stdout=log, stderr=log).returncode
    if code or not (folder / "final").exists():  # a stopped run exits with 0
        return None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained, evals = [row for row in rows if "lr" in row], [row for row in rows if "lr" not in row]
    ends = [{k.removeprefix("eval/"): x for k, x in row.items() if k != "step"} for row in (evals[0], evals[-1])]
    line = dict(cell=name, command=command, start=ends[0], end=ends[1], checksum=trained[-1]["rollout/checksum"])
    line |= {key: [round(row[f"gate/{key}"], 4) for row in trained] for key in ("ess", "mean", "drift_abs")}
    if "/probe/" in name:
        line["epochs"] = by_epoch([json.loads(text) for text in (folder / "probe.jsonl").read_text().splitlines()])
    for path in folder.glob("step-*"):
        shutil.rmtree(path)
    return line | dict(seconds=round(time.time() - began, 1), commit=args.commit, hardware=args.hardware)


def run(args):
    """Runs the cells that OUT/study.jsonl lacks, args.jobs at a time."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "study.jsonl"
    done = {line["cell"]: line for line in read(path)} if path.exists() else {}
    path.write_text("".join(json.dumps(line) + "\n" for line in done.values()))  # without a torn last line
    todo = {name: flags for name, flags in cells(args).items() if name not in done and args.only in name}
    args.commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    args.hardware = f"{gpu}, torch {torch.__version__}, {args.jobs} cell(s) at a time"

    def one(name):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        line = run_cell(name, todo[name], args)
        if line is None:
            print(f"{name}: did not finish, see {out}/{name}.log", flush=True)
            return
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}: mean@k {100 * score(line, 'mean@'):.1f} %, {line['seconds']:.0f} s", flush=True)

    print(f"{len(done)} cells are in {path}, {len(todo)} to run")
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, todo))
    return path


def by_epoch(rows):
    """{epoch: the mean of its updates' rows}, without the first updates after sampling, which have no drift yet."""
    found = {}
    for row in rows:
        if row["drift"] != [0.0] * 5:
            found.setdefault(row["epoch"], []).append(row)
    return {
        epoch: {key: np.mean([row[key] for row in part], 0).round(4).tolist() for key in part[0]}
        for epoch, part in found.items()
    }


# -----------------------------------------------------------------------------
# the report


def read(path):
    """The lines of a study.jsonl; a torn last one, of a killed study, is left out."""
    return [json.loads(text) for text in Path(path).read_text().splitlines(keepends=True) if text.endswith("\n")]


def score(line, metric):
    """The metric whose name begins so, after training: the mean over benchmarks."""
    return float(np.mean([x for key, x in line["end"].items() if key.split("/")[-1].startswith(metric)]))


def paired(lines, loss, reuse, variant, metric):
    """Differences of a variant from "none", one a seed that both have; their mean and half their 95 % interval."""
    seeds = [
        {int(n.split("/")[3]): x for n, x in lines.items() if n.startswith(f"{loss}/{reuse}/{v}/")}
        for v in (variant, "none")
    ]
    diffs = [score(seeds[0][i], metric) - score(seeds[1][i], metric) for i in seeds[0] if i in seeds[1]]
    if len(diffs) < 2:
        return diffs, math.nan, math.nan
    t = T975[len(diffs) - 2] if len(diffs) <= len(T975) + 1 else 1.96
    return diffs, float(np.mean(diffs)), t * float(np.std(diffs, ddof=1)) / math.sqrt(len(diffs))


def table(lines, metric, scale=100):
    """Markdown: a row a variant, a column a loss and reuse; "none" in full, the others as differences from it."""
    columns = [f"{loss}, {reuse} reuse" for loss, reuse in PAIRS]
    body = ["| gate | " + " | ".join(columns) + " |", "|---" * (1 + len(PAIRS)) + "|"]
    for variant in [*MAIN, *SWEEP, *RETIRED]:
        row = []
        for loss, reuse in PAIRS:
            found = [score(x, metric) * scale for n, x in lines.items() if n.startswith(f"{loss}/{reuse}/none/")]
            diffs, mean, half = paired(lines, loss, reuse, variant, metric)
            if variant == "none":
                row.append(
                    f"{np.mean(found):.1f} ± {np.std(found, ddof=1):.1f} ({len(found)})" if len(found) > 1 else "-"
                )
            elif math.isnan(half):
                row.append("-")
            else:
                low, high = scale * (mean - half), scale * (mean + half)
                text = f"{scale * mean:+.1f} [{low:.1f}, {high:.1f}]"
                row.append(f"{f'**{text}**' if low * high > 0 else text} ({len(diffs)})")
        body.append(f"| {variant} | " + " | ".join(row) + " |")
    return "\n".join(body)


def certain(lines, metric):
    """(intervals that exclude zero, all intervals) of a metric's table."""
    found = [paired(lines, *pair, v, metric)[1:] for pair in PAIRS for v in [*MAIN[1:], *SWEEP, *RETIRED]]
    return sum(abs(mean) > half for mean, half in found), sum(not math.isnan(half) for _, half in found)


def probe_table(lines):
    """Markdown: what a block gate would do in the last epoch of the ungated runs that were probed (probe.look)."""
    keys = dict(toward="|d| toward the teacher", cancelled="cancelling blocks")
    keys |= {"block/ess": "ESS", "block/cos": "cosine", "block/norm": "norm"}
    keys |= {"block/toward": "gate of d toward", "block/away": "gate of d away"}
    body = ["| ungated run | " + " | ".join(keys.values()) + " |", "|---" * (1 + len(keys)) + "|"]
    for name, line in lines.items():
        if "epochs" in line:
            last = line["epochs"][max(line["epochs"], key=int)]
            body.append(f"| {name} | " + " | ".join(f"{last[key]:.2f}" for key in keys) + " |")
    return "\n".join(body)


def report(path, out):
    """Prints the tables, and writes effects.png and diagnostics.png into the folder `out`."""
    lines = {line["cell"]: line for line in read(path)}
    print(f"{len(lines)} cells, {sum(x['seconds'] for x in lines.values()) / 3600:.1f} hours of runs")
    print("commit and hardware:", *sorted({f"{x['commit']}, {x['hardware']}" for x in lines.values()}), sep="\n  ")
    for title, metric, scale in (
        ("mean@k, %", "mean@", 100),
        ("pass@k, %", "pass@", 100),
        ("reverse KL to the teacher, 0.001 nats a token (lower is better)", "gap", 1000),
    ):
        print(f"\n{title}: none ± its standard deviation over seeds, then differences from none [95 %] (seeds)\n")
        print(table(lines, metric, scale))
        print("\n{} of {} intervals exclude zero; by chance 1 in 20 does".format(*certain(lines, metric)))
    print(f"\nA block gate in the last epoch of a batch, on ungated runs (probe.py)\n\n{probe_table(lines)}")
    draw_effects(lines, out / "effects.png")
    draw_diagnostics(lines, out / "diagnostics.png")
    print(f"\n{out}/effects.png and {out}/diagnostics.png have the figures")


def draw_effects(lines, path):
    """The difference of each variant from none in mean@k: seeds as dots, mean and 95 % interval."""
    plt = pyplot()
    figure, (axes,) = plt.subplots(1, len(PAIRS), figsize=(12, 4.2), sharey=True, squeeze=False, layout="constrained")
    names = [*MAIN[1:], *SWEEP, *RETIRED]
    for ax, (loss, reuse) in zip(axes, PAIRS, strict=True):
        ax.axvline(0, color="black", linewidth=0.8)
        for i, name in enumerate(names):
            diffs, mean, half = paired(lines, loss, reuse, name, "mean@")
            ax.plot(100 * np.array(diffs), [i + 0.2] * len(diffs), ".", color="gray", markersize=4)
            if not math.isnan(half):
                color = "C0" if abs(mean) <= half else "C2" if mean > 0 else "C3"
                ax.errorbar(100 * mean, i, xerr=100 * half, fmt="o", color=color, markersize=4, capsize=2)
        ax.axhline(len(MAIN) - 1.5, color="gray", linewidth=0.5, linestyle=":")
        ax.set(title=f"{loss}, {reuse} reuse", xlabel="mean@k, points over no gate", yticks=range(len(names)))
        ax.set_ylim(-0.6, len(names) - 0.4)
        ax.set_yticklabels(names)
        ax.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_diagnostics(lines, path):
    """A row a loss, heavy reuse: drift and gates by epoch, gate by position, ESS, cancellation, gradients."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 6, figsize=(20, 6.4), layout="constrained")
    for row, loss in zip(axes, ("opd", "lsm"), strict=True):
        probes = [x["epochs"] for n, x in lines.items() if n.startswith(f"{loss}/heavy/probe/")]
        if not probes:
            continue
        epochs = sorted(probes[0], key=int)
        at = [int(e) + 1 for e in epochs]
        series = {
            key: np.array([np.mean([p[e][key] for p in probes], 0) for e in epochs]) for key in probes[0][epochs[0]]
        }
        for ax, key, title in ((row[0], "drift", "block drift s, nats"), (row[1], "gate", "block gate g")):
            low, lower, middle, upper, high = series[key].T
            ax.fill_between(at, low, high, alpha=0.2, label="5-95 %")
            ax.fill_between(at, lower, upper, alpha=0.4, color="C0", label="25-75 %")
            ax.plot(at, middle, label="median")
            ax.set(title=f"{loss}: {title}", xlabel="epoch")
            ax.legend(fontsize=8)
        for name in MAIN[1:]:
            row[2].plot((np.arange(20) + 0.5) / 20, series[f"{name}/position"][-1], label=name)
            runs = [x["ess"] for n, x in lines.items() if n.startswith(f"{loss}/heavy/{name}/")]
            if runs:
                row[3].plot(np.arange(1, len(runs[0]) + 1), np.mean(runs, 0), label=name)
            (solid,) = row[5].plot(at, series[f"{name}/cos"], label=name)
            row[5].plot(at, series[f"{name}/norm"], linestyle="--", color=solid.get_color())
        row[2].set(title="mean gate, last epoch", xlabel="position in the response")
        row[3].set(title="effective sample size, gated", xlabel="step")
        row[4].plot(at, series["cancelled"], label="positions in cancelling blocks")
        row[4].plot(at, series["toward"], label="share of |d| toward the teacher")
        row[4].set(title="cancellation and direction", xlabel="epoch", ylim=(0, 1))
        row[5].set(title="gradient: cosine, norm (--)", xlabel="epoch")
        for ax in row[2:]:
            if ax.lines:
                ax.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--flags", default="", help="of train.py, for every cell")
    parser.add_argument("--launch", default="python", help="what runs train.py")
    parser.add_argument("--seeds", type=int, default=5, help="of the gates")
    parser.add_argument("--sweep_seeds", type=int, default=3, help="of the other statistics, block sizes and so on")
    parser.add_argument(
        "--probes", type=int, default=1, help="seeds that are probed; one process only, so 0 for torchrun"
    )
    parser.add_argument("--only", default="", help="cells whose name LOSS/REUSE/VARIANT/SEED holds this text")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--out", default="", help="default out/study/SIZE")
    parser.add_argument("--report", default="", help="only report this study.jsonl, figures beside it")
    args = parser.parse_args(argv)
    args.out = args.out or f"out/study/{args.size}"
    path = Path(args.report) if args.report else run(args)
    report(path, path.parent)


if __name__ == "__main__":
    main()
