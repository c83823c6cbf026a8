"""From a trained CNN to a smaller, faster ONNX model you can trust.

    compress.inspect(model, example)                     prunable channel groups, least MACs
    compress.sensitivity(model, example, data=...)       loss over the width of each group
    compress.prune(model, example, macs=0.5, data=...)   fewer channels and blocks within a budget
    compress.low_rank(model, ...)                        factorised kernels
    compress.finetune(model, data=..., epochs=3)         training; or a loop of your own
    compress.export(model, "m.onnx")                     ONNX file, compared with torch
    compress.verify("m.onnx", baseline=..., data=...)    verdict on the file itself
    compress.run("pipeline.yaml")                        all of it, cached, with a report
    compress.save(model, folder), compress.load(folder)  recipe and weights, no pickle
    compress.Task                                        base of a task of your own (docs/tasks.md)
    compress.CompressError                               base of all errors raised on purpose
    compress.__version__

Importing this package imports neither torch nor anything else that is heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import CompressError

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

    from torch import nn

    from compress.api.operations import export, finetune, inspect, low_rank, prune, save, sensitivity
    from compress.api.verification import Run, run, verify
    from compress.tasks.base import Task

__all__ = [
    "CompressError",
    "Run",
    "Task",
    "__version__",
    "export",
    "finetune",
    "inspect",
    "load",
    "low_rank",
    "prune",
    "run",
    "save",
    "sensitivity",
    "verify",
]

_PLACES = {
    **dict.fromkeys(
        ("export", "finetune", "inspect", "low_rank", "prune", "save", "sensitivity"), "compress.api.operations"
    ),
    **dict.fromkeys(("Run", "run", "verify"), "compress.api.verification"),
    "Task": "compress.tasks.base",
    "load_bundle": "compress.api.operations",  # part of `load`
}


def load(
    folder: str | PathLike[str],
    factory: str | Callable[..., nn.Module] | None = None,
    *,
    own_class: bool = False,
) -> nn.Module:
    """Rebuild a slim network: factory, recipe, weights; strict, bit-identical outputs.

    Args:
        folder: A run folder (`runs/<name>`), the folder of a slim checkpoint or of `save`, or a bundle (.zip), whose
            ONNX file is imported.
        factory: Builds the baseline, where the one named by the run is not to be used: a callable, which
            gets the keyword arguments of the run, or "pkg.module:callable" or "path/to/file.py:callable".
        own_class: True returns an instance of the factory's own class with all of its outputs, for trainers of other
            libraries; False only the outputs that the run keeps.

    Returns:
        The network in eval mode on the CPU.

    Raises:
        ArtifactError: The folder holds no slim checkpoint, or a file in it is corrupt.
        ModelError: The factory cannot be called.
        RebuildMismatch: The factory builds another network than the one that was compressed.
    """
    from pathlib import Path

    path = Path(folder)
    if path.suffix == ".zip":
        network: nn.Module = __getattr__("load_bundle")(path)
        return network
    from compress.checkpoint.layout import load_slim  # imports torch, which takes seconds

    return load_slim(path, factory, own_class)


def __getattr__(name: str) -> Any:
    """Look the version up, or import a function, when it is asked for; both take a moment."""
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)
    if name != "__version__":
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("compress")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
