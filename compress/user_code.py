"""Import of code that users bring, and translation of its errors.

User code is everything a pipeline file refers to: factories, data sets, tasks, losses, postprocess functions,
importance classes and plug-ins. A reference is "pkg.module:name" or "path/to/file.py:name". The settings that hold one
are `model.factory`, `task.own`, `task.postprocess`, `task.loss`, `own` of a data source, and `criterion.torch_pruning`.
Nothing else in a pipeline file is imported, except `plugins`.

Any exception of user code becomes a `CompressError` that names its file and line, `SystemExit` included: it would
otherwise choose the exit code of this program. Only a real Ctrl-C passes.
"""

import dis
import errno
import hashlib
import importlib
import importlib.util
import re
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

# Old and new names of modules that user code may import, below `compress`; a name stands for all names below it, too.
_MOVED_NAMES = """
adapter                         model.adapter
artifacts                       model.artifacts
attributes                      model.tensors
building                        checkpoint.rebuild
config.digest                   storage.digest
config.records                  storage.digest
config.schema                   config.schema.pipeline
cost.latency                    cost.latency_table
cost.onnx_file                  onnx_file.io
cost.onnx_graph                 onnx_file.counting
cost.onnx_products              onnx_file.node_macs
cost.onnx_shapes                onnx_file.counting
cost.products                   cost.macs
cost.sharing                    model.tensors
data.annotated                  data.sources.annotated
data.boxes                      data.sources.boxes
data.opening                    data.from_config
data.own                        data.sources.user
data.pictures                   data.sources.image_files
data.sources                    data.sources.classification
data.strides                    data.packing
data.variation                  data.augmentation
exporting.calibration           quantization.calibration
exporting.precision             exporting.rewrite
exporting.quantize              quantization.onnx_int8
files                           storage.files
handoff                         bundle
handoff.bundle                  bundle.write
importing                       onnx_import
importing.evaluation            onnx_import.values
importing.reading               onnx_import.preconditions
keys                            engine.keys
locking                         storage.lock
networks.archives               networks.torch_archives
networks.narrow                 networks.narrow_weights
networks.observe                networks.wiring
networks.prepare                networks.normalize
networks.unread                 networks.unused_modules
networks.weight_types           networks.weights
outputs                         storage.files
packages                        catalog
persist                         checkpoint.layout
pruning.costs                   pruning.width_costs
pruning.criteria.bn_scale       pruning.criteria.magnitude
pruning.criteria.contributions  pruning.criteria.pfp
pruning.criteria.grasp          pruning.criteria.gradient_flow
pruning.criteria.random         pruning.criteria.magnitude
pruning.criteria.readers        pruning.criteria.reconstruction
pruning.criteria.snip           pruning.criteria.gradient_flow
pruning.cutting                 pruning.surgery
pruning.damage                  pruning.ranking.sensitivity
pruning.elimination             pruning.ranking.elimination
pruning.forward_selection       pruning.ranking.forward_selection
pruning.labels                  pruning.tracing.record
pruning.lockstep                pruning.repair.lockstep
pruning.numbers_left            pruning.surgery
pruning.regression              pruning.repair.least_squares
pruning.repair                  pruning.repair.repairs
pruning.selection               pruning.ranking.selection
pruning.sensitivity             pruning.ranking.sensitivity
recipe                          model.recipe
references                      user_code
registry                        catalog
report.html                     report.page
runner                          engine.runner
stages.context                  search.context
stages.exporting                search.export
stages.learned                  search.learned
stages.repairing                search.repairs
stages.scoring                  search.scoring
stages.teaching                 search.context
store                           storage.store
sweep                           engine.sweep
tasks.opening                   tasks.from_config
tasks.paired                    tasks.base
training.averaging              training.weight_averaging
training.fit                    training.loop
training.unfolding              training.batch_norm_unfolding
verification.calibration        verification.statistics
verification.compare            verification.parity
verification.jackknife          verification.statistics
verification.measuring          verification.measurement
"""
_MOVED = dict(line.split() for line in _MOVED_NAMES.strip().splitlines())


@contextmanager
def raise_as(kind: type[CompressError], what: str, hint: str | None = None) -> Iterator[None]:
    """Translate the exceptions of user code that runs within this context; it must not contain a `yield`.

    Args:
        kind: Class of the error that is raised instead.
        what: Beginning of its message, such as "Factory 'net.py:Net' must build the network".
        hint: Remedy, unless the user code imports a module of this package by an old name.

    Raises:
        kind: The code raised anything but a `CompressError`, a real Ctrl-C, or a want of memory.
    """
    try:
        yield
    except CompressError:
        raise
    except BaseException as error:
        if is_interrupt(error) or is_out_of_memory(error):
            raise
        raise kind(f"{what}, got {describe_error(error)}", hint=moved_module_hint(error) or hint) from error


def describe_error(error: BaseException) -> str:
    """Return class, message and position of an exception, such as "ValueError: no such depth (net.py:12)"."""
    text = str(error).strip()
    place = user_place(error)
    name = type(error).__name__
    return f"{name}{f': {text}' if text else ''}{f' ({place})' if place else ''}"


def moved_module_hint(error: BaseException) -> str | None:
    """Return the hint with the new name of a module of this package that code imports by an old one.

    Returns:
        None if the exception is no failed import, or not of a moved module.
    """
    if not isinstance(error, ImportError):
        return None
    missing = re.match(r"cannot import name '(\w+)'", str(error))
    names = [f"{error.name}.{missing.group(1)}"] if missing else []
    for name in (*names, error.name or ""):
        package, _, old = name.partition(".")
        if package == "compress" and (new := _new_name(old)) is not None:
            return f"compress.{old} is now compress.{new}."
    return None


def _new_name(old: str) -> str | None:
    head, rest = old, ""
    while head:
        is_package_now = bool(rest) and f"compress.{head}" in sys.modules
        if head in _MOVED and not is_package_now:
            return _MOVED[head] + rest
        head, _, last = head.rpartition(".")
        rest = f".{last}{rest}"
    return None


def user_place(error: BaseException) -> str | None:
    """Return "file:line" of the innermost frame in user code; None for an exception without one."""
    frame = user_frame(error)
    return None if frame is None else f"{Path(frame.filename).name}:{frame.lineno}"


def user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Return the innermost frame that is neither in this package nor in a library; None if no frame is."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame for frame in reversed(frames) if not _is_library(frame.filename)), None)


def is_from_user_code(error: BaseException) -> bool:
    """Return whether user code, or a library that it called, raised an exception, and not this package."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(_OURS):
            return False
        if not _is_library(frame.filename):
            return True
    return False


def as_stage_error(error: BaseException) -> CompressError | None:
    """Return the error to report for an exception of user code; None if user code did not raise it.

    Exceptions that end a process, such as `SystemExit`, count as the user's if any user code was running. Want of
    memory, full and read-only disks and packages that are not installed are reported elsewhere.
    """
    if isinstance(error, SystemExit) and user_frame(error) is None:  # a parser of arguments of this package
        return None
    if isinstance(error, CompressError) or is_interrupt(error) or is_out_of_memory(error):
        return None
    if isinstance(error, OSError) and error.errno in _MACHINE:
        return None
    if isinstance(error, Exception) and not is_from_user_code(error):
        return None
    moved = moved_module_hint(error)
    if isinstance(error, ModuleNotFoundError) and moved is None:
        return None
    return StageError(
        f"Code outside of compress must not fail while a stage runs, got {describe_error(error)}.",
        hint=moved or "Run that code alone, with the same input; nothing of it was changed.",
    )


def is_interrupt(error: BaseException) -> bool:
    """Return whether an exception is a real Ctrl-C, and not a `KeyboardInterrupt` that user code raises."""
    return type(error) is KeyboardInterrupt and not _is_raised(error.__traceback__)


def _is_raised(trace: TracebackType | None) -> bool:
    """Return whether the innermost frame is at a `raise` outside of compress; a signal arrives anywhere else."""
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
    """Import the callable that a reference names.

    Args:
        reference: "pkg.module:name" or "path/to/file.py:name".
        what: Noun for the callable in messages.

    Raises:
        ModelError: The file or module does not exist, fails to import, or has no callable of that name.
    """
    place, _, name = reference.rpartition(":")
    module = _import_file(Path(place), what) if place.endswith(".py") else _import_module(place, what)
    found = getattr(module, name, None)
    if not callable(found):
        choices = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"'{place}' must have a callable '{name}', it has none.", hint=closest(name, choices))
    return found  # type: ignore[no-any-return]


def short_reference(reference: str) -> str:
    """Return a reference without the folder of its file.

    >>> short_reference("/data/nets/mine.py:MyImportance")
    'mine.py:MyImportance'
    """
    place, _, name = reference.rpartition(":")
    return f"{Path(place).name}:{name}"


@contextmanager
def import_path_of(reference: str) -> Iterator[None]:
    """Put a reference's folder first on the import path: the folder of its file, or the current one for a module."""
    place = reference.rpartition(":")[0]
    with on_import_path(Path(place).resolve().parent if place.endswith(".py") else Path.cwd()):
        yield


@contextmanager
def on_import_path(folder: Path) -> Iterator[None]:
    """Put a folder first on the import path."""
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
    with on_import_path(path.resolve().parent):
        sys.modules[name] = module  # dataclasses and typing find the module of a class by name
        try:
            with raise_as(ModelError, f"{what} file '{path}' must import"):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


def _import_module(name: str, what: str) -> Any:
    with raise_as(ModelError, f"{what} module '{name}' must import"), on_import_path(Path.cwd()):
        return importlib.import_module(name)
