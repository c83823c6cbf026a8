"""Labels of the values of a forward pass, and of the network's parameters."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from compress.model.tensors import attribute_names, held_tensors
from compress.pruning.tracing.facts import Facts, where
from compress.pruning.tracing.record import Axis, along, unlabelled, vector


class ValueLabels:
    """Channel labels of each value; a parameter gets its labels at its first use.

    Args:
        module: The network whose forward pass is watched.
        facts: Recorder of the parameters' axes, and of positions that belong together.
    """

    def __init__(self, module: nn.Module, facts: Facts) -> None:
        self._facts = facts
        self._known = {id(value): value for part in module.modules() for value in held_tensors(part).values()}
        self._attributes = attribute_names(module)
        self._axes: dict[tuple[int, str, int], Axis] = {}
        self._labels: Any = WeakIdKeyDictionary()
        self._transposed: Any = WeakIdKeyDictionary()

    def of(self, value: Tensor) -> Tensor:
        """Return a value's labels; a parameter that is longer than 1 along one dimension only has labels of its own."""
        found: Tensor | None = self._labels.get(value)
        if found is not None:
            return found
        if id(value) in self._known and (dims := [d for d, size in enumerate(value.shape) if size > 1]):
            return self.of_scale(value, dims[0]) if len(dims) == 1 else unlabelled(value.ndim)
        return unlabelled(value.ndim)

    def of_scale(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the labels of a parameter that is multiplied with, or added to, channels along `dim`."""
        return along(dim, tensor.ndim, self.axis(tensor, "scale", dim, tensor.shape[dim]).labels)

    def of_vector(self, tensor: Tensor) -> Tensor | None:
        """Return (C,) the labels of a vector with one value for each channel, such as a bias; else None."""
        if id(tensor) in self._known and tensor.ndim == 1:
            return self.axis(tensor, "scale", 0, tensor.shape[0]).labels
        return vector(self.of(tensor), 0, tensor.shape[0]) if tensor.ndim == 1 else None

    def give(self, value: Any, labels: Tensor) -> None:
        """Set the labels of a result."""
        if isinstance(value, Tensor):
            self._labels[value] = labels

    def is_known(self, value: Any) -> bool:
        """Return whether a value is a parameter, a buffer or a plain tensor of the network."""
        return isinstance(value, Tensor) and id(value) in self._known

    def is_followed(self, value: Tensor) -> bool:
        """Return whether a value is the result of a watched operation."""
        return value in self._labels

    def name_of(self, value: Tensor) -> str:
        """Return the name, for messages, of a value without channels: its attribute's path if it has one."""
        place = self._attributes.get(id(value))
        return f"attribute '{place}'" if place else "values that follow no channel"

    def note_transposed(self, value: Tensor, weight: Tensor) -> None:
        """Note that a value is a parameter, transposed."""
        self._transposed[value] = weight

    def untransposed(self, value: Tensor) -> Tensor:
        """Return the parameter whose transpose a value is, else the value itself."""
        found: Tensor = self._transposed.get(value, value)
        return found

    def weight_behind(self, value: Tensor) -> tuple[Tensor, int, int] | None:
        """Return the parameter on a matrix product's right side, with its output and input dimensions; else None."""
        if value in self._transposed:
            return self._transposed[value], 0, 1
        return (value, 1, 0) if self.is_known(value) else None

    def axis(self, tensor: Tensor, role: str, dim: int, size: int, parts: int = 1) -> Axis:
        """Return an axis of a parameter, the same at each use.

        Args:
            tensor: The parameter.
            role: "out", "in" or "scale".
            dim: Dimension of the tensor.
            size: Number of positions.
            parts: Number of equal ranges that lose the same positions.
        """
        trace, key = self._facts.trace, (id(tensor), role, dim)
        if key not in self._axes:
            self._axes[key] = axis = Axis(tensor, role, dim, size, trace.size)
            trace.axes.append(axis)
            if parts > 1:
                self._facts.tie(axis.labels, axis.start + torch.arange(size) % (size // parts))
            for (of, _, along_dim), other in list(self._axes.items()):
                if (of, along_dim) == (id(tensor), dim) and other is not axis:
                    _share(self._facts, axis, other)
        found = self._axes[key]
        if found.size != size:
            _freeze_axis(self._facts, found)
        return found


def _share(facts: Facts, one: Axis, other: Axis) -> None:
    """Record that a dimension of a parameter is used in two ways: match equal sizes, freeze unequal ones."""
    if one.size == other.size:
        facts.match(one.labels, other.labels)
        return
    for axis in (one, other):
        _freeze_axis(facts, axis)


def _freeze_axis(facts: Facts, axis: Axis) -> None:
    facts.freeze(axis.labels, f"a parameter of it is used in two different ways in {where(facts.place)}")
