"""Files that survive a kill, folders that belong to one process at a time, and the names of what a run leaves."""

import errno
import json
import os
import secrets
import shutil
import socket
import time
from pathlib import Path

import filelock

from support.common import gather, print0, rank, world_size

# What a run leaves in --out, besides its checkpoints step-N/, pictures and, after an error, error-RANK.log
CONFIG = "config.json"  # every setting
METRICS = "metrics.jsonl"  # a row for each step
EVALUATIONS = "evaluations.jsonl"  # a row for each evaluation in the loop
TRACE = "trace.jsonl"  # with --trace_every: one response, token by token
FINAL = "final"  # the student, a Hugging Face folder
TOKEN, TOKEN_SECONDS = ".token", 10  # until all nodes see a file that one has written


def write_file(path: Path, text: str):
    """Replaces a file as a whole: a process that dies, or a power cut, leaves the old text or the new one."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.unlink(missing_ok=True)  # if it is a link, what it points to stays as it is
    with tmp.open("w", encoding="utf-8") as file:  # not in the locale's, which may lack a character
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


# -----------------------------------------------------------------------------
# rows of JSON


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file that we wrote. A last line without its newline was cut off by a kill, and is left out."""
    try:
        return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def append_jsonl(path: Path, rows):
    """Appends rows, ASCII only (a lone surrogate is escaped), and flushes them to the disk."""
    with path.open("ab") as file:  # buffered: a raw write to a disk that becomes full may take a part without an error
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def write_jsonl(path: Path, rows):
    """Replaces a file of rows as a whole."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


# -----------------------------------------------------------------------------
# folders


def check_is_shared(folder: Path):
    """ValueError on the ranks that do not see what rank 0 writes to the folder, as on nodes with disks of their own. A collective."""
    token, path = gather(secrets.token_hex())[0], folder / TOKEN
    if world_size() == 1:
        return
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, token)
    for _ in range(TOKEN_SECONDS):  # a network file system may show it late
        if path.exists() and path.read_text() == token:
            return
        time.sleep(1)
    raise ValueError(
        f"--out {folder} is not on a disk that all nodes share: {socket.gethostname()} does not see rank 0's files"
    )


def lock_folder(folder: Path):
    """Keeps other processes out of the folder until the lock that it returns is released, or this process ends.

    ValueError, with the holder's name, if another process has locked it. The system releases the lock of a killed process.
    """
    lock, holder = filelock.FileLock(folder / ".lock"), folder / ".holder"
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        name = holder.read_text() if holder.exists() else "another process"
        raise ValueError(f"{folder} is in use by {name}: stop it, or choose another --out") from None
    except (
        OSError
    ) as error:  # such as NFS without its lock daemon; on Lustre without flock, filelock has a way of its own
        print0(f"warning: {folder} cannot be locked ({error}): do not start two runs with it as --out")
    holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return lock


def claim_folder(folder, config_name, overwrite):
    """Creates and locks a folder, deletes what a killed process was writing, and returns the lock.

    overwrite: deletes all the rest, too. Without a file config_name, the folder is not ours, and nothing is deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    (folder / TOKEN).unlink(missing_ok=True)  # check_is_shared has read it
    if (folder / config_name).exists():
        # Temporary names first, because delete() needs them; config_name last, so that the folder of an interrupted
        # deletion is still known as a run.
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == config_name, path.suffix != ".tmp")):
            if path.suffix == ".tmp" or (overwrite and path.name not in (".lock", ".holder")):
                delete(path)
    return lock


def delete(path):
    """As remove(), but a folder is renamed first, so that half a checkpoint never has a checkpoint's name."""
    if path.is_dir() and not path.is_symlink() and path.suffix != ".tmp":
        tmp = path.with_name(path.name + ".tmp")
        remove(tmp)
        path = path.rename(tmp)
    remove(path)


def remove(path):
    """Deletes a file, a link (not what it points to) or a folder, if it is there."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
