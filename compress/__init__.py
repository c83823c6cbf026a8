"""From a trained CNN to a smaller, faster ONNX model you can trust.

    compress.load("runs/quickstart")     the slim torch network of a finished run
    compress.Task                        base of a task of your own (docs/tasks.md)
    compress.__version__

Importing this package imports neither torch nor anything else that is heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

    from torch import nn

    from compress.tasks.base import Task

__all__ = ["Task", "__version__", "load"]


def load(folder: str | PathLike[str], factory: str | Callable[..., nn.Module] | None = None) -> nn.Module:
    """Rebuild the slim network of a run: factory, recipe, weights; strict, bit-identical outputs.

    Args:
        folder: A run folder (`runs/<name>`), or the folder of its slim checkpoint.
        factory: Builds the baseline, where the one named by the run is not to be used: a callable, which
            gets the keyword arguments of the run, or "pkg.module:callable" or "path/to/file.py:callable".

    Returns:
        The network in eval mode on the CPU.

    Raises:
        ArtifactError: The folder holds no slim checkpoint, or a file in it is corrupt.
        ModelError: The factory cannot be called.
        RebuildMismatch: The factory builds another network than the one that was compressed.
    """
    from pathlib import Path

    from compress.checkpoint.layout import load_slim  # imports torch, which takes seconds

    return load_slim(Path(folder), factory)


def __getattr__(name: str) -> Any:
    """Look the version up, or import `Task`, when it is asked for; both take a moment."""
    if name == "Task":
        from compress.tasks.base import Task

        return Task
    if name != "__version__":
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("compress")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
