"""What a run leaves on disk: out/RUN/{config.json, metrics.jsonl, step-N/, final/, curves.png, gates.png}."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

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
