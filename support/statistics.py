"""From graded samples to numbers: unbiased pass@k, intervals, and paired comparisons.

A row is one graded sample, a dictionary from evaluate.py's samples.jsonl with data (its benchmark), problem (an id),
correct, finish, tokens, reason and gold. Shapes: R runs, P problems of a benchmark, n samples of each problem.
"""

import math
from pathlib import Path

import numpy as np

from support.files import read_jsonl
from support.grade import UNGRADABLE

DRAWS = 10_000  # random draws in each bootstrap and each permutation test
MEAN = "mean"  # the name under which tables list the unweighted mean over benchmarks

# -----------------------------------------------------------------------------
# rows


def read_rows(path: Path):
    """The rows of a .jsonl file, or of a finished evaluation's folder. ValueError if there is none."""
    if path.is_dir():
        if (path / "identity.json").exists() and not (path / "results.json").exists():
            raise ValueError(f"no finished evaluation: {path} was stopped; its command, run again, finishes it")
        path = path / "samples.jsonl"
    if not path.is_file():
        raise ValueError(f"no finished evaluation: {path} does not exist")
    return read_jsonl(path)


def rows_by_benchmark(rows) -> dict:
    """{benchmark: its rows}, in the order of the rows."""
    benchmarks = {}
    for row in rows:
        benchmarks.setdefault(row["data"], []).append(row)
    return benchmarks


def shared_benchmarks(runs) -> list[str]:
    """The benchmarks that all runs have, each a dictionary of its rows by benchmark."""
    return [benchmark for benchmark in runs[0] if all(benchmark in run for run in runs)]


# -----------------------------------------------------------------------------
# statistics


def pass_at_k(n: int, correct) -> np.ndarray:
    """[P, n]: pass@k of each problem for k = 1..n, from correct [P], how many of its n samples are correct.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), 1 - C(n - c, k) / C(n, k). At k = 1 it is mean@n.
    """
    curve_for_count = [[1 - math.comb(n - c, k) / math.comb(n, k) for k in range(1, n + 1)] for c in range(n + 1)]
    return np.array(curve_for_count)[np.asarray(correct)]


def bootstrap(scores, low=0.0, high=1.0, seed=0) -> np.ndarray:
    """[DRAWS, ...]: means of scores [P, ...] in a Bayesian bootstrap over problems (Rubin 1981).

    Each draw gives the problems random Dirichlet weights, as if other problems had been collected. A problem's samples
    are not resampled, because the spread of the scores already contains their noise. Two pseudo-problems of half weight
    with scores `low` and `high`, the ends of the scale, are added: without them 0 of 30 solved would have an interval
    of width 0. For scores of 0 and 1 this is Jeffreys' interval.
    """
    scores = np.asarray(scores, dtype=float)
    pseudo_scores = np.stack([np.full(scores.shape[1:], low), np.full(scores.shape[1:], high)])
    concentration = np.r_[np.ones(len(scores)), 0.5, 0.5]
    weights = np.random.default_rng(seed).standard_gamma(concentration, (DRAWS, len(concentration)))
    weights /= weights.sum(1, keepdims=True)  # gamma variates divided by their sum are Dirichlet weights
    return np.tensordot(weights, np.concatenate([scores, pseudo_scores]), 1)


def interval(draws) -> np.ndarray:
    """[2, ...]: the bounds of the middle 95 % of draws [DRAWS, ...]."""
    return np.quantile(draws, [0.025, 0.975], axis=0)


def paired(ours, base, seed=0):
    """(difference, (low, high), p_value): how much higher `ours` scores than `base` on the same problems.

    ours, base: for each benchmark the scores [R, P] of R runs (training seeds) on P problems, in the same order. The
    difference is between means over runs and problems, averaged over benchmarks.

    Interval: problems are resampled (see bootstrap), because other problems would have given another result. A draw
    weights the differences of the problems, not each side on its own: what makes a problem hard for both sides cancels.
    p_value, one run on each side: a permutation test. If the two models do not differ, a problem's two scores are
    exchangeable, so each difference gets a random sign. This says nothing about other training seeds.
    Several runs: another seed would have trained another model, so each draw also gets noise for the seeds: Student's
    t, scaled by the spread of run means within a side, pooled over both sides. p_value is twice the share of draws
    beyond 0. A side with one run shows no spread and counts as a fixed model. Both the differences and the run means
    contain the noise of sampling responses, so the interval is, if anything, too wide.
    """
    differences = [a.mean(0) - b.mean(0) for a, b in zip(ours, base, strict=True)]  # [P] for each benchmark
    difference = np.mean([by_problem.mean() for by_problem in differences])
    draws = np.zeros(DRAWS)
    for i, by_problem in enumerate(differences):
        largest = np.abs(by_problem).max() or 1.0  # ±1 would make the pseudo-problems outweigh small differences
        draws += bootstrap(by_problem, -largest, largest, seed=[seed, 0, i]) / len(differences)
    rng = np.random.default_rng([seed, 1])
    sides = [side for side in (ours, base) if len(side[0]) > 1]  # those with several runs
    if sides:
        run_means = [np.mean([scores.mean(1) for scores in side], 0) for side in sides]  # [R] of each side
        degrees_of_freedom = sum(len(means) - 1 for means in run_means)
        variance = sum(((means - means.mean()) ** 2).sum() for means in run_means) / degrees_of_freedom
        standard_error = math.sqrt(variance * sum(1 / len(means) for means in run_means))
        draws += standard_error * rng.standard_t(degrees_of_freedom, DRAWS)
        n_extreme = 2 * min(np.sum(draws <= 0), np.sum(draws >= 0))
    else:
        signs = [rng.integers(0, 2, (DRAWS, len(by_problem))) * 2 - 1 for by_problem in differences]
        permuted = [s @ by_problem / len(by_problem) for s, by_problem in zip(signs, differences, strict=True)]
        n_extreme = np.sum(np.abs(np.mean(permuted, 0)) >= abs(difference) - 1e-12)  # ties count, despite rounding
    p_value = min(1.0, (1 + n_extreme) / (1 + DRAWS))  # the data count as one more draw: never 0
    return difference, interval(draws), p_value


# -----------------------------------------------------------------------------
# metrics


def curves_by_problem(rows, k: int) -> dict:
    """{problem id: its pass@k for k = 1..n} of one benchmark's rows, n samples of each problem. ValueError if n < k, or differs."""
    verdicts = {}
    for row in rows:
        samples = verdicts.setdefault(row["problem"], {})
        if (
            row["sample"] in samples
        ):  # such as files joined that hold the same samples: they would count as independent ones
            raise ValueError(f"sample {row['sample']} of problem {row['problem']} is there twice")
        samples[row["sample"]] = row["correct"]
    n = min(map(len, verdicts.values()))
    if n < (most := max(map(len, verdicts.values()))):
        raise ValueError(f"some problems have {n} sample(s), others {most}: has a part of the evaluation been lost?")
    if k > n:
        raise ValueError(f"--k is {k}, but there are {n} sample(s) of each problem: lower --k")
    n_correct = [sum(samples.values()) for samples in verdicts.values()]
    return dict(zip(verdicts, pass_at_k(n, n_correct), strict=True))


def curves_of_runs(runs, k: int) -> np.ndarray:
    """[R, P, n] of R runs' rows of one benchmark. The problems are sorted, so that those of other runs pair up with them."""
    runs = [curves_by_problem(rows, k) for rows in runs]
    sizes = sorted({len(curve) for curves in runs for curve in curves.values()})
    if len(sizes) > 1:
        raise ValueError(f"runs of one variant have {sizes} samples of each problem; they need equally many")
    return np.array([[curves[problem] for problem in sorted(runs[0])] for curves in runs])


def metrics(rows, k: int) -> dict:
    """{"pass@K", "mean@N", "truncated", "length", "no_answer"} of one benchmark's rows: shares; tokens for length."""
    curve = np.mean(list(curves_by_problem(rows, k).values()), 0)  # [n]
    values = {
        f"pass@{k}": curve[k - 1],
        f"mean@{len(curve)}": curve[0],
        "truncated": np.mean([row["finish"] == "length" for row in rows]),
        "length": np.mean([row["tokens"] for row in rows]),
        "no_answer": np.mean([row["reason"] in UNGRADABLE for row in rows]),
    }
    return {name: float(x) for name, x in values.items()}


def summary(runs, k: int) -> dict:
    """{benchmark: its metrics, "problems" (how many), and "curve", "low", "high": pass@k and interval for k = 1..n}.

    runs: the rows of each run of one model or variant, to be averaged on the benchmarks that all of them have. With several
    benchmarks, their unweighted mean comes last.
    """
    runs = [rows_by_benchmark(rows) for rows in runs]
    entries, draws = {}, []
    for seed, benchmark in enumerate(shared_benchmarks(runs)):
        curves = curves_of_runs([run[benchmark] for run in runs], k).mean(0)  # [P, n]
        run_metrics = [metrics(run[benchmark], k) for run in runs]
        entry = {name: float(np.mean([values[name] for values in run_metrics])) for name in run_metrics[0]}
        entries[benchmark] = entry | {"problems": len(curves), "curve": curves.mean(0)}
        draws.append(bootstrap(curves, seed=seed))  # [DRAWS, n]
    sizes = {benchmark: len(entry["curve"]) for benchmark, entry in entries.items()}
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{n} samples of each problem of {benchmark}" for benchmark, n in sizes.items())
        raise ValueError(f"there are {found or 'no samples'}; all benchmarks need equally many, at least one")

    if len(entries) > 1:
        each = list(entries.values())
        entries[MEAN] = {key: np.mean([entry[key] for entry in each], 0) for key in each[0]}
        entries[MEAN]["problems"] = sum(entry["problems"] for entry in each)
        draws.append(np.mean(draws, 0))
    for entry, entry_draws in zip(entries.values(), draws, strict=True):
        low, high = interval(entry_draws)
        # Pseudo-problems pull every benchmark toward 50 %; the narrower interval of their mean could miss that mean.
        low, high = np.minimum(low, entry["curve"]), np.maximum(high, entry["curve"])
        entry |= {"curve": list(entry["curve"]), "low": list(low), "high": list(high)}
    return entries
