"""Policy-drift gates: how far the policy moved since it sampled, as weights on per-token losses.

Zheng and Jiang, Blockwise Policy-Drift Gating for On-Policy Distillation, arXiv 2606.24084, Eq. 1:

    d = logp - logp_old            drift of the sampled token, in nats
    s = mean of d over a segment   the signed mean; a segment is a block, a span, a token or a response
    g = exp(-tau |s|)              the gate, detached, the same at every position of the segment
    L = sum(mask * g * loss) / sum(mask * g)

Shapes: B sequences, T positions. `mask` marks the valid ones (response tokens); padding may stand on
either side, and never counts. Copy this file; it needs torch alone:

    weights = gate_weights(logp, logp_old, mask, "block", block=64)     # [B, T], mean 1 over the mask
    loss = (weights * token_loss * mask).sum() / mask.sum()

MIT license.
"""

import torch
from torch import Tensor

KINDS = ("none", "token", "block", "span", "sequence")
STATS = ("mean", "absmean", "rms")
SIDES = ("all", "toward", "away")


def gate_weights(logp: Tensor, logp_old: Tensor, mask: Tensor, kind="block", **options) -> Tensor:
    """The paper's normalised gate [B, T]: mean 1 over all valid positions. Options as in `gate`."""
    return normalise(gate(logp, logp_old, mask, kind, **options)[0], mask)


@torch.no_grad()
def gate(
    logp: Tensor,  # [B, T] log-probs of the sampled tokens under the current policy
    logp_old: Tensor,  # [B, T] the same when they were sampled, from the same code
    mask: Tensor,  # [B, T] 1 or True at valid positions
    kind: str = "block",
    *,
    tau: float = 1.0,
    stat: str = "mean",
    block: int = 64,
    newline: Tensor | None = None,  # [B, T] True at tokens that contain a newline; for spans
    span_min: int = 16,
    span_max: int = 128,
) -> tuple[Tensor, Tensor]:
    """Gates g and segment drifts s, both [B, T] in fp32 and 0 outside the mask; g is not normalised.

    Divide by sum(mask * g) over the whole optimizer minibatch, and any split of it gives the same
    gradient. kind "none" gives gates of 1, with the drift of blocks as a diagnostic.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, not one of {KINDS}")
    if tau < 0:
        raise ValueError(f"tau is {tau}; a negative one would reward drift")
    if not logp.shape == logp_old.shape == mask.shape:
        raise ValueError(f"shapes differ: {[tuple(x.shape) for x in (logp, logp_old, mask)]}")
    mask = mask.bool()
    if kind == "span":
        if newline is None:
            raise ValueError("spans need `newline`, the mask of tokens that contain one")
        segment = span_segments(mask, newline, block=block, span_min=span_min, span_max=span_max)
    else:
        width = {"token": 1, "sequence": max(mask.shape[1], 1)}.get(kind, block)
        segment = block_segments(mask, width)
    s = segment_drift(drift(logp, logp_old, mask), mask, segment, stat)
    g = mask.float() if kind == "none" else torch.exp(-tau * s.abs()) * mask
    return g, s


def normalise(g: Tensor, mask: Tensor) -> Tensor:
    """g / (mean of g over the mask): average weight 1. All gates 0 (or no valid token) stay 0."""
    g = g * mask
    mean = g.sum() / mask.sum().clamp(min=1)
    return g / mean.clamp(min=torch.finfo(g.dtype).tiny)


@torch.no_grad()
def drift(logp: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    """d = logp - logp_old [B, T], in nats, fp32; 0 outside the mask and where both are -inf."""
    d = logp.float() - logp_old.float()
    return d.masked_fill(~mask.bool(), 0.0).nan_to_num(nan=0.0).clamp(-1e4, 1e4)


@torch.no_grad()
def one_side(logp: Tensor, logp_old: Tensor, logp_teacher: Tensor, side: str = "all") -> Tensor:
    """logp, and logp_old where the gate is not to see a token's drift. Not in the paper, whose gate sees all.

    side "toward" keeps drift toward the teacher, d with the sign of logp_teacher - logp_old; "away" the rest.
    """
    if side not in SIDES:
        raise ValueError(f"side is {side!r}, not one of {SIDES}")
    if side == "all":
        return logp
    toward = (logp - logp_old) * (logp_teacher - logp_old) > 0
    return torch.where(toward == (side == "toward"), logp, logp_old)


def block_segments(mask: Tensor, block: int) -> Tensor:
    """Segment index [B, T]: blocks of `block` valid tokens from each response's first; the last is shorter."""
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    return _position(mask) // block


def span_segments(mask: Tensor, newline: Tensor, *, block: int, span_min: int, span_max: int) -> Tensor:
    """Segment index [B, T]: spans that end at a newline, none (but a whole response) under span_min where span_max >= 2 span_min.

    A span is closed by the first newline that makes it span_min tokens or longer; a short rest joins
    the span before it; one over span_max is cut into equal parts; a response with no newline gets
    fixed blocks. The paper names the rule but not its thresholds.
    """
    if not 1 <= span_min <= span_max:
        raise ValueError(f"need 1 <= span_min <= span_max, got {span_min} and {span_max}")
    B, T = mask.shape
    pos, index = _position(mask), torch.arange(T, device=mask.device).expand(B, T)
    if T == 0:
        return pos
    n = mask.sum(1, keepdim=True)
    # Left-aligned copy of the newline mask: column p is the p-th valid token.
    ends = torch.zeros_like(index).scatter_add(1, pos, (newline.bool() & mask.bool()).long()) > 0
    # follow[p]: where the next span starts if one starts at p; T means never. The first newline at or
    # after p + span_min - 1 is a reversed running minimum.
    next_end = torch.where(ends, index, T).flip(1).cummin(1).values.flip(1)
    next_end = torch.nn.functional.pad(next_end, (0, span_min), value=T)[:, span_min - 1 :]
    follow = (next_end + 1).clamp(max=T)  # [B, T + 1]
    # Starts are the positions reached from 0 by following: pointer doubling, log2(T) rounds.
    starts = torch.zeros_like(follow)
    starts[:, 0] = 1
    for _ in range(T.bit_length()):
        starts = starts.scatter_add(1, follow, starts).clamp(max=1)
        follow = follow.gather(1, follow)
    starts = starts[:, :T].bool() & (index < n)
    last = torch.where(starts, index, 0).amax(1, keepdim=True)
    starts = starts & ~((index == last) & (n - last < span_min) & (index > 0))
    # Cut long spans: length L into ceil(L / span_max) parts of (nearly) equal size.
    span = (starts.long().cumsum(1) - 1).clamp(min=0)
    length = torch.zeros_like(span).scatter_add(1, span, (index < n).long()).gather(1, span)
    parts = ((length + span_max - 1) // span_max).clamp(min=1)
    size = ((length + parts - 1) // parts).clamp(min=1)
    offset = index - torch.where(starts, index, 0).cummax(1).values
    starts = torch.where(ends.any(1, keepdim=True), offset % size == 0, index % block == 0)
    return (starts.long().cumsum(1) - 1).clamp(min=0).gather(1, pos)


def segment_drift(d: Tensor, mask: Tensor, segment: Tensor, stat: str = "mean") -> Tensor:
    """s [B, T]: a statistic of d over the valid positions of each segment, spread over the segment.

    "mean" keeps the sign (the paper), so opposite drifts cancel; "absmean" and "rms" do not cancel.
    """
    if stat not in STATS:
        raise ValueError(f"stat is {stat!r}, not one of {STATS}")
    d = d * mask
    value = {"mean": d, "absmean": d.abs(), "rms": d.square()}[stat]
    zero = torch.zeros_like(d)
    total = zero.scatter_add(1, segment, value)
    count = zero.scatter_add(1, segment, mask.to(d.dtype))
    s = (total / count.clamp(min=1)).gather(1, segment) * mask
    return s.sqrt() if stat == "rms" else s


@torch.no_grad()
def gate_stats(g: Tensor, s: Tensor, d: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Diagnostics over the valid positions, as 0-d tensors; all inputs of one shape.

    ess is (sum g)^2 / (n sum g^2), the effective sample size as a share: 1 when all gates are equal.
    """
    mask = mask.bool()
    if not mask.any():
        return {}
    g, s, d = g[mask], s[mask].abs(), d[mask].abs()
    # torch.quantile refuses more than 2^24 values, so take the 5th percentile by rank.
    p05 = g.kthvalue(max(1, round(0.05 * g.numel()))).values
    return {
        "mean": g.mean(), "min": g.min(), "p05": p05,
        "ess": g.sum() ** 2 / (g.numel() * g.square().sum()).clamp(min=torch.finfo(g.dtype).tiny),
        "below_half": (g < 0.5).float().mean(),
        "drift_abs": d.mean(), "s_abs": s.mean(), "s_max": s.max(),
    }  # fmt: skip


def _position(mask: Tensor) -> Tensor:
    """Index [B, T] of each valid token among its row's valid tokens."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)
