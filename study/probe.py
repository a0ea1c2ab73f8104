"""What would each gate do to each update of a run?      python -m study.probe [flags of train.py]; one process

The run is the one that train.py makes of these flags, bit for bit; OUT/probe.jsonl gets a line per update (see `look`).
"""

import json
import os
import sys
from pathlib import Path

import torch

import train
from configs import TrainConfig, parse
from gating import KINDS, drift, gate, gate_stats, segment_lengths
from metrics import by_position


def main(argv):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("study.probe: one process only")
    cfg = parse(TrainConfig, argv)

    def record(run, batches, epoch):
        row = {"epoch": epoch} | look(run, batches, cfg)
        with (Path(cfg.out) / "probe.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    train.main(cfg, before_update=record)


def segments_of(batch, kind, cfg, vocabulary):
    """Segment index [N] of the batch's tokens for a gate of another kind than the run's."""
    lengths = []
    for r in batch.rollouts:
        is_newline = [token in vocabulary.newline_ids for token in r.response]
        sizes = {"block": cfg.block, "span_min": cfg.span_min, "span_max": cfg.span_max}
        lengths += segment_lengths(len(r.response), kind, is_newline, **sizes)
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(batch.ids.device)


def look(run, batches, cfg):
    """What each gate would do to the update on these micro-batches, {name: number or list}.

    GATE/cos, GATE/norm: the gated gradient's cosine with the ungated one, and its norm as a share of that one's.
    GATE/ess, GATE/position: effective sample size, mean gate by position in the response.
    GATE/advantage: mean |log q - log pi_old| under the gate's weights, as a share of the plain mean.
    GATE/toward, GATE/away: the mean gate of drift toward and away from the teacher, weighted by |d|.
    toward: the share of |d| toward the teacher. cancelled: of tokens, those in blocks with |mean d| < mean |d| / 2.
    drift, gate: quantiles (5, 25, 50, 75, 95 %) of the block drift s and of the block gate.
    """
    kinds = {kind: (kind, "mean") for kind in KINDS} | {"absmean": ("block", "absmean")}  # {name: (kind, statistic)}
    params = list(run.policy.parameters())
    gates = {name: [] for name in kinds}  # of each micro-batch, g and s as [2, n]
    gradients = dict.fromkeys(kinds, 0.0)
    tokens = []  # of each micro-batch, drift, advantage and position as [3, n]
    for batch in batches:
        logp, loss, _ = train.position_loss(run.policy, batch, cfg, run.teacher.head)
        logp_old = logp if batch.logp_old is None else batch.logp_old
        advantage = batch.teacher["logq_sampled"].to(logp.device) - logp_old
        tokens.append(torch.stack([drift(logp, logp_old), advantage, batch.position]))
        for name, (kind, stat) in kinds.items():
            tau = 0.0 if kind == "none" else cfg.tau
            g, s = gate(logp, logp_old, segments_of(batch, kind, cfg, run.vocabulary), tau=tau, stat=stat)
            gates[name].append(torch.stack([g, s]))
            parts = torch.autograd.grad((g * loss).sum(), params, retain_graph=True)
            gradients[name] = gradients[name] + torch.cat([part.flatten() for part in parts])
    d, advantage, position = torch.cat(tokens, 1)
    gates = {name: torch.cat(parts, 1) for name, parts in gates.items()}
    ungated = gradients["none"] / len(d)
    is_toward = d * advantage > 0
    block_gate, block_drift = gates["block"]
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=d.device)
    row = {
        "toward": (d.abs() * is_toward).sum() / d.abs().sum().clamp(min=1e-30),
        "cancelled": (block_drift.abs() < gates["absmean"][1] / 2).float().mean(),
        "drift": block_drift.quantile(levels),
        "gate": block_gate.quantile(levels),
    }
    for name, (g, s) in gates.items():
        gradient, weight = gradients[name] / g.sum(), g / g.mean()
        row[f"{name}/cos"] = torch.cosine_similarity(gradient, ungated, 0)
        row[f"{name}/norm"] = gradient.norm() / ungated.norm()
        row[f"{name}/ess"] = gate_stats(g, s, d)["ess"]
        row[f"{name}/position"] = by_position(g, position)
        row[f"{name}/advantage"] = (weight * advantage.abs()).mean() / advantage.abs().mean()
        for side, mask in (("toward", is_toward), ("away", ~is_toward)):
            drift_there = d.abs() * mask
            row[f"{name}/{side}"] = (
                (g * drift_there).sum() / drift_there.sum() if drift_there.any() else torch.tensor(1.0)
            )
    return {name: x.tolist() for name, x in row.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
