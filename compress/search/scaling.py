"""Factors of kept channels: weights that read a channel are multiplied by a factor for it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.allocation.widths import Candidates
from compress.pruning.groups import ChannelGroup, Read
from compress.pruning.ranking.selection import Groups, Selection
from compress.search.repairs import NamedRepair


@contextmanager
def scaled_reads(module: nn.Module, group: ChannelGroup, factors: Tensor) -> Iterator[None]:
    """Multiply the weights that read each channel of a group by a factor, within the context.

    Args:
        module: The network the group belongs to.
        group: Channel group of C channels.
        factors: (C,) float32 factors of the channels.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for read in group.reads:
            weight: Tensor = getattr(module.get_submodule(read.path), read.name)
            kept.append((weight, weight.detach().clone()))
            scale_slots(weight, read.dim, read.slots, factors[read.channels])
        yield
    finally:
        with torch.no_grad():
            for weight, values in reversed(kept):
                weight.copy_(values)


@torch.no_grad()
def scale_slots(weight: Tensor, dim: int, slots: Tensor, factors: Tensor) -> None:
    """Multiply the slots of one dimension of a weight by factors, in place."""
    shape = [1] * weight.ndim
    shape[dim] = len(slots)
    slots, values = slots.to(weight.device), factors.to(weight).reshape(shape)
    weight.index_copy_(dim, slots, weight.index_select(dim, slots) * values)


def scaling_repairs(
    candidates: Iterable[Candidates], selection: Selection, groups: Groups, fold: Callable[[nn.Module], Sized]
) -> list[NamedRepair]:
    """Return the repair that scales the reads of kept channels by the factors of the ranking; none without factors.

    Args:
        candidates: Ranked groups.
        selection: The removed channels.
        groups: The groups of the network before the removal.
        fold: Function that moves means into biases; part of the repair, as the factors hold for centred inputs.
    """
    chosen = {
        one.name: torch.from_numpy(scales)
        for one in candidates
        if one.name in selection.removed and (scales := one.unit_scales(selection.widths[one.name])) is not None
    }
    if not chosen:
        return []

    def scale(module: nn.Module) -> list[str]:
        """Multiply the kept slots of each read in the slim network; their order is unchanged."""
        for name, scales in chosen.items():
            group, removed = groups[name], torch.tensor(selection.removed[name])
            for read in group.reads:
                weight = getattr(module.get_submodule(read.path), read.name)
                is_kept = ~torch.isin(read.channels, removed)
                slots = _slim_positions(read, selection.removed, groups)[is_kept]
                scale_slots(weight, read.dim, slots, scales.repeat(group.parts)[read.channels[is_kept]])
        fold(module)
        return list(chosen)

    return [("scaling", scale)]


def _slim_positions(read: Read, removed: Mapping[str, Sequence[int]], groups: Groups) -> Tensor:
    """Return (n,) the position of each slot of a read in the slim network; arbitrary for removed slots."""
    gone = [
        other.slots[torch.isin(other.channels, torch.tensor(removed[name]))]
        for name in removed
        for other in groups[name].reads
        if (other.path, other.name, other.dim) == (read.path, read.name, read.dim)
    ]
    before = torch.unique(torch.cat(gone)) if gone else torch.zeros(0, dtype=torch.int64)
    return read.slots - torch.searchsorted(before, read.slots)
