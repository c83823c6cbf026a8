"""Errors of code that users bring: factories, forward passes, data sets, tasks, losses, plug-ins.

Whatever such code raises becomes one of our errors that names its file and line. `SystemExit` and other exceptions
that no `except Exception` sees are among them: they would otherwise choose our exit code. A real Ctrl-C stays one.
"""

import dis
import errno
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from compress.errors import CompressError, StageError, is_out_of_memory

_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_RAISE = dis.opmap["RAISE_VARARGS"]
_OURS = str(Path(__file__).resolve().parent)
_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scipy", "PIL", "onnx", "onnxruntime", "onnxscript", "typer",
              "click", "pydantic", "safetensors", "torch_pruning", "compress")  # fmt: skip
_STANDARD = tuple({sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib")})


@contextmanager
def shown_as(kind: type[CompressError], what: str, hint: str | None = None) -> Iterator[None]:
    """Raise an error of ours in the place of whatever the user's code raises within; never around a `yield`.

    Args:
        kind: The class to raise.
        what: Beginning of the message, such as "Factory 'net.py:Net' must build the network".
        hint: What to do about it.

    Raises:
        kind: The code raised something else than one of our errors or a real Ctrl-C.
    """
    try:
        yield
    except CompressError:
        raise
    except BaseException as error:
        if is_interrupt(error) or is_out_of_memory(error):
            raise
        raise kind(f"{what}, got {described(error)}", hint=hint) from error


def described(error: BaseException) -> str:
    """Return class, message and place of an error, such as "ValueError: no such depth (net.py:12)"."""
    said = str(error).strip()
    place = user_place(error)
    name = type(error).__name__
    return f"{name}{f': {said}' if said else ''}{f' ({place})' if place else ''}"


def user_place(error: BaseException) -> str | None:
    """Return file name and line of the innermost code of the user's that an error came through; None where none was."""
    frame = user_frame(error)
    return None if frame is None else f"{Path(frame.filename).name}:{frame.lineno}"


def user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Return the innermost frame of an error that is neither a library's nor ours; None where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame for frame in reversed(frames) if not _is_library(frame.filename)), None)


def is_users(error: BaseException) -> bool:
    """Whether an error was raised by code of the user's, or by a library that it called; not by code of ours."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(_OURS):
            return False
        if not _is_library(frame.filename):
            return True
    return False


def as_ours(error: BaseException) -> CompressError | None:
    """Return the error of ours that stands for one that the user's code raised; None where it was not theirs.

    An error that ends a process (SystemExit and its like) is never ours where any code of the user's was at work. Want
    of memory and a full or read-only disk are the machine's, and explained elsewhere.
    """
    if isinstance(error, ModuleNotFoundError):  # the package is named, whoever wants it
        return None
    if isinstance(error, SystemExit) and user_frame(error) is None:  # a parser of arguments of ours
        return None
    if isinstance(error, CompressError) or is_interrupt(error) or is_out_of_memory(error):
        return None
    if isinstance(error, OSError) and error.errno in _MACHINE:
        return None
    if isinstance(error, Exception) and not is_users(error):
        return None
    return StageError(
        f"Code outside of compress must not fail while a stage runs, got {described(error)}.",
        hint="Run that code alone, with the same input; nothing of it was changed.",
    )


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is a real Ctrl-C, and none that a `raise` in somebody's code made up."""
    return type(error) is KeyboardInterrupt and not _is_raised(error.__traceback__)


def _is_raised(trace: TracebackType | None) -> bool:
    """Whether the innermost frame of a traceback is at a `raise` outside of compress: a signal comes anywhere else."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    is_ours = code.co_filename.startswith(_OURS)
    return not is_ours and trace.tb_lasti >= 0 and code.co_code[trace.tb_lasti] == _RAISE


def _is_library(filename: str) -> bool:
    if filename.startswith((_OURS, "<")) or not filename:
        return True
    if "site-packages" in filename or "dist-packages" in filename:
        parts = Path(filename).parts
        root = max(place for place, part in enumerate(parts) if part.endswith("-packages"))
        return len(parts) > root + 1 and parts[root + 1].removesuffix(".py") in _LIBRARIES
    return filename.startswith(_STANDARD) or filename == sys.executable
