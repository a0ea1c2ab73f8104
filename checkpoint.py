"""What a run leaves on disk besides its metrics, and how a signal stops it.

OUT/config.json, OUT/step-N/ (checkpoints), OUT/final/ (the student)
"""

import json
import shutil
import signal
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from common import fsync, gather, one_line, rank, rng_state, set_rng_state, versions, world_size, write_file
from configs import may_change
from policy import full_weights

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # we save from one process on purpose
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FILE_BYTES = 2 << 30  # of a rank's tensors in one file: a file is copied to host memory as a whole, then written

# -----------------------------------------------------------------------------
# the run's folder


def complete(out: Path) -> list[Path]:
    """Checkpoint folders, oldest first. An unfinished one still has its temporary name."""
    folders = [path for path in out.glob("step-*") if path.suffix != ".tmp" and (path / "state.json").exists()]
    return sorted(folders, key=number)


def latest(out: Path) -> Path | None:
    return next(reversed(complete(out)), None)


def number(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def find(cfg) -> Path | None:
    """The checkpoint that this run goes on from; None if it starts. ValueError if --out holds another run."""
    out = Path(cfg.out)
    config = out / "config.json"
    saved = json.loads(config.read_text()) if config.exists() else {}
    if cfg.resume == "false":
        if saved and not cfg.overwrite:
            raise ValueError(
                f"{out} already holds a run: --resume goes on with it, --overwrite deletes it, --out names another folder"
            )
        return None
    newest = latest(out)
    if cfg.resume == "true" and not newest:
        raise ValueError(f"--resume: {out} holds no complete checkpoint")
    for name, new in asdict(cfg).items():
        old = saved.get(name, new)
        if old != new and not may_change(name):
            raise ValueError(f"--resume: {out} was run with --{name} {old!r}, not {new!r}")
    return newest


def claim(cfg):
    """Makes --out this run's, on rank 0. OSError if it cannot be written to."""
    out = Path(cfg.out)
    if rank() > 0:
        return
    if cfg.overwrite and (out / "config.json").exists():  # nothing but a run is ever deleted
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob("*.tmp"):  # of a run that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    write_file(out / "config.json", json.dumps(asdict(cfg), indent=1) + "\n")


# -----------------------------------------------------------------------------
# checkpoints


def state_dicts(policy, optimizer):
    """(model's, optimizer's) state dicts, sharded as they are."""
    is_fresh = not optimizer.state
    model, optim = get_state_dict(policy, optimizer, options=FLAT)
    if is_fresh:  # get_state_dict has initialised AdamW with a dummy step, which must not count
        for state in optimizer.state.values():
            state["step"].zero_()
    return model, optim


def checkpoint_tensors(policy, model, optim):
    """{name: tensor} that a checkpoint holds: tied weights once, and of the optimizer only tensors."""
    tied = {f"lm.{name}" for name in policy.lm.all_tied_weights_keys}
    tensors = {f"model.{name}": x for name, x in model.items() if name not in tied}
    return tensors | {f"optim.{name}": x for name, x in optim.items() if isinstance(x, torch.Tensor)}


def assign_files(tensors):
    """{tensor's name: number of its file, from 1}, about FILE_BYTES in each."""
    files, total = {}, 0
    for name, x in tensors.items():
        files[name] = 1 + total // FILE_BYTES
        total += (x.to_local() if hasattr(x, "to_local") else x).nbytes
    return files


def save(out, step, policy, optimizer, cfg):
    """Writes OUT/step-N: safetensors sharded over the ranks, which any number of ranks can load.

    It gets its name when all of it is on the disk. Older ones than the newest cfg.keep are deleted then.
    """
    tmp, final = out / f"step-{step}.tmp", out / f"step-{step}"
    rng_states = gather(rng_state())
    tensors = checkpoint_tensors(policy, *state_dicts(policy, optimizer))
    writer = HuggingFaceStorageWriter(str(tmp), assign_files(tensors), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except CheckpointException as failed:
        shutil.rmtree(tmp, ignore_errors=True)
        reason = root_cause([error for error, _ in failed.failures.values()][0])
        raise OSError(f"could not save {final}: {reason}; the checkpoints before it are whole") from None
    if rank() > 0:
        return
    torch.save(rng_states, tmp / "rng.pt")
    state = {"step": step, "config": asdict(cfg), "versions": versions()}
    write_file(tmp / "state.json", json.dumps(state, indent=1))
    fsync(tmp / "rng.pt")
    fsync(tmp)
    shutil.rmtree(final, ignore_errors=True)
    tmp.rename(final)
    fsync(out)
    for old in complete(out)[: -cfg.keep]:
        shutil.rmtree(old.rename(old.with_suffix(".tmp")))  # so that half a checkpoint never bears a checkpoint's name


def root_cause(error):
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return one_line(error)


def restore(folder, policy, optimizer):
    """Loads a checkpoint in place. On another number of ranks, the random states stay those of the seed."""
    model, optim = state_dicts(policy, optimizer)
    reader = HuggingFaceStorageReader(str(folder))
    dcp.load(checkpoint_tensors(policy, model, optim), storage_reader=reader)  # into the tensors of model and optim
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim, options=FLAT)
    rng_states = torch.load(folder / "rng.pt", weights_only=True)
    if len(rng_states) == world_size():
        set_rng_state(rng_states[rank()])


def save_model(path, policy, tokenizer):
    """The student as a Hugging Face folder, in the dtype that its own files came in; renamed once it is complete."""
    lm, config = policy.lm, policy.lm.generation_config
    tied = lm.all_tied_weights_keys  # {copy: source}; files hold the source alone
    weights = {name: w.to(policy.file_dtype).cpu() for name, w in full_weights(policy) if name not in tied}
    if rank() > 0:
        return
    if not config.do_sample and (config.temperature or config.top_p or config.top_k):
        config.do_sample = True  # some hub models come like this, and transformers refuses to save them
    tmp = path.with_name(path.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        lm.save_pretrained(tmp, state_dict=weights)
        written = json.loads((tmp / "config.json").read_text())
        written["dtype"] = str(policy.file_dtype).removeprefix("torch.")  # not that of the master weights
        write_file(tmp / "config.json", json.dumps(written, indent=2) + "\n")
        tokenizer.save_pretrained(tmp)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f"could not save {path}: {error}") from None
    for file in tmp.iterdir():
        fsync(file)
    shutil.rmtree(path, ignore_errors=True)
    tmp.rename(path)
    fsync(path.parent)


# -----------------------------------------------------------------------------
# signals


class StopSignal:
    """From listen() to release(), SIGTERM and Ctrl-C only ask the run to stop, at the next place where it can."""

    def __init__(self):
        self.reason = ""  # the signal's name, once there was one
        self.previous_handlers = {}

    def listen(self):
        for s in (signal.SIGTERM, signal.SIGINT):
            self.previous_handlers[s] = signal.signal(s, self.handle)

    def handle(self, signum, frame):
        self.reason = self.reason or signal.Signals(signum).name

    def release(self):
        for s, handler in self.previous_handlers.items():
            signal.signal(s, handler)

    def requested_here(self) -> bool:
        """On this rank. Samplers ask it at every token, and return what they have once it is True."""
        return bool(self.reason)

    def requested(self) -> bool:
        """On any rank. A collective: all ranks get the same answer."""
        reason = max(gather(self.reason))
        self.reason = self.reason or reason  # a signal that came meanwhile is kept for the next call
        return bool(reason)
