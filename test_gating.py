"""python -m pytest test_gating.py      (torch and pytest are all it needs)"""

import math
import random

import pytest
import torch

from gating import block_segments, drift, gate, gate_stats, gate_weights, normalise, one_side, segment_drift
from gating import span_segments as spans

KINDS = ["none", "token", "block", "span", "sequence"]


def batch(B=5, T=97, seed=0, side="right"):
    """Random log-probs, ragged masks (one row empty, one of one token), newlines at about one in ten."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g) * 4
    new = old + 0.3 * torch.randn(B, T, generator=g)
    lengths = torch.tensor([T, 0, 1, T // 2, T - 3])[:B]
    mask = torch.arange(T) < lengths[:, None]
    newline = torch.rand(B, T, generator=g) < 0.1
    if side == "left":
        new, old, mask, newline = (x.flip(1) for x in (new, old, mask, newline))
    return new, old, mask, newline


def slow_spans(newlines, block, lo, hi):
    """The rule of span_segments in plain Python, one response: lengths of its segments."""
    n = len(newlines)
    if not any(newlines):
        return [min(block, n - i) for i in range(0, n, block)]
    lengths, run = [], 0
    for end in newlines:
        run += 1
        if end and run >= lo:
            lengths, run = lengths + [run], 0
    if run:
        if run < lo and lengths:
            lengths[-1] += run
        else:
            lengths.append(run)
    cut = []
    for length in lengths:
        size = math.ceil(length / math.ceil(length / hi))
        while length > 0:
            cut.append(min(size, length))
            length -= size
    return cut


def slow_gate(new, old, mask, newline, kind, tau=1.0, stat="mean", block=64, span_min=16, span_max=128):
    """Eq. 1 in plain Python floats."""
    out = torch.zeros(mask.shape)
    for b in range(len(mask)):
        cols = [t for t in range(mask.shape[1]) if mask[b, t]]
        sizes = {
            "none": [len(cols)], "sequence": [len(cols)], "token": [1] * len(cols),
            "block": [block] * math.ceil(len(cols) / block),
            "span": slow_spans([bool(newline[b, t]) for t in cols], block, span_min, span_max),
        }[kind]  # fmt: skip
        for size in sizes:
            segment, cols = cols[:size], cols[size:]
            d = [float(new[b, t] - old[b, t]) for t in segment]
            if not d:
                continue
            s = {
                "mean": sum(d) / len(d), "absmean": sum(map(abs, d)) / len(d),
                "rms": math.sqrt(sum(x * x for x in d) / len(d)),
            }[stat]  # fmt: skip
            for t in segment:
                out[b, t] = 1.0 if kind == "none" else math.exp(-tau * abs(s))
    return out


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stat", ["mean", "absmean", "rms"])
@pytest.mark.parametrize("kind", KINDS)
def test_gate_agrees_with_plain_python(kind, stat, side):
    new, old, mask, newline = batch(side=side)
    options = dict(tau=1.7, stat=stat, block=10, span_min=4, span_max=15)
    g, _ = gate(new, old, mask, kind, newline=newline, **options)
    slow = slow_gate(new, old, mask, newline, kind, **options)
    torch.testing.assert_close(g, slow, rtol=1e-5, atol=1e-6)


def test_hand_example():
    """Two blocks of two: the first drifts by +0.5 and -0.1 (mean 0.2), the second by -1 alone."""
    old = torch.tensor([[-1.0, -2.0, -3.0, 0.0]])
    new = torch.tensor([[-0.5, -2.1, -4.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    g, s = gate(new, old, mask, "block", block=2)
    torch.testing.assert_close(s, torch.tensor([[0.2, 0.2, -1.0, 0.0]]))
    torch.testing.assert_close(g, torch.tensor([[0.818731, 0.818731, 0.367879, 0.0]]))
    mean = (0.818731 * 2 + 0.367879) / 3
    torch.testing.assert_close(normalise(g, mask), g / mean)


@pytest.mark.parametrize("kind", KINDS)
def test_identity_current_equals_old_gives_exactly_one(kind):
    """Invariant 1: every gate is 1, and the gated loss is the base loss bit for bit."""
    new, _, mask, newline = batch()
    g, s = gate(new, new.clone(), mask, kind, newline=newline)
    assert (g[mask] == 1).all() and (s == 0).all()
    loss = torch.randn(mask.shape)
    assert (g * loss * mask).sum() / g.sum() == (loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("kind", ["token", "block", "span", "sequence"])
def test_split_minibatch_gives_the_same_gradient(kind):
    """Invariant 2: numerator and denominator add up over micro-batches."""
    new, old, mask, newline = batch()
    x = torch.randn(mask.shape, requires_grad=True)

    def sums(rows):
        g, _ = gate(new[rows], old[rows], mask[rows], kind, newline=newline[rows], block=8)
        return (g * x[rows].square() * mask[rows]).sum(), g.sum()

    top, bottom = sums(slice(None))
    (whole,) = torch.autograd.grad(top / bottom, x)
    parts = [sums(slice(b, b + 1)) for b in range(len(mask))]
    (split,) = torch.autograd.grad(sum(p[0] for p in parts), x)
    torch.testing.assert_close(whole, split / sum(p[1] for p in parts), rtol=1e-5, atol=1e-9)


def test_limits_block_one_is_token_and_block_T_is_sequence():
    """Invariant 3."""
    new, old, mask, _ = batch()
    T = mask.shape[1]
    assert torch.equal(gate(new, old, mask, "block", block=1)[0], gate(new, old, mask, "token")[0])
    for block in (T, 10 * T):
        assert torch.equal(gate(new, old, mask, "block", block=block)[0], gate(new, old, mask, "sequence")[0])


def test_blocks_restart_at_each_response_and_the_last_is_ragged():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool()
    assert block_segments(mask, 2)[mask].tolist() == [0, 0, 1, 1, 2, 0, 0, 1]


def test_padding_never_counts():
    """Invariant 3: whatever stands in the padding, NaN included, changes nothing."""
    new, old, mask, newline = batch()
    junk = torch.where(mask, new, float("nan"))
    for kind in KINDS:
        clean, _ = gate(new, old, mask, kind, newline=newline & mask)
        dirty, _ = gate(junk, old, mask, kind, newline=newline | ~mask)
        assert torch.equal(clean, dirty) and (clean[~mask] == 0).all()


def test_padding_side_and_holes_do_not_matter():
    new, old, mask, newline = batch()
    for kind in KINDS:
        g, _ = gate(new, old, mask, kind, newline=newline, block=7)
        order = torch.argsort(mask.long() + 0, dim=1, stable=True)  # padding first, order kept
        moved = [x.gather(1, order) for x in (new, old, mask, newline)]
        h, _ = gate(*moved[:3], kind, newline=moved[3], block=7)
        torch.testing.assert_close(g[mask], h[moved[2]])


def test_response_without_tokens_is_finite_and_contributes_nothing():
    empty = torch.zeros(2, 5)
    for kind in KINDS:
        g, s = gate(empty, empty - 1, empty.bool(), kind, newline=empty.bool())
        assert (g == 0).all() and (s == 0).all()
    assert torch.equal(normalise(empty, empty), empty)
    assert gate_stats(empty, empty, empty, empty) == {}
    nothing = torch.zeros(3, 0)
    assert all(gate(nothing, nothing, nothing.bool(), k, newline=nothing.bool())[0].shape == (3, 0) for k in KINDS)


def test_no_gradient_and_no_writes_to_inputs():
    """Invariant 4."""
    new, old, mask, newline = batch()
    new.requires_grad_(True)
    kept = [x.clone() for x in (new.detach(), old, mask, newline)]
    for kind in KINDS:
        assert not gate_weights(new, old, mask, kind, newline=newline).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(kept, (new.detach(), old, mask, newline), strict=True))


def test_normalised_gate_has_mean_one():
    new, old, mask, newline = batch()
    for kind in KINDS:
        w = gate_weights(new, old, mask, kind, newline=newline, tau=3.0)
        assert abs(float(w[mask].mean()) - 1) < 1e-6


def test_signed_mean_cancels_and_the_others_do_not():
    old, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
    new = torch.tensor([[0.5, -0.5]])
    assert (gate(new, old, mask, "block")[0] == 1).all()
    for stat in ("absmean", "rms"):
        torch.testing.assert_close(gate(new, old, mask, "block", stat=stat)[0][0, 0].item(), math.exp(-0.5))


@pytest.mark.parametrize("seed", range(30))
def test_spans_agree_with_plain_python(seed):
    rng = random.Random(seed)
    T, lo = rng.randint(1, 70), rng.randint(1, 9)
    options = dict(block=rng.randint(1, 20), span_min=lo, span_max=lo + rng.randint(0, 20))
    rate = rng.choice([0, 0.05, 0.3, 1])
    newline = torch.rand(4, T, generator=torch.Generator().manual_seed(seed)) < rate
    mask = torch.arange(T) < torch.tensor([[T], [rng.randint(0, T)], [1], [T // 2]])
    got = spans(mask, newline, **options)
    for b in range(4):
        n = int(mask[b].sum())
        lengths = slow_spans(newline[b, :n].tolist(), options["block"], lo, options["span_max"])
        assert torch.bincount(got[b, :n], minlength=len(lengths)).tolist() == lengths or n == 0
        assert (got[b, :n].diff() >= 0).all()


def test_span_bounds_hold():
    """No span over span_max, and none under span_min where span_max leaves room for it."""
    newline = torch.rand(50, 300, generator=torch.Generator().manual_seed(1)) < 0.2
    newline[:, 5] = True
    segment = spans(torch.ones(50, 300).bool(), newline, block=64, span_min=10, span_max=40)
    for row in segment:
        lengths = torch.bincount(row)
        assert lengths.max() <= 40 and lengths.min() >= 10


def test_response_without_newline_falls_back_to_blocks():
    mask = torch.ones(2, 50).bool()
    newline = torch.zeros(2, 50).bool()
    newline[1, 20] = True
    segment = spans(mask, newline, block=16, span_min=4, span_max=100)
    assert torch.equal(segment[0], torch.arange(50) // 16)
    assert torch.equal(segment[1], (torch.arange(50) > 20).long())


def test_one_side_by_hand():
    old, new = torch.full((4,), -1.0), torch.tensor([-0.5, -0.5, -1.5, -1.5])
    teacher = torch.tensor([-0.2, -3.0, -3.0, -0.2])  # toward, away, toward, away
    assert one_side(new, old, teacher, "toward").tolist() == [-0.5, -1.0, -1.5, -1.0]
    assert one_side(new, old, teacher, "away").tolist() == [-1.0, -0.5, -1.0, -1.5]
    assert one_side(new, old, teacher) is new
    never = torch.full((4,), -math.inf)
    assert one_side(new, never, never, "toward").isneginf().all()
    with pytest.raises(ValueError, match="not one of"):
        one_side(new, old, teacher, "up")


def test_stats_by_hand():
    g = torch.tensor([1.0, 1.0, 0.5, 0.25, 9.0])
    d = torch.tensor([0.0, 0.2, -0.6, 1.0, 9.0])
    stats = gate_stats(g, -d, d, torch.tensor([1, 1, 1, 1, 0]))
    expected = dict(
        mean=0.6875,
        min=0.25,
        p05=0.25,
        ess=2.75**2 / (4 * 2.3125),
        below_half=0.25,
        drift_abs=0.45,
        s_abs=0.45,
        s_max=1.0,
    )
    assert {k: round(float(v), 5) for k, v in stats.items()} == {k: round(v, 5) for k, v in expected.items()}


def test_extreme_values_stay_finite():
    inf = float("inf")
    new = torch.tensor([[-inf, 0.0, -inf, -6e4, 0.0]])
    old = torch.tensor([[-inf, -inf, 0.0, 0.0, -6e4]])
    mask = torch.ones(1, 5).bool()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for kind in KINDS:
            for stat in ("mean", "absmean", "rms"):
                g, s = gate(new.to(dtype), old.to(dtype), mask, kind, stat=stat, newline=mask)
                w = gate_weights(new.to(dtype), old.to(dtype), mask, kind, stat=stat, newline=mask)
                assert g.isfinite().all() and s.isfinite().all() and w.isfinite().all()
    assert drift(new, old, mask).isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kind="blocks"), "not one of"), (dict(stat="median"), "not one of"), (dict(tau=-1), "tau is -1"),
        (dict(block=0), "at least 1"), (dict(kind="span"), "newline"),
        (dict(kind="span", newline=torch.ones(1, 3), span_min=9, span_max=4), "span_min"),
    ],
)  # fmt: skip
def test_wrong_arguments_say_what_is_wrong(options, message):
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=message):
        gate(x, x, x.bool(), **options)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        gate(torch.zeros(1, 3), torch.zeros(1, 4), torch.zeros(1, 3))
    assert segment_drift(torch.ones(1, 3), torch.ones(1, 3), torch.zeros(1, 3).long()).tolist() == [[1, 1, 1]]
