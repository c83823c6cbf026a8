"""Errors of code that users bring: factories, forward passes, data sets, tasks, losses, plug-ins.

Whatever such code raises becomes one of our errors that names its file and line. `SystemExit` and other exceptions
that no `except Exception` sees are among them: they would otherwise choose our exit code. A real Ctrl-C stays one.

How does a reference of the user's own, "pkg.module:name" or "path/file.py:name", become an object?

The keys of a pipeline that are imported so: `model.factory`, `task.own`, `task.postprocess`, `task.loss`, `own` of a
data source, and `criterion.torch_pruning`. Nothing else in a pipeline file but `plugins` is ever imported.
"""

import dis
import errno
import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from compress.catalog import closest
from compress.errors import CompressError, ModelError, StageError, is_out_of_memory

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


def import_callable(reference: str, what: str = "Factory") -> Callable[..., Any]:
    """Return what a reference names.

    Args:
        reference: "pkg.module:name" or "path/file.py:name".
        what: It is, for messages.

    Raises:
        ModelError: The file or module does not exist or does not import, or has no callable of that name.
    """
    place, _, name = reference.rpartition(":")
    module = _import_file(Path(place), what) if place.endswith(".py") else _import_module(place, what)
    found = getattr(module, name, None)
    if not callable(found):
        choices = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"'{place}' must have a callable '{name}', it has none.", hint=closest(name, choices))
    return found  # type: ignore[no-any-return]


def short_reference(reference: str) -> str:
    """Return a reference less the folder of its file.

    >>> short_reference("/data/nets/mine.py:MyImportance")
    'mine.py:MyImportance'
    """
    place, _, name = reference.rpartition(":")
    return f"{Path(place).name}:{name}"


@contextmanager
def beside(reference: str) -> Iterator[None]:
    """Let what a reference names import its neighbours, while it lasts: from its file's folder, or the current one."""
    place = reference.rpartition(":")[0]
    with on_path(Path(place).resolve().parent if place.endswith(".py") else Path.cwd()):
        yield


@contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """Let imports look into a folder first, while it lasts."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _import_file(path: Path, what: str) -> Any:
    if not path.is_file():
        raise ModelError(f"{what} file '{path}' does not exist.")
    name = f"compress_factory_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{what} file '{path}' must be a Python file.")
    module = importlib.util.module_from_spec(spec)
    with on_path(path.resolve().parent):
        sys.modules[name] = module  # dataclasses and typing look a class's module up by name
        try:
            with shown_as(ModelError, f"{what} file '{path}' must import"):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


def _import_module(name: str, what: str) -> Any:
    with shown_as(ModelError, f"{what} module '{name}' must import"), on_path(Path.cwd()):
        return importlib.import_module(name)
