"""Policy-drift gates: per-token loss weights that shrink where the policy has moved since the rollouts were sampled.

Zheng and Jiang, Blockwise Policy-Drift Gating for On-Policy Distillation, arXiv 2606.24084. The responses of a minibatch are
cut into segments: blocks of 64 tokens, spans between newlines, single tokens, or whole responses. The paper's Eq. 1:

    d_t = log pi(y_t) - log pi_old(y_t)     drift of the sampled token y_t since the rollouts were made, in nats
    s_b = mean of d over segment b          signed, so opposite drifts cancel
    g_b = exp(-tau |s_b|)                   the gate, the same for every token of the segment, without gradient
    L   = sum_t g_t loss_t / sum_t g_t      the loss, over the response tokens of the whole minibatch

Copy this file; it depends only on PyTorch. B responses, one per row; T positions; N response tokens: those at which `mask` is
True, wherever they lie in the row. All else (prompt, padding, gaps) is skipped. For a minibatch processed in one pass:

    weights = gate_weights(logp, logp_old, mask, "block", block=64)     # [B, T]: mean 1 over the response tokens
    loss = (weights * token_loss * mask).sum() / mask.sum()

With gradient accumulation or several ranks the sums of Eq. 1 still run over the whole minibatch, so no micro-batch may be
normalised by itself: add up the gates, and divide the gradient once, before clipping. All tensors of a micro-batch are [B, T];
`kind` is one of KINDS, and `newline`, which only "span" reads, marks the tokens whose decoded text contains a newline.

    gate_sum = torch.zeros((), device=device)
    for logp, logp_old, token_loss, mask, newline in micro_batches:   # equally many on every rank: fill up with masks of False
        mask = mask.bool()
        segments = segment_index(mask, kind, block=64, newline=newline)         # [N]
        g, _ = gate(drift(logp[mask], logp_old[mask]), segments, kind, tau=1.0)     # [N]
        (g * token_loss[mask]).sum().backward()
        gate_sum += g.sum()
    dist.all_reduce(gate_sum)
    for p in model.parameters():
        if p.grad is not None:                                        # DDP and FSDP have averaged it over the ranks
            p.grad *= dist.get_world_size() / gate_sum.clamp(min=1e-30)

Undo any division of the loss by your trainer: Accelerate divides by gradient_accumulation_steps, so multiply the loss by it.
DeepSpeed has no p.grad: use gradient_accumulation_steps = 1 and gate_weights there; with several ranks, each is then normalised
by its own gates, which is only approximately Eq. 1.

`logp_old` must come from the same code as `logp`, before the first update on these rollouts. A sampler's own log-probs
differ (another engine, another precision, top-p), and the gate would take the difference for drift.

MIT license.
"""

import math

import torch
from torch import Tensor

KINDS = ("none", "token", "block", "span", "sequence")
STATS = ("mean", "absmean", "rms")


def gate_weights(
    logp: Tensor,  # [B, T] log-probs of the sampled tokens under the current policy, in nats
    logp_old: Tensor,  # [B, T] the same before the first update on these rollouts
    mask: Tensor,  # [B, T] 1 or True at response tokens
    kind: str = "block",  # how the responses are cut into segments: one of KINDS
    *,
    tau: float = 1.0,
    stat: str = "mean",
    **segment_options,  # block, newline, span_min, span_max: see segment_index
) -> Tensor:
    """The paper's normalised gate [B, T]: g / mean(g), so mean 1 over the response tokens; 0 elsewhere. No gradient."""
    if not logp.shape == logp_old.shape == mask.shape:
        raise ValueError(f"shapes differ: {[tuple(x.shape) for x in (logp, logp_old, mask)]}")
    mask = mask.bool()
    segments = segment_index(mask, kind, **segment_options)
    g, _ = gate(drift(logp[mask], logp_old[mask]), segments, kind, tau=tau, stat=stat)
    weights = torch.zeros(mask.shape, dtype=g.dtype, device=g.device)
    # If every gate underflows to 0 (a huge tau), so do the weights: the loss is 0, not NaN.
    weights[mask] = g / g.mean().clamp(min=torch.finfo(g.dtype).tiny)
    return weights


@torch.no_grad()
def drift(logp: Tensor, logp_old: Tensor) -> Tensor:
    """d = logp - logp_old in nats, fp32, clamped to +-1e4; 0 where both are -inf. NaN stays NaN, for the training loop to notice."""
    logp, logp_old = logp.float(), logp_old.float()
    return (logp - logp_old).masked_fill(logp == logp_old, 0.0).clamp(-1e4, 1e4)


@torch.no_grad()
def gate(
    d: Tensor,  # [N] drift of each response token, in nats
    segments: Tensor,  # [N] index of each token's segment, from segment_index
    kind: str = "block",  # what the segments are; only "none" matters here: its gates are exactly 1
    *,
    tau: float = 1.0,
    stat: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The gates g and the segments' drift s of Eq. 1, both [N] in fp32: every token holds its segment's value.

    Not normalised: divide by the sum of g over the whole minibatch. To try another gate, change the last line.
    """
    if tau < 0:
        raise ValueError(f"tau is {tau}; it must be at least 0 (a negative one would reward drift)")
    s = segment_drift(d, segments, stat)
    if kind == "none":
        return torch.ones_like(s), s
    return torch.exp(-tau * s.abs()), s


def segment_drift(d: Tensor, segments: Tensor, stat: str = "mean") -> Tensor:
    """s [N]: a statistic of the drift d [N] over each segment, given to all of its tokens.

    "mean" is the paper's: it keeps the sign, so +0.5 and -0.5 cancel. "absmean" and "rms" do not cancel.
    """
    if stat not in STATS:
        raise ValueError(f"stat is {stat!r}; it must be one of {', '.join(STATS)}")
    values = {"mean": d, "absmean": d.abs(), "rms": d.square()}[stat]
    n_segments = int(segments[-1]) + 1 if len(segments) else 0  # indices are non-decreasing
    total = d.new_zeros(n_segments).index_add_(0, segments, values)
    n_tokens = d.new_zeros(n_segments).index_add_(0, segments, torch.ones_like(d))
    mean = (total / n_tokens)[segments]
    return mean.sqrt() if stat == "rms" else mean


# -----------------------------------------------------------------------------
# segments


def segment_index(
    mask: Tensor,  # [B, T] True at response tokens
    kind: str = "block",
    *,
    block: int = 64,
    newline: Tensor | None = None,  # [B, T] True at tokens that contain a newline; only spans need it
    span_min: int = 16,
    span_max: int = 128,
) -> Tensor:
    """The segment that each response token belongs to: [N], such as 0, 0, 1, 1, 1, numbered consecutively across responses."""
    if kind == "span" and newline is None:
        raise ValueError("spans need `newline`, the mask of the tokens that contain one")
    lengths = []
    for row, is_response in enumerate(mask.bool()):
        n_tokens = int(is_response.sum())
        is_newline = newline[row][is_response].tolist() if kind == "span" else None
        lengths += segment_lengths(n_tokens, kind, is_newline, block=block, span_min=span_min, span_max=span_max)
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long)).to(mask.device)


def segment_lengths(n_tokens, kind, is_newline=None, *, block=64, span_min=16, span_max=128) -> list[int]:
    """Cuts one response of n_tokens into segments; their lengths in tokens, which add up to n_tokens.

    "block": `block` tokens each, the last one shorter. "token" and "sequence": one token, the whole response. "span": see
    span_lengths; a response without a newline gets blocks. "none": like "block", so that drift can be reported without a
    gate. is_newline: for each token, whether its text contains a newline.
    """
    if kind not in KINDS:
        raise ValueError(f"the gate's kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    if not 1 <= span_min <= span_max:
        raise ValueError(f"span_min is {span_min} and span_max {span_max}; 1 <= span_min <= span_max must hold")
    if kind == "span" and any(is_newline):
        return span_lengths(is_newline, span_min, span_max)
    size = {"token": 1, "sequence": max(n_tokens, 1)}.get(kind, block)
    return [min(size, n_tokens - start) for start in range(0, n_tokens, size)]


def span_lengths(is_newline, span_min: int, span_max: int) -> list[int]:
    """Cuts a response at its newlines. The paper names this rule, but not its two thresholds.

    A span ends with the first newline at or after its span_min-th token, so short lines are merged with the next ones. A
    remainder shorter than span_min joins the span before it, or stands alone if there is none. A span over span_max is cut
    into nearly equal parts.
    For example, lines of 3, 9 and 30 tokens with span_min 8 and span_max 20 give spans of 12 (3 + 9), 15 and 15.
    """
    spans, length = [], 0
    for ends_line in is_newline:
        length += 1
        if ends_line and length >= span_min:
            spans.append(length)
            length = 0
    if length >= span_min or not spans:
        spans.append(length)
    else:
        spans[-1] += length

    parts = []
    for length in spans:
        size = math.ceil(length / math.ceil(length / span_max))
        parts += [min(size, length - start) for start in range(0, length, size)]
    return parts


# -----------------------------------------------------------------------------
# diagnostics


@torch.no_grad()
def gate_stats(g: Tensor, s: Tensor, d: Tensor) -> dict[str, Tensor]:
    """Summary statistics {name: scalar} of gates g, segment drift s and token drift d, all [N]; {} if N is 0.

    gate/ess is (sum g)^2 / (N sum g^2), the effective sample size as a share of N: 1 when all gates are equal.
    """
    if not len(g):
        return {}
    ess = g.sum() ** 2 / (len(g) * g.square().sum()).clamp(min=torch.finfo(g.dtype).tiny)
    return {
        "gate/mean": g.mean(),
        "gate/min": g.min(),
        # torch.quantile refuses more than 2^24 values, so take the 5th percentile by rank.
        "gate/p05": g.kthvalue(max(1, round(0.05 * len(g)))).values,
        "gate/ess": ess,
        "gate/below_half": (g < 0.5).float().mean(),
        "gate/drift_abs": d.abs().mean(),
        "gate/s_abs": s.abs().mean(),
        "gate/s_max": s.abs().max(),
    }
