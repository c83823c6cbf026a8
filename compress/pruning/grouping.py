"""Search for channel groups in the trace of a network.

Labels that mean the same channel form a channel. Channels that must be removed together form a unit, and units on the
same axes, equally often, form a group. A group is named after the first layer that computes it. A unit with a frozen
label makes its group not prunable.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from compress.cost.macs import COUNTED
from compress.model.tensors import held_tensors
from compress.pruning.groups import LAYERS, ChannelGroup, Exclusion, Member, Read
from compress.pruning.tracing.record import OUTPUTS, Axis, Trace

_MOST_PATTERNS = 4
ONE_CHANNEL = "it has one channel only"


@dataclass(frozen=True, slots=True)
class GroupLabels:
    """Labels of the channels of a group.

    Attributes:
        labels: (n,) all labels of the group.
        units: (n,) unit of each label.
    """

    labels: np.ndarray
    units: np.ndarray


@dataclass(frozen=True, slots=True)
class Owner:
    """Module that holds a parameter or buffer, with the name of the tensor in it.

    Attributes:
        path: Path of the module.
        module: The module.
        name: Name of the tensor in the module.
        order: Position of the module in definition order.
    """

    path: str
    module: nn.Module
    name: str
    order: int


class Owners:
    """Modules that each parameter, buffer or plain tensor of a network belongs to, in definition order.

    Args:
        module: The network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._by_identity: dict[int, list[Owner]] = {}
        for order, (path, part) in enumerate(module.named_modules()):
            for name, tensor in held_tensors(part).items():
                self._by_identity.setdefault(id(tensor), []).append(Owner(path, part, name, order))

    def of(self, tensor: Tensor) -> list[Owner]:
        """Return all owners of a tensor."""
        return self._by_identity.get(id(tensor), [])

    def first(self, axis: Axis) -> Owner:
        """Return the first owner of an axis's parameter."""
        return self._by_identity[id(axis.tensor)][0]

    def paths(self, tensor: Tensor, user: str) -> list[str]:
        """Return the path of the module `user` if it holds the parameter, else of all modules that hold it."""
        paths = [owner.path for owner in self.of(tensor)]
        return [user] if user in paths else paths

    def is_layer(self, axis: Axis) -> bool:
        """Return whether an axis belongs to a convolution or linear layer."""
        return any(isinstance(owner.module, COUNTED) for owner in self.of(axis.tensor))

    def layer_name(self, axis: Axis) -> str:
        """Return the path of the layer that an axis belongs to; outside known layers, the parameter's path."""
        owner = self.first(axis)
        return owner.path if isinstance(owner.module, LAYERS) else ".".join(filter(None, (owner.path, owner.name)))


class AxisIndex:
    """Axes of a trace, looked up by label.

    Args:
        axes: Axes in the order of their labels.
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        self.axes = axes
        self._makes = np.array([axis.role == "out" for axis in axes], dtype=bool)
        self._starts = np.array([axis.start for axis in axes], dtype=np.int64)

    def numbers(self, labels: np.ndarray) -> np.ndarray:
        """Return for each label the number of its axis."""
        found: np.ndarray = np.searchsorted(self._starts, labels, side="right") - 1
        return found

    def is_made(self, labels: np.ndarray) -> np.ndarray:
        """Return for each label whether it is an output that a layer computes."""
        found: np.ndarray = self._makes[self.numbers(labels)]
        return found

    def split(self, labels: np.ndarray, channels: np.ndarray) -> Iterator[tuple[Axis, Tensor, Tensor]]:
        """Yield each axis with its positions, ascending, and their channels."""
        order = np.argsort(labels, kind="stable")  # labels count through the axes, and through the positions of each
        labels, channels = labels[order], channels[order]
        numbers, starts = np.unique(self.numbers(labels), return_index=True)
        for number, start, end in zip(numbers, starts, [*starts[1:], len(labels)], strict=True):
            axis = self.axes[number]
            yield axis, torch.from_numpy(labels[start:end] - axis.start), torch.from_numpy(channels[start:end])


class GroupFinder:
    """Search for the channel groups of a trace.

    Args:
        trace: Trace with at least one axis.
        owners: Owners of the traced network's tensors.

    Attributes:
        groups: Group name -> prunable group, in definition order.
        excluded: Groups that are not prunable, with the reason.
        found: Group name -> labels, for prunable and excluded groups.
    """

    def __init__(self, trace: Trace, owners: Owners) -> None:
        self.groups: dict[str, ChannelGroup] = {}
        self.excluded: list[Exclusion] = []
        self.found: dict[str, GroupLabels] = {}
        self._trace, self._owners, self._index = trace, owners, AxisIndex(trace.axes)
        self._channel = _components(trace.same, trace.size)
        self._unit = _components([*trace.same, *trace.tied], trace.size)
        self._is_summed = np.zeros(trace.size, bool)
        for labels in trace.summed:
            self._is_summed[labels.numpy()] = True
        self._behind: dict[str, list[str]] = {}  # layer -> norms that read its outputs directly
        for weight, norm in trace.behind:
            for layer in owners.paths(*weight):
                self._behind.setdefault(layer, []).extend(owners.paths(*norm))

    def find(self) -> None:
        """Fill `groups`, `excluded` and `found`."""
        unit = self._unit
        reasons = _reasons(self._trace, unit)
        patterns, parts = _patterns(unit, self._index), _parts(unit, self._channel, self._index)
        order = np.argsort(unit, kind="stable")
        borders = np.searchsorted(unit[order], np.arange(unit.max() + 2))
        taken: set[int] = set()
        for axis in self._roots():
            own = unit[axis.start : axis.start + axis.size]
            units = [int(one) for one in dict.fromkeys(own.tolist()) if one not in taken]
            taken.update(units)
            alike: dict[tuple[bytes, int, str | None], list[int]] = {}
            for one in units:
                alike.setdefault((patterns[one], int(parts[one]), reasons.get(one)), []).append(one)
            for (_, count, reason), chosen in alike.items():
                labels = np.concatenate([order[borders[one] : borders[one + 1]] for one in chosen])
                if reason is None and len(alike) > _MOST_PATTERNS:
                    reason = "its channels are tied to one another in too many ways"
                self._add(axis, labels, count, reason)

    def _add(self, root: Axis, labels: np.ndarray, parts: int, reason: str | None) -> None:
        """Add one group, or the reason why it is excluded.

        Args:
            root: Axis that the group is named after.
            labels: All labels of the group.
            parts: Channels in each unit.
            reason: Reason why the group is not prunable, if one is known already.
        """
        name = self._name(root, labels)
        numbers, channels, units = _numbered(
            labels, self._channel, self._unit, root, parts, self._index.is_made(labels)
        )
        count = len(np.unique(units))
        if reason is None and count * parts == 1:
            reason = ONE_CHANNEL
        elif reason is None and count < 2:
            reason = f"its {parts} channels can only be removed all together"
        members = () if reason is not None else tuple(self._members(numbers, channels))
        if reason is None and not any(member.is_producer for member in members):
            reason = "no convolution or linear layer computes it, but a function with a parameter of its own"
        self.found[name] = GroupLabels(labels, units)
        if reason is not None:
            self.excluded.append(Exclusion(name, reason, expected=reason in (OUTPUTS, ONE_CHANNEL)))
            return
        behind = self._norms_behind(members)
        gates = tuple(behind.get(member.layer, member) for member in members if member.is_producer)
        bare = tuple(
            member
            for member in members
            if member.axis == "out" and isinstance(member.module, COUNTED) and member.layer not in behind
        )
        reads = tuple(self._reads(numbers, channels))
        is_summed = bool(self._is_summed[labels].any())
        self.groups[name] = ChannelGroup(name, count * parts, parts, members, gates, bare, reads, is_summed)

    def _roots(self) -> list[Axis]:
        """Return the axes of outputs, in the order in which their layers are defined."""
        made = [axis for axis in self._trace.axes if axis.role == "out"]
        return sorted(made, key=lambda axis: (not self._owners.is_layer(axis), self._owners.first(axis).order))

    def _name(self, root: Axis, labels: np.ndarray) -> str:
        """Return the path of the first layer that makes the channels and names no other group."""
        inside = {int(axis) for axis in self._index.numbers(labels)}
        made = [root, *(self._trace.axes[axis] for axis in sorted(inside) if self._trace.axes[axis].role == "out")]
        names = [self._owners.layer_name(axis) for axis in made]
        free = next((name for name in names if name not in self.found), None)
        return free or next(name for count in range(2, len(self.found) + 3)
                            if (name := f"{names[0]}:{count}") not in self.found)  # fmt: skip

    def _members(self, labels: np.ndarray, channels: np.ndarray) -> Iterable[Member]:
        """Yield each layer of a known kind, once for its outputs and once for its inputs."""
        done: set[tuple[str, str]] = set()
        for axis, slots, found in self._index.split(labels, channels):
            side: Literal["out", "in"] = "in" if axis.role == "in" else "out"
            for owner in self._owners.of(axis.tensor):
                if isinstance(owner.module, LAYERS) and (owner.path, side) not in done:
                    done.add((owner.path, side))
                    yield Member(owner.path, owner.module, side, slots, found)

    def _reads(self, labels: np.ndarray, channels: np.ndarray) -> Iterable[Read]:
        for axis, slots, found in self._index.split(labels, channels):
            if axis.role == "in":
                owner = self._owners.first(axis)
                yield Read(owner.path, owner.name, axis.dim, axis.slots(slots), found)

    def _norms_behind(self, members: Sequence[Member]) -> dict[str, Member]:
        """Return layer -> norm of the group that reads the layer's outputs directly."""
        norms = {member.layer: member for member in members if member.is_norm}
        return {
            member.layer: norms[norm]
            for member in members
            for norm in self._behind.get(member.layer, ())
            if norm in norms
        }


def _components(pairs: Sequence[Tensor], size: int) -> np.ndarray:
    """Return (size,) the component of each label, where each pair of labels is in one component."""
    edges = torch.cat(list(pairs), 1).numpy() if pairs else np.zeros((2, 0), np.int64)
    graph = coo_matrix((np.ones(edges.shape[1], np.int8), (edges[0], edges[1])), shape=(size, size))
    found: np.ndarray = connected_components(graph, directed=False)[1].astype(np.int64)
    return found


def _patterns(unit: np.ndarray, index: AxisIndex) -> list[bytes]:
    """Return for each unit how often each axis occurs in it, in a form that can be compared."""
    count = len(index.axes)
    found, often = np.unique(unit * count + index.numbers(np.arange(len(unit))), return_counts=True)
    facts = np.stack([found % count, often], 1)
    borders = np.searchsorted(found // count, np.arange(unit.max() + 2))
    return [facts[start:end].tobytes() for start, end in pairwise(borders)]


def _parts(unit: np.ndarray, channel: np.ndarray, index: AxisIndex) -> np.ndarray:
    """Return for each unit its number of channels that a layer computes."""
    made = index.is_made(np.arange(len(unit)))
    _, first = np.unique(channel[made], return_index=True)
    return np.bincount(unit[made][first], minlength=int(unit.max()) + 1)


def _reasons(found: Trace, unit: np.ndarray) -> dict[int, str]:
    """Return the reason of each unit that cannot be removed; being an output comes before all other reasons."""
    reasons: dict[int, str] = {}
    for labels, reason in found.frozen:
        for one in np.unique(unit[labels.numpy()]).tolist():
            if reason == OUTPUTS or one not in reasons:
                reasons[one] = reason
    return reasons


def _numbered(
    labels: np.ndarray, channel: np.ndarray, unit: np.ndarray, root: Axis, parts: int, is_made: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number the channels of a group: p * units + u, units and parts in the order of the root's outputs.

    Returns:
        The labels that belong to a channel, the channel of each, and the unit of each label given.
    """
    own, of_units = channel[labels], unit[labels]
    key = np.where((labels >= root.start) & (labels < root.start + root.size), labels - root.start, labels + root.size)
    channels, first = _first_keys(own[is_made], key[is_made])
    units, first_of_unit = _first_keys(of_units[is_made], key[is_made])
    rank_of_unit = np.empty(len(units), np.int64)
    rank_of_unit[np.argsort(first_of_unit, kind="stable")] = np.arange(len(units))
    unit_of_channel = rank_of_unit[np.searchsorted(units, of_units[is_made][_first_places(own[is_made], channels)])]
    order = np.lexsort((first, unit_of_channel))
    number = np.empty(len(channels), np.int64)
    number[order] = (np.arange(len(channels)) % parts) * len(units) + np.arange(len(channels)) // parts
    belongs = np.isin(own, channels)
    return (
        labels[belongs],
        number[np.searchsorted(channels, own[belongs])],
        rank_of_unit[np.searchsorted(units, of_units)],
    )


def _first_keys(values: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that occur, ascending, and the smallest key of each."""
    order = np.lexsort((keys, values))
    found, first = np.unique(values[order], return_index=True)
    return found, keys[order][first]


def _first_places(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return for each wanted value the first index at which it occurs."""
    found, first = np.unique(values, return_index=True)
    return first[np.searchsorted(found, wanted)]
