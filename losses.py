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
    lse: Tensor | None = None,  # [...] student's logsumexp, where renormalise is False
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
        raise ValueError("K = 1: renormalised on one token, the loss is always 0")
    if not renormalise and lse is None:
        raise ValueError("renormalise=False needs the student's logsumexp, lse")
    z = _finite(z if renormalise else z.float() - lse[..., None])
    logq = _finite(logq)
    if support is not None:  # finite, so that no NaN reaches a gradient
        z, logq = z.masked_fill(~support, -1e30), logq.masked_fill(~support, -1e30)
    if renormalise:
        z, logq = z.log_softmax(-1), logq.log_softmax(-1)
    a, b = (logq, z) if forward else (z, logq)
    ratio = a - b
    if log_ratio_clamp is not None:
        ratio = ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    terms = a.exp() * ratio
    return (terms if support is None else terms.masked_fill(~support, 0.0)).sum(-1)


def tail_loss(logp: Tensor, logq: Tensor) -> Tensor:
    """Reverse KL over K + 1 outcomes [...]: the K true log-probs [..., K] and all other tokens as one."""
    return lsm_loss(_with_tail(_finite(logp)), _with_tail(_finite(logq)))


def _with_tail(logp: Tensor) -> Tensor:
    """[..., K] log-probs to [..., K + 1]: the rest's mass, 1 - sum p, last; at least 1e-6 to stay finite."""
    rest = 1 - logp.exp().sum(-1, keepdim=True)
    return torch.cat([logp, rest.clamp(min=1e-6).log()], -1)


def _finite(x: Tensor) -> Tensor:
    """Logits or log-probs in fp32, -inf as -1e4, so that differences stay finite. NaN stays: the training loop must see it."""
    return x.float().clamp(-1e4, 1e4)


# -----------------------------------------------------------------------------
# the head, in blocks


def head_logits(
    hidden, weight, ids, bias=None, *,
    temperature=1.0, vocab=None, lse=True, entropy=False, block=None,
):  # fmt: skip
    """(z [N, K], lse [N]) in fp32: logits / temperature at ids, and logsumexp of all logits / temperature.

    hidden [N, H], weight [V', H], ids [N, K], bias [V'] or None. vocab: only the first V rows of weight are
    tokens. lse=False: no pass over the vocabulary, and lse is None. entropy=True: a third output [N], in
    nats, detached. block: elements of the largest temporary.

    Any upstream gradient may arrive at either. One at lse costs 2NHV to compute the logits again, and
    4NHV; where it is absent (a loss on z alone, lse detached or off) only K rows of weight a position
    are touched. Memory beyond outputs and gradients is one or two blocks, whatever N.
    """
    vocab, block = vocab or weight.shape[0], block or _default_block(hidden)
    out = _Head.apply(hidden, weight, bias, ids, temperature, vocab, lse or entropy, entropy, block)
    return out if entropy else out[:2]


@torch.no_grad()
def head_topk(hidden, weight, k: int, bias=None, *, ids=None, temperature=1.0, vocab=None, block=None):
    """A teacher's targets in fp32: top-k (ids [N, k], logq [N, k]); with ids [N, J], also their logq [N, J].

    Memory beyond the result is about one block, whatever N: some positions' logits over the whole vocabulary.
    """
    vocab, block = vocab or weight.shape[0], block or 3 * _default_block(hidden, cpu=24, cuda=26)
    group = 16 if vocab >= 32 * k else 1
    tile = vocab if hidden.is_cuda else min(vocab, 1024)  # on a CPU the passes over it stay in the cache
    width = group * math.ceil(tile / group)
    count = math.ceil(vocab / width)
    rows = max(1, min(len(hidden), block // (count * width)))
    z = None if ids is None else _rows_logits(hidden, weight, bias, ids, temperature, block)
    tiles = hidden.new_empty(count, rows, width, dtype=torch.float32)
    tiles[-1, :, vocab - (count - 1) * width :] = -math.inf  # beyond the vocabulary
    parts = [_topk(h, weight, k, bias, temperature, vocab, tiles[:, : len(h)], group) for h in hidden.split(rows)]
    top, logq, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return (top, logq) if z is None else (top, logq, z - lse)


def _topk(hidden, weight, k, bias, temperature, vocab, tiles, group):
    """(ids [N, k], logq [N, k], lse [N, 1]). The k largest lie in the k groups of logits with the largest maxima."""
    count, N, width = tiles.shape
    size, part, maxima = width // group, [], []  # size: groups in a tile
    for tile, start in zip(tiles, range(0, vocab, width), strict=True):
        v = slice(start, min(start + width, vocab))
        _logits_(tile[:, : v.stop - start], hidden, weight, bias, v, temperature)
        part.append(_log_softmax_(tile)[:, None])
        maxima.append(tile.view(N, group, size).amax(1) + part[-1].float())
    part, best = torch.cat(part, 1), torch.cat(maxima, 1).topk(k).indices[:, None]
    member, row = (torch.arange(n, device=best.device)[:, None] for n in (group, N))
    ids = (best // size * width + best % size + size * member).flatten(1)
    j = ids // width
    value, at = (tiles[j, row, ids % width] + part.gather(1, j)).topk(k)
    lse = part.logsumexp(1, keepdim=True)
    return ids.gather(1, at), (value - lse).float(), lse.float()


def head_kl(
    hidden, weight, hidden_t, weight_t, bias=None, bias_t=None, *,
    beta=1.0, temperature=1.0, vocab=None, block=None,
):  # fmt: skip
    """Full-vocabulary divergence [N] with gradient, and the student's logsumexp [N] without, in fp32.

    Teacher's hidden_t [N, H_t], weight_t [V'', H_t], bias_t; vocab is what the two share. beta 1: reverse
    KL(p||q). beta 0: forward KL(q||p). Between: generalised JSD, beta KL(q||m) + (1 - beta) KL(p||m) with
    m = beta q + (1 - beta) p (Agarwal et al. 2024), as GKD and TRL have it.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, outside [0, 1]")
    vocab = vocab or min(len(weight), len(weight_t))
    teacher = hidden_t, weight_t, bias_t
    return _HeadKL.apply(hidden, weight, bias, *teacher, beta, temperature, vocab, block)


class _Head(torch.autograd.Function):
    """(z, lse, entropy): adds up the logsumexps of blocks; backward makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, vocab, want_lse, want_entropy, block):
        ctx.args = temperature, vocab, block
        ctx.set_materialize_grads(False)
        z, lse, H = _rows_logits(hidden, weight, bias, ids, temperature, block), None, None
        if want_lse:
            total = hidden.new_full(hidden.shape[:1], -math.inf, dtype=torch.float64)
            mean = torch.zeros_like(total)  # of the logits, under the softmax so far
            for _, logits in _blocks(hidden, weight, bias, temperature, vocab, block):
                part, old = _log_softmax_(logits), total
                total = torch.logaddexp(old, part)
                if want_entropy:
                    here = part + torch.linalg.vecdot(logits.exp(), logits)
                    mean = mean * (old - total).exp() + here * (part - total).exp()
            lse = total.float()
            if want_entropy:
                H = (total - mean).float()
                ctx.mark_non_differentiable(H)
        ctx.save_for_backward(hidden, weight, bias, ids, lse)
        return z, lse, H

    @staticmethod
    def backward(ctx, grad_z, grad_lse, _):
        hidden, weight, bias, ids, lse = ctx.saved_tensors
        temperature, vocab, block = ctx.args
        if grad_lse is None:
            grads = _rows_backward(hidden, weight, bias, ids, temperature, block, grad_z)
            return *grads, *[None] * 6
        grads = [torch.zeros_like(hidden, dtype=torch.float32), *_zeros(weight, bias)]
        for v, p in _blocks(hidden, weight, bias, temperature, vocab, block):
            p.sub_(lse[:, None]).exp_().mul_(grad_lse[:, None])
            if grad_z is not None:
                inside = (ids >= v.start) & (ids < v.stop)
                p.scatter_add_(1, (ids - v.start).clamp(0, p.shape[1] - 1), grad_z * inside)
            _backward_block(p, hidden, weight, v, temperature, *grads)
        return grads[0].to(hidden.dtype), *grads[1:], *[None] * 6


class _HeadKL(torch.autograd.Function):
    """JSD(beta) [N]: walks rows forward, since m needs both softmaxes complete, and the vocabulary backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, hidden_t, weight_t, bias_t, beta, temp, vocab, block):
        N = hidden.shape[0]
        rows = max(1, (block or _default_block(hidden, cpu=26, cuda=28)) // (4 * vocab))
        small = max(1, (block or _default_block(hidden, cpu=20)) // vocab)  # rows that fit the cache
        loss, lse, lse_t, mean = (hidden.new_zeros(N, dtype=torch.float32) for _ in range(4))
        buffers = hidden.new_empty(2, min(rows, N) * vocab, dtype=torch.float32)
        for i in range(0, N, rows):
            ((_, x),) = _blocks(hidden[i : i + rows], weight, bias, temp, vocab, buffer=buffers[0])
            ((_, y),) = _blocks(hidden_t[i : i + rows], weight_t, bias_t, temp, vocab, buffer=buffers[1])
            for logp, logq in zip(x.split(small), y.split(small), strict=True):
                r = slice(i, i := i + len(logp))
                lse[r], lse_t[r] = _log_softmax_(logp), _log_softmax_(logq)
                logm = _log_mixture(logp, logq, beta)
                mean[r] = torch.linalg.vecdot(logp.exp(), logp - logm)  # the gradient needs it too
                kl_q = torch.linalg.vecdot(logq.exp(), logq - logm)
                loss[r] = (beta or 1) * kl_q + (1 - beta or 1) * mean[r]
        ctx.save_for_backward(hidden, weight, bias, hidden_t, weight_t, bias_t, lse, lse_t, mean)
        block = block // 4 if block else _default_block(hidden, cpu=20, cuda=25)
        ctx.args = beta, temp, vocab, block
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, hidden_t, weight_t, bias_t, lse, lse_t, mean = ctx.saved_tensors
        beta, temperature, vocab, block = ctx.args
        grads = [torch.zeros_like(hidden, dtype=torch.float32), *_zeros(weight, bias)]
        student = _blocks(hidden, weight, bias, temperature, vocab, block)
        teacher = _blocks(hidden_t, weight_t, bias_t, temperature, vocab, block)
        for (v, logp), (_, logq) in zip(student, teacher, strict=True):
            logp -= lse[:, None]
            logq -= lse_t[:, None]
            if beta == 0:
                d = logp.exp_().sub_(logq.exp_()).mul_(grad[:, None])
            else:  # d/dz of (1 - beta) KL(p||m) + beta KL(q||m) is (1 - beta) p (log p - log m - mean)
                p = logp.exp().mul_(grad[:, None] * (1 - beta or 1))
                d = logp.sub_(_log_mixture(logp, logq, beta)).sub_(mean[:, None]).mul_(p)
            _backward_block(d, hidden, weight, v, temperature, *grads)
        return grads[0].to(hidden.dtype), *grads[1:], *[None] * 7


def _log_mixture(logp, logq, beta):
    """log m; the two limits compare with the other side itself."""
    if beta in (0, 1):
        return logq if beta == 1 else logp
    return logp.exp().lerp_(logq.exp(), beta).clamp_(min=torch.finfo(logp.dtype).tiny).log_()


# -----------------------------------------------------------------------------
# blocks


def _default_block(x, cpu=21, cuda=27):
    """Elements. On a CPU a block that stays in the cache: several passes go over it between the matmuls."""
    return 1 << (cuda if x.is_cuda else cpu)


def _mm(a, b, out=None):
    """a @ b with fp32 accumulation and an fp32 result; bf16 stays on the tensor cores, and is upcast on CPU."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def _blocks(hidden, weight, bias, temperature, vocab, block=None, buffer=None):
    """Yields (v, logits [N, |v|] / temperature), v a slice of the vocabulary. The buffer is used again."""
    N = hidden.shape[0]
    width = min(vocab, max(1, block // max(N, 1))) if block else vocab
    buffer = hidden.new_empty(N * width, dtype=torch.float32) if buffer is None else buffer
    for start in range(0, vocab, width):
        v = slice(start, min(start + width, vocab))
        out = buffer[: N * (v.stop - v.start)].view(N, v.stop - v.start)
        yield v, _logits_(out, hidden, weight, bias, v, temperature)


def _logits_(out, hidden, weight, bias, v, temperature):
    """out [N, |v|] becomes the logits / temperature of v, a slice of the vocabulary."""
    tile = out.shape[1] if out.is_cuda else 1024  # a CPU multiplies few rows faster by pieces of the weight
    for piece, part in zip(weight[v].split(tile), out.split(tile, 1), strict=True):
        _mm(hidden, piece.T, part)
    if bias is not None:
        out += bias[v]
    return out if temperature == 1 else out.div_(temperature)


def _log_softmax_(x: Tensor) -> Tensor:
    """x [N, W] becomes its log_softmax, in one fused pass; returns its logsumexp [N] in fp64."""
    some = x[:, :16].double()  # what the pass takes off; a mean, because each result is rounded
    torch.log_softmax(x, 1, out=x)
    return (some - x[:, :16]).nanmean(1)  # nan where a bias of -inf bans a token


def _zeros(weight, bias):
    return torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)


def _backward_block(d, hidden, weight, v, temperature, dh, dw, db):
    """Adds one block's part to the gradients; d [N, |v|] is the gradient of logits / temperature."""
    if temperature != 1:
        d /= temperature
    if db is not None:
        db[v] = d.sum(0)
    if d.is_cuda:
        d = d.to(hidden.dtype)
        dh += _mm(d, weight[v])
    else:  # in place: a temporary [N, H] would grow with N
        dh.addmm_(d, weight[v].float())
    dw[v] = _mm(d.T, hidden)


def _rows_logits(hidden, weight, bias, ids, temperature, block):
    """z [N, K] from K rows of the weight a position."""
    rows = max(1, block // (ids.shape[1] * hidden.shape[1]))
    parts = zip(hidden.split(rows), ids.split(rows), strict=True)
    z = torch.cat([torch.bmm(weight[i].float(), h.float()[:, :, None])[:, :, 0] for h, i in parts])
    return (z if bias is None else z + bias[ids]).div_(temperature)


def _rows_backward(hidden, weight, bias, ids, temperature, block, grad_z):
    """(dh, dw, db) of z alone. Repeated ids add up in fp32, on the touched rows only."""
    grad_z = grad_z / temperature
    dh, (dw, db) = torch.empty_like(hidden), _zeros(weight, bias)
    exact = weight.dtype == torch.float32
    used, slot = (None, ids) if exact else torch.unique(ids, return_inverse=True)
    total = dw if exact else weight.new_zeros(len(used), weight.shape[1], dtype=torch.float32)
    rows = max(1, block // (ids.shape[1] * hidden.shape[1]))
    for r in (slice(i, i + rows) for i in range(0, len(ids), rows)):
        dh[r] = torch.bmm(grad_z[r, None], weight[ids[r]].float())[:, 0]
        outer = grad_z[r, :, None] * hidden[r, None].float()  # [|r|, K, H]
        total.index_add_(0, slot[r].flatten(), outer.flatten(0, 1))
    if not exact:
        dw[used] = total.to(dw.dtype)
    if db is not None:
        db.index_add_(0, ids.flatten(), grad_z.flatten().to(db.dtype))
    return dh, dw, db
