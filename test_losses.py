"""python -m pytest test_losses.py      (needs torch and pytest alone)"""

import math
import shutil

import pytest
import torch

import losses
from losses import head_kl, head_logits, head_topk, lsm_loss, opd_loss, tail_loss

N, H, V = 37, 19, 203  # odd on purpose
log = math.log


def make(dtype=torch.float32, K=33, seed=0, spread=2.0):
    """Leaves hidden [N, H], weight [V, H], bias [V], and ids [N, K]; `spread`: standard deviation of the logits."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, H, generator=g), 0.2 * spread * torch.randn(V, H, generator=g)
    bias, ids = 0.5 * spread * torch.randn(V, generator=g), torch.randint(0, V - 10, (N, K), generator=g)
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), ids


def naive(leaves, dtype=torch.float64):
    """Fresh leaves in dtype, and the whole [N, V] matrix of logits."""
    hidden, weight, bias = leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    return leaves, hidden @ weight.T + bias


def error(leaves, reference):
    """Largest relative error (2-norm) of the leaves' gradients."""
    return max(
        float((a.grad.double() - b.grad.double()).norm() / b.grad.norm())
        for a, b in zip(leaves, reference, strict=True)
    )


def loss_of(name, z, lse, logq, gates):
    """A gated loss from head_logits' outputs; z [N, K], slot 0 the sampled token."""
    if name == "opd":
        return (gates * opd_loss(z[:, 0] - lse, (z[:, 0] - lse).detach() + 0.1, logq[:, 0])[0]).sum()
    if name == "tail_topk":
        return (gates * tail_loss(z[:, :5] - lse[:, None], logq[:, :5] - 2)).sum()
    return (gates * lsm_loss(z, logq, forward=name == "fkl_topk")).sum()


def typical_errors(run, **options):
    """Mean over seeds of the gradients' errors against float64: of ours, and of the naive graph in the same dtype.

    run(seed, leaves, ids, logits) backpropagates the loss of our head, or of naive logits where they are given.
    """
    found = []
    for seed in range(5):
        *leaves, ids = make(seed=seed, **options)
        run(seed, leaves, ids, None)
        graphs = [naive(leaves, dtype) for dtype in (torch.float64, leaves[0].dtype)]
        for copies, logits in graphs:
            run(seed, copies, ids, logits)
        (exact, _), (low, _) = graphs
        found.append([error(leaves, exact), error(low, exact)])
    return torch.tensor(found).mean(0).tolist()


@pytest.mark.parametrize("chunk", [64, V * 5, 10**6])
@pytest.mark.parametrize("name, K", [("opd", 1), ("lsm", 33), ("fkl_topk", 33), ("tail_topk", 33)])
@pytest.mark.parametrize("temperature, vocab", [(1.0, None), (0.7, V - 10)])
def test_gradients_agree_with_float64(name, K, chunk, temperature, vocab):
    """In fp32 to 1e-6 relative, at larger logits as well as the naive fp32 graph; in bf16 as well as the naive bf16 one."""

    def run(seed, leaves, ids, logits):
        g = torch.Generator().manual_seed(seed + 100)
        gates, logq = torch.rand(N, generator=g), torch.randn(N, K, generator=g).log_softmax(-1)
        if logits is None:
            options = dict(temperature=temperature, vocab=vocab, chunk=chunk)
            z, lse = head_logits(*leaves, ids, **options)
        else:
            logits = logits[:, :vocab] / temperature
            z, lse = logits.gather(1, ids), logits.logsumexp(1)
        wide = torch.promote_types(z.dtype, torch.float32)
        loss_of(name, z, lse, logq.to(wide), gates.to(wide)).backward()

    assert typical_errors(run, K=K, spread=1.0)[0] < 1e-6
    ours, low = typical_errors(run, K=K)
    assert ours < 1e-6 + low
    ours, low = typical_errors(run, K=K, dtype=torch.bfloat16)
    assert ours < min(low + 1e-3, 5e-3)


def test_values_agree_with_float64():
    *leaves, ids = make()
    z, lse = head_logits(*leaves, ids, chunk=500)
    _, logits = naive(leaves)
    for ours, exact in ((z, logits.gather(1, ids)), (lse, logits.logsumexp(1))):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_any_upstream_gradient_per_position(temperature):
    """Signs and sizes at will, at z and at lse, as gates, clips and advantages give them."""
    *leaves, ids = make(K=5, spread=1.0)
    g = torch.Generator().manual_seed(3)
    up_z, up_lse = torch.randn(N, 5, generator=g), 3 * torch.randn(N, generator=g)
    z, lse = head_logits(*leaves, ids, temperature=temperature, chunk=700)
    ((z * up_z).sum() + (lse * up_lse).sum()).backward()
    exact, logits = naive(leaves)
    logits = logits / temperature
    ((logits.gather(1, ids) * up_z).sum() + (logits.logsumexp(1) * up_lse).sum()).backward()
    assert error(leaves, exact) < 1e-6


def test_lse_without_gradient_takes_the_sparse_path():
    """A loss on z alone: same gradient, whether lse was computed or not, and no matmul over the vocabulary."""
    for dtype in (torch.float32, torch.bfloat16):
        *leaves, ids = make(dtype)
        up = torch.randn(N, 33)
        for lse in (True, False):
            z, out = head_logits(*leaves, ids, want_lse=lse)
            assert (out is None) == (not lse)
            grads = torch.autograd.grad((z * up).sum(), leaves)
            if lse:
                first = grads
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(first, grads, strict=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, such as g++")
@pytest.mark.parametrize("dtype, K", [(torch.float32, 1), (torch.bfloat16, 5)])
def test_compiled_passes_give_the_same_numbers(monkeypatch, K, dtype):
    """What --kernels compile runs on CUDA, compiled for a CPU here. A CPU's matmul takes the gradient in fp32."""
    found = []
    for fuses in (False, True):
        monkeypatch.setattr(losses, "_fuses", lambda x, fuses=fuses: fuses)
        *leaves, ids = make(dtype, K=K, spread=1.0)
        z, lse = head_logits(*leaves, ids, temperature=0.7, chunk=N * 50)
        up = torch.randn(N, K, generator=torch.Generator().manual_seed(4))
        ((z - lse[:, None]) * up).sum().backward()
        found.append([z.detach(), lse.detach(), *(x.grad for x in leaves)])
    for plain, compiled in zip(*found, strict=True):
        limit = 1e-6 if dtype == torch.float32 else 5e-3  # of rounding to bf16
        assert (plain.double() - compiled.double()).norm() <= limit * plain.double().norm()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature, chunk", [(1.0, 10**6), (0.7, 4 * V * 5)])
def test_full_vocabulary_divergences_agree_with_float64(beta, temperature, chunk):
    found = {}

    def run(seed, leaves, ids, logits):
        g, dtype = torch.Generator().manual_seed(seed + 100), leaves[0].dtype
        hidden_t, weight_t = torch.randn(N, 11, generator=g), 0.3 * torch.randn(V + 4, 11, generator=g)
        gates = torch.rand(N, generator=g)
        if logits is None:
            options = dict(beta=beta, temperature=temperature, chunk=chunk)
            kl, lse = head_kl(*leaves, hidden_t, weight_t, None, **options)
        else:
            logits, logq = logits / temperature, (hidden_t.to(dtype) @ weight_t.to(dtype).T)[:, :V] / temperature
            logp, logq, lse = logits.log_softmax(1), logq.log_softmax(1), logits.logsumexp(1)
            p, q = logp.exp(), logq.exp()
            m = (beta * q + (1 - beta) * p).log()
            jsd = (beta * q * (logq - m) + (1 - beta) * p * (logp - m)).sum(1)
            kl = {0.0: (q * (logq - logp)).sum(1), 1.0: (p * (logp - logq)).sum(1)}.get(beta, jsd)
        (gates.to(kl.dtype) * kl).sum().backward()
        found[logits is None, dtype] = kl.detach().double(), lse.detach().double()

    assert typical_errors(run, spread=1.0)[0] < 1e-6
    for ours, exact in zip(found[True, torch.float32], found[False, torch.float64], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)
    ours, low = typical_errors(run)
    assert ours < 1e-6 + low


@pytest.mark.parametrize("size, chunk, ks", [(V, 3 * V, (1, 7, V - 10)), (V, None, (7,)), (2500, 10**5, (1, 7, 90))])
def test_topk_agrees_with_log_softmax(size, chunk, ks):
    """With one tile of the vocabulary or several, the last one narrower; k up to all of it."""
    hidden, _, _, ids = make()
    g = torch.Generator().manual_seed(1)
    weight, bias, vocab = torch.randn(size, H, generator=g), torch.randn(size, generator=g), size - 10
    bias[3] = -math.inf
    logp = ((hidden @ weight.T + bias)[:, :vocab] / 0.8).log_softmax(1)
    for k in ks:
        expected = logp.topk(k)
        top, logq, at_ids = head_topk(hidden, weight, bias, k, also_ids=ids, temperature=0.8, vocab=vocab, chunk=chunk)
        torch.testing.assert_close(logq, expected.values)
        assert torch.equal(top, expected.indices) and not logq.requires_grad
        torch.testing.assert_close(at_ids, logp.gather(1, ids))


def test_no_positions_is_no_error():
    """A rank without tokens runs the same code, and its gradients are zero."""
    *leaves, ids = make()
    for lse in (True, False):
        z, out = head_logits(leaves[0][:0], *leaves[1:], ids[:0], want_lse=lse)
        (z.sum() + (out.sum() if lse else 0)).backward()
    kl, _ = head_kl(leaves[0][:0], leaves[1], None, leaves[0][:0].detach(), leaves[1].detach(), None)
    kl.sum().backward()
    assert all((x.grad == 0).all() for x in leaves)
    assert head_topk(leaves[0][:0], leaves[1], None, 3)[0].shape == (0, 3)


# Hand-worked examples, three tokens: the student samples token 0 (invariant 7).
P, Q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])


def test_opd_direction_by_hand():
    """The teacher likes token 0 less than the student: A = log .2 - log .5 < 0, and a step down must lower its logit."""
    z = P.log().requires_grad_()
    logp = z.log_softmax(0)[0]
    loss, info = opd_loss(logp, logp.detach(), Q.log()[0])
    assert loss.item() == pytest.approx(-log(0.2 / 0.5), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, z)
    expected = -log(0.2 / 0.5) * torch.tensor([0.5, -0.3, -0.2])  # -A (onehot - p)
    torch.testing.assert_close(grad, expected)
    assert info["clipped"] == 0


def test_opd_gradient_is_the_reverse_kl_gradient_in_expectation():
    z = P.log().requires_grad_()
    logp = z.log_softmax(0)
    expected = (P * opd_loss(logp, logp.detach(), Q.log())[0]).sum()
    (grad,) = torch.autograd.grad(expected, z)
    logp = z.log_softmax(0)
    (kl,) = torch.autograd.grad((logp.exp() * (logp - Q.log())).sum(), z)
    torch.testing.assert_close(grad, kl)


@pytest.mark.parametrize(
    "ratio, advantage, options, loss, clipped",
    [
        (1.5, 1.0, {}, -1.2, 1), (1.5, 1.0, dict(clip_high=0), -1.5, 0),
        (0.5, 1.0, {}, -0.5, 0), (0.5, -1.0, {}, 0.8, 1), (0.5, -1.0, dict(clip_low=0), 0.5, 0),
        (5.0, -1.0, {}, 3.0, 1), (5.0, -1.0, dict(dual_clip=0), 5.0, 0), (2.0, -1.0, {}, 2.0, 0),
    ],
)  # fmt: skip
def test_opd_clips_by_hand(ratio, advantage, options, loss, clipped):
    """Each bound acts on its side alone, can be off, and stops the gradient where it acts."""
    logp = torch.tensor(log(ratio), requires_grad=True)
    got, info = opd_loss(logp, torch.tensor(0.0), torch.tensor(advantage), **options)
    assert got.item() == pytest.approx(loss, rel=1e-5) and info["clipped"].item() == clipped
    got.backward()
    assert logp.grad.item() == pytest.approx(0 if clipped else -ratio * advantage, rel=1e-5)


def test_lsm_by_hand():
    """Reverse KL on the support {0, 1}, both sides renormalised: p = (5/8, 3/8), q = (2/5, 3/5)."""
    z = P.log()[:2].requires_grad_()
    loss = lsm_loss(z, Q.log()[:2])
    expected = 5 / 8 * log((5 / 8) / (2 / 5)) + 3 / 8 * log((3 / 8) / (3 / 5))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, z)
    assert grad[0] > 0 > grad[1]  # down on the token that the teacher likes less
    forward = lsm_loss(z, Q.log()[:2], forward=True)
    assert forward.item() == pytest.approx(2 / 5 * log((2 / 5) / (5 / 8)) + 3 / 5 * log((3 / 5) / (3 / 8)), rel=1e-6)


def test_tail_by_hand():
    """Two tokens and the rest: with three tokens in all, the tail loss is the full reverse KL."""
    loss = tail_loss(P.log()[:2], Q.log()[:2])
    assert loss.item() == pytest.approx(
        sum(p * log(p / q) for p, q in zip(P.tolist(), Q.tolist(), strict=True)), rel=1e-5
    )


def test_lsm_does_not_need_the_normaliser():
    z, logq = torch.randn(5, 8), torch.randn(5, 8)
    torch.testing.assert_close(lsm_loss(z, logq), lsm_loss(z + 3, logq - 2))
    assert (lsm_loss(z, z).abs() < 1e-6).all() and (lsm_loss(z, logq) > 0).all()


def test_support_mask_leaves_slots_out():
    z, logq = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    support = torch.ones(4, 6).bool()
    support[:, 0] = False
    loss = lsm_loss(z, logq, support)
    torch.testing.assert_close(loss, lsm_loss(z[:, 1:], logq[:, 1:]))
    assert (torch.autograd.grad(loss.sum(), z)[0][:, 0] == 0).all()


def test_renormalised_on_one_token_is_refused():
    with pytest.raises(ValueError, match="K = 1"):
        lsm_loss(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="beta"):
        head_kl(*[torch.zeros(2, 2), torch.zeros(2, 2), None] * 2, beta=1.5)


def test_extreme_log_probs_stay_finite():
    inf = float("inf")
    logp = torch.tensor([-inf, 0.0, -inf, -80.0, 0.0], requires_grad=True)
    old = torch.tensor([-inf, -inf, 0.0, 0.0, -90.0])
    for teacher in (old, torch.full((5,), -inf), torch.zeros(5)):
        loss, _ = opd_loss(logp, old, teacher)
        (grad,) = torch.autograd.grad(loss.sum(), logp)
        assert loss.isfinite().all() and grad.isfinite().all()
    z = torch.tensor([[60.0, -60.0, 0.0]], requires_grad=True)
    loss = lsm_loss(z, torch.tensor([[-inf, 0.0, -inf]]))
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert loss.isfinite().all() and grad.isfinite().all()
    tail = tail_loss(torch.tensor([0.0, -inf]), torch.tensor([-inf, 0.0]))
    assert tail.isfinite()


# -----------------------------------------------------------------------------
# merged ids: one outcome, whose probability is the sum of theirs

MERGED = [7, 2, 150]


def merged_logits(logits):
    """[N, V - 2]: the outcome's logit first, then all other tokens'. In plain torch."""
    others = [i for i in range(logits.shape[1]) if i not in MERGED]
    return torch.cat([logits[:, MERGED].logsumexp(1, keepdim=True), logits[:, others]], 1), {
        **{id: 0 for id in MERGED},
        **{id: column + 1 for column, id in enumerate(others)},
    }


@pytest.mark.parametrize("chunk", [64, 10**6])
def test_merged_ids_have_the_log_prob_of_their_sum(chunk):
    *leaves, ids = make(K=9, spread=1.0)
    ids[:, 0], ids[:, 1], ids[:, 2] = 2, 150, 7
    exact, logits = naive(leaves)
    merged, column = merged_logits(logits / 0.7)
    columns = torch.tensor([[column[i] for i in row] for row in ids.tolist()])
    up = torch.randn(N, 9, generator=torch.Generator().manual_seed(1))
    z, lse = head_logits(*leaves, ids, temperature=0.7, merged=MERGED, chunk=chunk)
    logp = z - lse[:, None]
    expected = merged.log_softmax(1).gather(1, columns)
    torch.testing.assert_close(logp.double(), expected, rtol=1e-6, atol=2e-6)
    (logp * up).sum().backward()
    (expected * up).sum().backward()
    assert error(leaves, exact) < 1e-6


def test_the_top_k_counts_merged_ids_once():
    hidden, weight, bias, ids = make(spread=1.0)
    bias = bias.detach().index_fill(0, torch.tensor(MERGED), 3.0)  # likely, all three
    ids[:, :3] = torch.tensor(MERGED)
    merged, column = merged_logits((hidden @ weight.T + bias).detach())
    expected = merged.log_softmax(1)
    top, logq, at_ids = head_topk(hidden, weight, bias, 12, also_ids=ids, merged=MERGED)
    torch.testing.assert_close(logq, expected.topk(12).values)
    assert (top == MERGED[0]).any(1).all() and not torch.isin(top, torch.tensor(MERGED[1:])).any()
    torch.testing.assert_close(at_ids[:, 0], expected[:, 0])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [4 * V * 5, 10**6])
def test_full_vocabulary_divergences_count_merged_ids_once(beta, chunk):
    *leaves, _ = make(spread=1.0)
    g = torch.Generator().manual_seed(5)
    hidden_t, weight_t, gates = torch.randn(N, 11, generator=g), 0.3 * torch.randn(V, 11, generator=g), torch.rand(N)
    options = dict(beta=beta, temperature=0.7, merged=MERGED, chunk=chunk)
    kl, lse = head_kl(*leaves, hidden_t, weight_t, None, **options)
    exact, logits = naive(leaves)
    logp = merged_logits(logits / 0.7)[0].log_softmax(1)
    logq = merged_logits(hidden_t.double() @ weight_t.double().T / 0.7)[0].log_softmax(1)
    p, q = logp.exp(), logq.exp()
    logm = (beta * q + (1 - beta) * p).log()
    kl_p, kl_q = (
        (p * (logp - (logq if beta == 1 else logm))).sum(1),
        (q * (logq - (logp if beta == 0 else logm))).sum(1),
    )
    expected = {0.0: kl_q, 1.0: kl_p}.get(beta, beta * kl_q + (1 - beta) * kl_p)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), (logits / 0.7).logsumexp(1), rtol=1e-6, atol=1e-6)
    (kl * gates).sum().backward()
    (expected * gates).sum().backward()
    assert error(leaves, exact) < 1e-6
