"""How does a reference of the user's own, "pkg.module:name" or "path/file.py:name", become an object?

The keys of a pipeline that are imported so: `model.factory`, `task.own`, `task.postprocess`, `task.loss`, `own` of a
data source, and `criterion.torch_pruning`. Nothing else in a pipeline file but `plugins` is ever imported.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.registry import closest
from compress.user_code import shown_as


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
