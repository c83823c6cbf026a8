"""Which channels must be cut together? Groups, out of what a watched forward pass told.

Which channels are the same is found by `tracing/`; whether a cut is right is tried by `trial.py`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from compress.cost.macs import COUNTED
from compress.errors import UnsupportedLayer
from compress.model.tensors import held_tensors
from compress.pruning.groups import LAYERS, Amount, ChannelGroup, Exclusion, Member, Read, Share
from compress.pruning.tracing.forward import trace
from compress.pruning.tracing.record import OUTPUTS, Axis, Trace

_MOST_PATTERNS = 4
ONE_CHANNEL = "it has one channel only"


@dataclass(frozen=True, slots=True)
class _Found:
    """A group, with the labels of its channels.

    Attributes:
        labels: All labels in it.
        units: (n,) the unit of each.
    """

    labels: np.ndarray
    units: np.ndarray


@dataclass(frozen=True, slots=True)
class ParameterAxis:
    """One dimension of a parameter or buffer whose size follows numbers of channels.

    Attributes:
        tensor: The parameter or buffer.
        dim: The dimension.
        lost: Group name -> indices along `dim` that one unit of the group takes with it. Excluded groups are there too.
    """

    tensor: Tensor
    dim: int
    lost: dict[str, float]


class ChannelGraph:
    """The channel groups of one network, traced once.

    Args:
        module: The network.
        example: One input, (1, ...).

    Attributes:
        groups: By name, in definition order; each could be cut as far as the trace tells.
        excluded: The groups that the trace says must stay whole.

    Raises:
        UntraceableModel: The network does not run.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self._owners = _owners(module)  # before its code runs, which may put another tensor in a buffer's place
        self.trace: Trace = trace(module, example)
        self._behind: dict[str, list[str]] = {}  # layer -> norms that its outputs go to directly
        for weight, norm in self.trace.behind:
            for layer in self._paths(*weight):
                self._behind.setdefault(layer, []).extend(self._paths(*norm))
        self.groups: dict[str, ChannelGroup] = {}
        self.excluded: list[Exclusion] = []
        self._found: dict[str, _Found] = {}
        self._makes = np.array([axis.role == "out" for axis in self.trace.axes], dtype=bool)
        self._starts = np.array([axis.start for axis in self.trace.axes], dtype=np.int64)
        self._is_summed = np.zeros(self.trace.size, bool)
        for labels in self.trace.summed:
            self._is_summed[labels.numpy()] = True
        if self.trace.axes:
            self._find_groups()
            self._find_shares()

    def gone(self, removed: Mapping[str, Sequence[int]]) -> np.ndarray:
        """Return (labels,) whether each goes with the channels that are removed.

        Args:
            removed: Group name -> indices of the channels that go, whole units of them.

        Raises:
            UnsupportedLayer: There is no such group, an index lies outside it, or a unit would be divided.
        """
        going = np.zeros(self.trace.size, bool)
        for name, indices in removed.items():
            group = self.groups.get(name)
            if group is None:
                raise UnsupportedLayer(f"The network must have a channel group '{name}' to cut, it has none.")
            chosen = set(indices)
            if not chosen or min(chosen) < 0 or max(chosen) >= group.width or len(chosen) == group.width:
                raise UnsupportedLayer(
                    f"Group '{name}' has {group.width} channels; it must lose at least one, all of them within it, "
                    f"and keep at least one, got {len(chosen)} indices."
                )
            units = {index % (group.width // group.parts) for index in chosen}
            if chosen != set(group.expand(units)):
                raise UnsupportedLayer(
                    f"Group '{name}' must lose the same positions of each of its {group.parts} parts, got "
                    f"{sorted(chosen)}."
                )
            found = self._found[name]
            going[found.labels[np.isin(found.units, list(units))]] = True
        return going

    def parameter_axes(self) -> list[ParameterAxis]:
        """Return the dimensions of all parameters and buffers that follow numbers of channels, in trace order."""
        names, units = list(self._found), {name: int(found.units.max()) + 1 for name, found in self._found.items()}
        owner = np.full(self.trace.size, -1, np.int64)
        for number, name in enumerate(names):
            owner[self._found[name].labels] = number
        alike: dict[tuple[int, int], list[Axis]] = {}
        for axis in self.trace.axes:
            alike.setdefault((id(axis.tensor), axis.dim), []).append(axis)
        axes = []
        for parts in alike.values():
            labels = np.concatenate([axis.labels.numpy() for axis in parts])
            slots = np.concatenate([axis.slots(axis.labels - axis.start).numpy() for axis in parts])
            held = owner[labels] >= 0
            pairs = np.unique(np.stack([owner[labels][held], slots[held]]), axis=1)
            counts = zip(*np.unique(pairs[0], return_counts=True), strict=True)
            lost = {names[number]: int(count) / units[names[number]] for number, count in counts}
            axes.append(ParameterAxis(parts[0].tensor, parts[0].dim, lost))
        return axes

    def _paths(self, tensor: Tensor, user: str) -> list[str]:
        """Return the module that uses a parameter, if it is its own, or else all that it belongs to."""
        paths = [owner.path for owner in self._owners.get(id(tensor), ())]
        return [user] if user in paths else paths

    def _find_groups(self) -> None:
        size = self.trace.size
        channel = _components(self.trace.same, size)
        unit = _components([*self.trace.same, *self.trace.tied], size)
        reasons = _reasons(self.trace, unit)
        patterns, parts = self._patterns(unit), self._parts(unit, channel)
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
                self._add(axis, labels, channel, unit, count, reason, len(alike))

    def _find_shares(self) -> None:
        """Tell each group what it has of the MACs and of the parameters."""
        owner, names = np.full(self.trace.size, -1, np.int64), list(self.groups)
        for number, name in enumerate(names):
            owner[self._found[name].labels] = number
        shares: list[list[Share]] = [[] for _ in names]
        for amount, places in (*self._counted_macs(), *self._counted_params()):
            for axis, labels in enumerate(places):
                held = owner[labels]
                for number, slots in zip(*np.unique(held[held >= 0], return_counts=True), strict=True):
                    shares[number].append(Share(amount, axis, int(slots) / self.groups[names[number]].width))
        for name, found in zip(names, shares, strict=True):
            self.groups[name] = replace(self.groups[name], shares=tuple(found))

    def _counted_macs(self) -> Iterator[tuple[Amount, list[np.ndarray]]]:
        """Yield the MACs that follow the same channels in one module, and the labels on each of their axes."""
        alike: dict[tuple[str, tuple[bytes, ...]], tuple[int, list[np.ndarray]]] = {}
        for counted in self.trace.counted:
            places = [labels.numpy() for labels in counted.labels]
            key = counted.module, tuple(labels.tobytes() for labels in places)
            alike[key] = alike.get(key, (0, places))[0] + counted.macs, places
        for number, ((layer, _), (macs, places)) in enumerate(alike.items()):
            yield Amount("macs", number, layer, macs, _sizes(places)), places

    def _counted_params(self) -> Iterator[tuple[Amount, list[np.ndarray]]]:
        """Yield the scalars of each parameter with channels, and a label for each index of its dimensions."""
        by_tensor: dict[int, dict[int, dict[int, int]]] = {}
        tensors = {id(axis.tensor): axis.tensor for axis in self.trace.axes if isinstance(axis.tensor, nn.Parameter)}
        for axis in self.trace.axes:
            labels = axis.labels
            indices = axis.slots(labels - axis.start).tolist()
            first = by_tensor.setdefault(id(axis.tensor), {}).setdefault(axis.dim, {})
            for index, label in zip(indices, labels.tolist(), strict=True):
                first.setdefault(index, label)  # a grouped convolution has several labels for one index
        for number, (key, tensor) in enumerate(tensors.items()):
            places = [np.array(list(first.values()), np.int64) for first in by_tensor[key].values()][:2]
            for unit in ("params", "weights") if key in self.trace.multiplied else ("params",):
                layer = self._owners[key][0].path
                yield Amount(unit, number, layer, tensor.numel(), _sizes(places)), places

    def _patterns(self, unit: np.ndarray) -> list[bytes]:
        """Return for each unit how often each axis occurs in it, in a form that can be compared."""
        count = len(self.trace.axes)
        found, often = np.unique(unit * count + self._axis_of(np.arange(len(unit))), return_counts=True)
        facts = np.stack([found % count, often], 1)
        borders = np.searchsorted(found // count, np.arange(unit.max() + 2))
        return [facts[start:end].tobytes() for start, end in pairwise(borders)]

    def _parts(self, unit: np.ndarray, channel: np.ndarray) -> np.ndarray:
        """Return for each unit how many channels that some layer computes are in it."""
        made = self._is_made(np.arange(len(unit)))
        _, first = np.unique(channel[made], return_index=True)
        return np.bincount(unit[made][first], minlength=int(unit.max()) + 1)

    def _add(
        self, root: Axis, labels: np.ndarray, channel: np.ndarray, unit: np.ndarray, parts: int,
        reason: str | None, patterns: int,
    ) -> None:  # fmt: skip
        """Add one group, or the reason why it is none."""
        name = self._name(root, labels)
        numbers, channels, units = _numbered(labels, channel, unit, root, parts, self._is_made(labels))
        count = len(np.unique(units))
        if reason is None and patterns > _MOST_PATTERNS:
            reason = "its channels are tied to one another in too many ways"
        if reason is None and count * parts == 1:
            reason = ONE_CHANNEL
        elif reason is None and count < 2:
            reason = f"its {parts} channels can only go together"
        members = () if reason is not None else tuple(self._members(numbers, channels))
        if reason is None and not any(member.is_producer for member in members):
            reason = "no convolution or linear layer computes it, but a function with a parameter of its own"
        if reason is not None:
            self.excluded.append(Exclusion(name, reason, expected=reason in (OUTPUTS, ONE_CHANNEL)))
            self._found[name] = _Found(labels, units)
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
        group = ChannelGroup(name, count * parts, parts, members, gates, bare, reads, is_summed)
        self.groups[name] = group
        self._found[name] = _Found(labels, units)

    def _roots(self) -> list[Axis]:
        """Return the axes of outputs, in the order in which their layers are defined."""
        made = [axis for axis in self.trace.axes if axis.role == "out"]
        return sorted(made, key=lambda axis: (not self._is_layer(axis), self._owners[id(axis.tensor)][0].order))

    def _is_layer(self, axis: Axis) -> bool:
        return any(isinstance(owner.module, COUNTED) for owner in self._owners[id(axis.tensor)])

    def _is_made(self, labels: np.ndarray) -> np.ndarray:
        """Return for each label whether it is an output that a layer computes."""
        found: np.ndarray = self._makes[self._axis_of(labels)]
        return found

    def _name(self, root: Axis, labels: np.ndarray) -> str:
        """Return the path of the first layer that makes the channels and names no other group."""
        inside = {int(axis) for axis in self._axis_of(labels)}
        made = [root, *(self.trace.axes[axis] for axis in sorted(inside) if self.trace.axes[axis].role == "out")]
        names = [self._layer_name(axis) for axis in made]
        free = next((name for name in names if name not in self._found), None)
        return free or next(name for count in range(2, len(self._found) + 3)
                            if (name := f"{names[0]}:{count}") not in self._found)  # fmt: skip

    def _layer_name(self, axis: Axis) -> str:
        owner = self._owners[id(axis.tensor)][0]
        return owner.path if isinstance(owner.module, LAYERS) else ".".join(filter(None, (owner.path, owner.name)))

    def _members(self, labels: np.ndarray, channels: np.ndarray) -> Iterable[Member]:
        """Yield each layer of a kind that is known, once for its outputs and once for its inputs."""
        done: set[tuple[str, str]] = set()
        for axis, slots, found in self._by_axis(labels, channels):
            side: Literal["out", "in"] = "in" if axis.role == "in" else "out"
            for owner in self._owners[id(axis.tensor)]:
                if isinstance(owner.module, LAYERS) and (owner.path, side) not in done:
                    done.add((owner.path, side))
                    yield Member(owner.path, owner.module, side, slots, found)

    def _reads(self, labels: np.ndarray, channels: np.ndarray) -> Iterable[Read]:
        for axis, slots, found in self._by_axis(labels, channels):
            if axis.role == "in":
                owner = self._owners[id(axis.tensor)][0]
                yield Read(owner.path, owner.name, axis.dim, axis.slots(slots), found)

    def _by_axis(self, labels: np.ndarray, channels: np.ndarray) -> Iterator[tuple[Axis, Tensor, Tensor]]:
        """Yield for each axis its places, ascending, and their channels."""
        order = np.argsort(labels, kind="stable")  # labels count through the axes, and through the places of each
        labels, channels = labels[order], channels[order]
        numbers, starts = np.unique(self._axis_of(labels), return_index=True)
        for number, start, end in zip(numbers, starts, [*starts[1:], len(labels)], strict=True):
            axis = self.trace.axes[number]
            yield axis, torch.from_numpy(labels[start:end] - axis.start), torch.from_numpy(channels[start:end])

    def _axis_of(self, labels: np.ndarray) -> np.ndarray:
        """Return for each label the number of its axis."""
        found: np.ndarray = np.searchsorted(self._starts, labels, side="right") - 1
        return found

    def _norms_behind(self, members: Sequence[Member]) -> dict[str, Member]:
        """Return for each layer that a norm of the group follows at once that norm."""
        norms = {member.layer: member for member in members if member.is_norm}
        return {
            member.layer: norms[norm]
            for member in members
            for norm in self._behind.get(member.layer, ())
            if norm in norms
        }


@dataclass(frozen=True, slots=True)
class Owner:
    """Where a parameter or buffer hangs.

    Attributes:
        path: Of the module.
        module: That module.
        name: The parameter's name in it.
        order: The module's place in definition order.
    """

    path: str
    module: nn.Module
    name: str
    order: int


def _owners(module: nn.Module) -> dict[int, list[Owner]]:
    """Return by identity of a parameter, buffer or plain tensor every place it hangs at, in definition order."""
    found: dict[int, list[Owner]] = {}
    for order, (path, part) in enumerate(module.named_modules()):
        for name, tensor in held_tensors(part).items():
            found.setdefault(id(tensor), []).append(Owner(path, part, name, order))
    return found


def _sizes(places: Sequence[np.ndarray]) -> tuple[int, int]:
    """Return the sizes of two axes, 1 for one that is not there."""
    first, second = (*map(len, places), 1, 1)[:2]
    return first, second


def _components(pairs: Sequence[Tensor], size: int) -> np.ndarray:
    """Return (size,) the component of each label, where each pair of labels is in one component."""
    edges = torch.cat(list(pairs), 1).numpy() if pairs else np.zeros((2, 0), np.int64)
    graph = coo_matrix((np.ones(edges.shape[1], np.int8), (edges[0], edges[1])), shape=(size, size))
    found: np.ndarray = connected_components(graph, directed=False)[1].astype(np.int64)
    return found


def _reasons(found: Trace, unit: np.ndarray) -> dict[int, str]:
    """Return for each unit that cannot go why; that it is an output goes before all other reasons."""
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
    """Return for each value wanted one place where it occurs."""
    found, first = np.unique(values, return_index=True)
    return first[np.searchsorted(found, wanted)]
