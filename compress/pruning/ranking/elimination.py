"""Backward elimination of a group's channels; the layers that read them (readers) are refitted after each removal.

    statistics   one pass over images, its own or that of the scores: for each reader the Gram matrix of its inputs
    elimination  remove the channels that the refitted readers compensate best; refit; repeat
    refit        the same matrices give the readers' best weights for any set of kept channels

Unlike a separate score for each channel, elimination takes into account that a channel can be rebuilt from the others.
"""

from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compress.data.batches import Batch, evaluation_batches
from compress.data.splits import Split
from compress.model.modes import eval_mode, hooked
from compress.progress import Progress
from compress.pruning.criteria.base import Ranking
from compress.pruning.groups import BATCH_NORMS, ChannelGroup, Member
from compress.pruning.ranking.downdates import Downdates, preferred_dtype
from compress.pruning.repair.least_squares import (
    RIDGE,
    GramSum,
    Places,
    input_rows,
    is_refittable,
    positions_needed,
)
from compress.pruning.repair.lockstep import call_order, following_norms

_BATCH = 32
_MOST_UNKNOWNS = 5000
_GRAM_BYTES = 2 * 10**9
_ROUNDS = 64
_LEAST_ENERGY = 1e-12


@dataclass(frozen=True)
class ReaderStats:
    """Statistics of a layer that reads channels (a reader).

    Attributes:
        layer: Module path.
        gram: (n, n) float64, second moments of the layer's inputs; with an intercept, the last input is always 1.
        weight: (outputs, n) float64, weights of the layer; with an intercept, its bias is the last column.
        energy: Variance of each output over images and positions, summed over the outputs.
        has_intercept: Whether a constant can be added to the outputs, in the layer's bias or the batch norm behind it.
    """

    layer: str
    gram: Tensor
    weight: Tensor
    energy: float
    has_intercept: bool = True

    def refit(self, gone: Tensor) -> Tensor:
        """Return the (outputs, n) weights, zero at the removed inputs `gone`, that come nearest to the old outputs."""
        left = torch.ones(len(self.gram), dtype=torch.bool)
        left[gone] = False
        found = torch.linalg.solve(self.gram[left][:, left], self.gram[left] @ self.weight.T)
        weight = torch.zeros_like(self.weight)
        weight[:, left] = found.T
        return weight


Bulk = tuple[list[str], dict[str, ReaderStats]]


class ReaderPass:
    """One pass over images that collects the statistics of readers, in a loop of its own or along with another.

    Args:
        module: The network.
        groups: Names of the groups that the readers belong to.
        readers: Module path -> convolution or linear layer of the network.
        norms: Layers with a batch norm behind them.
        split: Images to run; labels are not used.

    Attributes:
        groups: As given.
        has_begun: Whether a loop has begun.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[str],
        readers: Mapping[str, nn.Module],
        norms: Container[str],
        split: Split,
    ) -> None:
        self.groups, self.has_begun = list(groups), False
        self._module, self._readers, self._norms, self._split = module, dict(readers), norms, split
        self._sums: dict[str, _RowSum] = {}
        self._before, self._here = 0, 0  # images of earlier batches, and of the one that the caller runs now

    def along(self, batches: Iterable[Batch]) -> Generator[Batch]:
        """Yield all batches of the split in order; what the caller runs them through must call each reader once."""
        self.has_begun = True
        for name, layer in self._readers.items():
            size = _unknowns(layer)
            self._sums[name] = _RowSum(size, positions_needed(size, len(self._split)))
        hooks = [(layer, self._watch(name)) for name, layer in self._readers.items()]
        with hooked(after=hooks):
            for images, targets in batches:
                self._here = len(images)
                yield images, targets
                self._before, self._here = self._before + self._here, 0

    def collect(self, progress: Progress) -> dict[str, ReaderStats]:
        """Return the statistics by reader, once; images are run unless another loop has run all of them.

        Args:
            progress: Receives progress by batch.
        """
        if self._before < len(self._split):
            self._before = 0
            with torch.no_grad(), eval_mode(self._module), progress.task("what layers read", len(self._split)) as task:
                for images, _ in self.along(evaluation_batches(self._split, _BATCH, "nothing")):
                    self._module(images)
                    task.advance(len(images))
        found = {}
        for name, layer in self._readers.items():
            found[name] = _finished(name, layer, self._sums.pop(name).moments(), name in self._norms)
        return found

    def _watch(self, name: str) -> Callable[..., None]:
        @torch.no_grad()
        def hook(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self._here == 0:  # a call for the targets of the next batch
                return
            for part, number in self._parts(len(inputs[0])):
                self._sums[name].add(layer, inputs[0].detach()[part], output, number)

        return hook

    def _parts(self, length: int) -> Iterator[tuple[slice, int]]:
        """Yield parts of the first axis of a layer's input, and the number of the sample of positions of each.

        Samples belong to `_BATCH` images each, whatever the size of the batches: all loops give the same statistics.
        """
        first, end = self._before, self._before + self._here
        if length % self._here:
            yield slice(None), first // _BATCH
            return
        each = length // self._here
        while first < end:
            last = min(end, (first // _BATCH + 1) * _BATCH)
            yield slice((first - self._before) * each, (last - self._before) * each), first // _BATCH
            first = last


class _RowSum:
    """Sum of the second moments of a reader's inputs, each row with a 1 behind it.

    Args:
        size: Number of unknowns with the intercept.
        positions: Number of positions of each image.
    """

    def __init__(self, size: int, positions: int) -> None:
        self._gram, self._positions, self._count = GramSum(size), positions, 0
        self._number, self._waiting = 0, list[Tensor]()

    def add(self, layer: nn.Conv2d | nn.Linear, inputs: Tensor, output: Tensor, number: int) -> None:
        """Add rows of some images; rows of one sample of positions wait for each other, as large products are fast."""
        if number != self._number:
            self._add_waiting()
        self._number = number
        self._waiting.append(input_rows(layer, inputs, output.shape[2:], Places(self._positions, number)))

    def moments(self) -> Tensor:
        """Return the (size, size) mean."""
        self._add_waiting()
        return self._gram.matrix().div_(self._count)

    def _add_waiting(self) -> None:
        if self._waiting:
            rows = torch.cat(self._waiting)
            self._gram.add(torch.cat([rows, torch.ones(len(rows), 1)], 1))
            self._count += len(rows)
            self._waiting.clear()


def reader_passes(module: nn.Module, groups: Mapping[str, ChannelGroup], split: Split) -> list[ReaderPass]:
    """Return passes over images for the groups whose readers can all be refitted; each pass fits into memory.

    Args:
        module: The network the groups belong to.
        groups: Prunable groups; a group that another kind of layer reads is left out.
        split: Images to run; labels are not used.
    """
    names = {r.layer for group in groups.values() for r in group.readers if _is_eligible(group, r)}
    once, norms = _called_once(module, names, split)
    readers = {
        name: {reader.layer: reader.module for reader in group.readers}
        for name, group in groups.items()
        if group.readers and not group.other_reads and all(reader.layer in once for reader in group.readers)
    }
    bulks = _bulks({name: list(layers.values()) for name, layers in readers.items()})
    return [
        ReaderPass(module, bulk, {path: layer for name in bulk for path, layer in readers[name].items()}, norms, split)
        for bulk in bulks
    ]


def reader_statistics(
    module: nn.Module, groups: Mapping[str, ChannelGroup], split: Split, progress: Progress
) -> Iterator[Bulk]:
    """Yield groups whose readers can all be refitted, with their readers' statistics, in bulks that fit into memory.

    Args:
        module: As in `reader_passes`.
        groups: As in `reader_passes`.
        split: As in `reader_passes`.
        progress: Receives progress by batch.
    """
    for one in reader_passes(module, groups, split):
        yield one.groups, one.collect(progress)


def layer_statistics(
    module: nn.Module, names: Iterable[str], split: Split, progress: Progress
) -> Iterator[dict[str, ReaderStats]]:
    """Yield the statistics of the layers that can be refitted, in bulks that fit into memory.

    Args:
        module: The network.
        names: Module paths of convolutions and linear layers.
        split: Images to run; labels are not used.
        progress: Receives progress by batch.
    """
    able = {name: layer for name in names if _is_affordable(layer := module.get_submodule(name))}
    once, norms = _called_once(module, able, split)
    for bulk in _bulks({name: [layer] for name, layer in able.items() if name in once}):
        yield ReaderPass(module, [], {name: able[name] for name in bulk}, norms, split).collect(progress)


def removal_order(group: ChannelGroup, stats: Mapping[str, ReaderStats], most: int) -> np.ndarray:
    """Return the units of a group in order of removal; as `removal_ranking`, without the errors."""
    return removal_ranking(group, stats, most).order


def removal_ranking(group: ChannelGroup, stats: Mapping[str, ReaderStats], most: int) -> Ranking:
    """Rank the units of a group by backward elimination: next is the unit that the refitted readers compensate best.

    Args:
        group: C channels in `parts` equal parts; a unit is one channel of each part.
        stats: Reader path -> statistics, for all readers of the group.
        most: Largest number of units to remove; the order of the others is arbitrary.

    Source: removal with update by the inverse Hessian (Hassibi and Stork 1992, "Optimal Brain Surgeon"), with whole
        columns of a layer as in Kurtic et al. 2023, "ZipLM", arXiv:2302.04089, section 3.1; summed over all layers
        that read a channel, each relative to the energy of its outputs.
    """
    readers = [stats[reader.layer] for reader in group.readers]
    inputs = [unit_inputs(group, reader) for reader in group.readers]
    fastest = [preferred_dtype(one.numel()) for one in inputs]
    try:
        return _eliminate(readers, inputs, fastest, most)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # inputs are nearly copies of each other
        return _eliminate(readers, inputs, [torch.float64] * len(readers), most)


def _eliminate(
    readers: Sequence[ReaderStats], inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype], most: int
) -> Ranking:
    units = len(inputs[0])
    regressions = [
        Downdates(reader.gram, reader.weight, unknowns, dtype)
        for reader, unknowns, dtype in zip(readers, inputs, dtypes, strict=True)
    ]
    alive = np.arange(units)
    order: list[int] = []
    errors = np.zeros(units + 1)
    at_once = max(1, most // _ROUNDS)
    while len(order) < most:
        losses = np.zeros(len(alive))
        for reader, regression in zip(readers, regressions, strict=True):
            losses += regression.losses().numpy() / max(reader.energy, _LEAST_ENERGY)
        chosen = np.argsort(losses, kind="stable")[: min(at_once, most - len(order))]
        rises = np.maximum(losses[chosen], 0.0)
        errors[len(order) + 1 : len(order) + 1 + len(chosen)] = errors[len(order)] + np.cumsum(rises)
        order += alive[chosen].tolist()
        if len(order) < most:
            for regression in regressions:
                regression.remove(torch.from_numpy(chosen))
        alive = np.delete(alive, chosen)
    errors[len(order) + 1 :] = errors[len(order)]
    return Ranking(np.asarray([*order, *alive], dtype=np.int64), errors)


def unit_inputs(group: ChannelGroup, reader: Member) -> Tensor:
    """Return (units, n) indices of the reader's unknowns (inputs of one output) that belong to each unit of a group."""
    layer = reader.module
    cells = layer.weight[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
    stride = group.width // group.parts
    slots = torch.stack([reader.slots[reader.channels % stride == unit] for unit in range(stride)])
    return (slots[:, :, None] * cells + torch.arange(cells)).flatten(1)


def _is_eligible(group: ChannelGroup, reader: Member) -> bool:
    """Return whether a reader can be refitted at a bearable cost and reads all units of the group equally often."""
    if not _is_affordable(reader.module):
        return False
    seen = torch.bincount(reader.channels % (group.width // group.parts), minlength=group.width // group.parts)
    return bool((seen == seen[0]).all())


def _is_affordable(layer: nn.Module) -> bool:
    return is_refittable(layer) and _unknowns(layer) <= _MOST_UNKNOWNS


def _called_once(module: nn.Module, names: Iterable[str], split: Split) -> tuple[set[str], dict[str, str]]:
    """Return the layers that one forward pass calls exactly once, and the batch norms behind layers."""
    example = next(evaluation_batches(split.first(1), 1, "nothing"))[0]
    with eval_mode(module):
        return set(call_order(module, names, example)), following_norms(module, BATCH_NORMS, example)


def _unknowns(layer: nn.Module) -> int:
    """Return the number of inputs of each output of a layer, plus one for the intercept."""
    return int(layer.weight[0].numel()) + 1  # type: ignore[index,union-attr,operator]


def _bulks(readers: Mapping[str, Sequence[nn.Module]]) -> Iterator[list[str]]:
    """Split names into bulks so that the Gram matrices of each bulk's layers fit into memory."""
    bulk: list[str] = []
    sizes: dict[nn.Module, int] = {}
    for name, layers in readers.items():
        needed = {layer: 8 * _unknowns(layer) ** 2 for layer in layers}
        if bulk and sum((sizes | needed).values()) > _GRAM_BYTES:
            yield bulk
            bulk, sizes = [], {}
        bulk.append(name)
        sizes |= needed
    if bulk:
        yield bulk


def _finished(name: str, layer: nn.Module, gram: Tensor, has_norm: bool) -> ReaderStats:
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    outputs = len(layer.weight)
    bias = torch.zeros(outputs) if layer.bias is None else layer.bias.detach()
    weight = torch.cat([layer.weight.detach().flatten(1), bias[:, None]], 1).double()
    mean = weight @ gram[-1]
    energy = float(((weight @ gram) * weight).sum() - (mean**2).sum())
    ridge = RIDGE * gram.diagonal().mean()
    has_intercept = has_norm or layer.bias is not None
    if not has_intercept:
        gram, weight = gram[:-1, :-1], weight[:, :-1]
    gram.diagonal().add_(ridge)
    return ReaderStats(name, gram, weight, energy, has_intercept)
