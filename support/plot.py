"""Pictures of runs and evaluations.

    python -m support.plot out/tiny [out/other ...]     # writes out/tiny/curves.png and gates.png

curves.png: loss, KL to the teacher (eval/kl: exact; kl_sampled: log pi_old - log q on the sampled tokens, an estimate), drift,
gates, pass@k and response length over steps, of one or more runs.
gates.png: the mean gate by position in the response, over steps, of the first run.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import numpy as np

from support.files import EVALUATIONS, METRICS, read_jsonl

PANELS = {  # title: a regular expression for the names of the metrics in the panel
    "loss": "loss",
    "KL to the teacher, nats/token": "kl_sampled|eval/(.*/)?kl",
    "absolute drift since sampling, nats": "gate/(drift_abs|s_abs)",
    "gates (1: no drift)": "gate/(mean|ess|p05)",
    "share of held-out problems solved": r"eval/.*(pass|mean)@\d+",
    "response length, tokens": "rollout/length",
}


def pyplot():
    """matplotlib.pyplot without a display; imported only where a picture is drawn, because that takes a second."""
    os.environ["MPLBACKEND"] = "Agg"  # not a notebook's: without its package, matplotlib would fail to import
    import matplotlib.pyplot as plt

    return plt


def draw(*runs) -> None:
    """Writes curves.png, and gates.png if the first run recorded gates, into the first run's folder."""
    histories = {Path(run): read_run(Path(run)) for run in runs}
    first = Path(runs[0])
    draw_curves(histories, first / "curves.png")
    rows = [row for row in histories[first] if "gate/by_position" in row]
    if rows:
        draw_gates(rows, first / "gates.png", title=f"mean gate in the last epoch of each step: {first.name}")


def read_run(run: Path) -> list[dict]:
    """Rows of its steps, then of its evaluations."""
    evaluations = run / EVALUATIONS
    return read_jsonl(run / METRICS) + (read_jsonl(evaluations) if evaluations.exists() else [])


def draw_curves(histories, path):
    """histories: {folder: rows}. One run: a colour per metric. Several: a colour per run, a line style per metric."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    one_run = len(histories) == 1
    all_rows = sum(histories.values(), [])
    for ax, (title, pattern) in zip(axes.flat, PANELS.items(), strict=True):
        names = dict.fromkeys(name for row in all_rows for name in row if re.fullmatch(pattern, name))
        for i, name in enumerate(names):
            linestyle = "-" if one_run else ("-", "--", ":")[i % 3]
            style = dict(linestyle=linestyle, marker="o" if name.startswith("eval/") else None, markersize=5)
            for j, rows in enumerate(histories.values()):
                steps = [row["step"] for row in rows if name in row]
                values = [row[name] for row in rows if name in row]
                ax.plot(steps, values, color=f"C{i}" if one_run else f"C{j}", **style)
            ax.plot([], [], color=f"C{i}" if one_run else "gray", label=name, **style)  # for the legend only
        ax.set(title=title, xlabel="step")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        if len(names) > 1:
            ax.legend(fontsize=8, handlelength=3)  # long enough to tell line styles apart
    if not one_run:
        lines = [plt.Line2D([], [], color=f"C{j}", label=run.name) for j, run in enumerate(histories)]
        figure.legend(handles=lines, loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_gates(rows, path, title):
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    extent = (rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5, 0, 1)  # each column is centred on its step
    # [positions, steps]; NaN where there was no token
    gates = np.array([row["gate/by_position"] for row in rows], dtype=float).T
    image = ax.imshow(gates, origin="lower", aspect="auto", extent=extent, cmap="viridis", interpolation="nearest")
    ax.set(title=title, xlabel="step", ylabel="position in the response (0: start, 1: end)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, label="gate")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_pass_at_k(summaries: dict, path):
    """Writes pass@k against k with 95 % bands: one panel per benchmark, one line per name of summaries."""
    plt = pyplot()
    benchmarks = list(dict.fromkeys(benchmark for entries in summaries.values() for benchmark in entries))
    fig, axes = plt.subplots(1, len(benchmarks), figsize=(1 + 3.2 * len(benchmarks), 3.6), squeeze=False, sharey=True)
    largest_k = max(len(entry["curve"]) for entries in summaries.values() for entry in entries.values())
    ticks = [2**i for i in range(12) if 2**i <= largest_k]
    for ax, benchmark in zip(axes[0], benchmarks, strict=True):
        for i, (name, entries) in enumerate(summaries.items()):
            if benchmark in entries:
                curve, low, high = (100 * np.array(entries[benchmark][key]) for key in ("curve", "low", "high"))
                ks = np.arange(1, len(curve) + 1)
                ax.plot(ks, curve, marker="o", markersize=3, color=f"C{i}", label=name)
                ax.fill_between(ks, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        ax.set(title=benchmark, xlabel="k", ylim=(0, 103), xscale="log")
        ax.set_xticks(ticks, ticks)
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("pass@k, %; band: 95 %")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)
    fig.tight_layout(rect=(0, 0, 1, 0.92))
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m support.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with a metrics.jsonl")
    args = parser.parse_args(argv)
    for run in args.runs:
        if not (Path(run) / METRICS).exists():
            sys.exit(f"support.plot: {run} is not a run: it has no {METRICS}")
    draw(*args.runs)


if __name__ == "__main__":
    main()
