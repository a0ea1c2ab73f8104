"""What would each gate do to each update of a run?      python probe.py [flags of train.py]; one process

The run is the one that train.py makes of these flags, bit for bit; OUT/probe.jsonl gets a line an update (see `look`).
"""

import json
import os
import sys
from pathlib import Path

import torch

import train
from configs import TrainConfig, parse
from gating import KINDS, drift, gate, gate_stats, one_side
from metrics import by_position


def main(argv):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("probe.py: one process only")
    cfg, plain, count = parse(TrainConfig, argv), train.update, 0

    def update(policy, optimizer, batches, cfg, want_logp):
        nonlocal count
        row = {"epoch": count // cfg.minibatches % cfg.epochs} | look(policy, batches, cfg)
        count += 1
        with (Path(cfg.out) / "probe.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return plain(policy, optimizer, batches, cfg, want_logp)

    train.update = update
    train.main(cfg)


def look(policy, batches, cfg):
    """What each gate would do to this update, {name: number or list}.

    GATE/cos, GATE/norm: the gated gradient's cosine with the ungated one, and its norm as a share of that one's.
    GATE/advantage: mean |log q - log pi_old| under the gate's weights, as a share of the plain mean.
    GATE/toward, GATE/away: the mean gate of drift toward and away from the teacher, weighted by |d|.
    toward: the share of |d| toward the teacher. cancelled: of positions, those in blocks with |mean d| < mean |d| / 2.
    """
    size = dict(block=cfg.block, span_min=cfg.span_min, span_max=cfg.span_max)
    kinds = {name: (name, "mean", "all") for name in KINDS} | {"absmean": ("block", "absmean", "all")}
    kinds |= {side: ("block", "mean", side) for side in ("toward", "away")}
    params, tracks, grads = list(policy.parameters()), {name: [] for name in kinds}, dict.fromkeys(kinds, 0.0)
    shared = []
    for batch in batches:
        logp, loss, _ = train.position_loss(policy, batch, cfg)
        now, old, teacher = logp.detach(), batch.old, batch.targets["logp"].to(logp.device)
        d, advantage = drift(now, old, torch.ones_like(now)), teacher - old
        shared.append(torch.stack([d, advantage, batch.where]))
        for name, (kind, stat, side) in kinds.items():
            pair = batch.spread(one_side(now, old, teacher, side)), batch.spread(old)
            both = gate(*pair, batch.mask, kind, tau=cfg.tau, stat=stat, newline=batch.newline, **size)
            g, s = (x[batch.mask] for x in both)
            tracks[name].append(torch.stack([g, s]))
            parts = torch.autograd.grad((g * loss).sum(), params, retain_graph=True)
            grads[name] = grads[name] + torch.cat([part.flatten() for part in parts])
    d, advantage, where = torch.cat(shared, 1)
    tracks = {name: torch.cat(parts, 1) for name, parts in tracks.items()}
    plain, toward = grads["none"] / len(d), d * advantage > 0
    signed, unsigned = tracks["block"][1].abs(), tracks["absmean"][1]
    row = {"toward": (d.abs() * toward).sum() / d.abs().sum().clamp(min=1e-30)}
    row["cancelled"] = (signed < unsigned / 2).float().mean()
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=d.device)
    row |= {"drift": tracks["block"][1].quantile(levels), "gate": tracks["block"][0].quantile(levels)}
    for name, (g, s) in tracks.items():
        gradient, share = grads[name] / g.sum(), g / g.mean()
        found = {
            "cos": torch.cosine_similarity(gradient, plain, 0), "norm": gradient.norm() / plain.norm(),
            "ess": gate_stats(g, s, d, torch.ones_like(g))["ess"], "position": by_position(g, where),
            "advantage": (share * advantage.abs()).mean() / advantage.abs().mean(),
        }  # fmt: skip
        for side, mask in (("toward", toward), ("away", ~toward)):
            weight = d.abs() * mask
            found[side] = (g * weight).sum() / weight.sum() if weight.any() else torch.tensor(1.0)
        row |= {f"{name}/{key}": x for key, x in found.items()}
    return {name: x.tolist() for name, x in row.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
