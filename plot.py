"""metrics.jsonl -> pictures.      python plot.py out/tiny [out/other ...]

curves.png: loss, teacher-student gap, drift, gates, pass@k and response length over steps, of one or more runs.
gates.png: the mean gate by position in the response, over steps, of the first run.
"""

import json
import re
import sys
from pathlib import Path

PANELS = {  # title: the metrics' names, a regular expression
    "loss": "loss",
    "gap: reverse KL to the teacher, nats a token": "gap|eval/.*gap",
    "drift since sampling, nats": "gate/(drift_abs|s_abs)",
    "gates": "gate/(mean|ess|p05)",
    "held-out problems": "eval/.*(pass|mean)@.*",
    "response length, tokens": "rollout/length",
}


def read(run) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def pyplot():
    """matplotlib, for files alone; imported where a picture is drawn, as it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw(*runs) -> None:
    """Writes curves.png, and gates.png where gates were recorded, into the first run's folder."""
    plt = pyplot()
    histories = {Path(run): read(run) for run in runs}
    first = Path(runs[0])
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for ax, (title, pattern) in zip(axes.flat, PANELS.items(), strict=True):
        for i, (run, rows) in enumerate(histories.items()):
            names = dict.fromkeys(name for row in rows for name in row if re.fullmatch(pattern, name))
            for j, name in enumerate(names):
                label = name if len(runs) == 1 else f"{run.name} {name}"
                style = {} if len(runs) == 1 else dict(color=f"C{i}", linestyle=("-", "--", ":")[j % 3])
                points = [(row["step"], row[name]) for row in rows if name in row]
                ax.plot(
                    *zip(*points, strict=True), marker="o" if name.startswith("eval/") else None, label=label, **style
                )
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.3)
        if len(ax.lines) > 1:
            ax.legend(fontsize=8)
    figure.savefig(first / "curves.png", dpi=120)
    plt.close(figure)

    rows = [row for row in histories[first] if "gate/by_position" in row]
    if rows:
        figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
        extent = (rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5, 0, 1)
        values = list(zip(*(row["gate/by_position"] for row in rows), strict=True))
        image = ax.imshow(values, origin="lower", aspect="auto", extent=extent, cmap="viridis", interpolation="nearest")
        ax.set(
            title=f"mean gate, last epoch of each step: {first.name}", xlabel="step", ylabel="position in the response"
        )
        figure.colorbar(image, label="gate")
        figure.savefig(first / "gates.png", dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    if not sys.argv[1:] or any(not (Path(run) / "metrics.jsonl").exists() for run in sys.argv[1:]):
        sys.exit("usage: python plot.py RUN [RUN ...]      a run is a folder with a metrics.jsonl")
    draw(*sys.argv[1:])
