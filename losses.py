"""On-policy distillation losses over a large vocabulary, without ever holding a [N, V] matrix.

Two halves. The language-model head, in blocks of the vocabulary, with its own backward pass:

    z, lse = head_logits(hidden, weight, ids)        # z [N, K] logits at ids, lse [N] logsumexp of all
    logp = z - lse[:, None]                          # differentiable log-probs of the ids
    ids, logq = head_topk(hidden, weight, k)         # a teacher's top-k log-probs, no gradient
    kl, lse = head_kl(hidden, weight, hidden_t, weight_t)       # [N] full-vocabulary KL or JSD(beta)

and position losses on what it returns, unreduced: weight them (gating.py), then divide once by the
global denominator. Student p, teacher q. All arithmetic is fp32, whatever the dtype of the inputs.

Shapes: N positions, H hidden size, V vocabulary, K support; `...` is [N] or [B, T].
Copy this file; it needs torch alone. MIT license.
"""

import math

import torch
from torch import Tensor

LOSSES = ("opd", "lsm", "fkl_topk", "tail_topk", "rkl", "fkl", "jsd")


# -----------------------------------------------------------------------------
# position losses


def opd_loss(
    logp: Tensor,  # [...] student's log-prob of the sampled token, with gradient
    logp_old: Tensor,  # [...] the same before the first update on this rollout batch
    logp_teacher: Tensor,  # [...]
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = 3.0,
) -> tuple[Tensor, dict]:
    """Sampled-token OPD, PPO style: -min(r A, clip(r) A), A = log q(y) - log p_old(y), r = p(y) / p_old(y).

    At r = 1 its gradient is the policy gradient of the token-level reverse KL. dual_clip c bounds the
    loss by -c A where A < 0 (Ye et al. 2020; verl's default 3). None turns a bound off.
    """
    advantage = (_finite(logp_teacher) - _finite(logp_old)).detach()
    ratio = (_finite(logp) - _finite(logp_old)).clamp(-20, 20).exp()
    low = 0.0 if clip_low is None else 1 - clip_low
    high = math.inf if clip_high is None else 1 + clip_high
    surrogate, clipped = ratio * advantage, ratio.clamp(low, high) * advantage
    loss = -torch.minimum(surrogate, clipped)
    bound = -dual_clip * advantage if dual_clip is not None else torch.full_like(loss, math.inf)
    dual = (advantage < 0) & (loss > bound)
    info = {"clipped": ((clipped < surrogate) | dual).float(), "advantage": advantage}
    return torch.where(dual, bound, loss), info


def lsm_loss(
    z: Tensor,  # [..., K] student's logits at the support, with gradient
    logq: Tensor,  # [..., K] teacher's logits or log-probs there
    support: Tensor | None = None,  # [..., K] False where a slot does not count
    *,
    lse: Tensor
    | None = None,  # [...] student's logsumexp over the vocabulary: for renormalise=False
    renormalise: bool = True,
    log_ratio_clamp: float | None = None,
    forward: bool = False,
) -> Tensor:
    """Teacher top-K local support matching, sum_k p_k (log p_k - log q_k) over the support: reverse KL.

    renormalise (Fu et al. 2026, the paper's form): p and q are softmaxes over the support alone, so
    the student's logsumexp is not needed, and no gradient of vocabulary size arises. Otherwise p and q
    are true probabilities (logq must be log-probs); that form can be negative, and rewards moving mass
    off the support. forward=True is sum_k q_k (log q_k - log p_k), the same with p and q exchanged.
    """
    if renormalise and z.shape[-1] < 2:
        raise ValueError(
            "K = 1: a distribution renormalised on one token is constant, the loss is 0"
        )
    if not renormalise and lse is None:
        raise ValueError("renormalise=False needs the student's logsumexp, lse")
    z, logq = (_finite(z) if renormalise else _finite(z.float() - lse[..., None])), _finite(logq)
    if support is not None:  # finite, so that no NaN reaches a gradient
        z, logq = z.masked_fill(~support, -1e30), logq.masked_fill(~support, -1e30)
    logp = z
    if renormalise:
        logp, logq = z.log_softmax(-1), logq.log_softmax(-1)
    if forward:
        logp, logq = logq, logp
    ratio = logp - logq
    if log_ratio_clamp is not None:
        ratio = ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    terms = logp.exp() * ratio
    return (terms if support is None else terms.masked_fill(~support, 0.0)).sum(-1)


def tail_loss(logp: Tensor, logq: Tensor) -> Tensor:
    """Reverse KL over K + 1 outcomes [...]: the K true log-probs [..., K] and all other tokens as one."""
    return lsm_loss(_with_tail(_finite(logp)), _with_tail(_finite(logq)))


def _with_tail(logp: Tensor) -> Tensor:
    """[..., K] log-probs to [..., K + 1]: the rest's mass, 1 - sum p, last; at least 1e-6 to stay finite."""
    rest = 1 - logp.exp().sum(-1, keepdim=True)
    return torch.cat([logp, rest.clamp(min=1e-6).log()], -1)


def _finite(x: Tensor) -> Tensor:
    """Log-probs in fp32, -inf as -1e4, so that differences stay finite. NaN stays: the training loop must see it."""
    return x.float().clamp(-1e4, 1e4)


# -----------------------------------------------------------------------------
# the head, in blocks


def head_logits(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V', H]
    ids: Tensor,  # [N, K] token ids below V
    bias: Tensor | None = None,  # [V']
    *,
    temperature: float = 1.0,
    vocab: int | None = None,  # V: only the first V rows of weight are tokens; None: all
    lse: bool = True,  # False: no pass over the vocabulary, the second output is None
    entropy: bool = False,  # True: a third output [N], the entropy in nats, detached
    block: int | None = None,  # elements of the largest temporary
):
    """(z [N, K], lse [N]) in fp32: logits / temperature at ids, and logsumexp of all logits / temperature.

    Any upstream gradient may arrive at either. One at lse costs 2NHV to compute the logits again, and
    4NHV; where it is absent (a loss on z alone, lse detached or off) only K rows of weight a position
    are touched. Memory beyond outputs and gradients is one block, whatever N.
    """
    vocab, block = vocab or weight.shape[0], block or _default_block(hidden)
    if not lse and not entropy:
        return _HeadRows.apply(hidden, weight, bias, ids, temperature, block), None
    out = _Head.apply(hidden, weight, bias, ids, temperature, vocab, entropy, block)
    return out if entropy else out[:2]


@torch.no_grad()
def head_topk(
    hidden, weight, k: int, bias=None, *, ids=None, temperature=1.0, vocab=None, block=None
):
    """A teacher's targets in fp32: top-k (ids [N, k], logq [N, k]); with ids [N, J], also their logq [N, J]."""
    vocab, block = vocab or weight.shape[0], block or _default_block(hidden)
    N, rows = hidden.shape[0], max(1, block // vocab)
    top = hidden.new_empty(N, k, dtype=torch.long)
    logq = hidden.new_empty(N, k, dtype=torch.float32)
    at_ids = None if ids is None else hidden.new_empty(ids.shape, dtype=torch.float32)
    for r, logits in _row_blocks(hidden, weight, bias, temperature, vocab, rows):
        logq[r], top[r] = logits.topk(k, dim=1)
        if ids is not None:
            at_ids[r] = logits.gather(1, ids[r])
        lse = _lse_(logits)[:, None]
        logq[r] -= lse
        if ids is not None:
            at_ids[r] -= lse
    return (top, logq) if ids is None else (top, logq, at_ids)


def head_kl(
    hidden: Tensor,  # [N, H] student's
    weight: Tensor,  # [V', H]
    hidden_t: Tensor,  # [N, H_t] teacher's
    weight_t: Tensor,  # [V'', H_t]
    bias: Tensor | None = None,
    bias_t: Tensor | None = None,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    vocab: int | None = None,  # the shared vocabulary V
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Full-vocabulary divergence [N] with gradient, and the student's logsumexp [N] without, in fp32.

    Generalised JSD(beta), Agarwal et al. 2024.
    beta 1: reverse KL(p||q). beta 0: forward KL(q||p). Between: beta KL(q||m) + (1 - beta) KL(p||m)
    with m = beta q + (1 - beta) p, as GKD and TRL have it.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, outside [0, 1]")
    vocab, block = vocab or min(len(weight), len(weight_t)), block or _default_block(hidden)
    return _HeadKL.apply(
        hidden, weight, bias, hidden_t, weight_t, bias_t, beta, temperature, vocab, block
    )


class _Head(torch.autograd.Function):
    """(z, lse[, entropy]): walks the vocabulary with an online logsumexp; backward makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, vocab, entropy, block):
        N = hidden.shape[0]
        z = hidden.new_zeros(ids.shape, dtype=torch.float32)
        top = hidden.new_full((N,), -math.inf, dtype=torch.float32)  # running maximum
        total, moment = (
            torch.zeros_like(top),
            torch.zeros_like(top),
        )  # sum e^(x - top), sum e^(x - top) (x - top)
        for v, logits in _vocab_blocks(hidden, weight, bias, temperature, vocab, block):
            inside = (ids >= v.start) & (ids < v.stop)
            at = logits.gather(1, (ids - v.start).clamp(0, logits.shape[1] - 1))
            z = torch.where(inside, at, z)
            new_top = torch.maximum(top, logits.amax(1))
            shift = top - new_top
            logits -= new_top[:, None]
            scale = shift.exp()  # 0 at the first block, where shift is -inf
            if entropy:
                old = torch.where(total > 0, moment + shift * total, 0.0)
                moment = old * scale + torch.linalg.vecdot(logits.exp(), logits)
            total = total * scale + logits.exp_().sum(1)
            top = new_top
        lse = top + total.log()
        ctx.save_for_backward(hidden, weight, bias, ids, lse)
        ctx.args = temperature, vocab, block
        ctx.set_materialize_grads(False)
        if not entropy:
            return z, lse
        H = total.log() - moment / total
        ctx.mark_non_differentiable(H)
        return z, lse, H

    @staticmethod
    def backward(ctx, grad_z, grad_lse, *_):
        hidden, weight, bias, ids, lse = ctx.saved_tensors
        temperature, vocab, block = ctx.args
        if grad_lse is None:
            return *_rows_backward(hidden, weight, bias, ids, temperature, block, grad_z), *[
                None
            ] * 5
        dh = torch.zeros_like(hidden, dtype=torch.float32)
        dw, db = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        for v, p in _vocab_blocks(hidden, weight, bias, temperature, vocab, block):
            p.sub_(lse[:, None]).exp_().mul_(grad_lse[:, None])
            if grad_z is not None:
                inside = (ids >= v.start) & (ids < v.stop)
                p.scatter_add_(1, (ids - v.start).clamp(0, p.shape[1] - 1), grad_z * inside)
            _backward_block(p, hidden, weight, bias, v, temperature, dh, dw, db)
        return dh.to(hidden.dtype), dw, db, *[None] * 5


class _HeadRows(torch.autograd.Function):
    """z alone: K rows of the weight a position, forward and backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, block):
        z = hidden.new_empty(ids.shape, dtype=torch.float32)
        for r in _rows_of(ids, hidden, block):
            z[r] = torch.bmm(weight[ids[r]].float(), hidden[r].float()[:, :, None])[:, :, 0]
            if bias is not None:
                z[r] += bias[ids[r]]
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.args = temperature, block
        return z.div_(temperature)

    @staticmethod
    def backward(ctx, grad_z):
        hidden, weight, bias, ids = ctx.saved_tensors
        return *_rows_backward(hidden, weight, bias, ids, *ctx.args, grad_z), *[None] * 3


class _HeadKL(torch.autograd.Function):
    """JSD(beta) [N]: walks rows forward, since m needs both softmaxes complete, and the vocabulary backward."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, hidden_t, weight_t, bias_t, beta, temperature, vocab, block
    ):
        N, rows = (
            hidden.shape[0],
            max(1, block // (4 * vocab)),
        )  # about four blocks are alive at once
        loss, lse, lse_t, mean = (hidden.new_empty(N, dtype=torch.float32) for _ in range(4))
        student = _row_blocks(hidden, weight, bias, temperature, vocab, rows)
        teacher = _row_blocks(hidden_t, weight_t, bias_t, temperature, vocab, rows)
        for (r, logp), (_, logq) in zip(student, teacher, strict=True):
            lse[r], lse_t[r] = logp.logsumexp(1), logq.logsumexp(1)
            logp -= lse[r, None]
            logq -= lse_t[r, None]
            logm = _mixture(logp, logq, beta)
            if beta > 0:  # mean: E_p[log p - log m], which the gradient needs too
                mean[r] = torch.linalg.vecdot(logp.exp(), logp - logm)
            if beta < 1:
                kl_q = torch.linalg.vecdot(logq.exp(), logq - logm)
            loss[r] = (
                mean[r] if beta == 1 else kl_q if beta == 0 else beta * kl_q + (1 - beta) * mean[r]
            )
        ctx.save_for_backward(hidden, weight, bias, hidden_t, weight_t, bias_t, lse, lse_t, mean)
        ctx.args = beta, temperature, vocab, block
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, hidden_t, weight_t, bias_t, lse, lse_t, mean = ctx.saved_tensors
        beta, temperature, vocab, block = ctx.args
        dh = torch.zeros_like(hidden, dtype=torch.float32)
        dw, db = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        student = _vocab_blocks(hidden, weight, bias, temperature, vocab, block // 4)
        teacher = _vocab_blocks(hidden_t, weight_t, bias_t, temperature, vocab, block // 4)
        for (v, logp), (_, logq) in zip(student, teacher, strict=True):
            logp -= lse[:, None]
            logq -= lse_t[:, None]
            if beta == 0:
                d = logp.exp_() - logq.exp_()
            else:  # d/dz of (1 - beta) KL(p||m) + beta KL(q||m) is (1 - beta) p (log p - log m - mean)
                d = logp - _mixture(logp, logq, beta)
                d.sub_(mean[:, None]).mul_(logp.exp_()).mul_(1 - beta if beta < 1 else 1)
            d.mul_(grad[:, None])
            _backward_block(d, hidden, weight, bias, v, temperature, dh, dw, db)
        return dh.to(hidden.dtype), dw, db, *[None] * 7


def _mixture(logp, logq, beta):
    """log m; the two limits compare with the other side itself."""
    if beta in (0, 1):
        return logq if beta == 1 else logp
    return torch.logaddexp(logp + math.log1p(-beta), logq + math.log(beta))


def _default_block(x: Tensor) -> int:
    return 2**27 if x.is_cuda else 2**24


def _mm(a: Tensor, b: Tensor, out=None) -> Tensor:
    """a @ b with fp32 accumulation and an fp32 result; bf16 stays on the tensor cores, and is upcast on CPU."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float(), out=out)


def _vocab_blocks(hidden, weight, bias, temperature, vocab, block):
    """Yields (v, logits [N, |v|] / temperature), v a slice of the vocabulary. The buffer is used again."""
    N = hidden.shape[0]
    width = min(vocab, max(1, block // max(N, 1)))
    buffer = hidden.new_empty(N * width, dtype=torch.float32)
    for start in range(0, vocab, width):
        v = slice(start, min(start + width, vocab))
        out = buffer[: N * (v.stop - v.start)].view(N, v.stop - v.start)
        yield v, _scale_(_mm(hidden, weight[v].T, out), bias, v, temperature)


def _row_blocks(hidden, weight, bias, temperature, vocab, rows):
    """Yields (r, logits [|r|, V] / temperature), r a slice of the positions. The buffer is used again."""
    N, v = hidden.shape[0], slice(0, vocab)
    buffer = hidden.new_empty(min(rows, N) * vocab, dtype=torch.float32)
    for start in range(0, N, rows):
        r = slice(start, min(start + rows, N))
        out = buffer[: (r.stop - r.start) * vocab].view(r.stop - r.start, vocab)
        yield r, _scale_(_mm(hidden[r], weight[v].T, out), bias, v, temperature)


def _scale_(logits, bias, v, temperature):
    if bias is not None:
        logits += bias[v]
    return logits if temperature == 1 else logits.div_(temperature)


def _lse_(logits: Tensor) -> Tensor:
    """logsumexp over the last dimension; overwrites logits."""
    top = logits.amax(1)
    return logits.sub_(top[:, None]).exp_().sum(1).log_() + top


def _backward_block(d, hidden, weight, bias, v, temperature, dh, dw, db):
    """Adds one block's part to the gradients; d [N, |v|] is the gradient of logits / temperature."""
    if temperature != 1:
        d /= temperature
    if bias is not None:
        db[v] = d.sum(0)
    if d.is_cuda or hidden.dtype == torch.float32:
        d = d.to(hidden.dtype)
        dh += _mm(d, weight[v])
        dw[v] = _mm(d.T, hidden)
    else:
        dh.addmm_(d, weight[v].float())
        dw[v] = d.T @ hidden.float()


def _rows_of(ids, hidden, block):
    rows = max(1, block // (ids.shape[1] * hidden.shape[1]))
    return [slice(i, i + rows) for i in range(0, ids.shape[0], rows)]


def _rows_backward(hidden, weight, bias, ids, temperature, block, grad_z):
    """(dh, dw, db) of z alone. Repeated ids add up in fp32, on the touched rows only."""
    grad_z = grad_z / temperature
    dh, dw = torch.empty_like(hidden), torch.zeros_like(weight)
    exact = weight.dtype == torch.float32
    used, slot = (None, ids) if exact else torch.unique(ids, return_inverse=True)
    total = dw if exact else weight.new_zeros(len(used), weight.shape[1], dtype=torch.float32)
    for r in _rows_of(ids, hidden, block):
        dh[r] = torch.bmm(grad_z[r, None], weight[ids[r]].float())[:, 0]
        outer = grad_z[r, :, None] * hidden[r, None].float()  # [|r|, K, H]
        total.index_add_(0, slot[r].flatten(), outer.flatten(0, 1))
    if not exact:
        dw[used] = total.to(dw.dtype)
    db = (
        None
        if bias is None
        else torch.zeros_like(bias).index_add_(0, ids.flatten(), grad_z.flatten().to(bias.dtype))
    )
    return dh, dw, db
