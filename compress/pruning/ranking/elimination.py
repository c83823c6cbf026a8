"""Backward elimination of a group's channels; the layers that read them (readers) are refitted after each removal.

    statistics   one pass over images: for each reader the Gram matrix of its inputs
    elimination  remove the channel that the refitted readers compensate best; update the matrices; repeat
    refit        the same matrices give the readers' best weights for any set of kept channels

Unlike a separate score for each channel, elimination takes into account that a channel can be rebuilt from the others.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compress.data.batches import evaluation_batches
from compress.data.splits import Split
from compress.model.modes import eval_mode
from compress.progress import Progress
from compress.pruning.criteria.base import Ranking
from compress.pruning.groups import BATCH_NORMS, ChannelGroup, Member
from compress.pruning.repair.least_squares import (
    RIDGE,
    GramSum,
    Places,
    is_refittable,
    positions_needed,
    regression_rows,
)
from compress.pruning.repair.lockstep import call_order, following_norms, run_watched

_BATCH = 32
_MOST_UNKNOWNS = 5000
_GRAM_BYTES = 2 * 10**9
_ROUNDS = 64
_COMPACT = 0.25


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


def reader_statistics(
    module: nn.Module,
    groups: Mapping[str, ChannelGroup],
    split: Split,
    progress: Progress,
    is_done: Callable[[Sequence[str]], bool] = lambda names: False,
) -> Iterator[Bulk]:
    """Yield groups whose readers can all be refitted, with their readers' statistics, in bulks that fit into memory.

    Args:
        module: The network the groups belong to.
        groups: Prunable groups; a group that another kind of layer reads is left out.
        split: Images to run; labels are not used.
        progress: Receives progress by batch.
        is_done: Returns whether the statistics of these groups, yielded together, are not needed.
    """
    names = {r.layer for group in groups.values() for r in group.readers if _is_eligible(group, r)}
    once, norms = _called_once(module, names, split)
    eligible = {
        name: group
        for name, group in groups.items()
        if group.readers and not group.other_reads and all(reader.layer in once for reader in group.readers)
    }
    for bulk in _bulks({name: [reader.module for reader in group.readers] for name, group in eligible.items()}):
        if is_done(bulk):
            continue
        readers = {reader.layer: reader.module for name in bulk for reader in eligible[name].readers}
        yield bulk, _collect(module, readers, norms, split, progress)


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
        yield _collect(module, {name: able[name] for name in bulk}, norms, split, progress)


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
    readers = [_Eliminated(stats[reader.layer], unit_inputs(group, reader)) for reader in group.readers]
    units = group.width // group.parts
    alive = np.arange(units)
    order: list[int] = []
    errors = np.zeros(units + 1)
    at_once = max(1, most // _ROUNDS)
    while len(order) < most:
        losses = sum((reader.losses() for reader in readers), start=torch.zeros(len(alive), dtype=torch.float64))
        chosen = np.argsort(losses.numpy(), kind="stable")[: min(at_once, most - len(order))]
        rises = np.maximum(losses.numpy()[chosen], 0.0)
        errors[len(order) + 1 : len(order) + 1 + len(chosen)] = errors[len(order)] + np.cumsum(rises)
        order += alive[chosen].tolist()
        left = np.setdiff1d(np.arange(len(alive)), chosen)
        for reader in readers:
            reader.keep(torch.from_numpy(left))
        alive = alive[left]
    errors[len(order) + 1 :] = errors[len(order)]
    return Ranking(np.asarray([*order, *alive], dtype=np.int64), errors)


def unit_inputs(group: ChannelGroup, reader: Member) -> Tensor:
    """Return (units, n) indices of the reader's unknowns (inputs of one output) that belong to each unit of a group."""
    layer = reader.module
    cells = layer.weight[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
    stride = group.width // group.parts
    slots = torch.stack([reader.slots[reader.channels % stride == unit] for unit in range(stride)])
    return (slots[:, :, None] * cells + torch.arange(cells)).flatten(1)


class _Eliminated:
    """Reader whose input units are removed one after the other.

    Args:
        stats: Statistics of the reader.
        inputs: (units, n) unknowns of each unit.
    """

    def __init__(self, stats: ReaderStats, inputs: Tensor) -> None:
        self.inputs = inputs
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(stats.gram))
        self.weight = stats.weight.T.clone(memory_format=torch.contiguous_format)  # (n, outputs), changed below
        self.gone = torch.zeros(0, dtype=torch.int64)
        self.energy = max(stats.energy, 1e-12)

    def losses(self) -> Tensor:
        """Return (kept units,) rises of the squared error of the outputs, over their energy, when a unit is removed."""
        blocks = self.inverse[self.inputs[:, :, None], self.inputs[:, None, :]]
        rows = self.weight[self.inputs]  # units, n, outputs
        losses: Tensor = (torch.linalg.inv(blocks) * (rows @ rows.mT)).sum((1, 2)) / self.energy
        return losses

    def keep(self, units: Tensor) -> None:
        """Remove all other units, and refit the weights of the kept ones."""
        leaves = torch.ones(len(self.inputs), dtype=torch.bool)
        leaves[units] = False
        gone = self.inputs[leaves].flatten()
        across = self.inverse[gone]
        factor = torch.linalg.solve(across[:, gone], across)
        self.weight.addmm_(factor.T, self.weight[gone], alpha=-1)
        self.inverse.addmm_(across.T, factor, alpha=-1)  # removed entries become 0, and are not read any more
        self.inputs = self.inputs[units]
        self.gone = torch.cat([self.gone, gone])
        if len(self.gone) > _COMPACT * len(self.inverse):
            self._compact()

    def _compact(self) -> None:
        stays = torch.ones(len(self.inverse), dtype=torch.bool)
        stays[self.gone] = False
        left = stays.nonzero().flatten()
        self.weight = self.weight.index_select(0, left)
        self.inverse = self.inverse.index_select(0, left).index_select(1, left)
        self.inputs = (torch.cumsum(stays, 0) - 1)[self.inputs]
        self.gone = self.gone[:0]


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


def _collect(
    module: nn.Module, readers: Mapping[str, nn.Module], norms: Container[str], split: Split, progress: Progress
) -> dict[str, ReaderStats]:
    """Run images through the network and return the statistics of each reader."""
    sizes = {name: _unknowns(layer) for name, layer in readers.items()}
    grams = {name: GramSum(size) for name, size in sizes.items()}
    rows = dict.fromkeys(readers, 0)
    number = 0

    def watch(name: str):  # type: ignore[no-untyped-def]
        def hook(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            places = Places(positions_needed(sizes[name], len(split)), number)
            x, _ = regression_rows(layer, inputs[0], output, places)
            x = torch.cat([x, torch.ones(len(x), 1)], 1)
            grams[name].add(x)
            rows[name] += len(x)

        return hook

    with eval_mode(module), progress.task("what layers read", len(split)) as task:
        batches = evaluation_batches(split, _BATCH, "nothing")
        for number, (images, _) in enumerate(batches):  # noqa: B007 - read by the hooks
            run_watched(module, images, {module.get_submodule(name): watch(name) for name in readers})
            task.advance(len(images))
    return {
        name: _finished(name, reader, grams[name].matrix().div_(rows[name]), name in norms)
        for name, reader in readers.items()
    }


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
