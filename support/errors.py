"""Errors that end a run: one line on stderr for a mistake of the user, and a kept traceback for all others."""

import sys
import traceback
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from support.common import ROOT, gather, print0, rank

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
            with path.open("a", encoding="utf-8") as file:
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


def abort(message):
    """Ends the run with one line on stderr and exit code 1. All ranks must call it."""
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
    errors = gather(error)
    if any(errors):
        first = next(i for i, e in enumerate(errors) if e)
        abort(f"rank {first}: {errors[first]}" if first else errors[0])
    return result


def draw_or_warn(draw, *args):
    """draw(*args). If it fails, a warning: a picture must not end a run."""
    try:
        draw(*args)
    except Exception as error:
        print0(f"warning: no picture: {one_line(error)}")
