"""What several files share: ranks, output, signals, seeds, and the versions of what ran."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent  # of the project
PATIENCE = timedelta(minutes=1)  # of a rank that was not started by torchrun, with the others

# -----------------------------------------------------------------------------
# ranks: one process, or those that torchrun started


def init_device(cfg) -> torch.device:
    """Joins the process group that torchrun describes, seeds torch, and returns this rank's device.

    ValueError if CUDA is asked for and is not there, if this rank's GPU is not, or if ranks that are expected do not come.
    """
    name = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device on this machine")
    if name == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))  # RANK counts over all nodes
        n_devices = torch.cuda.device_count()
        if local_rank >= n_devices:
            remedy = "every rank must see a GPU for each rank of its node (srun --gpus-per-node, not --gpus-per-task)"
            raise ValueError(f"LOCAL_RANK is {local_rank}, and this process sees {n_devices} GPU(s): {remedy}")
        torch.cuda.set_device(local_rank)
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if name == "cuda" or not is_alone:
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        # A single GPU is a group of one, so that it computes what several compute (policy.shard).
        store, rank, world_size = (dist.HashStore(), 0, 1) if is_alone else meet_other_ranks()
        # Long timeout: ranks wait for the slowest rollout. torchrun detects dead ranks.
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(days=1))
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


def meet_other_ranks():
    """(store, rank, world size) of the group that the environment describes. ValueError if not all ranks come."""
    patience = timedelta(days=1) if dist.is_torchelastic_launched() else PATIENCE  # torchrun starts all of them
    try:
        return next(dist.rendezvous("env://", timeout=patience))
    except (ValueError, RuntimeError) as error:
        why = f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not all of the ranks came within {PATIENCE.seconds} s"
        raise ValueError(f"{why}: start them all with torchrun, or unset WORLD_SIZE ({error})") from None


def leave_process_group():
    """All ranks together: one that leaves while another's gloo thread still cleans up can abort it."""
    if dist.is_initialized():  # also in a single process: init_device makes a group on a GPU, and vLLM may make its own
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x) -> list:
    """[x of rank 0, x of rank 1, ...] on every rank; x is anything that pickles. A collective: all ranks must call it."""
    if not dist.is_initialized():
        return [x]
    parts = [None] * world_size()
    dist.all_gather_object(parts, x)
    return parts


def barrier():
    if dist.is_initialized():
        dist.barrier()


def print0(message):
    """Prints on rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(str(message))


class TolerantStream:
    """A text stream that goes on without its reader: | head, or a terminal that was closed."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal's encoding may lack a character

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def ignore_output_errors():
    """From here on, no print or progress bar of this process fails because nobody reads it, or for a character."""
    sys.stdout, sys.stderr = TolerantStream(sys.stdout), TolerantStream(sys.stderr)


def hide_progress_bars():
    """Of transformers, which shows one for each model that it loads or writes. Those of downloads stay."""
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # which that switches off, too


def seed_for(*parts) -> int:
    """53 bits that depend on the parts alone, for example (run seed, step, problem id, sample).

    No more, because samples.jsonl holds them, and jq and pandas may read numbers as float64.
    """
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 11


def digest(parts) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextmanager
def one_rank_at_a_time():
    """The ranks of a node run this block one after the other. A collective."""
    turn = int(os.environ.get("LOCAL_RANK", 0))
    n_turns = 1 + max(gather(turn))  # over all nodes: they may have unequal numbers of ranks
    for _ in range(turn):
        barrier()
    try:
        yield
    finally:  # also if it fails: the other ranks are waiting
        for _ in range(n_turns - turn):
            barrier()


# -----------------------------------------------------------------------------
# signals


class StopSignal:
    """From listen() to release(), these signals only ask the run to stop where it can.

    SIGTERM, Ctrl-C, SIGHUP (a closed terminal) and SIGUSR1 (Slurm's --signal, some time before it ends a job).
    """

    def __init__(self):
        self.reason = ""  # the signal's name, once there was one
        self.previous_handlers = {}

    def listen(self):
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
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


# -----------------------------------------------------------------------------
# versions


@functools.cache
def versions() -> dict:
    """Of Python, of the packages that matter, and of this code: its git commit and public repository, where git knows them."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "vllm", "math-verify", "sympy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["commit"] = git("describe", "--always", "--dirty", "--abbrev=12")
    origin = git("config", "--get", "remote.origin.url")
    found["repository"] = (
        origin if origin.startswith(("https://", "git@")) and "@" not in origin.removeprefix("git@") else ""
    )
    return found


def git(*words) -> str:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here, as in slim containers
        return ""
