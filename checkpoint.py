"""What a run leaves on disk: out/RUN/{config.json, metrics.jsonl, step-N/ (checkpoints), final/ (the student)}."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from gating import gate_stats
from policy import full_weights


def latest(out: Path):
    """The newest complete checkpoint folder, or None: a partial one still has its temporary name."""
    done = [p for p in out.glob("step-*") if p.suffix != ".tmp"]
    return max(done, key=lambda p: int(p.name.split("-")[1]), default=None)


def save(out, step, policy, optimizer, stream, keep):
    """Sharded over the ranks, loadable on any number of them; renamed once it is complete."""
    tmp, final = out / f"step-{step}.tmp", out / f"step-{step}"
    model, optim = get_state_dict(policy, optimizer)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=tmp)
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    state = {"step": step, "position": stream.position, "dropped": stream.dropped}
    (tmp / "state.json").write_text(json.dumps(state))
    shutil.rmtree(final, ignore_errors=True)
    tmp.rename(final)
    for old in sorted(out.glob("step-*"), key=lambda p: p.stat().st_mtime)[:-keep]:
        shutil.rmtree(old)


def restore(folder, policy, optimizer, stream):
    """Loads a checkpoint in place and returns its step."""
    model, optim = get_state_dict(policy, optimizer)
    dcp.load({"model": model, "optim": optim}, checkpoint_id=folder)
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    state = json.loads((folder / "state.json").read_text())
    stream.position, stream.dropped = state["position"], state["dropped"]
    return state["step"]


def save_model(path, policy, tokenizer):
    """The student as a Hugging Face folder, in the dtype that its own files came in."""
    weights = {name: w.to(policy.dtype).cpu() for name, w in full_weights(policy)}
    if not dist.is_initialized() or dist.get_rank() == 0:
        policy.lm.save_pretrained(path, state_dict=weights)
        tokenizer.save_pretrained(path)


def make_logger(cfg, out, step):
    """log(metrics): a line of metrics.jsonl, and W&B or TensorBoard where asked for. Lines after `step` are dropped."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(x for x in lines if json.loads(x)["step"] <= step))
    if cfg.log == "wandb":
        import wandb

        wandb.init(project="opd-gating", name=out.name, config=asdict(cfg), resume="allow")
    if cfg.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(out)

    def log(metrics):
        with path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        scalars = {name: x for name, x in metrics.items() if not isinstance(x, list)}
        if cfg.log == "wandb":
            wandb.log(scalars, step=metrics["step"])
        if cfg.log == "tensorboard":
            for name, x in scalars.items():
                writer.add_scalar(name, x, metrics["step"])

    return log


def summary(cfg, rollouts, batches, raw, updates, clock):
    """A step's metrics over all ranks. Gate and loss diagnostics are of its last epoch, where drift is largest."""
    tracks, scalars = zip(*updates, strict=True)
    last = [track for part in tracks[-(len(tracks) // cfg.epochs) :] for track in part]
    flat = {name: [track[name] for track in last] for name in last[0]}
    flat["gap"] = [b.old - b.targets["logp"].to(b.old.device) for b in batches if b.old is not None]
    flat["out_of_step"] = [(logp - b.sampler_logp).abs() for b, logp in raw]
    flat = {name: torch.cat(xs).float().cpu() for name, xs in flat.items() if xs}
    flat = {name: torch.cat([part[name] for part in parts]) for parts in [gather(flat)] for name in flat}
    where, metrics = (flat.pop("where"), {name: sum(x[name] for x in scalars) / len(scalars) for name in scalars[0]})
    if "g" in flat:
        g, s, d = (flat.pop(name) for name in "gsd")
        metrics |= {f"gate/{name}": x.item() for name, x in gate_stats(g, s, d, torch.ones_like(g)).items()}
        twentieth = (where * 20).long().clamp(max=19)
        total = torch.zeros(2, 20).index_add_(1, twentieth, torch.stack([g, torch.ones_like(g)]))
        metrics["gate/by_position"] = (total[0] / total[1].clamp(min=1)).tolist()
    if "out_of_step" in flat:
        metrics["rollout/out_of_step_max"] = flat["out_of_step"].max().item()
        metrics["rollout/out_of_step"] = flat.pop("out_of_step").mean().item()
    metrics |= {name if name == "gap" else f"loss/{name}": x.mean().item() for name, x in flat.items()}
    tokens = sum(len(r.response) for r in rollouts)
    metrics |= {"rollout/tokens": tokens, "rollout/length": tokens / len(rollouts)}
    metrics["rollout/truncated"] = sum(r.finish == "length" for r in rollouts) / len(rollouts)
    times = list(clock.items())
    for (_, before), (phase, after) in zip(times, times[1:], strict=False):
        t = after - before
        metrics[f"time/{phase}"] = t
        metrics[f"tokens_per_s/{phase}"] = tokens * (cfg.epochs if phase == "update" else 1) / t
    return metrics


def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank."""
    if not dist.is_initialized():
        return [x]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return parts
