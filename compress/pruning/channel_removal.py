"""How are channels taken out of a network? A copy loses them from every parameter, buffer and number that has them.

Besides parameters, a cut changes the numbers of channels that layers carry (`out_channels`, `num_features`, ...) and,
in other modules, whole numbers that equal a count of channels that their own code splits, reshapes or holds, in lists,
mappings and dataclasses too (`numbers_left.py`): such a number is a guess, which the trial of the cut confirms or
refutes.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from compress.cost.macs import CONVOLUTIONS, TRANSPOSED
from compress.model.tensors import held_tensors, own_attributes
from compress.pruning.folded_constants import Sizes, corrected
from compress.pruning.graph import ChannelGraph
from compress.pruning.groups import BATCH_NORMS, INSTANCE_NORMS, LAYERS
from compress.pruning.shortcuts import FixedShortcut

_CONVOLUTIONS = (*CONVOLUTIONS, *TRANSPOSED)


def cut_copy(module: nn.Module, removed: Mapping[str, Sequence[int]], example: Tensor) -> nn.Module:
    """Return a copy of `module` without the channels given; training and requires_grad flags are kept.

    Args:
        module: The network; left as it is.
        removed: Group name -> indices of the channels that go.
        example: One input, (1, ...).

    Raises:
        UntraceableModel: The network does not run.
        UnsupportedLayer: A group or index does not exist.
    """
    return cut_out(module, ChannelGraph(module, example), removed)


def cut_out(module: nn.Module, graph: ChannelGraph, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `module` without the channels given; training and requires_grad flags are kept.

    Args:
        module: The network; left as it is.
        graph: Of `module`.
        removed: Group name -> indices of the channels that go.

    Raises:
        UnsupportedLayer: A group or index does not exist.
    """
    gone = graph.gone(removed)
    slim = {key: _without(tensor, kept) for key, (tensor, kept) in _kept_indices(graph, gone).items()}
    known: dict[int, object] = dict(slim)  # what is slim already is not copied first
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
        graph: Of the network before the cut.
        removed: Group name -> indices of the channels that go.

    Raises:
        UnsupportedLayer: A group or index does not exist.
    """
    return list(_kept_indices(graph, graph.gone(removed)).values())


def _kept_indices(graph: ChannelGraph, gone: np.ndarray) -> dict[int, tuple[Tensor, dict[int, Tensor]]]:
    """Return by identity each tensor that becomes smaller, and the ascending kept indices of its dimensions."""
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
    """Return for each group norm the groups and the channels that it is left with."""
    found = {}
    for path, labels in graph.trace.norm_groups:
        part = module.get_submodule(path)
        if isinstance(part, nn.GroupNorm):
            left = int((~gone[labels.numpy()]).sum())
            found[path] = part.num_groups * left // len(labels), left
    return found


def _sizes_left(graph: ChannelGraph, gone: np.ndarray) -> dict[str, Sizes]:
    """Return for each module the counts of channels its code may have written down and what becomes of them."""
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
    """Let the numbers that a module carries follow its parameters."""
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
    """Let the number of inputs follow the weight that reads them; the hidden state is never cut."""
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
