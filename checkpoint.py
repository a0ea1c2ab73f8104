"""What a run leaves on disk besides its metrics, and how a signal stops it.

OUT/config.json, OUT/model/ (the student's files but its weights), OUT/step-N/ (checkpoints), OUT/final/ (the student)
"""

import json
import re
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

from common import fsync, gather, lock_folder, on_all_ranks, one_line, rank, say, versions, write_file
from configs import may_change

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # we save from one process on purpose
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FILE_BYTES = 1 << 28  # of a rank's tensors in one file: a file is copied to host memory as a whole, then written

# -----------------------------------------------------------------------------
# the run's folder


def complete(out: Path) -> list[Path]:
    """Checkpoint folders, oldest first. An unfinished one still has its temporary name; a user's copies have others."""
    folders = [path for path in out.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted([path for path in folders if (path / "state.json").exists()], key=number)


def latest(out: Path) -> Path | None:
    return next(reversed(complete(out)), None)


def number(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def find(cfg) -> Path | None:
    """The checkpoint that this run goes on from; None if it starts. ValueError if --out holds another run."""
    out = Path(cfg.out)
    config = out / "config.json"
    if cfg.resume == "false":
        if config.exists():
            if not cfg.overwrite:
                remedies = "--resume goes on with it, --overwrite deletes it, --out names another folder"
                raise ValueError(f"{out} already holds a run: {remedies}")
            check_inputs_outlive(out, cfg)
        return None
    newest = latest(out)
    if cfg.resume == "true" and not newest:
        raise ValueError(
            f"--resume: {out} holds no complete checkpoint; with --resume auto the run starts from the beginning"
        )
    saved = json.loads(config.read_text()) if config.exists() else {}
    for name, new in asdict(cfg).items():
        old = saved.get(name, new)
        if old != new and not may_change(name):
            raise ValueError(f"--resume: {out} was run with --{name} {old!r}, not {new!r}")
    return newest


def check_inputs_outlive(out, cfg):
    """ValueError if --overwrite would delete a model or data that this run is about to read."""
    for flag in ("student", "teacher", "data", "eval_data"):
        for name in getattr(cfg, flag).split(","):
            if Path(name).exists() and Path(name).resolve().is_relative_to(out.resolve()):
                raise ValueError(f"--overwrite would delete --{flag} {name}: choose another --out")


def check_data(resume_from, data_digest):
    """ValueError if the checkpoint was made with other training prompts."""
    if resume_from and json.loads((resume_from / "state.json").read_text()).get("data", data_digest) != data_digest:
        raise ValueError(
            "--resume: the training prompts are not those that the run began with: has --data's file changed?"
        )


def claim(cfg):
    """Makes --out this run's, on rank 0, and returns its lock. OSError if it cannot be written to."""
    if rank() > 0:
        return None
    out = Path(cfg.out)
    lock = claim_folder(out, "config.json", cfg.overwrite)
    write_file(out / "config.json", json.dumps(asdict(cfg), indent=1) + "\n")
    return lock


def claim_folder(folder, config_name, overwrite):
    """Creates and locks a folder, deletes what a killed process was writing, and returns the lock.

    overwrite: deletes all the rest, too. Without a file config_name, the folder is not ours, and nothing is deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    if (folder / config_name).exists():
        # Temporary names first, because delete() needs them; config_name last, so that the folder of an interrupted
        # deletion is still known as a run.
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == config_name, path.suffix != ".tmp")):
            if path.suffix == ".tmp" or (overwrite and path.name != ".lock"):
                delete(path)
    return lock


def delete(path):
    """Deletes a file or folder. A folder is renamed first, so that half a checkpoint never has a checkpoint's name."""
    if not path.is_dir():
        path.unlink()
    elif path.suffix == ".tmp":
        shutil.rmtree(path)
    else:
        shutil.rmtree(path.rename(path.with_name(path.name + ".tmp")))


# -----------------------------------------------------------------------------
# checkpoints


def state_dicts(policy, optimizer):
    """(model's state dict, optimizer's state dict, {name: tensor} of what a checkpoint holds of both), sharded as they are."""
    is_fresh = not optimizer.state
    model, optim = get_state_dict(policy, optimizer, options=FLAT)
    if is_fresh:  # get_state_dict has initialised AdamW with a dummy step, which must not count
        for state in optimizer.state.values():
            state["step"].zero_()
    tied = {f"lm.{name}" for name in policy.lm.all_tied_weights_keys}
    tensors = {f"model.{name}": x for name, x in model.items() if name not in tied}
    tensors |= {f"optim.{name}": x for name, x in optim.items() if isinstance(x, torch.Tensor)}
    return model, optim, tensors


def assign_files(tensors):
    """{tensor's name: number of its file, from 1}, about FILE_BYTES in each."""
    files, total = {}, 0
    for name, x in tensors.items():
        files[name] = 1 + total // FILE_BYTES
        total += (x.to_local() if hasattr(x, "to_local") else x).nbytes
    return files


def save(out, step, policy, optimizer, cfg, data_digest):
    """Writes OUT/step-N: safetensors sharded over the ranks, which any number of ranks can load.

    It gets its name when all of it is on the disk. Then the newest cfg.keep remain. The disk never holds more of them, this
    one included, except with cfg.keep 1: the old one goes when the new one is complete.
    """
    tmp, final = out / f"step-{step}.tmp", out / f"step-{step}"
    on_all_ranks(delete_all_but, out, max(cfg.keep - 1, 1))
    _, _, tensors = state_dicts(policy, optimizer)
    writer = HuggingFaceStorageWriter(str(tmp), assign_files(tensors), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except CheckpointException as failed:
        shutil.rmtree(tmp, ignore_errors=True)
        reason, _ = next(iter(failed.failures.values()))
        raise OSError(f"could not save {final}: {reason}; the checkpoints before it are whole") from None
    if rank() > 0:
        return
    state = {"step": step, "data": data_digest, "config": asdict(cfg), "versions": versions()}
    write_file(tmp / "state.json", json.dumps(state, indent=1))
    fsync(tmp)
    shutil.rmtree(final, ignore_errors=True)
    tmp.rename(final)
    fsync(out)
    delete_all_but(out, cfg.keep)


def delete_all_but(out, n_newest):
    """On rank 0, deletes all complete checkpoints but the newest."""
    if rank() > 0:
        return
    for old in complete(out)[:-n_newest]:
        delete(old)


def restore(folder, policy, optimizer):
    """Loads a checkpoint in place, on any number of ranks. No random state: every draw of a run has a seed of its own."""
    model, optim, tensors = state_dicts(policy, optimizer)
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))  # in place
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim, options=FLAT)


# -----------------------------------------------------------------------------
# the student as a Hugging Face folder


def save_model_files(out, policy, path, tokenizer):
    """Writes OUT/model: config, generation config and tokenizer, before the first step, so that the last cannot fail on them.

    Both configs are copies of the student's own, at `path`: transformers refuses to write some that it reads.
    """
    from transformers.dynamic_module_utils import custom_object_save
    from transformers.utils import cached_file

    folder = out / "model"
    if rank() > 0 or folder.exists():
        return
    tmp = folder.with_name("model.tmp")
    policy.lm.config.save_pretrained(tmp)  # as save_model will do
    tokenizer.save_pretrained(tmp)
    if policy.lm._auto_class:  # a model with Python code of its own (--trust_remote_code)
        custom_object_save(policy.lm, tmp, config=policy.lm.config)
    for name in ("config.json", "generation_config.json"):
        own = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if own:
            shutil.copyfile(own, tmp / name)
    tmp.rename(folder)


def save_model(out, policy):
    """Writes OUT/final: the student of the newest checkpoint, in the dtype that its own files came in."""
    if rank() == 0:
        write_model(out / "final", latest(out), policy.lm, policy.file_dtype)


def export(checkpoint, trust_remote_code=False):
    """Writes CHECKPOINT/model, the student as a Hugging Face folder, if it is not there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if (checkpoint / "model").exists():
        return
    config = AutoConfig.from_pretrained(checkpoint.parent / "model", trust_remote_code=trust_remote_code)
    lm = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    write_model(checkpoint / "model", checkpoint, lm, config.dtype or torch.float32)


def write_model(folder, checkpoint, lm, dtype):
    """Writes a checkpoint's student as a Hugging Face folder, which gets its name once it is complete.

    lm: a model of the student's kind; its weights do not count. OSError if the folder cannot be written.
    """
    from transformers import GenerationConfig

    tied = lm.all_tied_weights_keys
    weights = {name: torch.empty(weight.shape) for name, weight in lm.state_dict().items() if name not in tied}
    tensors = {f"model.lm.{name}": weight for name, weight in weights.items()}
    # On this rank alone, and in place.
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    lm.generation_config = GenerationConfig()  # one that transformers writes for sure; the student's own replaces it
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        lm.save_pretrained(tmp, state_dict=weights)
        (tmp / "generation_config.json").unlink(missing_ok=True)
        shutil.copytree(checkpoint.parent / "model", tmp, dirs_exist_ok=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f"could not save {folder}: {error}") from None
    for file in tmp.iterdir():
        fsync(file)
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)
    fsync(folder.parent)


def check_push(cfg):
    """ValueError, before the first step, if --push could not work: no token, no network."""
    from huggingface_hub import HfApi

    if cfg.push and rank() == 0:
        try:
            HfApi().whoami()
        except Exception as error:  # the hub's client has many kinds
            raise ValueError(f"--push {cfg.push}: {one_line(error)} (to log in: hf auth login)") from None


def push(cfg):
    """Uploads OUT/final to --push. If that fails the run is not lost: it prints the command to try again."""
    from huggingface_hub import HfApi

    folder = f"{cfg.out}/final"
    try:
        name = HfApi().create_repo(cfg.push, exist_ok=True).repo_id
        say(f"pushed to {HfApi().upload_folder(repo_id=name, folder_path=folder).commit_url}")
    except Exception as error:
        say(f"warning: --push {cfg.push}: {one_line(error)}. To try again: hf upload {cfg.push} {folder}")


# -----------------------------------------------------------------------------
# signals


class StopSignal:
    """From listen() to release(), SIGTERM, SIGHUP (a closed terminal) and Ctrl-C only ask the run to stop where it can."""

    def __init__(self):
        self.reason = ""  # the signal's name, once there was one
        self.previous_handlers = {}

    def listen(self):
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(s) != signal.SIG_IGN:  # as nohup ignores SIGHUP
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
