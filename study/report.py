"""Tables and figures of a study.jsonl, which study.run writes. Every number is recomputed from its lines.

Intervals. The unit is a pair of models: a difference between two cells of the same pair and training seed is averaged over
the seeds, and Student's t over the pairs' means gives the 95 % interval and the p-value. In a balanced design (as many seeds
for each pair) that is the mixed model with a random effect for each pair. It covers other pairs of the same kind as well as
other training seeds, and with three pairs it is wide (2 degrees of freedom). With a single pair, the unit is a training seed.
KLs are averaged and compared on a log scale, as geometric means and ratios: they are positive, and a collapsed run has ten
times the KL of another.
"""

import re
from pathlib import Path

import numpy as np
from scipy import stats

from support.files import read_jsonl
from support.plot import pyplot

ARMS = ("opd_old", "opd_current", "lsm")
REUSES = ("heavy", "light")
GATES = ("none", "block", "span", "token", "sequence")
EPOCHS = (1, 2, 4, 8, 16)  # of the dose-response
METRICS = {  # name in the lines: (title, factor, decimals)
    "kl": ("exact reverse KL to the teacher, 0.001 nats per token; its change in %; lower is better", 1000, 0),
    "pass@": ("pass@k, %", 100, 1),
    "mean@": ("mean@k, %", 100, 1),
}
# Named before the runs. Each is a difference, (arm, reuse, gate) against (arm, reuse, gate).
QUESTIONS = [
    *[("current advantage against old, no gate", ("opd_current", reuse, "none"), ("opd_old", reuse, "none")) for reuse in REUSES],
    *[("block gate against none", (arm, reuse, "block"), (arm, reuse, "none")) for reuse in REUSES for arm in ARMS],
    *[("span gate against none", (arm, "light", "span"), (arm, "light", "none")) for arm in ("opd_old", "lsm")],
    *[("block gate against span", (arm, "light", "block"), (arm, "light", "span")) for arm in ("opd_old", "lsm")],
]  # fmt: skip

# -----------------------------------------------------------------------------
# numbers


def read(path) -> dict:
    """{cell: its line}."""
    return {line["cell"]: line for line in read_jsonl(path)}


def score(line, metric, when="end") -> float:
    """A metric's mean over the benchmarks, after training or before it ("start"). "pass@" finds pass@8, not pass@8_low."""
    values = [x for name, x in line[when].items() if re.fullmatch(rf"(.*/)?{metric}\d*", name)]
    return float(np.mean(values))


def scores(lines, arm, reuse, gate, metric, when="end") -> dict:
    """{(pair, seed): the metric after training, or before it ("start")}."""
    found = {}
    for name, line in lines.items():
        pair, *cell, seed = name.split("/")
        if cell == [arm, reuse, gate]:
            found[pair, seed] = score(line, metric, when)
    return found


def by_unit(values) -> list[float]:
    """Means over each pair's seeds, of {(pair, seed): x}; with a single pair, the seeds' values themselves."""
    pairs = sorted({pair for pair, _ in values})
    if len(pairs) == 1:
        return list(values.values())
    return [float(np.mean([x for (p, _), x in values.items() if p == pair])) for pair in pairs]


def average(values, metric) -> float:
    """The mean; of KLs the geometric mean."""
    return float(np.exp(np.mean(np.log(values))) if metric == "kl" else np.mean(values))


def difference(lines, ours, base, metric, base_when="end"):
    """(units' differences, mean, low, high, p-value); NaN where there are fewer than two units. Of KLs, log-ratios.

    ours, base: (arm, reuse, gate). base_when "start": the difference from base's student before training.
    """
    scale = np.log if metric == "kl" else np.asarray
    a = scores(lines, *ours, metric)
    b = scores(lines, *base, metric, base_when)
    units = by_unit({cell: float(scale(a[cell]) - scale(b[cell])) for cell in a.keys() & b.keys()})
    if len(units) < 2:
        return units, np.nan, np.nan, np.nan, np.nan
    test = stats.ttest_1samp(units, 0)
    low, high = test.confidence_interval(0.95)
    p_value = test.pvalue if np.any(units) else 1.0  # of equal results; scipy's is NaN
    return units, float(np.mean(units)), low, high, p_value


def holm(p_values) -> list[float]:
    """p-values corrected for their number (Holm 1979): the chance of any false claim stays below the level."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


# -----------------------------------------------------------------------------
# tables, in Markdown


def markdown(header, body) -> str:
    rows = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_interval(mean, low, high, metric) -> str:
    """A difference in points, or a log-ratio of KLs as a change in percent; bold if the interval excludes zero."""
    if np.isnan(low):
        return "-"
    if metric == "kl":
        middle, lower, upper = (100 * np.expm1(x) for x in (mean, low, high))
        text = f"{middle:+.0f} % [{lower:.0f}, {upper:.0f}]"
    else:
        text = f"{100 * mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"**{text}**" if low * high > 0 else text


def change(lines, ours, base, metric, base_when="end") -> str:
    _, *bounds, _ = difference(lines, ours, base, metric, base_when)
    return with_interval(*bounds, metric)


def gate_table(lines, metric) -> str:
    """Three kinds of rows: ungated, the mean over pairs (and their range); its change by training; each gate's difference."""
    columns = [(arm, reuse) for reuse in REUSES for arm in ARMS if scores(lines, arm, reuse, "none", metric)]
    _, factor, decimals = METRICS[metric]
    levels, changes = ["no gate"], ["no gate, against the untrained student"]
    for arm, reuse in columns:
        units = [factor * x for x in by_unit(scores(lines, arm, reuse, "none", metric))]
        mean, low, high = average(units, metric), min(units), max(units)
        levels.append(f"{mean:.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f})")
        changes.append(change(lines, (arm, reuse, "none"), (arm, reuse, "none"), metric, "start"))
    body = [levels, changes]
    for gate in GATES[1:]:
        row = [f"{gate}, against no gate"]
        row += [change(lines, (arm, reuse, gate), (arm, reuse, "none"), metric) for arm, reuse in columns]
        if set(row[1:]) != {"-"}:
            body.append(row)
    return markdown(["", *[f"{arm}, {reuse}" for arm, reuse in columns]], body)


def question_table(lines) -> str:
    """The questions that the lines answer: difference, interval, p-value alone and after Holm's correction, for KL and pass@k."""
    questions = [q for q in QUESTIONS if len(difference(lines, q[1], q[2], "kl")[0]) > 1]
    body = []
    for text, ours, base in questions:
        units = difference(lines, ours, base, "kl")[0]
        body.append([f"{text}: {ours[0]}, {ours[1]} reuse", f"{len(units)}"])
    for metric in ("kl", "pass@"):
        results = [difference(lines, ours, base, metric) for _, ours, base in questions]
        corrected = holm([p for *_, p in results])
        for row, (_, mean, low, high, p), p_holm in zip(body, results, corrected, strict=True):
            row.append(with_interval(mean, low, high, metric))
            row.append(f"{p:.3f} ({p_holm:.3f})")
    return markdown(["question", "n", "KL", "p (Holm)", "pass@k, points", "p (Holm)"], body)


def dose_table(lines, metric) -> str:
    """A row for each number of epochs per rollout batch: ungated levels with their change from one epoch, and comparisons."""
    arms = ("opd_old", "opd_current")
    _, factor, decimals = METRICS[metric]
    body = []
    for epochs in EPOCHS:
        dose = f"dose_{epochs}"
        row = [f"{epochs}", f"{96 // epochs}"]
        for arm in arms:
            values = list(scores(lines, arm, dose, "none", metric).values())
            text = f"{factor * average(values, metric):.{decimals}f}" if values else "-"
            if epochs > 1:
                text += f"; {change(lines, (arm, dose, 'none'), (arm, 'dose_1', 'none'), metric)}"
            row.append(text)
        row.append(change(lines, ("opd_current", dose, "none"), ("opd_old", dose, "none"), metric))
        row += [change(lines, (arm, dose, "block"), (arm, dose, "none"), metric) for arm in arms]
        body.append(row)
    comparisons = ["current against old", "block gate, opd_old", "block gate, opd_current"]
    return markdown(["epochs", "rollout batches", *arms, *comparisons], body)


def noise(lines) -> str:
    """How much the two estimates of the KL differ between 64 responses and the next 64, for one and the same student."""
    starts = [line["start"] for name, line in lines.items() if "/noise/" in name]
    if len(starts) < 2:
        return ""
    kl, gap = (np.std([start[metric] for start in starts], ddof=1) for metric in ("kl", "gap"))
    return (
        f"Standard deviation over {len(starts)} draws of 64 responses of one student, nats per token: exact KL {kl:.4f}, "
        f"estimate from the sampled tokens {gap:.4f}, {gap / kl:.1f} times as much"
    )


# -----------------------------------------------------------------------------
# figures


def draw_effects(lines, path):
    """Each gate's difference from no gate in KL: a dot for each pair, the mean and its 95 % interval.

    Of a single pair, such as that of real text, a dot is a training seed.
    """
    plt = pyplot()
    toy, other = split_by_pair(lines)
    panels = [(f"{reuse} reuse", toy, reuse) for reuse in REUSES] + [("real text, heavy reuse", other, "heavy")]
    panels = [(title, part, reuse) for title, part, reuse in panels if part]
    gates = [gate for gate in GATES[1:] if any(f"/{gate}/" in name for name in lines)]
    size = (10, len(panels) * (1 + 0.4 * len(gates)))
    figure, axes = plt.subplots(len(panels), len(ARMS), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for row, (title, part, reuse) in zip(axes, panels, strict=True):
        for ax, arm in zip(row, ARMS, strict=True):
            ax.axvline(0, color="black", linewidth=0.8)
            for i, gate in enumerate(gates):
                units, mean, low, high, _ = difference(part, (arm, reuse, gate), (arm, reuse, "none"), "kl")
                ax.plot(100 * np.expm1(units), [i + 0.2] * len(units), ".", color="gray", markersize=5)
                if not np.isnan(low):
                    color = "C0" if low * high <= 0 else "C2" if mean < 0 else "C3"
                    ax.plot([100 * np.expm1(low), 100 * np.expm1(high)], [i, i], color=color)
                    ax.plot(100 * np.expm1(mean), i, "o", color=color, markersize=5)
            ax.set(title=f"{arm}, {title}", yticks=range(len(gates)), ylim=(len(gates) - 0.5, -0.5), xlim=(-100, 200))
            ax.set_yticklabels(gates)
            ax.grid(alpha=0.3, axis="x")
    for ax in axes[-1]:
        ax.set_xlabel("KL against no gate, % (left: better)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_doses(lines, path):
    """Quality against the number of rollout batches that were sampled, for as many updates; the line is the pairs' mean."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    batches = [96 // epochs for epochs in EPOCHS]
    for ax, metric in zip(axes, ("kl", "pass@"), strict=True):
        title, factor, _ = METRICS[metric]
        title = title.split(";")[0].replace("pass@k", "pass@8")
        for color, arm in (("C1", "opd_old"), ("C0", "opd_current")):
            for style, marker, gate in (("-", "o", "none"), ("--", "s", "block")):
                values = [list(scores(lines, arm, f"dose_{e}", gate, metric).values()) for e in EPOCHS]
                means = [factor * average(x, metric) if x else np.nan for x in values]
                ax.plot(batches, means, style, marker=marker, color=color, label=f"{arm}, gate {gate}")
                for x, dots in zip(batches, values, strict=True):
                    ax.plot([x] * len(dots), factor * np.array(dots), ".", color=color, alpha=0.3, markersize=4)
        ax.set_xscale("log", base=2)
        ax.set_xticks(batches, [f"{b}\n({e})" for b, e in zip(batches, EPOCHS, strict=True)])
        ax.set(title=title, xlabel="rollout batches sampled (epochs on each)")
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def split_by_pair(lines):
    """(the toy pairs' lines, those of any other pair)."""
    toy = {name: line for name, line in lines.items() if name.split("/")[0].isdigit()}
    return toy, {name: line for name, line in lines.items() if name not in toy}


def report(path: Path):
    """Prints the tables, and writes effects.png and doses.png beside study.jsonl."""
    lines = read(path)
    print(f"{len(lines)} cells, {sum(line['seconds'] for line in lines.values()) / 3600:.1f} hours of runs")
    print("commit and hardware:", *sorted({f"{x['commit']}, {x['hardware']}" for x in lines.values()}), sep="\n  ")
    toy, other = split_by_pair(lines)
    for title, part in (("toy pairs", toy), ("another pair", other)):
        if not part:
            continue
        print(f"\n### {title}: the questions (n: pairs; of a single pair, training seeds)\n\n{question_table(part)}")
        for metric, (name, _, _) in METRICS.items():
            print(f"\n### {title}: {name}\n\n{gate_table(part, metric)}")
    if any("/dose_" in name for name in toy):
        for metric in ("kl", "pass@"):
            print(f"\n### dose-response: {METRICS[metric][0]}\n\n{dose_table(toy, metric)}")
        draw_doses(toy, path.parent / "doses.png")
    print(f"\n{noise(toy)}")
    draw_effects(lines, path.parent / "effects.png")
