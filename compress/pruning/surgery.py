"""Structural edits: removal of channels and of residual blocks from a copy of a network.

A cut removes channels from every parameter and buffer, and corrects the numbers of channels that layers carry
(`out_channels`, `num_features`, ...). In other modules it corrects whole numbers, also in lists, mappings and
dataclasses, that equal a count of channels in their own code:

    sizes    (32,) -> (20,)               one number, or several in a row, such as the sizes of a split
    shapes   (128, 4, 4) -> (80, 4, 4)    sizes of a value, or some of them in a row; -1 stands for any of them

Such a correction is a guess, which the trial of the cut confirms or refutes (`trial.py`).
"""

import argparse
import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.cost.macs import CONVOLUTIONS, TRANSPOSED
from compress.errors import UnsupportedLayer
from compress.model.recipe import MergeBlock, RemoveBlock, RemoveChannels
from compress.model.tensors import held_tensors, own_attributes
from compress.pruning.graph import ChannelGraph
from compress.pruning.groups import BATCH_NORMS, INSTANCE_NORMS, LAYERS
from compress.pruning.shortcuts import FixedShortcut

_DEEPEST = 6  # containers within containers


class Sizes:
    """Counts of channels that the code of one module may contain, and their values after a cut.

    A count with two different values after the cut is left unchanged.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        self._shapes: dict[tuple[int, ...], set[tuple[int, ...]]] = {}

    def add(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Add a count, or several in a row, with the values after the cut."""
        self._after.setdefault(before, set()).add(after)

    def add_shape(self, shape: tuple[int, ...], dim: int, left: int) -> None:
        """Add the sizes of a value; the size along `dim` becomes `left`."""
        for start in range(dim + 1):
            for end in range(dim + 1, len(shape) + 1):
                if end - start > 1:
                    after = (*shape[start:dim], left, *shape[dim + 1 : end])
                    self._shapes.setdefault(shape[start:end], set()).add(after)

    def with_counts(self, counts: Mapping[int, int]) -> "Sizes":
        """Return these sizes with other values for single counts."""
        both = Sizes()
        both._after = {**self._after, **{(before,): {(after,)} for before, after in counts.items()}}
        both._shapes = self._shapes
        return both

    def after(self, numbers: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return numbers in a row after the cut; None if they are not known."""
        found = self._after.get(numbers)
        if found is None:
            found = {
                tuple(-1 if given == -1 else size for given, size in zip(numbers, after, strict=True))
                for before, afters in self._shapes.items()
                if len(before) == len(numbers) and _is_shape(numbers, before)
                for after in afters
            }
        return next(iter(found)) if len(found) == 1 else None


def corrected(value: object, sizes: Sizes, depth: int = 0) -> object:
    """Return an attribute with its counts corrected for a cut, also inside containers; the same object if unchanged.

    Args:
        value: Any attribute.
        sizes: Counts of channels before and after the cut.
        depth: Number of containers around the attribute.
    """
    if type(value) is int:  # True and False are not
        after = sizes.after((value,))
        return value if after is None or after[0] == value else after[0]
    if isinstance(value, Tensor | nn.Module | str) or depth == _DEEPEST:
        return value
    if type(value) in (list, tuple) and value and all(type(one) is int for one in value):  # type: ignore[attr-defined]
        after = sizes.after(tuple(value))  # type: ignore[arg-type]
        return value if after is None or after == tuple(value) else type(value)(after)  # type: ignore[arg-type,call-arg]
    changed = {
        key: new for key, old in _entries(value) if (new := corrected(old, sizes, depth + 1)) is not old
    }  # fmt: skip
    return _with(value, changed) if changed else value


def _is_shape(numbers: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether numbers equal the sizes of a shape; at most one of them may be -1, for any size."""
    return numbers.count(-1) <= 1 and all(
        given in (-1, size) for given, size in zip(numbers, shape, strict=True)
    )  # fmt: skip


def _entries(value: object) -> Iterator[tuple[object, object]]:
    """Yield the entries of a container by key, index or name; nothing for other values."""
    if isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, dict):
        yield from value.items()
    elif _is_record(value):
        yield from vars(value).items()


def _is_record(value: object) -> bool:
    is_data = dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")
    return is_data or type(value) in (SimpleNamespace, argparse.Namespace)


def _with(value: Any, changed: Mapping[Any, Any]) -> Any:
    """Return a copy of a container with some of its entries changed."""
    if isinstance(value, tuple):
        entries = [changed.get(place, one) for place, one in enumerate(value)]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    copied = copy.copy(value)
    if isinstance(copied, list | dict):
        for key, one in changed.items():
            copied[key] = one
    else:
        vars(copied).update(changed)
    return copied


_CONVOLUTIONS = (*CONVOLUTIONS, *TRANSPOSED)


def cut_copy(module: nn.Module, removed: Mapping[str, Sequence[int]], example: Tensor) -> nn.Module:
    """Return a copy of `module` without the channels given; training and requires_grad flags are kept.

    Args:
        module: The network; left unchanged.
        removed: Group name -> indices of the removed channels.
        example: One input, (1, ...).

    Raises:
        UntraceableModel: The network does not run.
        UnsupportedLayer: A group or index does not exist.
    """
    return cut_out(module, ChannelGraph(module, example), removed)


def cut_out(module: nn.Module, graph: ChannelGraph, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `module` without the channels given; training and requires_grad flags are kept.

    Args:
        module: The network; left unchanged.
        graph: Channel graph of `module`.
        removed: Group name -> indices of the removed channels.

    Raises:
        UnsupportedLayer: A group or index does not exist.
    """
    gone = graph.gone(removed)
    slim = {key: _without(tensor, kept) for key, (tensor, kept) in _kept_indices(graph, gone).items()}
    known: dict[int, object] = dict(slim)  # slim tensors are not copied again
    copied = copy.deepcopy(module, known)  # type: ignore[arg-type]
    widths, sizes = _norm_groups_left(module, graph, gone), _sizes_left(graph, gone)
    for path, part in module.named_modules():
        tensors = held_tensors(part)
        changed = {name: (tensor, slim[id(tensor)]) for name, tensor in tensors.items() if id(tensor) in slim}
        _correct_numbers(copied.get_submodule(path), changed, sizes.get(path, Sizes()), widths.get(path))
    return copied


def kept_indices(graph: ChannelGraph, removed: Mapping[str, Sequence[int]]) -> list[tuple[Tensor, dict[int, Tensor]]]:
    """Return each parameter and buffer that a cut makes smaller, with the (n,) kept indices of its dimensions.

    Args:
        graph: Channel graph of the network before the cut.
        removed: Group name -> indices of the removed channels.

    Raises:
        UnsupportedLayer: A group or index does not exist.
    """
    return list(_kept_indices(graph, graph.gone(removed)).values())


def _kept_indices(graph: ChannelGraph, gone: np.ndarray) -> dict[int, tuple[Tensor, dict[int, Tensor]]]:
    """Return `id` -> each tensor that becomes smaller, with the ascending kept indices of its dimensions."""
    found: dict[int, tuple[Tensor, dict[int, set[int]]]] = {}
    for axis in graph.trace.axes:
        places = torch.from_numpy(np.flatnonzero(gone[axis.start : axis.start + axis.size]))
        if len(places):
            _, by_dim = found.setdefault(id(axis.tensor), (axis.tensor, {}))
            by_dim.setdefault(axis.dim, set()).update(axis.slots(places).tolist())
    return {
        key: (
            tensor,
            {
                dim: torch.tensor([index for index in range(tensor.shape[dim]) if index not in lost])
                for dim, lost in by_dim.items()
            },
        )
        for key, (tensor, by_dim) in found.items()
    }


def _without(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Return a parameter or buffer with the kept indices of some of its dimensions."""
    values = tensor.detach()
    for dim, indices in kept.items():
        values = values.index_select(dim, indices)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def _norm_groups_left(module: nn.Module, graph: ChannelGraph, gone: np.ndarray) -> dict[str, tuple[int, int]]:
    """Return for each group norm its numbers of groups and of channels after the cut."""
    found = {}
    for path, labels in graph.trace.norm_groups:
        part = module.get_submodule(path)
        if isinstance(part, nn.GroupNorm):
            left = int((~gone[labels.numpy()]).sum())
            found[path] = part.num_groups * left // len(labels), left
    return found


def _sizes_left(graph: ChannelGraph, gone: np.ndarray) -> dict[str, Sizes]:
    """Return module path -> counts of channels that its code may contain, before and after the cut."""
    found: dict[str, Sizes] = {}
    for sized in graph.trace.sized:
        before = tuple(len(labels) for labels in sized.labels)
        after = tuple(int((~gone[labels.numpy()]).sum()) for labels in sized.labels)
        found.setdefault(sized.module, Sizes()).add(before, after)
    for shaped in graph.trace.shaped:
        left = int((~gone[shaped.labels.numpy()]).sum())
        if shaped.shape[shaped.dim] == len(shaped.labels):
            found.setdefault(shaped.module, Sizes()).add_shape(shaped.shape, shaped.dim, left)
    return found


def _correct_numbers(
    part: nn.Module,
    changed: Mapping[str, tuple[Tensor, Tensor]],
    sizes: Sizes,
    norm: tuple[int, int] | None,
) -> None:
    """Set the numbers of channels that a module carries to the sizes of its parameters."""
    if norm is not None and isinstance(part, nn.GroupNorm):
        part.num_groups, part.num_channels = norm
    elif isinstance(part, LAYERS):
        _correct_layer(part, changed)
    elif isinstance(part, (nn.RNNBase, nn.RNNCellBase)):
        _correct_recurrent(part)
    else:
        own = sizes.with_counts(
            {
                before: after
                for old, new in changed.values()
                for before, after in zip(old.shape, new.shape, strict=True)
                if before != after
            }
        )
        for name, value in own_attributes(part).items():
            if (after := corrected(value, own)) is not value:
                setattr(part, name, after)


def _correct_recurrent(part: nn.RNNBase | nn.RNNCellBase) -> None:
    """Set the number of inputs to the size of the weight that reads them; the hidden state is never cut."""
    weight = part.weight_ih_l0 if isinstance(part, nn.RNNBase) else part.weight_ih
    assert isinstance(weight, Tensor)
    part.input_size = int(weight.shape[1])


def _correct_layer(part: nn.Module, changed: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    if not changed:
        return
    tensor = next(iter(changed.values()))[1]
    if isinstance(part, _CONVOLUTIONS):
        weight = part.weight
        is_each_alone = part.groups > 1 and part.groups == part.in_channels
        per_part = part.out_channels // part.groups
        out_dim = 1 if part.transposed else 0
        if is_each_alone:
            part.groups = weight.shape[0] if part.transposed else weight.shape[0] // per_part
        scaled = weight.shape[1] * part.groups
        part.in_channels, part.out_channels = (weight.shape[0], scaled) if out_dim else (scaled, weight.shape[0])
    elif isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
    elif isinstance(part, (*BATCH_NORMS, *INSTANCE_NORMS)):
        part.num_features = tensor.shape[0]
    elif isinstance(part, nn.PReLU):
        part.num_parameters = tensor.shape[0]
    elif isinstance(part, FixedShortcut):
        part.follow()
    elif isinstance(part, nn.LayerNorm):
        part.normalized_shape = tuple(part.weight.shape)


def remove_channels(module: nn.Module, edit: RemoveChannels, example: Tensor) -> nn.Module:
    """Return a copy of `module` without the channels that `edit` names.

    Args:
        module: The network before the edit.
        edit: Group names and channel indices.
        example: One input, (1, C, H, W).

    Raises:
        UntraceableModel: No graph could be built.
        UnsupportedLayer: A group or index does not exist.
    """
    return cut_copy(module, edit.removed, example)


def remove_block(module: nn.Module, edit: RemoveBlock) -> nn.Module:
    """Return a copy of `module` with the block replaced by the identity.

    Raises:
        UnsupportedLayer: There is no such block.
    """
    return _replaced(module, edit.block, nn.Identity(), "remove")


def merge_block(module: nn.Module, edit: MergeBlock) -> nn.Module:
    """Return a copy of `module` with the block replaced by one convolution, whose weights are 0.

    Raises:
        UnsupportedLayer: There is no such block.
    """
    layer = merged_layer(edit)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    parts = OrderedDict[str, nn.Module](merged=layer)
    if edit.activation == "relu":
        parts["activation"] = nn.ReLU()
    return _replaced(module, edit.block, nn.Sequential(parts), "merge")


def merged_layer(edit: MergeBlock) -> nn.Conv2d:
    """Return the convolution that replaces a block, with arbitrary weights."""
    return nn.Conv2d(edit.inputs, edit.outputs, edit.kernel, edit.stride, edit.kernel // 2)


def _replaced(module: nn.Module, block: str, by: nn.Module, aim: str) -> nn.Module:
    """Return a copy of a network with another module in the place of a block."""
    slim = copy.deepcopy(module)
    parent_name, _, name = block.rpartition(".")
    try:
        parent = slim.get_submodule(parent_name)
        parent.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedLayer(f"The network must have a block '{block}' to {aim}, it has none.") from error
    setattr(parent, name, by.train(parent.training))
    return slim
