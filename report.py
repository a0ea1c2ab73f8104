"""From graded samples to numbers: unbiased pass@k, intervals, paired comparisons, the table, the picture.

rows: dicts with data, problem, correct, finish, tokens, reason, gold (evaluate.py's samples.jsonl)
P problems, n samples of each, R runs
"""

import glob
import json
import math
from pathlib import Path

import numpy as np

from common import read_jsonl, write_file
from configs import BENCHMARKS
from grade import UNGRADABLE
from plot import pyplot

PAPER = {  # arXiv 2606.24084: pass@8 in %, on BENCHMARKS in this order; one seed each
    "base student": (77.2, 13.3, 10.0, 60.0),
    "OPD": (85.8, 20.0, 13.3, 80.0),
    "OPD + Block64": (86.4, 20.0, 20.0, 80.0),
    "OPD + NewlineSpan": (86.0, 26.7, 16.7, 75.0),
    "LSM": (86.0, 23.3, 20.0, 70.0),
    "LSM + Block64": (86.4, 20.0, 26.7, 80.0),
    "LSM + NewlineSpan": (86.2, 20.0, 26.7, 80.0),
    "teacher (4B)": (90.8, 46.7, 33.3, 90.0),
}
DRAWS = 10_000  # of every bootstrap and permutation
MEAN = "mean"  # the unweighted mean over benchmarks

# -----------------------------------------------------------------------------
# files


def read_rows(path: Path):
    """The rows of a .jsonl file, or of a folder's samples.jsonl."""
    path = path / "samples.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no finished evaluation: {path} does not exist")
    return read_jsonl(path)


def write_rows(path: Path, rows):
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))  # ASCII: a lone surrogate survives


# -----------------------------------------------------------------------------
# statistics


def pass_at_k(n: int, correct) -> np.ndarray:
    """[P, n]: each problem's pass@k for k = 1..n, from correct [P] of n samples: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374); k = 1 is mean@n.
    """
    ks = range(1, n + 1)
    table = [[1 - math.comb(n - c, k) / math.comb(n, k) for k in ks] for c in range(n + 1)]
    return np.array(table)[np.asarray(correct)]


def bootstrap(scores, low=0.0, high=1.0, seed=0) -> np.ndarray:
    """[DRAWS, ...]: means of scores [P, ...] under random weights of the problems (Rubin's Bayesian bootstrap).

    A problem's samples stay with it. Its score varies with them already, so to draw samples again within
    the problem would count their noise twice. Half a problem at each end of the scale joins in: without
    it, 0 of 30 solved has an interval of width 0. For 0/1 scores this makes Jeffreys' interval.
    """
    scores = np.asarray(scores, dtype=float)
    ends = np.stack([np.full(scores.shape[1:], low), np.full(scores.shape[1:], high)])
    shape = np.r_[np.ones(len(scores)), 0.5, 0.5]
    weights = np.random.default_rng(seed).standard_gamma(shape, (DRAWS, len(shape)))
    return np.tensordot(weights / weights.sum(1, keepdims=True), np.concatenate([scores, ends]), 1)


def interval(draws) -> np.ndarray:
    """[2, ...]: the middle 95 % of draws [DRAWS, ...]."""
    return np.quantile(draws, [0.025, 0.975], axis=0)


def paired(ours, base, seed=0):
    """(difference, (low, high), p) of ours - base, each a list over benchmarks of [R, P] on the same problems.

    One run on each side: p is the permutation test that swaps the two runs problem by problem. More: training
    seeds are noise as well, drawn as Student's t from the spread of run means, pooled over both sides, and p
    is read off the same draws as the interval. A side of one run counts as a fixed model.
    """
    rng = np.random.default_rng([seed, 1])
    diffs = [a.mean(0) - b.mean(0) for a, b in zip(ours, base, strict=True)]
    total, draws = np.mean([d.mean() for d in diffs]), 0.0
    for i, d in enumerate(diffs):
        most = np.abs(d).max() or 1.0  # the scale of bootstrap's half problems
        draws = draws + bootstrap(d, -most, most, seed=[seed, 0, i]) / len(diffs)
    runs = [np.mean([s.mean(1) for s in side], 0) for side in (ours, base) if len(side[0]) > 1]
    if runs:
        free = sum(len(m) - 1 for m in runs)
        variance = sum(((m - m.mean()) ** 2).sum() for m in runs) / free
        scale = math.sqrt(variance * sum(1 / len(m) for m in runs))
        draws = draws + scale * rng.standard_t(free, DRAWS)
        hits = 2 * min(np.sum(draws <= 0), np.sum(draws >= 0))
    else:
        flips = [(rng.integers(0, 2, (DRAWS, len(d))) * 2 - 1) @ d / len(d) for d in diffs]
        hits = np.sum(np.abs(np.mean(flips, 0)) >= abs(total) - 1e-12)
    return total, interval(draws), min(1.0, (1 + hits) / (1 + DRAWS))


# -----------------------------------------------------------------------------
# tables


def split(rows) -> dict:
    """{benchmark: its rows}, in the order of the rows."""
    sets = {}
    for row in rows:
        sets.setdefault(row["data"], []).append(row)
    return sets


def scores(rows) -> dict:
    """{problem id: its row of pass_at_k} of one benchmark's rows."""
    correct = {}
    for row in rows:
        correct.setdefault(row["problem"], []).append(row["correct"])
    n = min(map(len, correct.values()))
    return dict(zip(correct, pass_at_k(n, [sum(c[:n]) for c in correct.values()]), strict=True))


def metrics(rows, k: int) -> dict:
    """{"pass@K", "mean@N", "truncated", "length", "no_answer"} of one benchmark: shares, and tokens."""
    curves = np.array(list(scores(rows).values()))
    if k > curves.shape[1]:
        raise ValueError(f"pass@{k} needs {k} samples of each problem; here are {curves.shape[1]}")
    values = {f"pass@{k}": curves[:, k - 1], f"mean@{curves.shape[1]}": curves[:, 0]}
    values["truncated"] = [row["finish"] == "length" for row in rows]
    values["length"] = [row["tokens"] for row in rows]
    values["no_answer"] = [row["reason"] in UNGRADABLE for row in rows]
    return {name: float(np.mean(x)) for name, x in values.items()}


def summary(runs, k: int) -> dict:
    """{benchmark: its metrics, "problems", and curve, low, high: pass@k and interval for k = 1..n}.

    runs: the rows of each run of one model or variant; runs are averaged. Last, where there are several
    benchmarks: their unweighted mean.
    """
    found, draws = {}, []
    for i, name in enumerate(split(runs[0])):
        parts = [split(rows)[name] for rows in runs]
        of = [scores(part) for part in parts]
        curves = np.mean([[x[problem] for problem in of[0]] for x in of], 0)
        draws.append(bootstrap(curves, seed=i))
        means = [metrics(part, k) for part in parts]
        found[name] = {key: float(np.mean([x[key] for x in means])) for key in means[0]}
        found[name] |= {"problems": len(curves), "curve": curves.mean(0)}
    if len(found) > 1:
        entries = list(found.values())
        found[MEAN] = {key: np.mean([x[key] for x in entries], 0) for key in entries[0]}
        found[MEAN]["problems"] = sum(x["problems"] for x in entries)
        draws.append(np.mean(draws, 0))
    for x, d in zip(found.values(), draws, strict=True):
        low, high = interval(d)  # the half problems of several sets add up: keep the mean itself inside
        low, high = np.minimum(low, x["curve"]), np.maximum(high, x["curve"])
        x |= {"curve": list(x["curve"]), "low": list(low), "high": list(high)}
    return found


def percent(x, ends=()):
    return f"{100 * x:.1f}" + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if len(ends) else "")


def layout(head, body) -> str:
    """Rows of text as columns, the first flush left."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = []
    for row in [head, *body]:
        cells = [cell.rjust(w) for cell, w in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def table(found: dict, k: int) -> str:
    """A summary in percent, with 95 % intervals."""
    mean = list(next(iter(found.values())))[1]
    body = []
    for name, x in found.items():
        at_k, at_1 = ((x["low"][i], x["high"][i]) for i in (k - 1, 0))
        cells = [percent(x[f"pass@{k}"], at_k), percent(x[mean], at_1), percent(x["truncated"])]
        cells += [f"{x['length']:.0f}", percent(x["no_answer"])]
        body.append([name, str(x["problems"]), *cells])
    return layout(["", "problems", f"pass@{k} %", f"{mean} %", "cut off %", "tokens", "no answer %"], body)


def paper_table(ours: dict, k: int) -> str:
    """The paper's table, and ours, {name: summary}, under it."""
    columns = BENCHMARKS.split(",")
    body = [[name, *map(str, row), f"{np.mean(row):.1f}"] for name, row in PAPER.items()]
    for name, found in ours.items():
        have = [found[c][f"pass@{k}"] for c in columns if c in found]
        cells = [percent(found[c][f"pass@{k}"]) if c in found else "-" for c in columns]
        mean = percent(np.mean(have)) if len(have) == len(columns) else "-"
        body.append([f"ours: {name}", *cells, mean])
    return layout([f"paper: pass@8 %, ours: pass@{k} %", *columns, MEAN], body)


def comparison(arms: dict, k: int) -> str:
    """Each later arm against the first, on the benchmarks that all have. arms: {name: [rows of each run]}.

    ValueError where the problems are not the same ones, or a run has fewer than k samples of each.
    """
    runs = [(name, split(rows)) for name, arm in arms.items() for rows in arm]
    common = [s for s in runs[0][1] if all(s in sets for _, sets in runs)]
    if not common:
        raise ValueError(f"no benchmark in common: {[(name, list(sets)) for name, sets in runs]}")
    sides = {name: [[] for _ in common] for name in arms}  # [benchmark][run] of [P, n]
    for name, sets in runs:
        for i, s in enumerate(common):
            golds = [{(r["problem"], r["gold"]) for r in x[s]} for x in (runs[0][1], sets)]
            if odd := golds[0] ^ golds[1]:
                who = f"{runs[0][0]} and {name} do not answer the same problems of {s}"
                raise ValueError(f"{who}: {len(odd)} differ, for example (id, gold) = {min(odd)}")
            of, order = scores(sets[s]), scores(runs[0][1][s])
            if k > len(of[min(of)]):
                raise ValueError(f"--k is {k}, but {name} has {len(of[min(of)])} samples of each problem")
            sides[name][i].append(np.array([of[problem] for problem in order]))
    body, (first, *others) = [], arms
    sets = [([i], s) for i, s in enumerate(common)]
    sets += [(range(len(common)), MEAN)] * (len(common) > 1)
    for other in others:
        for at, label in ((k - 1, f"pass@{k}"), (0, "mean@n")):
            for pick, s in sets:
                pair = [[np.array(sides[a][i])[..., at] for i in pick] for a in (other, first)]
                diff, ends, p = paired(*pair)
                ours, base = (percent(np.mean([x.mean() for x in side])) for side in pair)
                body.append([other, s, label, ours, base, percent(diff, ends), f"{p:.4f}"])
    return layout(["variant", "", "%", "variant", first, "difference", "p"], body)


# -----------------------------------------------------------------------------
# picture


def picture(curves: dict, path):
    """pass@k against k with its 95 % band: a panel a benchmark, a line a run. curves: {name: summary}."""
    plt = pyplot()
    names = list(dict.fromkeys(s for found in curves.values() for s in found))
    size = (1 + 3.2 * len(names), 3.6)
    fig, axes = plt.subplots(1, len(names), figsize=size, squeeze=False, sharey=True)
    most = max(len(x["curve"]) for found in curves.values() for x in found.values())
    ticks = [2**i for i in range(12) if 2**i <= most]
    for ax, name in zip(axes[0], names, strict=True):
        for i, (label, found) in enumerate(curves.items()):
            if name in found:
                mid, low, high = (100 * np.array(found[name][x]) for x in ("curve", "low", "high"))
                ks = np.arange(1, len(mid) + 1)
                ax.plot(ks, mid, marker="o", markersize=3, color=f"C{i}", label=label)
                ax.fill_between(ks, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        ax.set(title=name, xlabel="k", ylim=(0, 103), xscale="log")
        ax.set_xticks(ticks, ticks)
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("pass@k, %; band: 95 %")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)
    fig.tight_layout(rect=(0, 0, 1, 0.92))
    fig.savefig(path, dpi=150)
    plt.close(fig)


def compare(cfg):
    arms = {}
    for text in cfg.compare:
        name, _, paths = text.rpartition("=")
        files = [file for path in paths.split(",") for file in sorted(glob.glob(path)) or [path]]
        arms[name or paths] = [read_rows(Path(file)) for file in files]
    if len(arms) < 2:
        raise ValueError("--compare takes at least two evaluations with different names")
    print(f"\n{comparison(arms, cfg.k)}\n")
    curves = {name: summary(runs, cfg.k) for name, runs in arms.items()}
    if cfg.paper:
        print(f"{paper_table(curves, cfg.k)}\n")
    out = Path(cfg.out or "out/eval")
    out.mkdir(parents=True, exist_ok=True)
    picture(curves, out / "pass_at_k.png")
    print(f"{out}/pass_at_k.png has the curves")
