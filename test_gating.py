"""python -m pytest test_gating.py      (needs torch and pytest alone)"""

import math
import multiprocessing
import os
import random
import textwrap

import pytest
import torch
import torch.distributed as dist

import gating
from gating import KINDS, drift, gate, gate_stats, gate_weights, segment_drift, segment_index, segment_lengths


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


def padded_gate(new, old, mask, kind, *, tau=1.0, stat="mean", **options):
    """gate() on [B, T]: 0 where mask is False."""
    segments = segment_index(mask, kind, **options)
    out = torch.zeros(mask.shape)
    out[mask], _ = gate(drift(new[mask], old[mask]), segments, kind, tau=tau, stat=stat)
    return out


def naive_span_lengths(newlines, block, span_min, span_max):
    """The rule of segment_lengths for spans, written again by looking for the borders."""
    n = len(newlines)
    if not any(newlines):
        return [min(block, n - i) for i in range(0, n, block)]
    borders = [0]
    for t in range(n):
        if newlines[t] and t + 1 - borders[-1] >= span_min:
            borders.append(t + 1)
    if borders[-1] != n:
        if n - borders[-1] < span_min and len(borders) > 1:
            borders.pop()
        borders.append(n)
    lengths = []
    for start, end in zip(borders, borders[1:]):  # noqa: B905
        n_parts = math.ceil((end - start) / span_max)
        size = math.ceil((end - start) / n_parts)
        while start < end:
            lengths.append(min(size, end - start))
            start += size
    return lengths


def naive_gate(new, old, mask, newline, kind, tau=1.0, stat="mean", block=64, span_min=16, span_max=128):
    """Eq. 1 in plain Python floats."""
    out = torch.zeros(mask.shape)
    for b in range(len(mask)):
        cols = [t for t in range(mask.shape[1]) if mask[b, t]]
        sizes = {
            "none": [len(cols)], "sequence": [len(cols)], "token": [1] * len(cols),
            "block": [block] * math.ceil(len(cols) / block),
            "span": naive_span_lengths([bool(newline[b, t]) for t in cols], block, span_min, span_max),
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


# -----------------------------------------------------------------------------
# Eq. 1


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stat", ["mean", "absmean", "rms"])
@pytest.mark.parametrize("kind", KINDS)
def test_gate_agrees_with_plain_python(kind, stat, side):
    new, old, mask, newline = batch(side=side)
    options = dict(tau=1.7, stat=stat, block=10, span_min=4, span_max=15)
    g = padded_gate(new, old, mask, kind, newline=newline, **options)
    naive = naive_gate(new, old, mask, newline, kind, **options)
    torch.testing.assert_close(g, naive, rtol=1e-5, atol=1e-6)
    weights = gate_weights(new, old, mask, kind, newline=newline, **options)
    torch.testing.assert_close(weights, naive / naive[mask].mean(), rtol=1e-5, atol=1e-6)


def test_hand_example():
    """Two blocks of two: the first drifts by +0.5 and -0.1 (mean 0.2), the second by -1 alone."""
    old = torch.tensor([[-1.0, -2.0, -3.0, 0.0]])
    new = torch.tensor([[-0.5, -2.1, -4.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    g, s = gate(drift(new[mask], old[mask]), segment_index(mask, "block", block=2))
    torch.testing.assert_close(s, torch.tensor([0.2, 0.2, -1.0]))
    torch.testing.assert_close(g, torch.tensor([0.818731, 0.818731, 0.367879]))
    mean = (0.818731 * 2 + 0.367879) / 3
    weights = gate_weights(new, old, mask, "block", block=2)
    torch.testing.assert_close(weights, torch.tensor([[0.818731, 0.818731, 0.367879, 0.0]]) / mean)


@pytest.mark.parametrize("kind", KINDS)
def test_without_drift_every_gate_is_exactly_one(kind):
    """Invariant 1: and then the gated loss equals the base loss bit for bit."""
    new, _, mask, newline = batch()
    g, s = gate(drift(new[mask], new[mask].clone()), segment_index(mask, kind, newline=newline), kind)
    assert (g == 1).all() and (s == 0).all()
    loss = torch.randn(int(mask.sum()))
    assert (g * loss).sum() / g.sum() == loss.sum() / len(loss)
    assert (gate_weights(new, new.clone(), mask, kind, newline=newline)[mask] == 1).all()


@pytest.mark.parametrize("kind", ["token", "block", "span", "sequence"])
def test_split_minibatch_gives_the_same_gradient(kind):
    """Invariant 2: numerator and denominator add up over micro-batches."""
    new, old, mask, newline = batch()
    x = torch.randn(mask.shape, requires_grad=True)

    def sums(rows):
        g = padded_gate(new[rows], old[rows], mask[rows], kind, newline=newline[rows], block=8)
        return (g * x[rows].square() * mask[rows]).sum(), g.sum()

    numerator, denominator = sums(slice(None))
    (whole,) = torch.autograd.grad(numerator / denominator, x)
    parts = [sums(slice(b, b + 1)) for b in range(len(mask))]
    (split,) = torch.autograd.grad(sum(p[0] for p in parts), x)
    torch.testing.assert_close(whole, split / sum(p[1] for p in parts), rtol=1e-5, atol=1e-9)


def test_block_of_one_is_the_token_gate_and_block_of_T_the_sequence_gate():
    """Invariant 3."""
    new, old, mask, _ = batch()
    T = mask.shape[1]
    assert torch.equal(padded_gate(new, old, mask, "block", block=1), padded_gate(new, old, mask, "token"))
    for block in (T, 10 * T):
        assert torch.equal(padded_gate(new, old, mask, "block", block=block), padded_gate(new, old, mask, "sequence"))


def test_blocks_restart_at_each_response_and_the_last_is_ragged():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool()
    assert segment_index(mask, "block", block=2).tolist() == [0, 0, 1, 1, 2, 3, 3, 4]


def test_padding_never_counts():
    """Invariant 3: whatever stands in the padding, NaN included, changes nothing."""
    new, old, mask, newline = batch()
    junk = torch.where(mask, new, float("nan"))
    for kind in KINDS:
        clean = gate_weights(new, old, mask, kind, newline=newline & mask)
        dirty = gate_weights(junk, old, mask, kind, newline=newline | ~mask)
        assert torch.equal(clean, dirty) and (clean[~mask] == 0).all()


def test_padding_side_and_holes_do_not_matter():
    new, old, mask, newline = batch()
    for kind in KINDS:
        g = padded_gate(new, old, mask, kind, newline=newline, block=7)
        order = torch.argsort(mask.long() + 0, dim=1, stable=True)  # padding first, order kept
        moved = [x.gather(1, order) for x in (new, old, mask, newline)]
        h = padded_gate(*moved[:3], kind, newline=moved[3], block=7)
        torch.testing.assert_close(g[mask], h[moved[2]])


def test_a_batch_without_response_tokens_is_finite_and_contributes_nothing():
    empty = torch.zeros(2, 5)
    nothing = torch.zeros(3, 0)
    for kind in KINDS:
        for x in (empty, nothing):
            assert torch.equal(gate_weights(x, x - 1, x.bool(), kind, newline=x.bool()), x)
        g, s = gate(torch.zeros(0), segment_index(empty.bool(), kind, newline=empty), kind)
        assert g.shape == s.shape == (0,)
    assert gate_stats(g, s, s) == {}


def test_no_gradient_and_no_writes_to_inputs():
    """Invariant 4."""
    new, old, mask, newline = batch()
    new.requires_grad_(True)
    kept = [x.clone() for x in (new.detach(), old, mask, newline)]
    for kind in KINDS:
        assert not gate_weights(new, old, mask, kind, newline=newline).requires_grad
        assert not gate(drift(new[mask], old[mask]), segment_index(mask, kind, newline=newline), kind)[0].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(kept, (new.detach(), old, mask, newline), strict=True))


def test_weights_have_mean_one():
    new, old, mask, newline = batch()
    for kind in KINDS:
        w = gate_weights(new, old, mask, kind, newline=newline, tau=3.0)
        assert abs(float(w[mask].mean()) - 1) < 1e-6


def test_the_signed_mean_cancels_and_the_other_statistics_do_not():
    old, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
    new = torch.tensor([[0.5, -0.5]])
    assert (padded_gate(new, old, mask, "block") == 1).all()
    for stat in ("absmean", "rms"):
        g = padded_gate(new, old, mask, "block", stat=stat)
        torch.testing.assert_close(g[0, 0].item(), math.exp(-0.5))


# -----------------------------------------------------------------------------
# segments


@pytest.mark.parametrize("seed", range(30))
def test_spans_agree_with_the_rule_written_again(seed):
    rng = random.Random(seed)
    T, span_min = rng.randint(1, 70), rng.randint(1, 9)
    options = dict(block=rng.randint(1, 20), span_min=span_min, span_max=span_min + rng.randint(0, 20))
    rate = rng.choice([0, 0.05, 0.3, 1])
    newline = torch.rand(4, T, generator=torch.Generator().manual_seed(seed)) < rate
    lengths = [T, rng.randint(0, T), 1, T // 2]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    index = segment_index(mask, "span", newline=newline, **options)
    expected = [x for row, n in enumerate(lengths) for x in naive_span_lengths(newline[row, :n].tolist(), **options)]
    assert torch.bincount(index).tolist() == expected and (index.diff() >= 0).all()


def test_span_lengths_stay_between_their_bounds():
    """No span over span_max, and none under span_min if span_max leaves room for it."""
    newline = torch.rand(50, 300, generator=torch.Generator().manual_seed(1)) < 0.2
    newline[:, 5] = True
    for row in newline.tolist():
        lengths = segment_lengths(300, "span", row, span_min=10, span_max=40)
        assert max(lengths) <= 40 and min(lengths) >= 10 and sum(lengths) == 300


def test_the_docstrings_example_of_spans():
    lines = [3, 9, 30]
    newlines = [t + 1 in (3, 12, 42) for t in range(sum(lines))]
    assert segment_lengths(42, "span", newlines, span_min=8, span_max=20) == [12, 15, 15]


def test_a_response_without_a_newline_gets_blocks():
    newlines = [False] * 50
    assert segment_lengths(50, "span", newlines, block=16, span_min=4, span_max=100) == [16, 16, 16, 2]
    newlines[20] = True
    assert segment_lengths(50, "span", newlines, block=16, span_min=4, span_max=100) == [21, 29]


# -----------------------------------------------------------------------------
# numbers and arguments


def test_stats_by_hand():
    g = torch.tensor([1.0, 1.0, 0.5, 0.25])
    d = torch.tensor([0.0, 0.2, -0.6, 1.0])
    expected = {
        "gate/mean": 0.6875, "gate/min": 0.25, "gate/p05": 0.25, "gate/ess": 2.75**2 / (4 * 2.3125),
        "gate/below_half": 0.25, "gate/drift_abs": 0.45, "gate/s_abs": 0.45, "gate/s_max": 1.0,
    }  # fmt: skip
    stats = {name: float(x) for name, x in gate_stats(g, -d, d).items()}
    assert stats == pytest.approx(expected, abs=1e-5)


def test_extreme_log_probs_give_finite_gates():
    inf = float("inf")
    new = torch.tensor([[-inf, 0.0, -inf, -6e4, 0.0]])
    old = torch.tensor([[-inf, -inf, 0.0, 0.0, -6e4]])
    mask = torch.ones(1, 5).bool()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for kind in KINDS:
            for stat in ("mean", "absmean", "rms"):
                segments = segment_index(mask, kind, newline=mask)
                g, s = gate(drift(new[0].to(dtype), old[0].to(dtype)), segments, stat=stat)
                w = gate_weights(new.to(dtype), old.to(dtype), mask, kind, stat=stat, newline=mask)
                assert g.isfinite().all() and s.isfinite().all() and w.isfinite().all()
    assert drift(new, old).isfinite().all()


def test_a_log_prob_of_nan_is_not_hidden():
    """With a loss on the teacher's top-K tokens, the sampled token's log-prob may be NaN though the loss is not."""
    nan, one = float("nan"), torch.ones(1)
    for new, old in ((nan, -1.0), (-1.0, nan), (nan, nan)):
        assert drift(new * one, old * one).isnan()
    mask = torch.ones(1, 4, dtype=torch.bool)
    g, _ = gate(drift(torch.tensor([-1.0, nan, -1.0, -1.0]), -torch.ones(4)), segment_index(mask, "block", block=2))
    assert g.isnan().tolist() == [True, True, False, False]


def test_gates_that_all_underflow_give_weights_of_zero():
    x = torch.zeros(1, 4)
    assert (gate_weights(x + 1, x, x == 0, "block", tau=1e30) == 0).all()


# -----------------------------------------------------------------------------
# the recipe in the docstring, as it is written there


def recipe():
    """The code of the docstring's recipe."""
    start = gating.__doc__.index("    gate_sum = torch.zeros")
    return textwrap.dedent(gating.__doc__[start : gating.__doc__.index("Undo any division")])


def model_and_batch(kind):
    """A linear map from positions to log-probs, and a minibatch of 4 responses on which it has drifted."""
    _, old, mask, newline = batch(B=4, T=60, seed=KINDS.index(kind))
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4, 60, 3, generator=generator)
    model = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.4)
    return model, features, old, mask, newline


def one_rank(rank, world, port, kind, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plain, features, old, mask, newline = model_and_batch(kind)
    model = torch.nn.parallel.DistributedDataParallel(plain)

    def micro_batches():  # two on each rank, a response in each
        for row in ([rank], [2 + rank]):
            logp = model(features[row])[..., 0] - 2
            yield logp, old[row], logp.square(), mask[row], newline[row]

    names = {
        "model": plain,
        "micro_batches": micro_batches(),
        "device": "cpu",
        "kind": kind,
        "dist": dist,
        "torch": torch,
    }
    exec(recipe(), vars(gating) | names)
    if rank == 0:
        queue.put([p.grad.tolist() for p in plain.parameters()])
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_of_the_docstring_is_eq_1_over_two_ranks_of_two_micro_batches(kind):
    model, features, old, mask, newline = model_and_batch(kind)
    logp = model(features)[..., 0] - 2
    weights = naive_gate(logp.detach(), old, mask, newline, kind, block=64)
    ((weights * logp.square() * mask).sum() / weights.sum()).backward()

    fork, port = multiprocessing.get_context("fork"), random.randint(20000, 60000)
    queue = fork.SimpleQueue()
    ranks = [fork.Process(target=one_rank, args=(rank, 2, port, kind, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    for p, found in zip(model.parameters(), queue.get(), strict=True):
        torch.testing.assert_close(torch.tensor(found), p.grad, rtol=1e-5, atol=1e-6)


# -----------------------------------------------------------------------------
# arguments


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kind="blocks"), "must be one of"), (dict(stat="median"), "must be one of"), (dict(tau=-1), "tau is -1"),
        (dict(block=0), "at least 1"), (dict(kind="span"), "newline"),
        (dict(kind="span", newline=torch.ones(1, 3), span_min=9, span_max=4), "span_min is 9"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_with_their_value(options, message):
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=message):
        gate_weights(x, x, x == 0, **options)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        gate_weights(torch.zeros(1, 3), torch.zeros(1, 4), torch.zeros(1, 3))
    assert segment_drift(torch.ones(3), torch.zeros(3).long()).tolist() == [1, 1, 1]
