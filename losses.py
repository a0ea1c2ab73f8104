"""Losses for on-policy distillation over a large vocabulary, without a [N, V] matrix of logits in memory.

Position losses: one number for each response token, not reduced. Weight them with a gate (gating.py), then divide once
by the denominator of the whole minibatch. Student p, teacher q; log-probs in nats. (To add a loss to train.py, see the comment
above student_outputs there.)

    opd_loss     sampled-token OPD: PPO's clipped objective with the teacher's log-ratio as the advantage
    lsm_loss     reverse or forward KL on the teacher's top-K tokens (local support matching)
    tail_loss    reverse KL on the top-K tokens and "any other token" as one more outcome

The language-model head: what the losses need from the logits, in chunks, with a custom backward pass.

    z, lse = head_logits(hidden, weight, bias, ids)         # logits at ids [N, K], logsumexp of all logits [N]
    logp = z - lse[:, None]                                 # differentiable log-probs of ids
    ids, logq = head_topk(hidden, weight, bias, k)          # a teacher's k most likely tokens; no gradient
    kl, lse = head_kl(hidden, weight, bias, hidden_t, weight_t, bias_t)     # KL or JSD over the whole vocabulary [N]

N positions, H hidden size, V vocabulary, K tokens of the support; "..." is [N] or [B, T]. Results are fp32, whatever
the dtype of the inputs. The head functions share these arguments:

    hidden [N, H]; weight [V', H] and bias [V'] (or None): the states and the head's parameters
    temperature: logits are divided by it
    vocab: the first `vocab` rows of weight are tokens, the rest padding; by default all are tokens
    merged: a list of ids that count as one outcome, whose probability is the sum of theirs (the stop tokens, where student and
        teacher have different ones). The outcome goes by its first id
    chunk: elements in the largest temporary. Memory beyond inputs, outputs and gradients is a few chunks, regardless of N

As in torch, functions whose names end in _ work in place: they may overwrite their first argument.

Copy this file; it depends only on PyTorch. MIT license.
"""

import functools
import math

import torch
from torch import Tensor

# Elements of a chunk: the fastest of the powers of 2 measured (bench/losses.py). On a CPU a chunk should fit in the cache, since
# several elementwise passes read it between two matmuls.
CPU_CHUNK, CUDA_CHUNK = 1 << 21, 1 << 27  # head_logits
CPU_TOPK_CHUNK, CUDA_TOPK_CHUNK = 1 << 24, 1 << 27  # head_topk
# head_kl holds up to four tensors of this size at once, so it divides a `chunk` that the caller names by 4
CPU_KL_CHUNK, CUDA_KL_CHUNK = 1 << 24, 1 << 26
CPU_KL_BACKWARD_CHUNK, CUDA_KL_BACKWARD_CHUNK = 1 << 20, 1 << 25
# Elements that fit the cache: forward on a CPU, head_kl computes the divergence on so many at a time
CPU_KL_CACHED = 1 << 20
CUDA_COLUMNS = 128  # on CUDA, chunks of the vocabulary are multiples of this
FUSED = False  # on CUDA, compile the elementwise passes over a chunk into one kernel (bench/gpu.py compares)

# -----------------------------------------------------------------------------
# position losses


def opd_loss(
    logp: Tensor,  # [...] log p(y), y the sampled token, with gradient
    logp_old: Tensor,  # [...] the same before the first update on these rollouts
    logp_teacher: Tensor,  # [...] log q(y)
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    advantage_of: str = "old",
) -> tuple[Tensor, dict]:
    """Sampled-token OPD: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and {"clipped", "advantage"}.

    A = log q(y) - log p_old(y), r = p(y) / p_old(y). At r = 1 the gradient is the policy gradient of the token-level
    reverse KL. If A < 0 the loss is at most -dual_clip A (Ye et al. 2020, arXiv 1912.09729). 0 turns off clip_low,
    clip_high or dual_clip. The advantage is that of Fu et al. 2026, arXiv 2603.25562; the clipping and its defaults are verl's.
    advantage_of "current": A = log q(y) - log p(y), detached, what the teacher thinks of the current student; AsyncOPD
    (arXiv 2606.24143) recommends it for stale rollouts. "old" is the paper's.
    """
    student = logp if advantage_of == "current" else logp_old
    advantage = (_finite(logp_teacher) - _finite(student)).detach()
    ratio = (_finite(logp) - _finite(logp_old)).clamp(-20, 20).exp()  # at most e^20: finite
    low = 1 - clip_low if clip_low else 0.0
    high = 1 + clip_high if clip_high else math.inf
    surrogate = ratio * advantage
    clipped = ratio.clamp(low, high) * advantage
    loss = -torch.minimum(surrogate, clipped)
    is_clipped = clipped < surrogate
    if dual_clip:
        bound = -dual_clip * advantage
        is_bounded = (advantage < 0) & (loss > bound)
        loss = torch.where(is_bounded, bound, loss)
        is_clipped = is_clipped | is_bounded
    return loss, {"clipped": is_clipped.float(), "advantage": advantage}


def lsm_loss(
    z: Tensor,  # [..., K] student's logits (or log-probs) at the support, with gradient
    logq: Tensor,  # [..., K] teacher's
    support: Tensor | None = None,  # [..., K] False where a slot does not count
    *,
    forward: bool = False,
) -> Tensor:
    """Teacher top-K local support matching, LSM (Fu et al. 2026, arXiv 2603.25562): KL(p || q) over the support.

    p and q are softmaxes over the support alone, so the student's logsumexp over the vocabulary cancels, and no gradient with
    respect to all V logits is needed. forward: KL(q || p) instead.
    """
    if z.shape[-1] < 2:
        raise ValueError("K = 1: renormalised on one token, the loss is always 0")
    logp, logq = _finite(z), _finite(logq)
    if support is not None:  # a large finite number, because 0 * -inf would give NaN in the gradient
        logp = logp.masked_fill(~support, -1e30)
        logq = logq.masked_fill(~support, -1e30)
    logp, logq = logp.log_softmax(-1), logq.log_softmax(-1)
    # KL(a || b): a is the distribution that the expectation is taken over
    log_a, log_b = (logq, logp) if forward else (logp, logq)
    return (log_a.exp() * (log_a - log_b)).sum(-1)  # outside the support exp gives 0, and the difference is 0


def tail_loss(logp: Tensor, logq: Tensor) -> Tensor:
    """Reverse KL over K + 1 outcomes [...]: K tokens with log-probs logp and logq [..., K], and "any other token"."""
    # K + 1 probabilities that add up to 1 already, so lsm_loss's renormalisation changes nothing
    return lsm_loss(_with_tail(_finite(logp)), _with_tail(_finite(logq)))


def _with_tail(logp: Tensor) -> Tensor:
    """Appends log(1 - sum p) to the log-probs [..., K]; the rest is clamped to at least 1e-6 (and has no gradient there)."""
    rest = 1 - logp.exp().sum(-1, keepdim=True)
    return torch.cat([logp, rest.clamp(min=1e-6).log()], -1)


def _finite(x: Tensor) -> Tensor:
    """fp32, with -inf as -1e4 so that differences stay finite. NaN stays NaN: the training loop has to see it."""
    return x.float().clamp(-1e4, 1e4)


# -----------------------------------------------------------------------------
# the head: logits at chosen ids, and the logsumexp of all


def head_logits(hidden, weight, bias, ids, *, temperature=1.0, vocab=None, merged=None, want_lse=True, chunk=None):
    """(z [N, K], lse [N]): logits / temperature at ids [N, K], and the logsumexp of all logits / temperature, with gradient.

    want_lse=False skips the pass over the vocabulary, and lse is None. Each id in `merged` gets the outcome's z: two of them in
    one softmax would count the outcome twice. head_topk returns at most one (_merge_), unless K is nearly the whole vocabulary.

    FLOPs                                              forward       backward
        z alone (want_lse=False)                       2 N H K       4 N H K
        z and lse, no gradient reaches lse (LSM)       2 N H V       4 N H K
        z and lse, both with gradient (OPD)            2 N H V       2 N H V (logits again) + 4 N H V (gradients)
        head_kl                                        4 N H V       4 N H V (logits again) + 4 N H V (gradients)
    """
    vocab = vocab or weight.shape[0]
    chunk = chunk or (CUDA_CHUNK if hidden.is_cuda else CPU_CHUNK)
    if not merged:
        return _HeadLogits.apply(hidden, weight, bias, ids, temperature, vocab, want_lse, chunk)
    K, merged = ids.shape[1], torch.tensor(merged, device=ids.device)
    all_ids = torch.cat([ids, merged.expand(len(ids), -1)], 1)  # [N, K + M]
    z, lse = _HeadLogits.apply(hidden, weight, bias, all_ids, temperature, vocab, want_lse, chunk)
    outcome = z[:, K:].logsumexp(1, keepdim=True)  # [N, 1]: log of the sum of exp(z) over the merged ids
    return torch.where(torch.isin(ids, merged), outcome, z[:, :K]), lse


class _HeadLogits(torch.autograd.Function):
    """Forward accumulates the logsumexp over chunks of the vocabulary; backward recomputes each chunk's logits."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, vocab, want_lse, chunk):
        ctx.options = temperature, vocab, chunk
        ctx.set_materialize_grads(False)  # so that backward can tell an absent gradient from zeros
        z = _logits_at(ids, hidden, weight, bias, temperature, chunk)  # [N, K]
        lse = None
        if want_lse:
            total = hidden.new_full(hidden.shape[:1], -math.inf, dtype=torch.float64)  # [N]
            for _, logits in _vocabulary_chunks(hidden, weight, bias, temperature, vocab, chunk):
                total = torch.logaddexp(total, _lse_(logits))
            lse = total.float()
        ctx.save_for_backward(hidden, weight, bias, ids, lse)
        return z, lse

    @staticmethod
    def backward(ctx, grad_z, grad_lse):  # [N, K] or None, [N] or None
        hidden, weight, bias, ids, lse = ctx.saved_tensors
        temperature, vocab, chunk = ctx.options
        if grad_lse is None:
            grads = _logits_at_backward(grad_z, ids, hidden, weight, bias, temperature, chunk)
            return *grads, *[None] * 5
        if temperature != 1:  # the logits in question are weight @ hidden + bias, divided by it
            grad_lse, grad_z = grad_lse / temperature, None if grad_z is None else grad_z / temperature
        grads = _zero_grads(hidden, weight, bias)
        for v, logits in _vocabulary_chunks(hidden, weight, bias, temperature, vocab, chunk):
            d_logits = _d_logits_(logits, v, lse, grad_lse, ids, grad_z, hidden.dtype)
            _add_chunk_grads(d_logits, v, hidden, weight, *grads)
        return grads[0].to(hidden.dtype), *grads[1:], *[None] * 5


def _d_logits_(logits, v, lse, grad_lse, ids, grad_z, dtype):
    """The gradient of the chunk `logits` [N, |v|], which may be overwritten; v is its slice of the vocabulary.

    d lse / d logits is the softmax: this chunk of it, times the incoming gradient; and grad_z is added where ids lie in it.
    """
    if _fuses(logits) and (grad_z is None or ids.shape[1] == 1):
        return _compiled(_d_logits_in_one)(logits, v.start, lse, grad_lse, ids, grad_z, dtype)
    d_logits = logits.sub_(lse[:, None]).exp_().mul_(grad_lse[:, None])
    if grad_z is not None:
        in_chunk = (ids >= v.start) & (ids < v.stop)
        columns = (ids - v.start).clamp(0, d_logits.shape[1] - 1)
        d_logits.scatter_add_(1, columns, grad_z * in_chunk)
    return d_logits


def _d_logits_in_one(logits, start, lse, grad_lse, ids, grad_z, dtype):
    """_d_logits_ for ids [N, 1], as one expression that compiles into one kernel: reads the logits, writes the result."""
    d_logits = (logits - lse[:, None]).exp() * grad_lse[:, None]
    if grad_z is not None:
        columns = torch.arange(logits.shape[1], device=logits.device) + start
        d_logits = torch.where(columns == ids, d_logits + grad_z, d_logits)
    return d_logits.to(dtype)


# -----------------------------------------------------------------------------
# the head: a teacher's top-k


@torch.no_grad()
def head_topk(hidden, weight, bias, k: int, *, also_ids=None, temperature=1.0, vocab=None, merged=None, chunk=None):
    """A teacher's targets: (ids [N, k], logq [N, k]) of the k most likely tokens; also_ids [N, J] adds their logq [N, J].

    also_ids must name the outcome of `merged` by its first id. Works on a few positions at a time, over the whole vocabulary.
    """
    vocab = vocab or weight.shape[0]
    rows = max(1, (chunk or (CUDA_TOPK_CHUNK if hidden.is_cuda else CPU_TOPK_CHUNK)) // vocab)
    buffer = hidden.new_empty(min(rows, len(hidden)), vocab, dtype=torch.float32)
    top_ids, top_logq, also_logq = [], [], []
    for start in range(0, max(1, len(hidden)), rows):  # once even if N = 0
        h = hidden[start : start + rows]
        logits = _logits_(buffer[: len(h)], h, weight, bias, slice(0, vocab), temperature)  # [rows, V]
        _merge_(logits, merged)
        top = logits.topk(k)
        z = logits[:, :0]  # [rows, 0]
        if also_ids is not None:
            z = logits.gather(1, also_ids[start : start + rows])  # [rows, J]
        peak = top.values[:, :1]
        lse = peak + logits.sub_(peak).exp_().sum(1, keepdim=True).log()  # in place: logits are no longer needed
        top_ids.append(top.indices)
        top_logq.append(top.values - lse)
        also_logq.append(z - lse)
    results = torch.cat(top_ids), torch.cat(top_logq), torch.cat(also_logq)
    return results[:2] if also_ids is None else results


# -----------------------------------------------------------------------------
# the head: divergences over the whole vocabulary


def head_kl(
    hidden: Tensor,  # [N, H] student's hidden states, with gradient
    weight: Tensor,  # [V', H] student's head, with gradient
    bias: Tensor | None,  # [V']
    hidden_t: Tensor,  # [N, H_t] teacher's
    weight_t: Tensor,  # [V'', H_t]
    bias_t: Tensor | None,  # [V'']
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    vocab: int | None = None,  # tokens that the two share; by default the smaller head's rows
    merged: list[int] | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(divergence [N] with gradient, the student's logsumexp [N] without), over the whole vocabulary.

    beta = 1: reverse KL(p || q). beta = 0: forward KL(q || p). Between: the generalised Jensen-Shannon divergence,
    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (Agarwal et al. 2024, arXiv 2306.13649).
    All logits must be finite.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must lie in [0, 1]")
    vocab = vocab or min(len(weight), len(weight_t))
    return _HeadKL.apply(hidden, weight, bias, hidden_t, weight_t, bias_t, beta, temperature, vocab, merged, chunk)


class _HeadKL(torch.autograd.Function):
    """Forward takes whole rows, because m needs both softmaxes complete; backward takes chunks of the vocabulary."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, hidden_t, weight_t, bias_t, beta, temperature, vocab, merged, chunk):
        N = len(hidden)
        # `rows` positions share a matmul: two buffers [rows, V], plus temporaries of the same size. On a CPU the divergence is
        # then computed on as many rows at a time as the cache holds.
        rows = max(1, (chunk // 4 if chunk else CUDA_KL_CHUNK if hidden.is_cuda else CPU_KL_CHUNK) // vocab)
        cached_rows = rows if hidden.is_cuda else max(1, (chunk or CPU_KL_CACHED) // vocab)
        loss, lse, lse_t, kl_p = (hidden.new_zeros(N, dtype=torch.float32) for _ in range(4))
        buffers = hidden.new_empty(2, min(rows, N), vocab, dtype=torch.float32)
        v = slice(0, vocab)
        for start in range(0, N, rows):
            part = slice(start, min(start + rows, N))
            n = part.stop - start
            logits = _logits_(buffers[0, :n], hidden[part], weight, bias, v, temperature)
            logits_t = _logits_(buffers[1, :n], hidden_t[part], weight_t, bias_t, v, temperature)
            _merge_(logits, merged)
            _merge_(logits_t, merged)
            for i in range(0, n, cached_rows):
                logp, logq = logits[i : i + cached_rows], logits_t[i : i + cached_rows]
                r = slice(start + i, start + i + len(logp))
                lse[r] = _log_softmax_and_lse_(logp)  # in place: logp and logq are log-probs from here on
                lse_t[r] = _log_softmax_and_lse_(logq)
                loss[r], kl_p[r] = _divergence(logp, logq, beta)
        ctx.save_for_backward(hidden, weight, bias, hidden_t, weight_t, bias_t, lse, lse_t, kl_p)
        chunk = chunk // 4 if chunk else CUDA_KL_BACKWARD_CHUNK if hidden.is_cuda else CPU_KL_BACKWARD_CHUNK
        ctx.options = beta, temperature, vocab, merged or [], chunk
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, hidden_t, weight_t, bias_t, lse, lse_t, kl_p = ctx.saved_tensors
        beta, temperature, vocab, merged, chunk = ctx.options
        if temperature != 1:
            grad = grad / temperature
        grads = _zero_grads(hidden, weight, bias)
        # The outcome of `merged` has the logit o = logsumexp of their logits z_j, and the divergence D depends on the z_j through o
        # alone: dD / dz_j = dD / do * do / dz_j. _d_divergence_ gives dD / do, at log p(o) and log q(o), and do / dz_j is the
        # softmax of the z_j.
        if merged:
            merged_ids = torch.tensor(merged, device=hidden.device).expand(len(hidden), -1)
            z = _logits_at(merged_ids, hidden, weight, bias, temperature, chunk)
            z_t = _logits_at(merged_ids, hidden_t, weight_t, bias_t, temperature, chunk)
            logp, logq = z.logsumexp(1, keepdim=True) - lse[:, None], z_t.logsumexp(1, keepdim=True) - lse_t[:, None]
            d_merged = _d_divergence_(logp, logq, kl_p, grad, beta) * z.softmax(1)
        student = _vocabulary_chunks(hidden, weight, bias, temperature, vocab, chunk)
        teacher = _vocabulary_chunks(hidden_t, weight_t, bias_t, temperature, vocab, chunk)
        for (v, logits), (_, logits_t) in zip(student, teacher, strict=True):
            logp = logits.sub_(lse[:, None])  # [N, chunk of V], in place
            logq = logits_t.sub_(lse_t[:, None])
            d_logits = _d_divergence_(logp, logq, kl_p, grad, beta)
            for j, id in enumerate(merged):
                if v.start <= id < v.stop:
                    d_logits[:, id - v.start] = d_merged[:, j]
            _add_chunk_grads(d_logits, v, hidden, weight, *grads)
        return grads[0].to(hidden.dtype), *grads[1:], *[None] * 8


def _divergence(logp, logq, beta):
    """(divergence [n], KL(p || m) [n], which the gradient needs) of log-probs [n, V]; for beta 0 the latter is unused."""
    if beta == 0:  # KL(q || p)
        return torch.linalg.vecdot(logq.exp(), logq - logp), 0.0
    logm = _log_mixture(logp, logq, beta)
    kl_p = torch.linalg.vecdot(logp.exp(), logp - logm)
    if beta == 1:  # KL(p || q)
        return kl_p, kl_p
    kl_q = torch.linalg.vecdot(logq.exp(), logq - logm)
    return beta * kl_q + (1 - beta) * kl_p, kl_p


def _d_divergence_(logp, logq, kl_p, grad, beta):
    """grad [N] times d divergence / d logits [N, W], for columns of the vocabulary; overwrites logp and logq."""
    if beta == 0:  # d KL(q || p) / d logits = p - q
        return logp.exp_().sub_(logq.exp_()).mul_(grad[:, None])
    # d KL(p || m) / d logits = p (log p - log m - KL(p || m)) for a fixed m. In JSD m depends on p, but d JSD / d m_v
    # = -(beta q_v + (1 - beta) p_v) / m_v = -1 for every token v, and sum_v dm_v = 0: that term vanishes.
    scaled_p = logp.exp().mul_(grad[:, None] * (1 if beta == 1 else 1 - beta))
    return logp.sub_(_log_mixture(logp, logq, beta)).sub_(kl_p[:, None]).mul_(scaled_p)


def _log_mixture(logp, logq, beta):
    """log m, m = beta q + (1 - beta) p; for beta = 1 that is log q itself."""
    if beta == 1:
        return logq
    return logp.exp().lerp_(logq.exp(), beta).clamp_(min=torch.finfo(logp.dtype).tiny).log_()


# -----------------------------------------------------------------------------
# pieces of the head. Functions whose names end in _ may overwrite their first argument


def _fuses(x):
    return FUSED and x.is_cuda


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=True)


def _row_lse(x):
    return x.logsumexp(1)


def _lse_(x):
    """The logsumexp [N] of x [N, W], in fp64."""
    return _compiled(_row_lse)(x).double() if _fuses(x) else _log_softmax_and_lse_(x)


def _mm(a, b, out=None):
    """a @ b, accumulated and returned in fp32. bf16 stays on a GPU's tensor cores, and is converted on a CPU."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def _vocabulary_chunks(hidden, weight, bias, temperature, vocab, chunk):
    """Yields (v, logits / temperature [N, |v|]) for slices v of the vocabulary; every chunk is in the same buffer."""
    N = len(hidden)
    width = min(vocab, max(1, chunk // max(N, 1)))
    if hidden.is_cuda:
        # The rows of the bf16 gradient [N, width] must start at multiples of 16 bytes, 8 columns: for misaligned rows
        # cuBLAS has only slow kernels. 128 columns also fill its tiles. Only the last chunk may be of another width.
        width = min(vocab, max(CUDA_COLUMNS, width // CUDA_COLUMNS * CUDA_COLUMNS))
    buffer = hidden.new_empty(N * width, dtype=torch.float32)
    for start in range(0, vocab, width):
        v = slice(start, min(start + width, vocab))
        out = buffer[: N * (v.stop - start)].view(N, v.stop - start)
        yield v, _logits_(out, hidden, weight, bias, v, temperature)


def _logits_(out, hidden, weight, bias, v, temperature):
    """Overwrites out [N, |v|] with the logits / temperature of v, a slice of the vocabulary."""
    columns = out.shape[1] if out.is_cuda else 1024  # with few rows, a CPU is faster if the weight is split
    for weight_piece, out_piece in zip(weight[v].split(columns), out.split(columns, 1), strict=True):
        _mm(hidden, weight_piece.T, out_piece)
    if bias is not None:
        out += bias[v]
    return out if temperature == 1 else out.div_(temperature)


def _merge_(logits, merged):
    """Counts the ids `merged` as one outcome of logits [N, V]: the first of them gets its logit, the others vanish."""
    if merged:
        outcome = logits[:, merged].logsumexp(1, keepdim=True)
        logits[:, merged[:1]] = outcome
        logits[:, merged[1:]] = outcome - 80  # e^-80 of its probability; -inf would give NaN in a KL


def _log_softmax_and_lse_(x):
    """Overwrites x [N, W] with its log_softmax, and returns its logsumexp [N] in fp64.

    Even where only the logsumexp is wanted, this is three times faster than torch.logsumexp: log_softmax is one fused pass, and
    safe in place (tested). The logsumexp is input minus output at any element; the mean over 16 of them rounds less.
    """
    before = x[:, :16].double()
    torch.log_softmax(x, 1, out=x)
    return (before - x[:, :16]).nanmean(1)  # inf - inf is NaN, if a bias of -inf bans a token


def _zero_grads(hidden, weight, bias):
    """Gradients to add to; that of hidden in fp32."""
    d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    return d_hidden, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)


def _add_chunk_grads(d_logits, v, hidden, weight, d_hidden, d_weight, d_bias):
    """Backpropagates d_logits [N, |v|], the gradient of weight @ hidden + bias in the slice v of the vocabulary."""
    if d_bias is not None:
        d_bias[v] = d_logits.sum(0)
    if d_logits.is_cuda:
        d_logits = d_logits.to(hidden.dtype)  # bf16, for the tensor cores; nothing to do if it is already
        d_hidden += _mm(d_logits, weight[v])
    else:  # in place: avoids a second [N, H] tensor
        d_hidden.addmm_(d_logits.float(), weight[v].float())
    d_weight[v] = _mm(d_logits.T, hidden)


def _logits_at(ids, hidden, weight, bias, temperature, chunk):
    """z [N, K]: logits / temperature at ids [N, K], from the K rows of weight that they name."""
    rows = max(1, chunk // (ids.shape[1] * hidden.shape[1]))
    z = []
    for h, chunk_ids in zip(hidden.split(rows), ids.split(rows), strict=True):
        z.append(torch.bmm(weight[chunk_ids].float(), h.float()[:, :, None])[:, :, 0])  # [rows, K, H] @ [rows, H, 1]
    z = torch.cat(z)
    return (z if bias is None else z + bias[ids]).div_(temperature)


def _logits_at_backward(grad_z, ids, hidden, weight, bias, temperature, chunk):
    """Gradients of (hidden, weight, bias) from grad_z [N, K].

    d_weight is dense [V', H], as optimizers expect, but only the rows that ids name are written.

    Contributions of repeated ids are summed in fp32, in a compact copy of the rows in use, and rounded once.
    """
    grad_z = grad_z / temperature
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    d_bias = None if bias is None else torch.zeros_like(bias)
    used, slot = torch.unique(ids, return_inverse=True)  # ids = used[slot]
    total = weight.new_zeros(len(used), weight.shape[1], dtype=torch.float32)
    rows = max(1, chunk // (ids.shape[1] * hidden.shape[1]))
    for start in range(0, len(ids), rows):
        r = slice(start, start + rows)
        d_hidden[r] = torch.bmm(grad_z[r, None], weight[ids[r]].float())[:, 0]
        outer = grad_z[r, :, None] * hidden[r, None].float()  # [rows, K, H]
        total.index_add_(0, slot[r].flatten(), outer.flatten(0, 1))
    d_weight[used] = total.to(d_weight.dtype)
    if d_bias is not None:
        d_bias.index_add_(0, ids.flatten(), grad_z.flatten().to(d_bias.dtype))
    return d_hidden, d_weight, d_bias
