"""Channel graph of a network: its channel groups, and the sizes that depend on them.

The trace (`tracing/`) finds which channels are the same, `grouping.py` the groups; each cut is tried by `trial.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from compress.errors import UnsupportedLayer
from compress.pruning.grouping import GroupFinder, GroupLabels, Owners
from compress.pruning.groups import Amount, ChannelGroup, Exclusion, Share
from compress.pruning.tracing.forward import trace
from compress.pruning.tracing.record import Axis, Trace


@dataclass(frozen=True, slots=True)
class ParameterAxis:
    """One dimension of a parameter or buffer whose size follows numbers of channels.

    Attributes:
        tensor: The parameter or buffer.
        dim: The dimension.
        lost: Group name -> number of indices along `dim` that are removed with one unit of the group; groups excluded
            from pruning are listed too.
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
        groups: Group name -> group that is prunable by the trace, in definition order.
        excluded: Groups that are not prunable by the trace.

    Raises:
        UntraceableModel: The network does not run.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        owners = Owners(module)  # before its code runs, which may put another tensor in a buffer's place
        self.trace: Trace = trace(module, example)
        self.groups: dict[str, ChannelGroup] = {}
        self.excluded: list[Exclusion] = []
        self._found: dict[str, GroupLabels] = {}
        if self.trace.axes:
            finder = GroupFinder(self.trace, owners)
            finder.find()
            self._found, self.excluded = finder.found, finder.excluded
            shares = _find_shares(
                finder.groups,
                [*_counted_macs(self.trace), *_counted_params(self.trace, owners)],
                self._owner_of_labels(list(finder.groups)),
            )
            self.groups = {name: replace(group, shares=shares[name]) for name, group in finder.groups.items()}

    def gone(self, removed: Mapping[str, Sequence[int]]) -> np.ndarray:
        """Return (labels,) bool: whether each label is removed with the given channels.

        Args:
            removed: Group name -> indices of removed channels, in complete units.

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
        owner = self._owner_of_labels(names)
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

    def _owner_of_labels(self, names: Sequence[str]) -> np.ndarray:
        """Return (labels,) the position in `names` of each label's group, -1 for labels of other groups."""
        owner = np.full(self.trace.size, -1, np.int64)
        for number, name in enumerate(names):
            owner[self._found[name].labels] = number
        return owner


def _find_shares(
    groups: Mapping[str, ChannelGroup], amounts: Sequence[tuple[Amount, list[np.ndarray]]], owner: np.ndarray
) -> dict[str, tuple[Share, ...]]:
    """Return the shares of each group in amounts of MACs and parameters.

    Args:
        groups: Group name -> group.
        amounts: Amounts, with the labels on each of their axes, in the order of a group's shares.
        owner: (labels,) the position in `groups` of each label's group, or -1.
    """
    names = list(groups)
    shares: list[list[Share]] = [[] for _ in names]
    for amount, places in amounts:
        for axis, labels in enumerate(places):
            held = owner[labels]
            for number, slots in zip(*np.unique(held[held >= 0], return_counts=True), strict=True):
                shares[number].append(Share(amount, axis, int(slots) / groups[names[number]].width))
    return dict(zip(names, map(tuple, shares), strict=True))


def _counted_macs(found: Trace) -> Iterator[tuple[Amount, list[np.ndarray]]]:
    """Yield the MACs that follow the same channels in one module, and the labels on each of their axes."""
    alike: dict[tuple[str, tuple[bytes, ...]], tuple[int, list[np.ndarray]]] = {}
    for counted in found.counted:
        places = [labels.numpy() for labels in counted.labels]
        key = counted.module, tuple(labels.tobytes() for labels in places)
        alike[key] = alike.get(key, (0, places))[0] + counted.macs, places
    for number, ((layer, _), (macs, places)) in enumerate(alike.items()):
        yield Amount("macs", number, layer, macs, _sizes(places)), places


def _counted_params(found: Trace, owners: Owners) -> Iterator[tuple[Amount, list[np.ndarray]]]:
    """Yield the scalars of each parameter with channels, and a label for each index of its dimensions."""
    by_tensor: dict[int, dict[int, dict[int, int]]] = {}
    tensors = {id(axis.tensor): axis.tensor for axis in found.axes if isinstance(axis.tensor, nn.Parameter)}
    for axis in found.axes:
        labels = axis.labels
        indices = axis.slots(labels - axis.start).tolist()
        first = by_tensor.setdefault(id(axis.tensor), {}).setdefault(axis.dim, {})
        for index, label in zip(indices, labels.tolist(), strict=True):
            first.setdefault(index, label)  # a grouped convolution has several labels for one index
    for number, (key, tensor) in enumerate(tensors.items()):
        places = [np.array(list(first.values()), np.int64) for first in by_tensor[key].values()][:2]
        for unit in ("params", "weights") if key in found.multiplied else ("params",):
            layer = owners.of(tensor)[0].path
            yield Amount(unit, number, layer, tensor.numel(), _sizes(places)), places


def _sizes(places: Sequence[np.ndarray]) -> tuple[int, int]:
    """Return the sizes of two axes, 1 for a missing axis."""
    first, second = (*map(len, places), 1, 1)[:2]
    return first, second
