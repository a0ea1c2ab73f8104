"""train.py with gates that are not in the product, and a measure of how far a gate turns each update. For the study alone.

    python -m study.gated_train --study_gate excess --preset tiny --tau 3 --out out/x        # further flags are train.py's

--study_gate:
    plain       the gate of --gate, --tau and --stat
    excess      per segment, with s the mean drift and a the mean of log q - log pi_old: g = exp(-tau e),
                e = max(0, -s sign(a)) + max(0, s sign(a) - |a|), drift away from the teacher, or beyond it
    away        only the first half of e
    beyond      only the second half
    mask        0 for the 1 % of a micro-batch's tokens with the largest |d|, 1 for all others
--denominator n: divide by the number of tokens N, not by the sum of the gates.

Every update with drift adds a row to OUT/leverage.jsonl: cosine and ratio of norms of the gated and the ungated gradient, before
clipping, the gates' effective sample size and their spread. The ungated gradient takes a second backward pass.
"""

import argparse
import sys
from pathlib import Path

import torch

import gating
import train
from configs import TrainConfig, parse
from support.files import append_jsonl

plain_gate, plain_update, plain_clip = train.gate, train.update, torch.nn.utils.clip_grad_norm_


class Study:
    """Stands in for train.gate and train.update, and for torch's clipping, which comes after the division by sum g."""

    def __init__(self, kind, denominator, path):
        self.kind, self.denominator, self.path = kind, denominator, path
        self.n_updates = 0

    def gate(self, d, segments, kind="block", *, tau=1.0, stat="mean"):
        batch = next(self.batches)
        if self.is_ungated:
            return torch.ones_like(d), torch.zeros_like(d)
        if self.kind == "plain":
            g, s = plain_gate(d, segments, kind, tau=tau, stat=stat)
        elif self.kind == "mask":
            s = gating.segment_drift(d, segments)
            n = max(1, round(0.01 * len(d)))
            g = torch.ones_like(d)
            if len(d):
                g[d.abs().topk(n).indices] = 0.0
        else:
            s = gating.segment_drift(d, segments)
            advantage = batch.teacher["logq_sampled"].to(d.device) - batch.logp_old
            a = gating.segment_drift(advantage.clamp(-1e4, 1e4), segments)
            along = s * a.sign()  # drift toward the teacher is positive
            away, beyond = (-along).clamp(min=0), (along - a.abs()).clamp(min=0)
            e = {"excess": away + beyond, "away": away, "beyond": beyond}[self.kind]
            g = torch.exp(-tau * e)
        self.gates.append(g)
        self.drifts.append(d)
        return g, s

    def update(self, policy, optimizer, micro_batches, cfg, teacher_head=None):
        self.gradient, self.gates, self.drifts = None, [], []
        # The ungated gradient: the same update, without its step
        self.is_ungated, self.batches = True, iter(micro_batches)
        state = NoStep(policy)
        plain_update(policy, state, micro_batches, cfg, teacher_head)
        ungated = self.gradient
        self.is_ungated, self.batches = False, iter(micro_batches)
        result = plain_update(policy, optimizer, micro_batches, cfg, teacher_head)
        self.measure(ungated, self.gradient, result[0])
        return result

    def clip(self, params, max_norm, *args, **options):
        if not self.is_ungated and self.denominator == "n":  # gradients are divided by sum g already
            n = sum(len(g) for g in self.gates)
            for p in params:
                p.grad *= sum(g.sum() for g in self.gates) / n
        self.gradient = torch.cat([p.grad.flatten() for p in params]).clone()
        return plain_clip(params, max_norm, *args, **options)

    def measure(self, ungated, gated, result):
        self.n_updates += 1
        g, d = torch.cat(self.gates), torch.cat(self.drifts)
        if not d.any():
            return
        row = {
            "update": self.n_updates,
            "cosine": torch.nn.functional.cosine_similarity(gated, ungated, 0).item(),
            "norm_ratio": (gated.norm() / ungated.norm()).item(),
            "ess": (g.sum() ** 2 / (len(g) * g.square().sum())).item(),
            "gate_mean": g.mean().item(),
            "gate_sd": g.std().item(),
            "drift_abs": d.abs().mean().item(),
            "skipped": result["skipped"],
        }
        append_jsonl(self.path, [row])


class NoStep:
    """An optimizer that makes no step."""

    def __init__(self, policy):
        self.policy = policy

    def step(self):
        pass

    def zero_grad(self):
        self.policy.zero_grad()


def main(argv=None):
    parser = argparse.ArgumentParser("python -m study.gated_train", allow_abbrev=False)
    parser.add_argument("--study_gate", choices=["plain", "excess", "away", "beyond", "mask"], default="plain")
    parser.add_argument("--denominator", choices=["gates", "n"], default="gates")
    args, rest = parser.parse_known_args(argv)
    cfg = parse(TrainConfig, rest)
    path = Path(cfg.out) / "leverage.jsonl"
    path.unlink(missing_ok=True)
    study = Study(args.study_gate, args.denominator, path)
    train.gate, train.update, torch.nn.utils.clip_grad_norm_ = study.gate, study.update, study.clip
    train.main(cfg)


if __name__ == "__main__":
    main(sys.argv[1:])
