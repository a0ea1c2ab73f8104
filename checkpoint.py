"""What a run leaves on disk besides its metrics, and how it ends.

out/RUN/{config.json, step-N/ (checkpoints), final/ (the student)}
"""

import functools
import json
import random
import shutil
import signal
import sys
import warnings
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
from policy import full_weights
from report import sync, write

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # saving from one process is what we mean
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FILE_BYTES = 2 << 30  # of a rank's tensors in one file; a file is copied to the host as a whole, and freed once written


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


def state_dicts(policy, optimizer):
    """(model, optimizer). torch makes the state of a fresh optimizer by an update of nothing, which must not count."""
    fresh = not optimizer.state
    found = get_state_dict(policy, optimizer, options=FLAT)
    for state in optimizer.state.values() if fresh else ():
        state["step"].zero_()
    return found


def tensors(policy, model, optim):
    """What a checkpoint holds of get_state_dict's two: tied weights once, the optimizer's other values not at all."""
    tied = {f"lm.{name}" for name in policy.lm.all_tied_weights_keys}
    optim = {f"optim.{name}": x for name, x in optim.items() if isinstance(x, torch.Tensor)}
    return {f"model.{name}": x for name, x in model.items() if name not in tied} | optim


def files(state):
    """{tensor's name: number of its file, from 1}."""
    found, total = {}, 0
    for name, x in state.items():
        found[name] = 1 + total // FILE_BYTES
        total += (x.to_local() if hasattr(x, "to_local") else x).nbytes
    return found


def save(out, step, policy, optimizer, stream, cfg):
    """safetensors sharded over the ranks, loadable on any number of them; renamed once complete and on the disk."""
    tmp, final = out / f"step-{step}.tmp", out / f"step-{step}"
    rng, state = gather(rng_state()), tensors(policy, *state_dicts(policy, optimizer))
    try:
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(tmp), files(state), save_distributed=True))
    except CheckpointException as failed:
        shutil.rmtree(tmp, ignore_errors=True)
        reasons = [root_cause(error) for error, _ in failed.failures.values()]
        raise OSError(f"could not save {final}: {reasons[0]}; the checkpoints before it are whole") from None
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    torch.save(rng, tmp / "rng.pt")
    state = {"step": step} | stream.state
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
    model, optim = state_dicts(policy, optimizer)
    dcp.load(tensors(policy, model, optim), storage_reader=HuggingFaceStorageReader(str(folder)))  # in place
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim, options=FLAT)
    rng = torch.load(folder / "rng.pt", weights_only=True)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(rng) == world:
        set_rng_state(rng[rank])
    state = json.loads((folder / "state.json").read_text())
    stream.restore(state)
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


class Steps:
    """The numbers of a run's steps, until SIGTERM, Ctrl-C or `stop` on any rank: then the one under way is the last.

    From the first step until `release`, signals do no more than that.
    """

    def __init__(self, start, end):
        self.start, self.end, self.why, self.handlers = start, end, "", {}

    def __iter__(self):
        for s in (signal.SIGTERM, signal.SIGINT):
            self.handlers[s] = signal.signal(s, lambda s, _: self.stop(signal.Signals(s).name))
        for step in range(self.start, self.end):
            if self.stopped():
                return
            yield step

    def release(self):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

    def stop(self, why):
        self.why = self.why or why

    def asked(self):
        """Whether this rank was asked to stop; samplers call it for every token, and then return at once."""
        return bool(self.why)

    def stopped(self):
        """Whether any rank was, and then all of them; a collective."""
        why = max(gather(self.why))
        self.why = self.why or why  # a signal may have come meanwhile; the next call tells the others
        return bool(why)


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
