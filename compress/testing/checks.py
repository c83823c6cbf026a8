"""Checks and changes of networks that several contract suites share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from compress.pruning.groups import ChannelGroup, Member


def flags_and_hooks(module: nn.Module) -> list[object]:
    """Return training flags, numbers of hooks, and for each parameter whether it needs and has a gradient."""
    parts = [(part.training, len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()]
    return [parts, [(parameter.requires_grad, parameter.grad is None) for parameter in module.parameters()]]


def over_parts(group: ChannelGroup, units: Tensor) -> Tensor:
    """Return the channel index that rearranges the units of all parts in the same way."""
    starts = torch.arange(group.parts) * (group.width // group.parts)
    return (starts[:, None] + units[None, :]).flatten()


@torch.no_grad()
def rearranged(module: nn.Module, group: ChannelGroup, index: Tensor) -> nn.Module:
    """Return a copy of `module` whose channel c of the group is channel index[c] of `module`, in every layer."""
    changed = copy.deepcopy(module)
    done: set[tuple[str, str]] = set()
    for member in group.members:
        layer = changed.get_submodule(member.layer)
        depthwise = getattr(layer, "groups", 1) > 1 and layer.weight.shape[1] == 1  # type: ignore[index,union-attr]
        if (member.layer, "out" if depthwise else member.axis) in done:
            continue
        done.add((member.layer, "out" if depthwise else member.axis))
        on_outputs = depthwise or member.axis == "out"
        for name, values in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if values.ndim == 0 or (not on_outputs and name != "weight"):
                continue
            dim = int(on_outputs == bool(getattr(layer, "transposed", False))) if values.ndim > 1 else 0
            values.copy_(values.index_select(dim, _source(member, index, values.shape[dim])))
    return changed


def _source(member: Member, index: Tensor, size: int) -> Tensor:
    """Return for each of `size` slots of the member's axis the slot that its values come from."""
    source = torch.arange(max(size, int(member.slots.max()) + 1))
    for channel, origin in enumerate(index.tolist()):
        source[member.slots[member.channels == channel]] = member.slots[member.channels == origin]
    return source[:size]  # a grouped convolution stores the inputs of one part only


def hold(condition: bool, got: str) -> None:
    """Raise AssertionError if a condition of a contract does not hold."""
    if not condition:
        raise AssertionError(f"The contract is broken: {got}.")
