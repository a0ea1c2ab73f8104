"""What a run leaves on disk: out/RUN/{config.json, metrics.jsonl, step-N/ (checkpoints), final/ (the student)}."""

import functools
import json
import math
import os
import random
import shutil
import signal
import sys
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import evaluate
from configs import MAY_CHANGE
from evaluate import gather
from gating import gate_stats
from policy import full_weights


def latest(out: Path):
    """The newest complete checkpoint folder, or None: a partial one still has its temporary name."""
    return max(complete(out), key=number, default=None)


def complete(out):
    return [p for p in out.glob("step-*") if p.suffix != ".tmp" and (p / "state.json").exists()]


def number(folder):
    return int(folder.name.split("-")[1])


def to_resume(cfg):
    """The checkpoint that this run goes on from, None where it starts. ValueError where --out is another run's."""
    out, found = Path(cfg.out), None
    held = json.loads((out / "config.json").read_text()) if (out / "config.json").exists() else {}
    if cfg.resume != "false":
        found = latest(out)
        if cfg.resume == "true" and not found:
            raise ValueError(f"--resume: {out} holds no complete checkpoint")
        for name, new in asdict(cfg).items():
            if name not in MAY_CHANGE and held.get(name, new) != new:
                raise ValueError(f"--resume: {out} was run with --{name} {held[name]!r}, not {new!r}")
    elif held and not cfg.overwrite:
        choice = "--resume goes on with it, --overwrite deletes it, --out names another"
        raise ValueError(f"{out} already holds a run: {choice}")
    return found


def claim(cfg):
    """Makes --out this run's, on rank 0. OSError where it cannot be written to."""
    out = Path(cfg.out)
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    if cfg.overwrite and (out / "config.json").exists():  # nothing but a run is ever deleted
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob("*.tmp"):  # by a kill
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    write(out / "config.json", json.dumps(asdict(cfg), indent=1) + "\n")


def write(path, text):
    """The whole text or the old file, whenever the power goes."""
    tmp = path.with_name(path.name + ".tmp")
    with tmp.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    tmp.replace(path)
    sync(path.parent)


def sync(path):
    """Flushes a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


warnings.filterwarnings("ignore", "torch.distributed is disabled")  # saving from one process is what we mean
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def tensors(policy, model, optim):
    """What a checkpoint holds of get_state_dict's two: tied weights once, the optimizer's other values not at all."""
    tied = {f"lm.{name}" for name in policy.lm.all_tied_weights_keys}
    optim = {f"optim.{name}": x for name, x in optim.items() if isinstance(x, torch.Tensor)}
    return {f"model.{name}": x for name, x in model.items() if name not in tied} | optim


def save(out, step, policy, optimizer, stream, cfg):
    """safetensors sharded over the ranks, loadable on any number of them; renamed once complete and on the disk."""
    tmp, final = out / f"step-{step}.tmp", out / f"step-{step}"
    rng, state = gather(rng_state()), tensors(policy, *get_state_dict(policy, optimizer, options=FLAT))
    try:
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(tmp), save_distributed=True))
    except CheckpointException as failed:
        shutil.rmtree(tmp, ignore_errors=True)
        reasons = [root_cause(error) for error, _ in failed.failures.values()]
        raise OSError(f"could not save {final}: {reasons[0]}; the checkpoints before it are whole") from None
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    torch.save(rng, tmp / "rng.pt")
    state = {"step": step, "position": stream.position, "dropped": stream.dropped}
    write(tmp / "state.json", json.dumps(state | {"config": asdict(cfg), "versions": versions()}, indent=1))
    for path in (tmp / "rng.pt", tmp):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    tmp.rename(final)
    sync(out)
    for old in sorted(complete(out), key=number)[: -cfg.keep]:
        shutil.rmtree(old.rename(old.with_suffix(".tmp")))  # never half a checkpoint under a checkpoint's name


def root_cause(error):
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return " ".join(str(error).split()) or type(error).__name__


def restore(folder, policy, optimizer, stream):
    """Loads a checkpoint in place and returns its step. Another number of ranks keeps the random states of its seed."""
    model, optim = get_state_dict(policy, optimizer, options=FLAT)
    dcp.load(tensors(policy, model, optim), storage_reader=HuggingFaceStorageReader(str(folder)))  # in place
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim, options=FLAT)
    rng = torch.load(folder / "rng.pt", weights_only=True)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(rng) == world:
        set_rng_state(rng[rank])
    state = json.loads((folder / "state.json").read_text())
    stream.position, stream.dropped = state["position"], state["dropped"]
    return state["step"]


def rng_state():
    """Of every generator of this process, in types that torch.load(weights_only=True) takes."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state(), "cuda": cuda
    }  # fmt: skip


def set_rng_state(state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@functools.cache
def versions():
    return evaluate.versions()


def save_model(path, policy, tokenizer):
    """The student as a Hugging Face folder, in the dtype that its own files came in; renamed once it is complete."""
    lm, config = policy.lm, policy.lm.generation_config
    tied = lm.all_tied_weights_keys  # {copy: source}; files hold the source alone
    weights = {name: w.to(policy.dtype).cpu() for name, w in full_weights(policy) if name not in tied}
    if not config.do_sample and (config.temperature or config.top_p or config.top_k):
        config.do_sample = True  # as some hub models come; transformers refuses to save them otherwise
    if not dist.is_initialized() or dist.get_rank() == 0:
        tmp = path.with_name(path.name + ".tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        try:
            lm.save_pretrained(tmp, state_dict=weights)
            written = json.loads((tmp / "config.json").read_text())
            written["dtype"] = str(policy.dtype).removeprefix("torch.")  # not that of the master weights
            write(tmp / "config.json", json.dumps(written, indent=2) + "\n")
            tokenizer.save_pretrained(tmp)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(tmp, ignore_errors=True)
            raise OSError(f"could not save {path}: {error}") from None
        for file in tmp.iterdir():
            sync(file)
        shutil.rmtree(path, ignore_errors=True)
        tmp.rename(path)
        sync(path.parent)


def until_stopped(steps):
    """The steps, until SIGTERM or Ctrl-C reaches any rank: then the one under way is the last."""
    caught, signals = [], (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.signal(s, lambda s, _: caught.append(s)) for s in signals}
    try:
        for step in steps:
            yield step
            if any(gather(bool(caught))):
                return
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def attempt(task, *args, **kwargs):
    """task(*args, **kwargs) where every rank succeeds; else all exit, and one prints the first error in a line."""
    result = error = None
    try:
        result = task(*args, **kwargs)
    except (ValueError, OSError) as e:
        error = " ".join(str(e).split()) or type(e).__name__
    if errors := [e for e in gather(error) if e]:
        stop(errors[0])
    return result


def stop(message):
    """Ends every rank, which must all call it, with one line."""
    sys.exit(1 if dist.is_initialized() and dist.get_rank() > 0 else f"train.py: {message}")


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


def summary(cfg, rollouts, batches, raw, updates, clock):
    """A step's metrics over all ranks. Gate and loss diagnostics are of its last epoch, where drift is largest."""
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
    if not updates:
        return metrics
    tracks, results = zip(*updates, strict=True)
    last = [track for part in tracks[-(len(tracks) // cfg.epochs) :] for track in part]
    flat = {name: [track[name] for track in last] for name in last[0]}
    flat["gap"] = [b.old - b.targets["logp"].to(b.old.device) for b in batches if b.old is not None]
    flat["out_of_step"] = [(logp - b.sampler_logp).abs() for b, logp in raw]
    flat = {name: torch.cat(xs).float().cpu() for name, xs in flat.items() if xs}
    flat = {name: torch.cat([part[name] for part in parts]) for parts in [gather(flat)] for name in flat}
    where, good = flat.pop("where"), [x for x in results if not x["skipped"]]
    metrics |= {name: sum(x[name] for x in good) / len(good) for name in ("loss", "grad_norm") if good}
    metrics["skipped"] = len(results) - len(good)
    if "g" in flat:
        g, s, d = (flat.pop(name) for name in "gsd")
        metrics |= {f"gate/{name}": x.item() for name, x in gate_stats(g, s, d, torch.ones_like(g)).items()}
        twentieth = (where * 20).long().clamp(max=19)
        total = torch.zeros(2, 20).index_add_(1, twentieth, torch.stack([g, torch.ones_like(g)]))
        metrics["gate/by_position"] = (total[0] / total[1].clamp(min=1)).tolist()
    if "out_of_step" in flat:
        metrics["rollout/out_of_step_max"] = flat["out_of_step"].max().item()
        metrics["rollout/out_of_step"] = flat.pop("out_of_step").mean().item()
    return metrics | {name if name == "gap" else f"loss/{name}": x.mean().item() for name, x in flat.items()}
