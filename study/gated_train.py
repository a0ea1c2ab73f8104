"""train.py with gates that are not in the product, and a measure of how much a gate changes an update. For the study alone.

    python -m study.gated_train --study_gate excess --preset tiny --tau 3 --out out/x        # further flags are train.py's

--study_gate:
    plain       the gate of --gate, --tau and --stat
    excess      per segment, with s the mean drift and a the mean of log q - log pi_old: g = exp(-tau e),
                e = max(0, -s sign(a)) + max(0, s sign(a) - |a|): drift away from the teacher, and drift beyond it
    away        only the first half of e
    beyond      only the second half
    mask        0 for the 1 % of a micro-batch's tokens with the largest |d|, 1 for all others
--denominator n: divide by the number of tokens N, not by the sum of the gates.
--measure_every M: every M-th update is also computed without a gate, and a row of OUT/leverage.jsonl compares the two gradients
before clipping: their cosine, the ratio of their norms, the gates' effective sample size (as a share of N) and spread. As a
yardstick, the cosine of the gradient with that of the update before. Updates without drift, the first of each step, have no row.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

import train
from configs import TrainConfig, parse
from gating import segment_drift
from support.files import append_jsonl

GATES = ("plain", "excess", "away", "beyond", "mask")
product_gate, product_update, clip_grad_norm_ = train.gate, train.update, torch.nn.utils.clip_grad_norm_


def study_gate(study_kind, d, a, segments, kind, tau, stat):
    """(g, s), both [N], as gating.gate. d [N]: drift; a [N]: log q - log pi_old of the sampled tokens."""
    if study_kind == "plain":
        return product_gate(d, segments, kind, tau=tau, stat=stat)
    s = segment_drift(d, segments)
    if study_kind == "mask":
        g = torch.ones_like(d)
        largest = d.abs().topk(min(len(d), max(1, round(0.01 * len(d))))).indices
        g[largest] = (d[largest] == 0).float()  # before the first update nothing has drifted
        return g, s
    a = segment_drift(a.clamp(-1e4, 1e4), segments)
    toward_teacher = s * a.sign()
    away = (-toward_teacher).clamp(min=0)
    beyond = (toward_teacher - a.abs()).clamp(min=0)
    e = {"excess": away + beyond, "away": away, "beyond": beyond}[study_kind]
    return torch.exp(-tau * e), s


class Study:
    """Stands in for train.gate and train.update, and for torch's clipping, which comes after the division by the sum of gates."""

    def __init__(self, kind, denominator, measure_every, path):
        self.kind, self.denominator, self.measure_every, self.path = kind, denominator, measure_every, path
        self.n_updates, self.gradient = 0, None

    def update(self, policy, optimizer, micro_batches, cfg, teacher_head=None):
        self.n_updates += 1
        before, ungated = self.gradient, None
        has_drift = any(batch.logp_old is not None for batch in micro_batches)  # the first pass over them sets it
        if has_drift and self.n_updates % self.measure_every == 0:
            self.is_gated, self.batches = False, iter(micro_batches)
            product_update(policy, NoStep(policy), micro_batches, cfg, teacher_head)
            ungated = self.gradient
        self.is_gated, self.batches = True, iter(micro_batches)
        self.gates, self.drifts = [], []
        result = product_update(policy, optimizer, micro_batches, cfg, teacher_head)
        d = torch.cat(self.drifts)
        if ungated is not None and d.any():
            append_jsonl(self.path, [self.row(ungated, before, torch.cat(self.gates), d)])
        return result

    def gate(self, d, segments, kind="block", *, tau=1.0, stat="mean"):
        batch = next(self.batches)
        if not self.is_gated:
            return torch.ones_like(d), torch.zeros_like(d)
        a = batch.teacher["logq_sampled"].to(d.device) - batch.logp_old
        g, s = study_gate(self.kind, d, a, segments, kind, tau, stat)
        self.gates.append(g)
        self.drifts.append(d)
        return g, s

    def clip(self, params, max_norm, *args, **options):
        if self.is_gated and self.denominator == "n":  # the gradients have been divided by the sum of the gates
            mean = torch.cat(self.gates).mean()
            for p in params:
                p.grad *= mean
        self.gradient = torch.cat([p.grad.flatten() for p in params])
        return clip_grad_norm_(params, max_norm, *args, **options)

    def row(self, ungated, before, g, d) -> dict:
        return {
            "update": self.n_updates,
            "cosine": cosine_similarity(self.gradient.double(), ungated.double(), 0).item(),
            "norm_ratio": (self.gradient.norm() / ungated.norm()).item(),
            "norm": ungated.norm().item(),
            "cosine_before": cosine_similarity(self.gradient.double(), before.double(), 0).item(),
            "ess": (g.sum() ** 2 / (len(g) * g.square().sum())).item(),
            "gate_mean": g.mean().item(),
            "gate_sd": g.std().item(),
            "drift_abs": d.abs().mean().item(),
        }


class NoStep:
    """An optimizer that makes no step."""

    def __init__(self, policy):
        self.policy = policy

    def step(self):
        pass

    def zero_grad(self):
        self.policy.zero_grad()


def make_parser():
    parser = argparse.ArgumentParser("python -m study.gated_train", allow_abbrev=False)
    parser.add_argument("--study_gate", choices=GATES, default="plain")
    parser.add_argument("--denominator", choices=["gates", "n"], default="gates")
    parser.add_argument("--measure_every", type=int, default=5)
    return parser


def main(argv=None):
    args, rest = make_parser().parse_known_args(argv)
    cfg = parse(TrainConfig, rest)
    path = Path(cfg.out) / "leverage.jsonl"
    path.unlink(missing_ok=True)
    study = Study(args.study_gate, args.denominator, args.measure_every, path)
    train.gate, train.update, torch.nn.utils.clip_grad_norm_ = study.gate, study.update, study.clip
    try:
        train.main(cfg)
    finally:  # for a caller in the same process
        train.gate, train.update, torch.nn.utils.clip_grad_norm_ = product_gate, product_update, clip_grad_norm_


if __name__ == "__main__":
    main(sys.argv[1:])
