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

ARMS = ("opd_old", "opd_current", "lsm", "tail_topk", "fkl_topk", "rkl", "fkl", "jsd")
REUSES = ("heavy", "light")
GATES = ("none", "block", "span", "token", "sequence")
TAUS = ("placebo", "tau1", "tau10", "tau30", "tau10_n", "tau30_n")  # block gates; _n: divided by N
OTHERS = ("excess", "away", "beyond", "mask")
EPOCHS = (1, 2, 4, 8, 16)  # of the dose-response
METRICS = {  # name in the lines: (title, factor, decimals)
    "kl": ("KL to the teacher (exact, reverse), 0.001 nats per token; lower is better", 1000, 0),
    "pass@": ("pass@k, %", 100, 1),
    "mean@": ("mean@k, %", 100, 1),
}
# Named before the runs. Each is a difference, (arm, reuse, gate) against (arm, reuse, gate); Holm's correction is within a table.
QUESTIONS = {
    "which loss bears eight epochs": [
        (f"{a} against {b}", (a, "dose_8", "none"), (b, "dose_8", "none"))
        for a, b in (("rkl", "opd_current"), ("lsm", "opd_current"), ("rkl", "lsm"))
    ],
    "the dose of tau": [
        (f"{arm}: {gate} against none", (arm, "heavy", gate), (arm, "heavy", "none"))
        for arm in ("opd_current", "lsm")
        for gate in TAUS
    ],
    "the denominator": [
        (f"{arm}: {gate}_n against {gate}", (arm, "heavy", f"{gate}_n"), (arm, "heavy", gate))
        for arm in ("opd_current", "lsm")
        for gate in ("tau10", "tau30")
    ],
    "other gates": [
        (f"{arm}: {gate} against none", (arm, "heavy", gate), (arm, "heavy", "none"))
        for arm in ("opd_current", "lsm")
        for gate in OTHERS
    ],
}

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
    units, *bounds, _ = difference(lines, ours, base, metric, base_when)
    if len(units) == 1:
        return f"{100 * np.expm1(units[0]):+.0f} %, one run" if metric == "kl" else f"{100 * units[0]:+.1f}, one run"
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
    for gate in (*GATES[1:], *TAUS, *OTHERS):
        row = [f"{gate}, against no gate"]
        row += [change(lines, (arm, reuse, gate), (arm, reuse, "none"), metric) for arm, reuse in columns]
        if set(row[1:]) != {"-"}:
            body.append(row)
    return markdown(["", *[f"{arm}, {reuse}" for arm, reuse in columns]], body)


def question_table(lines, questions) -> str:
    """Those of the questions that the lines answer: difference, interval, p-value alone and after Holm's correction."""
    questions = [q for q in questions if len(difference(lines, q[1], q[2], "kl")[0]) > 1]
    if not questions:
        return ""
    body = []
    for text, ours, base in questions:
        units = difference(lines, ours, base, "kl")[0]
        body.append([text, f"{len(units)}"])
    for metric in ("kl", "pass@"):
        results = [difference(lines, ours, base, metric) for _, ours, base in questions]
        corrected = holm([p for *_, p in results])
        for row, (_, mean, low, high, p), p_holm in zip(body, results, corrected, strict=True):
            row.append(with_interval(mean, low, high, metric))
            row.append(f"{p:.2g} ({p_holm:.2g})")
    return markdown(["", "n", "KL", "p (Holm)", "pass@k, points", "p (Holm)"], body)


def single_dose_table(lines, pair="7", seed="0") -> str:
    """Of one pair and seed, every loss at every dose: KL and pass@8."""
    body = []
    for arm in ARMS:
        row = [arm]
        for epochs in EPOCHS:
            line = lines.get(f"{pair}/{arm}/dose_{epochs}/none/{seed}")
            row.append(f"{1000 * score(line, 'kl'):.0f}; {100 * score(line, 'pass@'):.0f} %" if line else "-")
        if set(row[1:]) != {"-"}:
            body.append(row)
    return markdown(["", *[f"{epochs} epochs, {96 // epochs} batches" for epochs in EPOCHS]], body)


def dose_table(lines) -> str:
    """The change from one epoch of each loss and dose that has it for several pairs."""
    body = []
    for arm in ARMS:
        for epochs in EPOCHS[1:]:
            ours, base = (arm, f"dose_{epochs}", "none"), (arm, "dose_1", "none")
            units = difference(lines, ours, base, "pass@")[0]
            if len(units) > 1:
                changes = [change(lines, ours, base, metric) for metric in ("kl", "pass@")]
                lower_end = 100 * difference(lines, ours, base, "pass@")[2]
                body.append([arm, f"{epochs}", f"{len(units)}", *changes, "yes" if lower_end > -5 else "no"])
    return markdown(["", "epochs", "n", "KL", "pass@8, points", "shown to be within 5 points"], body)


# -----------------------------------------------------------------------------
# leverage


def leverage(line) -> dict:
    """Means over a run's measured updates (of the ratio of norms the geometric mean); angles in degrees."""
    measured = {name: np.array(values) for name, values in line["leverage"].items()}
    angles = {
        name: np.degrees(np.arccos(np.clip(measured[name], -1, 1))).mean() for name in ("cosine", "cosine_before")
    }
    return {
        "angle": float(angles["cosine"]),
        "angle_before": float(angles["cosine_before"]),
        "norm_ratio": float(np.exp(np.log(measured["norm_ratio"]).mean())),
        **{name: float(measured[name].mean()) for name in ("ess", "gate_mean", "gate_sd", "drift_abs")},
    }


def leverages(lines, arm, reuse, gate) -> list[dict]:
    found = []
    for name, line in lines.items():
        if name.split("/")[1:-1] == [arm, reuse, gate] and line.get("leverage"):
            found.append(leverage(line))
    return found


def leverage_table(lines) -> str:
    body = []
    for reuse in (*REUSES, "paper"):
        for arm in ARMS:
            for gate in (*TAUS, *OTHERS):
                runs = leverages(lines, arm, reuse, gate)
                if not runs:
                    continue
                mean = {name: np.mean([run[name] for run in runs]) for name in runs[0]}
                row = [f"{arm}, {reuse}", gate, f"{len(runs)}"]
                row += [f"{mean['drift_abs']:.2g}", f"{mean['gate_mean']:.3f}", f"{mean['ess']:.3f}"]
                row += [f"{mean['angle']:.2g}", f"{mean['angle_before']:.0f}", f"{mean['norm_ratio']:.2f}"]
                body.append(row)
                row += [change(lines, (arm, reuse, gate), (arm, reuse, "none"), metric) for metric in ("kl", "pass@")]
    names = ["mean |d|", "mean gate", "ESS / N", "angle, °", "to the update before, °", "norm ratio"]
    return markdown(["", "gate", "runs", *names, "KL against no gate", "pass@8, points"], body)


# -----------------------------------------------------------------------------
# figures. Colours that the colour-blind tell apart (after Okabe and Ito), for a light and for a dark page

THEMES = {"": ("white", "#24292f"), "_dark": ("#0d1117", "#e6edf3")}  # suffix of the file: background, text
LOSS_STYLES = {  # (colour on light, on dark, marker)
    "opd_old": ("#d55e00", "#f0793a", "v"),
    "opd_current": ("#e69f00", "#ffc23d", "^"),
    "lsm": ("#009e73", "#1fc79a", "s"),
    "tail_topk": ("#56b4e9", "#a5dcff", "D"),
    "fkl_topk": ("#8c8c8c", "#8c8c8c", "x"),
    "rkl": ("#0072b2", "#3f9be0", "o"),
    "fkl": ("#cc79a7", "#e79ac6", "P"),
    "jsd": ("#24292f", "#e6edf3", "*"),
}
GATE_STYLES = {  # gates: (label, colour on light, on dark, marker)
    ("placebo",): ("block, tau 0.001", "#8c8c8c", "#8c8c8c", "x"),
    ("tau1",): ("block, tau 1 (the paper's)", "#0072b2", "#3f9be0", "o"),
    ("tau10",): ("block, tau 10", "#e69f00", "#ffc23d", "s"),
    ("tau30",): ("block, tau 30", "#d55e00", "#f0793a", "D"),
    ("tau10_n", "tau30_n"): ("block, tau 10 or 30, divided by N", "#56b4e9", "#a5dcff", "h"),
    ("excess",): ("excess drift, tau 10", "#009e73", "#1fc79a", "^"),
    ("away", "beyond"): ("its halves", "#009e73", "#1fc79a", "v"),
    ("mask",): ("mask of 1 %", "#cc79a7", "#e79ac6", "P"),
}


def draw(function, lines, path):
    """function(plt, lines, is_dark) returns a figure; it is saved as PATH.png and PATH_dark.png."""
    plt = pyplot()
    for suffix, (background, text) in THEMES.items():
        colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), text)
        faces = dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), background)
        with plt.rc_context(colors | faces):
            figure = function(plt, lines, suffix == "_dark")
            figure.savefig(path.with_name(f"{path.name}{suffix}.png"), dpi=110)
            plt.close(figure)


def doses_figure(plt, lines, is_dark):
    """KL and pass@8 against epochs: a line for each loss on pair 7, seed 0, and means over pairs where there are several."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for ax, metric in zip(axes, ("kl", "pass@"), strict=True):
        title, factor, _ = METRICS[metric]
        shift = 0.94
        for arm, (light, dark, marker) in LOSS_STYLES.items():
            color = dark if is_dark else light
            cells = {e: lines.get(f"7/{arm}/dose_{e}/none/0") for e in EPOCHS}
            values = {e: factor * score(line, metric) for e, line in cells.items() if line}
            if values:
                ax.plot(
                    values.keys(), values.values(), marker=marker, color=color, label=arm, markersize=6, linewidth=1.3
                )
            by_pair = by_unit(scores(lines, arm, "dose_8", "none", metric))
            if len(by_pair) >= 6:  # the primary comparison
                scale, inverse = (np.log, np.exp) if metric == "kl" else (np.asarray, np.asarray)
                test = stats.ttest_1samp(scale(by_pair), 0)
                low, high = (factor * inverse(x) for x in test.confidence_interval(0.95))
                x = 8 * shift
                ax.plot([x, x], [low, high], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
                ax.plot(
                    x, factor * average(by_pair, metric), marker, color=color, markersize=9, markeredgecolor="white"
                )
                shift *= 0.93
        ax.set_xscale("log", base=2)
        ax.set_xticks(EPOCHS, [f"{e}\n({96 // e})" for e in EPOCHS])
        title = title.split(";")[0].replace("pass@k", "pass@8").replace(" (exact, reverse)", "")
        ax.set(title=title, xlabel="epochs on each rollout batch (batches sampled)")
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def leverage_figure(plt, lines, is_dark):
    """Each gated run a dot: the mean angle by which the gate turns a gradient, and the factor by which KL ends elsewhere.

    The band: by which it ends elsewhere, on average, with another training seed, without a gate.
    """
    arms = ("opd_current", "lsm")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharex=True, sharey=True, layout="constrained")
    for ax, arm in zip(axes, arms, strict=True):
        ungated = scores(lines, arm, "heavy", "none", "kl")
        ax.axhspan(1, seed_factor(lines, arm), color="gray", alpha=0.2, linewidth=0, label="another training seed")
        for gates, (label, light, dark, marker) in GATE_STYLES.items():
            color = dark if is_dark else light
            if not any(name.split("/")[-2] in gates for name in lines):
                continue
            for name, line in lines.items():
                pair, *cell, gate, seed = name.split("/")
                if cell != [arm, "heavy"] or gate not in gates or (pair, seed) not in ungated:
                    continue
                effect = np.log(score(line, "kl") / ungated[pair, seed])
                face = color if effect > 0 or marker == "x" else "none"
                ax.plot(leverage(line)["angle"], np.exp(abs(effect)), marker, color=color, markerfacecolor=face)
            ax.plot([], [], marker, color=color, label=label)  # for the legend
        ax.set_xscale("log")
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.set(title=arm, xlabel="mean angle between gated and ungated gradient, degrees")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("KL against no gate: factor, either way\n(filled: higher KL, hollow: lower)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def seed_factor(lines, arm) -> float:
    """The factor, geometric mean, between the KLs of training seeds 0 and 1 of a pair, at eight epochs without a gate."""
    kl = scores(lines, arm, "dose_8", "none", "kl")
    ratios = [abs(np.log(kl[pair, "0"] / kl[pair, "1"])) for pair, seed in kl if seed == "1" and (pair, "0") in kl]
    return float(np.exp(np.mean(ratios))) if ratios else 1.0


def split_by_pair(lines):
    """(the toy pairs' lines, those of any other pair)."""
    toy = {name: line for name, line in lines.items() if name.split("/")[0].isdigit()}
    return toy, {name: line for name, line in lines.items() if name not in toy}


def report(path: Path):
    """Prints the tables, and writes doses.png and leverage.png, each also for a dark page, beside study.jsonl."""
    lines = read(path)
    print(f"{len(lines)} cells, {sum(line['seconds'] for line in lines.values()) / 3600:.1f} hours of runs")
    print("commit and hardware:", *sorted({f"{x['commit']}, {x['hardware']}" for x in lines.values()}), sep="\n  ")
    toy, other = split_by_pair(lines)
    for title, questions in QUESTIONS.items():
        if table := question_table(toy, questions):
            print(f"\n### {title} (n: pairs)\n\n{table}")
    if any("/dose_" in name for name in toy):
        print(f"\n### dose-response, pair 7, seed 0: KL in 0.001 nats per token; pass@8\n\n{single_dose_table(toy)}")
        print(f"\n### dose-response, change from one epoch (n: pairs)\n\n{dose_table(toy)}")
        draw(doses_figure, toy, path.parent / "doses")
    for title, part in (("toy pairs", toy), ("another pair", other)):
        if any(f"/{reuse}/none/" in name for name in part for reuse in REUSES):
            for metric, (name, _, _) in METRICS.items():
                print(f"\n### {title}: {name}\n\n{gate_table(part, metric)}")
    if any(line.get("leverage") for line in lines.values()):
        print(f"\n### leverage\n\n{leverage_table(lines)}")
        draw(leverage_figure, toy, path.parent / "leverage")
