"""How is the user's own code called so that it gives a network? Only what `model.factory` names is ever imported."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.artifacts import FactorySpec
from compress.errors import ModelError
from compress.networks.weights import some
from compress.registry import closest

Factory = Callable[..., Any]


def call_factory(make: Factory, spec: FactorySpec) -> nn.Module:
    """Call `make` with the keyword arguments of `spec` and return its network in eval mode.

    Raises:
        ModelError: It raises, or returns something that cannot be worked with; says what to give instead.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            module = make(**spec.kwargs)
        except (Exception, SystemExit) as error:  # the user's code: its error is shown, ours is around it
            raise ModelError(
                f"Factory '{spec.reference}' must build the network with {_call_text(make, spec.kwargs)}, "
                f"got {type(error).__name__}: {error}"
            ) from error
    if isinstance(module, nn.DataParallel):
        module = module.module
    _check_kind(module, spec.reference)
    return module.eval().cpu()  # type: ignore[no-any-return]


def import_factory(reference: str) -> Factory:
    """Return what "pkg.module:callable" or "file.py:callable" names.

    Raises:
        ModelError: It cannot be imported, or there is no such callable.
    """
    place, _, name = reference.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        choices = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"'{place}' must have a callable '{name}', it has none.", hint=closest(name, choices))
    return factory  # type: ignore[no-any-return]


@contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """Let Python look for modules in a folder first."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _check_kind(module: Any, reference: str) -> None:
    if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise ModelError(
            f"Factory '{reference}' must return a network of Python code, got a scripted one "
            f"({type(module).__name__}).",
            hint="Let it return the module before torch.jit.script or trace. The scripted file can be the weights.",
        )
    if isinstance(module, torch.export.ExportedProgram):
        raise ModelError(
            f"Factory '{reference}' must return a torch.nn.Module, got an exported program.",
            hint="Let it return the module before torch.export. The .pt2 file can be given as weights.",
        )
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise ModelError(f"Factory '{reference}' must return a network, got the class {module.__name__} itself.")
    if not isinstance(module, nn.Module):
        raise ModelError(f"Factory '{reference}' must return a torch.nn.Module, got {type(module).__name__}.")
    if rounded := [
        f"{name or 'the network itself'} ({type(part).__name__})"
        for name, part in module.named_modules()
        if _is_rounded(part)
    ]:
        raise ModelError(
            f"Factory '{reference}' must return a network in float32, got a quantised one: {some(rounded)}.",
            hint="Give the float network; a `quantize` stage after export rounds the file to INT8.",
        )
    if lazy := [name for name, value in module.named_parameters() if isinstance(value, nn.UninitializedParameter)]:
        raise ModelError(
            f"Factory '{reference}' must return a network whose parameters have shapes, these have none: {some(lazy)}.",
            hint="Let it run the network once, or replace lazy layers.",
        )
    if empty := [name for name, value in module.state_dict().items() if getattr(value, "is_meta", False)]:
        raise ModelError(
            f"Factory '{reference}' must return a network whose tensors hold values, these are on the meta device: "
            f"{some(empty)}.",
            hint="Let it build the network on the CPU.",
        )


def _is_rounded(part: nn.Module) -> bool:
    place = type(part).__module__
    packed = place.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized"))
    return packed or any(value.is_quantized for value in part.buffers(recurse=False))


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"Factory file '{path}' does not exist.")
    name = f"compress_factory_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"Factory file '{path}' must be a Python file.")
    module = importlib.util.module_from_spec(spec)
    with on_path(path.resolve().parent):
        sys.modules[name] = module  # dataclasses and typing look a class's module up by name
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # the user's code: its error is shown, ours is around it
            del sys.modules[name]
            raise ModelError(f"Factory file '{path}' must import, got {type(error).__name__}: {error}") from error
    return module


def _import_module(name: str) -> Any:
    try:
        with on_path(Path.cwd()):
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the user's code: its error is shown, ours is around it
        raise ModelError(f"Factory module '{name}' must import, got {type(error).__name__}: {error}") from error


def _call_text(make: Factory, kwargs: Mapping[str, Any]) -> str:
    given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no arguments"
    try:
        return f"{given} (it takes {inspect.signature(make)})"
    except (TypeError, ValueError):
        return given
