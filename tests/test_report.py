"""report.py: estimators, intervals, comparisons. Run: python -m pytest tests/test_report.py"""

import itertools
import random

import numpy as np
import pytest

from support import report, statistics


def make_rows(correct, name="set"):
    """Rows of a table [P][n] of verdicts."""
    row = dict(data=name, finish="stop", tokens=5, reason="equal", gold="7")
    return [
        row | dict(problem=f"p{i}", sample=j, correct=bool(c)) for i, of in enumerate(correct) for j, c in enumerate(of)
    ]


def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample():
    rng = random.Random(0)
    for n in range(1, 9):
        table = [[rng.random() < 0.4 for _ in range(n)] for _ in range(5)]
        found = statistics.pass_at_k(n, [sum(row) for row in table])
        for row, k in itertools.product(range(5), range(1, n + 1)):
            subsets = list(itertools.combinations(table[row], k))
            assert found[row, k - 1] == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.slow
def test_intervals_cover_the_truth_about_95_times_in_100():
    """30 problems whose difficulty is skewed like AIME's, 8 samples each: 300 benchmarks drawn, one truth."""
    rng = np.random.default_rng(0)

    def difficulties(size):
        return np.where(rng.random(size) < 0.5, 0.0, rng.beta(0.5, 2, size))

    for k in (1, 8):
        truth = (1 - (1 - difficulties(1_000_000)) ** k).mean()
        hits = 0
        for seed in range(300):
            scores = statistics.pass_at_k(8, rng.binomial(8, difficulties(30)))[:, k - 1]
            low, high = statistics.interval(statistics.bootstrap(scores, seed=seed))
            hits += low <= truth <= high
        assert 0.90 <= hits / 300 <= 0.98


def test_no_or_every_problem_solved_still_has_an_interval():
    low, high = statistics.interval(statistics.bootstrap(np.zeros(30)))
    assert low < 0.001 and 0.05 < high < 0.12
    low, high = statistics.interval(statistics.bootstrap(np.ones(30)))
    assert 0.88 < low < 0.95 and high > 0.999


def test_a_planted_difference_is_found_and_a_null_one_is_not():
    rng = np.random.default_rng(0)
    p = rng.beta(1, 1, 60)
    sides = [statistics.pass_at_k(8, rng.binomial(8, x))[None, :, 0] for x in (p, p, np.clip(p + 0.2, 0, 1))]
    diff, (low, high), value = statistics.paired([sides[2]], [sides[0]])
    assert 0.1 < diff < 0.25 and low > 0 and value < 0.01
    diff, (low, high), value = statistics.paired([sides[1]], [sides[0]])
    assert low < 0 < high and value > 0.05


def test_training_seeds_widen_a_comparison_by_their_own_noise():
    """Seeds that all differ from each other: two lucky ones must not look like an effect."""
    rng = np.random.default_rng(0)
    calm, wild = (0.5 + shift + rng.normal(0, 0.01, (3, 50)) for shift in (0.0, np.array([[-0.2], [0.1], [0.2]])))
    narrow, wide = (statistics.paired([side], [calm])[1] for side in (calm + 0.03, wild))
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0]) > 0
    assert wide[0] < 0 < wide[1]


@pytest.mark.parametrize(
    "rows, message",
    [
        (make_rows([[1, 0]] * 2) * 2, "sample 0 of problem p0 is there twice"),  # mlcommons/inference#246
        (make_rows([[1, 0, 1], [1, 1]]), "some problems have 2 .*others 3"),
        (make_rows([[1, 1]], "a") + make_rows([[1, 1, 1]], "b"), "2 samples .*a.*3 .*b"),
        (make_rows([[0, 0]]), "--k is 3, but there are 2"),  # nuprl/MultiPL-E#40
        ([], "no samples"),
    ],
)
def test_rows_that_give_no_honest_pass_at_k_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        statistics.summary([rows], 3 if "--k" in message else 2)


def test_the_mean_over_benchmarks_is_unweighted():
    rows = make_rows([[1, 1]] * 2, "small") + make_rows([[0, 0]] * 30, "large")
    found = statistics.summary([rows], 2)
    assert list(found) == ["small", "large", "mean"]
    assert found["mean"]["pass@2"] == 0.5
    assert found["mean"]["low"][1] < 0.5 < found["mean"]["high"][1]


def test_compare_names_the_problems_that_differ():
    a, b = make_rows([[1, 0]] * 4), make_rows([[1, 0]] * 5)
    with pytest.raises(ValueError, match="do not answer the same problems of set.*p4"):
        report.comparison({"a": [a], "b": [b]}, 2)
    with pytest.raises(ValueError, match="--k is 3"):
        report.comparison({"a": [a], "b": [a]}, 3)
    with pytest.raises(ValueError, match="no benchmark in common"):
        report.comparison({"a": [a], "b": [make_rows([[1, 0]], "other")]}, 1)


def test_compare_puts_the_difference_and_its_p_in_a_row():
    a, b = make_rows([[0] * 8] * 10 + [[1] * 8] * 10), make_rows([[1] * 8] * 20)
    lines = report.comparison({"base": [a], "new": [b, b]}, 8).splitlines()
    assert lines[2].split()[:5] == ["new", "set", "pass@8", "100.0", "50.0"]
    assert lines[2].split()[5] == "50.0" and float(lines[2].split()[-1]) < 0.01
