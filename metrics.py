"""A step's metrics over all ranks, and where they go: metrics.jsonl, W&B, TensorBoard."""

import json
import math
import os
import zlib
from dataclasses import asdict

import torch
import torch.distributed as dist

from checkpoint import stop
from evaluate import gather
from gating import gate_stats
from policy import training_flops
from report import write

# Dense bf16 FLOP/s by what a GPU's name contains, for the model FLOPs utilisation (mfu); other GPUs get none.
PEAK = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "B200": 2250e12}

# A sampler this far from the trainer (mean |difference| of log-probs on sampled tokens, nats) holds other weights.
OUT_OF_STEP = {"cpu": 1e-3, "cuda": 0.1}  # fp32; bf16


def make_logger(cfg, out, step):
    """log(metrics): a line of metrics.jsonl, and W&B or TensorBoard where asked for.

    A run that goes on after `step` (0: it starts) drops what a killed one wrote beyond it, and a torn last line.
    Values that are not finite are left out, as JSON has none.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        return lambda _: None
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() and step else []
    write(path, "".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step))
    if cfg.log == "wandb":
        import wandb

        wandb.init(project="opd-gating", name=out.name, config=asdict(cfg), resume="allow")
    if cfg.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(out)

    def log(metrics):
        metrics = {name: x for name, x in metrics.items() if isinstance(x, list) or math.isfinite(x)}
        with path.open("ab", buffering=0) as file:
            file.write((json.dumps(metrics) + "\n").encode())
            os.fsync(file.fileno())
        scalars = {name: x for name, x in metrics.items() if not isinstance(x, list)}
        if cfg.log == "wandb":
            wandb.log(scalars, step=metrics["step"])
        if cfg.log == "tensorboard":
            for name, x in scalars.items():
                writer.add_scalar(name, x, metrics["step"])

    return log


def has_evaluation(out, step):
    """Whether metrics.jsonl has the evaluation after a step: a run can be stopped between the two."""
    path = out / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return any(row["step"] == step and any(name.startswith("eval") for name in row) for row in rows)


def mfu(policy, batches, epochs, seconds):
    """Share of this rank's peak that the updates' model FLOPs are; {} on unknown hardware."""
    name = torch.cuda.get_device_name() if next(policy.parameters()).is_cuda else ""
    peak = next((x for key, x in PEAK.items() if key in name), None)
    lengths = [len(ids) for batch in batches for ids, _ in batch.sequences()]
    return {"mfu": training_flops(policy, lengths) * epochs / seconds / peak} if peak else {}


def summary(cfg, policy, rollouts, batches, checked, updates, clock):
    """A step's metrics over all ranks. checked: [(batch, the trainer's log-probs beside the sampler's)]. Gate and loss diagnostics are of its last epoch, where drift is largest."""
    tokens, n = sum(len(r.response) for r in rollouts), len(rollouts)
    texts = [(tuple(r.prompt), tuple(r.response)) for r in rollouts]
    metrics = {"rollout/tokens": tokens, "rollout/length": tokens / n}
    metrics["rollout/truncated"] = sum(r.finish == "length" for r in rollouts) / n
    metrics["rollout/empty"] = sum(not r.response for r in rollouts) / n
    metrics["rollout/distinct"] = len(set(texts)) / n
    metrics["rollout/checksum"] = zlib.crc32(repr(texts).encode())  # equal runs have equal rollouts
    times = list(clock.items())
    for (_, before), (phase, after) in zip(times, times[1:], strict=False):
        t = after - before
        metrics[f"time/{phase}"] = t
        metrics[f"tokens_per_s/{phase}"] = tokens * (cfg.epochs if phase == "update" else 1) / t
    metrics |= mfu(policy, batches, cfg.epochs, metrics["time/update"])
    if not updates:
        return metrics
    tracks, results = zip(*updates, strict=True)
    last = [track for part in tracks[-(len(tracks) // cfg.epochs) :] for track in part]
    flat = {name: [track[name] for track in last] for name in last[0]}
    flat["gap"] = [b.old - b.targets["logp"].to(b.old.device) for b in batches if b.old is not None]
    flat["out_of_step"] = [(logp - b.sampler_logp).abs() for b, logp in checked]
    flat = {name: torch.cat(xs).float().cpu() for name, xs in flat.items() if xs}
    parts = gather(flat)
    flat = {name: torch.cat([part[name] for part in parts]) for name in flat}
    where, good = flat.pop("where"), [x for x in results if not x["skipped"]]
    metrics |= {name: sum(x[name] for x in good) / len(good) for name in ("loss", "grad_norm") if good}
    metrics["skipped"] = len(results) - len(good)
    if "g" in flat:
        g, s, d = (flat.pop(name) for name in "gsd")
        metrics |= {f"gate/{name}": x.item() for name, x in gate_stats(g, s, d, torch.ones_like(g)).items()}
        metrics["gate/by_position"] = by_position(g, where).tolist()
    if "out_of_step" in flat:
        metrics["rollout/out_of_step_max"] = flat["out_of_step"].max().item()
        metrics["rollout/out_of_step"] = flat.pop("out_of_step").mean().item()
    return metrics | {name if name == "gap" else f"loss/{name}": x.mean().item() for name, x in flat.items()}


def by_position(x, where):
    """Means [20] of x [N] over twentieths of the responses; where [N] is the position in (0, 1)."""
    total = torch.zeros(2, 20, device=x.device)
    total.index_add_(1, (where * 20).long().clamp(max=19), torch.stack([x, torch.ones_like(x)]))
    return total[0] / total[1].clamp(min=1)


def check_in_step(row, device):
    """Stops a run whose sampler holds other weights than the trainer."""
    off, bound = row.get("rollout/out_of_step", 0), OUT_OF_STEP[device.type]
    if not off <= bound:  # NaN too
        stop(
            f"the sampler is out of step with the trainer: their log-probs of the sampled tokens differ by "
            f"{off:.2g} nats on average, over the bound of {bound:g}, at step {row['step']}"
        )
