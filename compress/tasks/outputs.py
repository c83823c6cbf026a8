"""Outputs of a network in one form, for tensors and arrays, one output and several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from compress.errors import ModelError, NonFinite


def named(returned: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return the outputs of a network by their names.

    Args:
        returned: A tensor or array, or a tuple, list, mapping or dataclass of tensors; other values in a mapping or
            dataclass (None, numbers) are omitted.
        names: Names of the outputs if `returned` has no names; `output_0` and so on by default.

    Raises:
        ModelError: `returned` has no tensor, or a tuple has another value.

    >>> list(named({"mask": np.zeros(1), "loss": None})), list(named((np.zeros(1), np.zeros(2))))
    (['mask'], ['output_0', 'output_1'])
    """
    if hasattr(returned, "shape"):
        return {names[0] if names else "output_0": returned}
    if is_dataclass(returned) and not isinstance(returned, type):
        returned = {one.name: getattr(returned, one.name) for one in fields(returned)}
    if isinstance(returned, Mapping):
        found = {str(name): value for name, value in returned.items() if hasattr(value, "shape")}
    elif isinstance(returned, tuple | list) and all(hasattr(value, "shape") for value in returned):
        given = names if len(names) == len(returned) else [f"output_{place}" for place in range(len(returned))]
        found = dict(zip(given, returned, strict=True))
    else:
        found = {}
    if not found:
        raise ModelError(f"A network must return tensors, it returns {type(returned).__name__}.")
    return found


def plain(returned: Any, names: Sequence[str] = ()) -> Any:
    """Return a single output of a network directly, or several outputs by name.

    Raises:
        ModelError: As in `named`.
    """
    found = named(returned, names)
    return next(iter(found.values())) if len(found) == 1 else found


def each(outputs: Any) -> list[Any]:
    """Return the list of outputs, for one output or several."""
    return list(outputs.values()) if isinstance(outputs, Mapping) else [outputs]


def first(outputs: Any) -> Any:
    """Return the first output, which loss and metrics use in networks with several (such as an auxiliary head)."""
    return each(outputs)[0]


def changed(outputs: Any, change: Any) -> Any:
    """Return outputs of the same form after applying a function to each."""
    if isinstance(outputs, Mapping):
        return {name: change(value) for name, value in outputs.items()}
    return change(outputs)


def picked(values: Any, places: Any) -> Any:
    """Return some entries of outputs or targets along the first axis, or of a list.

    >>> picked(["a", "b", "c"], slice(1, 3)), picked({"x": np.arange(3)}, slice(1, 2))
    (['b', 'c'], {'x': array([1])})
    """
    return changed(values, lambda one: one[places])


def singles(outputs: Any) -> list[slice]:
    """Return for each image of a batch the slice that selects it as a batch of one.

    >>> singles({"x": np.zeros((2, 5))})
    [slice(0, 1, None), slice(1, 2, None)]
    """
    return [slice(place, place + 1) for place in range(len(first(outputs)))]


def check_finite(outputs: Any) -> None:
    """Raise NonFinite if an output array has NaN or infinity."""
    for value in each(outputs):
        if not np.isfinite(value).all():
            raise NonFinite(f"Outputs of the network must be finite, got NaN or infinity in a batch of {len(value)}.")


def arrays(outputs: Any) -> Any:
    """Return tensors on any device as arrays, in the same form."""
    return changed(outputs, lambda one: one.detach().cpu().numpy())
