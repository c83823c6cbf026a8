"""Channel groups: coupled channels that are removed together.

channel group   coupled channels; named by its first convolution or linear layer in definition order
root            this first layer; channels are counted in the order of its outputs
unit            channels that are only removed together; most are one channel
parts           channels in a unit: a grouped convolution, or one chunked into halves, loses the same position of
                every part; channel p * units + u belongs to unit u and part p
member          one layer of the group: the channels are on its "out" axis (producer, norm, depthwise) or "in" axis
                (reader)
gates           the layers at whose outputs multiplying a channel by 0 is the same as removing it
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from compress.cost.macs import COUNTED
from compress.errors import InternalError
from compress.pruning.shortcuts import FixedShortcut

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, *INSTANCE_NORMS)
_NUMBERS = re.compile(r"(?<![\w.'])[\d.]+(?:e[+-]?\d+)?(?!\w)")  # without numbers in the names of layers
LAYERS = (*COUNTED, *NORMS, nn.PReLU, FixedShortcut)


@dataclass(frozen=True, slots=True)
class Member:
    """One layer's share of a group.

    Attributes:
        layer: Module path.
        module: The layer.
        axis: "out" when the group's channels are the layer's outputs, "in" when they are its inputs.
        slots: (n,) int64, ascending positions on that axis.
        channels: (n,) int64, the channel of the group that each slot belongs to.
    """

    layer: str
    module: nn.Module
    axis: Literal["out", "in"]
    slots: Tensor
    channels: Tensor

    @property
    def is_producer(self) -> bool:
        """Return whether the layer computes the channels anew (a depthwise layer only passes them on)."""
        return self.axis == "out" and isinstance(self.module, COUNTED) and not is_depthwise(self.module)

    @property
    def is_norm(self) -> bool:
        """Return whether the layer normalises the channels."""
        return self.axis == "out" and isinstance(self.module, NORMS)


@dataclass(frozen=True, slots=True)
class Read:
    """A weight that reads a group's channels, in a layer or anywhere else.

    Attributes:
        path: Path of the module that holds the weight.
        name: Name of the weight in that module.
        dim: Dimension of the weight's inputs.
        slots: (n,) int64, indices along `dim`.
        channels: (n,) int64, the channel of the group that each slot reads.
    """

    path: str
    name: str
    dim: int
    slots: Tensor
    channels: Tensor


@dataclass(frozen=True, slots=True)
class Amount:
    """A part of a network's cost that depends on the numbers of channels on at most two axes.

    Attributes:
        unit: "macs", "params", or "weights" (the params that values are multiplied by).
        number: Index among the amounts of this unit in one network.
        layer: Path of the module whose code multiplies, or that holds the parameter.
        total: Cost with all channels.
        sizes: Sizes of the two axes with all channels; 1 for a missing axis.
    """

    unit: str
    number: int
    layer: str
    total: int
    sizes: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Share:
    """Share of a group in a part of the cost.

    Attributes:
        amount: Part of the cost.
        axis: Axis of the amount that the group's channels are on, 0 or 1.
        slots: Number of positions on that axis for each channel.
    """

    amount: Amount
    axis: int
    slots: float


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Group of channels that are coupled across layers.

    Attributes:
        name: Module path of the root.
        width: Number of channels, C.
        parts: Channels in each unit.
        members: Layers that compute, normalise, pass on or read the channels, in trace order.
        gates: For each producer, the member at which its channels are masked or scored: its batch norm, or itself.
        bare: Convolutions (also depthwise) and linear layers whose outputs no norm of the group follows.
        reads: Weights that read the channels.
        is_summed: Whether feature maps of these channels are added up, as along a residual stream.
        shares: Shares of the group in the network's MACs, params and weights.
    """

    name: str
    width: int
    parts: int
    members: tuple[Member, ...]
    gates: tuple[Member, ...]
    bare: tuple[Member, ...] = ()
    reads: tuple[Read, ...] = ()
    is_summed: bool = False
    shares: tuple[Share, ...] = ()

    @property
    def producers(self) -> tuple[Member, ...]:
        """The layers that compute the channels."""
        return tuple(member for member in self.members if member.is_producer)

    @property
    def norms(self) -> tuple[Member, ...]:
        """The layers that normalise the channels."""
        return tuple(member for member in self.members if member.is_norm)

    @property
    def readers(self) -> tuple[Member, ...]:
        """The convolution and linear layers that read the channels."""
        return tuple(m for m in self.members if m.axis == "in" and isinstance(m.module, COUNTED))

    @property
    def other_reads(self) -> tuple[Read, ...]:
        """The weights outside convolution and linear layers that read the channels."""
        layers = {reader.layer for reader in self.readers}
        return tuple(read for read in self.reads if read.path not in layers)

    def expand(self, units: Iterable[int]) -> tuple[int, ...]:
        """Return the channels of the given units."""
        stride = self.width // self.parts
        return tuple(sorted(unit + part * stride for unit in units for part in range(self.parts)))


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A channel group that is not prunable.

    Attributes:
        name: Name of the group.
        reason: Reason of the exclusion, in words.
        expected: Whether the exclusion follows from the network itself (its outputs) and needs no warning.
    """

    name: str
    reason: str
    expected: bool = False


def exclusions_by_cause(excluded: Iterable[Exclusion], shown: int = 3) -> list[str]:
    """Return one sentence for each reason why groups are not prunable, with the first few of their names.

    Reasons that differ in numbers alone, such as the distance of outputs, count as one; the first is shown.

    >>> exclusions_by_cause([Exclusion("a", "error 0.2"), Exclusion("b", "error 0.31")])
    ["2 channel groups are not prunable: error 0.2 ('a', 'b')."]
    """
    causes: dict[str, list[Exclusion]] = {}
    for exclusion in excluded:
        if not exclusion.expected:
            causes.setdefault(_NUMBERS.sub("#", exclusion.reason), []).append(exclusion)
    sentences = []
    for members in causes.values():
        first, names = members[0], [f"'{one.name}'" for one in members]
        if len(members) == 1:
            sentences.append(f"Channel group {names[0]} is not prunable: {first.reason}.")
            continue
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        listed = f"{', '.join(names[:shown])}{more}"
        sentences.append(f"{len(members)} channel groups are not prunable: {first.reason} ({listed}).")
    return sentences


def kept_outputs(removed: Mapping[str, Sequence[int]], groups: Mapping[str, ChannelGroup]) -> dict[str, Tensor]:
    """Return layer -> (n,) ascending indices of kept outputs, for each layer that loses outputs."""
    gone: dict[str, list[Tensor]] = {}
    sizes: dict[str, int] = {}
    for name, indices in removed.items():
        for member in groups[name].members:
            if member.axis != "out" or not isinstance(member.module, COUNTED):
                continue
            slots = member.slots[torch.isin(member.channels, torch.tensor(sorted(indices)))]
            gone.setdefault(member.layer, []).append(slots)
            sizes[member.layer] = _out_channels(member.module)
    everything = {layer: torch.arange(size) for layer, size in sizes.items()}
    return {layer: slots[~torch.isin(slots, torch.cat(gone[layer]))] for layer, slots in everything.items()}


def is_depthwise(module: nn.Module) -> bool:
    """Return whether each output channel of a convolution reads one input channel of its own."""
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == getattr(module, "in_channels", None) == getattr(module, "out_channels", None)


def _out_channels(layer: nn.Module) -> int:
    channels = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
    if not isinstance(channels, int):
        raise InternalError(f"{type(layer).__name__} has neither out_channels nor out_features.")
    return channels
