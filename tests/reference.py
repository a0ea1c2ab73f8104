"""The paper's update in plain torch, to be read: this is what train.update computes.

One process, full logits, a loop over responses and over segments, one backward pass. train.update gives the same gradient
without the [T, V] matrices, in micro-batches, on several ranks: tests/test_reference.py holds it against this page.

T tokens in a response, V vocabulary, K tokens in the teacher's top-K. Log-probs in nats; any dtype, float64 in the tests.
"""

import math

import torch

from gating import segment_lengths


def loss_of_minibatch(student, old_student, teacher, rollouts, cfg, newlines):
    """Eq. 1: sum_t g_t loss_t / sum_t g_t over all response tokens. Its backward() gives the update's gradient."""
    numerator, denominator = 0.0, 0.0
    for r in rollouts:
        tokens = torch.tensor(r.response)
        logp = logprobs(student, r, cfg.temperature)  # [T, V], with gradient
        with torch.no_grad():
            logp_old = logprobs(old_student, r, cfg.temperature)
            logq = logprobs(teacher, r, cfg.temperature)
        logp_y, logp_old_y, logq_y = (of(x, tokens) for x in (logp, logp_old, logq))  # [T], of the sampled tokens
        if cfg.loss == "opd":
            loss = opd(logp_y, logp_old_y, logq_y, cfg)
        else:
            loss = divergence(logp, logq, cfg)
        start = 0
        for length in segments(r, cfg, newlines):
            segment = slice(start, start + length)
            d = (logp_y - logp_old_y)[segment].detach()  # drift: no gradient flows through the gate
            s = {"mean": d.mean(), "absmean": d.abs().mean(), "rms": d.square().mean().sqrt()}[cfg.stat]
            g = 1.0 if cfg.gate == "none" else math.exp(-cfg.tau * abs(s))
            numerator = numerator + g * loss[segment].sum()
            denominator = denominator + g * length
            start += length
    return numerator / denominator


def logprobs(model, r, temperature):
    """[T, V] log-probs of every token of the vocabulary at every position of the response."""
    logits = model(torch.tensor([r.prompt + r.response])).logits[0]
    predicting = logits[len(r.prompt) - 1 : -1]  # the logits at a position predict the next token
    return (predicting / temperature).log_softmax(-1)


def of(logprobs, tokens):
    return logprobs.gather(1, tokens[:, None])[:, 0]


def segments(r, cfg, newlines):
    """Lengths of the gate's segments; for example 64, 64, 22 for 150 tokens in blocks of 64."""
    is_newline = [token in newlines for token in r.response]
    sizes = {"block": cfg.block, "span_min": cfg.span_min, "span_max": cfg.span_max}
    return segment_lengths(len(r.response), cfg.gate, is_newline, **sizes)


def opd(logp, logp_old, logq, cfg):
    """[T] sampled-token OPD: PPO's objective with the teacher's log-ratio as a fixed advantage."""
    advantage = logq - (logp.detach() if cfg.advantage == "current" else logp_old)
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    return torch.where(advantage < 0, torch.minimum(loss, -cfg.dual_clip * advantage), loss)


def divergence(logp, logq, cfg):
    """[T] of student p and teacher q: on the teacher's top-K tokens, or over the whole vocabulary."""
    top = logq.topk(cfg.topk).indices  # [T, K]
    logp_top, logq_top = logp.gather(1, top), logq.gather(1, top)
    if cfg.loss == "lsm":  # both renormalised on the top-K
        return kl(logp_top.log_softmax(-1), logq_top.log_softmax(-1))
    if cfg.loss == "fkl_topk":
        return kl(logq_top.log_softmax(-1), logp_top.log_softmax(-1))
    if cfg.loss == "tail_topk":  # the top-K, and all other tokens as one
        return kl(with_rest(logp_top), with_rest(logq_top))
    if cfg.loss == "rkl":
        return kl(logp, logq)
    if cfg.loss == "fkl":
        return kl(logq, logp)
    logm = (cfg.beta * logq.exp() + (1 - cfg.beta) * logp.exp()).log()  # jsd
    return cfg.beta * kl(logq, logm) + (1 - cfg.beta) * kl(logp, logm)


def kl(log_a, log_b):
    """[T] KL(a || b)."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def with_rest(logprobs):
    rest = 1 - logprobs.exp().sum(-1, keepdim=True)
    return torch.cat([logprobs, rest.log()], -1)
