"""What several files share: ranks, errors that end a run in one line, and files that survive a kill."""

import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import traceback
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

# -----------------------------------------------------------------------------
# ranks: one process, or those that torchrun started


def init_device(cfg) -> torch.device:
    """Joins the process group that torchrun describes, seeds torch, and returns this rank's device.

    ValueError if CUDA is asked for and is not there.
    """
    name = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device on this machine")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # RANK counts over all nodes
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if name == "cuda" or not is_alone:
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        # A single GPU is a group of one, so that it computes what several compute (policy.shard).
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if is_alone else {}
        # Long timeout: ranks wait for the slowest rollout. torchrun detects dead ranks.
        dist.init_process_group(backend, timeout=timedelta(days=1), **alone)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


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


def say(message):
    """Prints a line on rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(str(message))


class Output:
    """A text stream that goes on without its reader: | head, or a terminal that was closed."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def outlive_terminal():
    """From here on, no print or progress bar of this process fails because nobody reads it."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)


def try_to(draw, *args):
    """draw(*args). If it fails, a warning: a picture must not end a run."""
    try:
        draw(*args)
    except Exception as error:
        say(f"warning: no picture: {one_line(error)}")


def hide_progress_bars():
    """Of transformers, which shows one for each model that it loads or writes. Those of downloads stay."""
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # which that switches off, too


def seed_for(*parts) -> int:
    """63 bits that depend on the parts alone, for example (run seed, step, problem id, sample)."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


# -----------------------------------------------------------------------------
# errors

ROOT = Path(__file__).resolve().parent
PACKAGES = {"site-packages", "dist-packages"}
traceback_folder = None  # where tracebacks go; None: to stderr


def keep_tracebacks_in(folder: Path | None):
    global traceback_folder
    traceback_folder = folder


def explain(error) -> str:
    """What went wrong, in one line.

    If our own code raised a ValueError, an OSError or an ImportError, its message says it all. An error that comes out of a
    library, or of any other type, also names its type, the innermost frame and the last of ours before it, and its traceback is
    kept: in error-RANK.log of the run's folder or, before there is one, on stderr.
    """
    message = one_line(error)
    if no_attention_kernel(error):
        message = (
            "flash and memory-efficient attention refuse this model on this GPU (torch's warnings say why), and math attention "
            "takes memory for [L, L] scores; use a GPU of compute capability 8.0 or more, or another model"
        )
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_ours(frame) or is_of_package(frame)]
    if not frames or (isinstance(error, (ValueError, OSError, ImportError)) and is_ours(frames[-1])):
        return message
    origin = f"{type(error).__name__} at {place(frames[-1])}"
    our_frames = [place(frame) for frame in frames if is_ours(frame)]
    if our_frames and not is_ours(frames[-1]):
        origin += f", called from {our_frames[-1]}"
    return f"{message} ({origin}; traceback {keep_traceback(error)})"


def no_attention_kernel(error):
    refusals = ("No available kernel", "No viable backend")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in refusals)


def is_ours(frame):
    return Path(frame.filename).is_relative_to(ROOT) and not is_of_package(frame)


def is_of_package(frame):
    """Of an installed package; what remains is Python's own library, such as pathlib, which acts for its caller."""
    return not PACKAGES.isdisjoint(Path(frame.filename).parts)


def place(frame):
    """FILE:LINE, the file as seen from the project or from the folder of packages."""
    parts = Path(frame.filename).parts
    if is_ours(frame):
        parts = parts[len(ROOT.parts) :]
    else:
        parts = parts[1 + max(i for i, part in enumerate(parts) if part in PACKAGES) :]
    return f"{Path(*parts)}:{frame.lineno}"


def keep_traceback(error) -> str:
    """Writes the whole traceback; says where."""
    text = "".join(traceback.format_exception(error))
    if traceback_folder:
        path = traceback_folder / f"error-{rank()}.log"
        with suppress(OSError):  # such as a full disk, which may be the error itself
            with path.open("a") as file:
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {' '.join(sys.argv)}\n{text}\n")
            return f"in {path}"
    print(text, file=sys.stderr, flush=True)
    return "above"


@contextmanager
def errors_in_one_line(program):
    """Ends the process with "PROGRAM: what went wrong" on stderr, and exit code 1, if the block raises an error."""
    keep_tracebacks_in(None)
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.exit(f"{program}: {end.code}")
        raise
    except Exception as error:
        sys.exit(f"{program}: {explain(error)}")


def one_line(error) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def exit_all(message):
    """Ends the run with one line on stderr and exit code 1. Every rank must call it."""
    sys.exit(message if rank() == 0 else 1)


def on_all_ranks(task, *args, **kwargs):
    """task(*args, **kwargs). If it raises an error on any rank, all ranks exit with the first one, explained in one line.

    Without this, the ranks on which it went well would wait in their next collective for the one that died.
    """
    result = error = None
    try:
        result = task(*args, **kwargs)
    except Exception as e:
        error = explain(e)
    errors = [e for e in gather(error) if e]
    if errors:
        exit_all(errors[0])
    return result


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
# files


def write_file(path: Path, text: str):
    """Replaces a file as a whole: a process that dies, or a power cut, leaves the old text or the new one."""
    tmp = path.with_name(path.name + ".tmp")
    with tmp.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    tmp.replace(path)
    fsync(path.parent)


def fsync(path: Path):
    """Flushes a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # many network file systems cannot flush a folder
            raise
    finally:
        os.close(fd)


def lock_folder(folder: Path):
    """A file whose lock keeps other processes out of the folder until it is closed, or this process ends.

    ValueError, with the holder's name, if another process has locked it. The system releases the lock of a killed process.
    """
    file = open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(
            f"{folder} is in use by {file.read() or 'another process'}: stop it, or choose another --out"
        ) from None
    except OSError as error:  # such as Lustre without its flock option
        say(f"warning: {folder} cannot be locked ({error}): do not start two runs with it as --out")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file that we wrote. A last line without its newline was cut off by a kill, and is left out."""
    try:
        return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


@functools.cache
def versions() -> dict:
    """Of Python, of the packages that matter, and of this code (its git commit, where git knows it)."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "vllm", "math-verify", "sympy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here, as in slim containers
        found["commit"] = ""
    return found
