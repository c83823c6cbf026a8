"""Provable filter pruning (pfp, sipp): remove first the channels of the smallest relative contribution to readers.

The evidence is collected on images without labels: for each reader, the share of each input in its outputs.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import InternalError, UnsupportedLayer
from compress.model.modes import eval_mode
from compress.pruning.criteria.base import Evidence, Order, WidthsBy
from compress.pruning.groups import ChannelGroup
from compress.pruning.repair.lockstep import run_watched

_POSITIONS = 16  # of each image and layer
_CHUNK = 2**24  # products at once
_SMALLEST = 1e-30
_ABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Contributions:
    """Shares that each input channel of a layer has in the layer's outputs.

    Products of weights and inputs are taken by sign: a share is a positive product over the sum of all positive
    products of that output, or a negative one over the sum of all negative ones.

    Attributes:
        largest: Layer -> (inputs,) float32 in [0, 1], the largest share over images, positions, outputs, kernel cells.
        mean: Layer -> (inputs,) float32 in [0, 1], as `largest`, but with the mean over the positions of an image.
    """

    largest: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]


def collect_contributions(
    module: nn.Module, groups: Iterable[ChannelGroup], batches: Iterable[tuple[Tensor, Any]]
) -> Contributions:
    """Run images through a network and record the shares at every reader that is a convolution or linear layer.

    At most 16 positions of each image and layer are used. Layers of other kinds, transposed convolutions among them,
    are left out.

    Args:
        module: The network; left unchanged.
        groups: Groups whose readers are watched.
        batches: (images, targets) pairs of a few images each; targets are not used.
    """
    names = sorted({r.layer for group in groups for r in group.readers if isinstance(r.module, _ABLE)})
    found = {name: _Shares(module.get_submodule(name)) for name in names}
    number = 0

    def watch(name: str) -> Any:
        return lambda _layer, inputs, _output: found[name].add(inputs[0], number)

    with torch.no_grad(), eval_mode(module):
        for number, (images, _) in enumerate(batches):  # noqa: B007 - read by hooks
            run_watched(module, images, {module.get_submodule(name): watch(name) for name in names})
    return Contributions(
        {name: shares.of_inputs(shares.largest) for name, shares in found.items()},
        {name: shares.of_inputs(shares.largest_mean) for name, shares in found.items()},
    )


class _Shares:
    """Shares at one layer, updated image by image.

    Attributes:
        largest: (groups, unknowns) largest share so far.
        mean: (outputs, unknowns) mean share over positions, the largest over images.
    """

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, _ABLE)
        self.layer = layer
        self.groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        self.weight = layer.weight.detach().float().flatten(1)
        self.cells = 1 if isinstance(layer, nn.Linear) else layer.weight[0, 0].numel()
        self.largest = torch.zeros(self.groups, self.weight.shape[1])
        self.mean = torch.zeros(self.weight.shape)

    def add(self, inputs: Tensor, seed: int) -> None:
        """Update the shares from some positions of each image of a batch."""
        for patches in self._patches(inputs, seed):  # (groups, positions, unknowns) of one image
            for number, (x, weight) in enumerate(zip(patches, self.weight.chunk(self.groups), strict=True)):
                rows = slice(number * len(weight), (number + 1) * len(weight))
                for sign in (1.0, -1.0):
                    self._add_sign(x, weight, sign, number, rows)

    def _add_sign(self, x: Tensor, weight: Tensor, sign: float, number: int, rows: slice) -> None:
        up, down = (sign * weight).clamp_min(0), (-sign * weight).clamp_min(0)
        total = (x.clamp_min(0) @ up.T + (-x).clamp_min(0) @ down.T).clamp_min(_SMALLEST)  # positions, outputs
        inverse = total.reciprocal()
        share = (up * (inverse.T @ x.clamp_min(0)) + down * (inverse.T @ (-x).clamp_min(0))) / len(x)
        self.mean[rows] = torch.maximum(self.mean[rows], share)
        step = max(1, _CHUNK // max(1, x.numel()))
        for start in range(0, len(weight), step):
            some = slice(start, start + step)
            products = (sign * weight[some, None] * x).clamp_min_(0).mul_(inverse.T[some, :, None])
            self.largest[number] = torch.maximum(self.largest[number], products.amax((0, 1)))

    @property
    def largest_mean(self) -> Tensor:
        """(groups, unknowns) the largest mean over outputs and images."""
        return self.mean.reshape(self.groups, -1, self.mean.shape[1]).amax(1)

    def of_inputs(self, values: Tensor) -> Tensor:
        """Return (inputs,) the largest value of each input channel, from (groups, unknowns) values."""
        return values.reshape(-1, self.cells).amax(1).clamp_max(1.0)

    def _patches(self, inputs: Tensor, seed: int) -> Iterable[Tensor]:
        layer = self.layer
        generator = torch.Generator().manual_seed(seed)
        if isinstance(layer, nn.Linear):
            rows = inputs.float().reshape(len(inputs), -1, inputs.shape[-1])
            chosen = torch.randperm(rows.shape[1], generator=generator)[:_POSITIONS]
            yield from rows[:, chosen][:, None]
            return
        flat = isinstance(layer, nn.Conv1d)
        maps = inputs.float()[:, :, None] if flat else inputs.float()
        kernel, stride, dilation = (
            (1, *value) if flat else tuple(value) for value in (layer.kernel_size, layer.stride, layer.dilation)
        )
        padding = layer._reversed_padding_repeated_twice
        if any(padding):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            maps = F.pad(maps, [*padding, 0, 0] if flat else padding, mode=mode)
        columns = F.unfold(maps, kernel, dilation=dilation, stride=stride)  # images, inputs * cells, positions
        chosen = torch.randperm(columns.shape[2], generator=generator)[:_POSITIONS]
        some = columns[:, :, chosen].transpose(1, 2)
        yield from some.reshape(*some.shape[:2], self.groups, -1).transpose(1, 2)


_CONSTANT, _FAILURE = 3.0, 1e-16  # C and delta of the paper's code
_SPAN = (-27.0, 27.0)  # natural logarithms of the smallest and largest error parameter
_BISECTIONS = 60


class Pfp:
    """Sensitivity of a channel: its largest share in any output of any layer that reads it. No labels are used.

    A width's damage is the error parameter eps at which the paper keeps that many channels, so that one ranking of all
    groups by damage is the paper's shared error; `allocation: shared_error` is its rule to the letter.

    Source: Liebenwein et al. 2020, "Provable Filter Pruning for Efficient Neural Networks", ICLR, arXiv:1911.07412, in
        its deterministic form. The largest share over all readers of a group replaces the paper's chain of layers, and
        the number of positions inside a logarithm is left out; both are adaptations.
    """

    name: ClassVar[str] = "pfp"
    evidence: ClassVar[Evidence] = "contributions"
    order: ClassVar[Order] = "scores"
    widths_by: ClassVar[WidthsBy] = "scores"
    comparable: ClassVar[bool] = True
    treats_equals_equally: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        pass

    def scores(self, group: ChannelGroup, stats: Contributions | None) -> Tensor:
        """Score each channel of `group` by its sensitivity.

        Args:
            group: C coupled channels.
            stats: From `collect_contributions`.

        Returns:
            (C,) float32 in [0, 1].

        Raises:
            UnsupportedLayer: No convolution or linear layer reads the group.
        """
        if stats is None:
            raise InternalError(f"Criterion '{self.name}' was called without contributions.")
        shares = self._shares(stats)
        total = torch.zeros(group.width)
        readers = [reader for reader in group.readers if reader.layer in shares]
        if not readers:
            raise UnsupportedLayer(
                f"Criterion '{self.name}' needs a convolution or linear layer that reads a channel group, none reads "
                f"'{group.name}'."
            )
        for reader in readers:
            total.scatter_reduce_(0, reader.channels, shares[reader.layer][reader.slots], "amax")
        return total

    def damages(self, scores: np.ndarray) -> np.ndarray:
        """Return (U + 1,) the error parameter eps at which all but n channels are kept.

        Source: m(eps) = ceil(3 (6 + 2 eps) S alpha / eps^2) samples, S the sum of all sensitivities, and
            kept(eps) = ceil(sum of 1 - (1 - p)^m) with p = sensitivity / S.
        """
        units, total = len(scores), float(scores.sum())
        errors = np.zeros(units + 1)
        if total <= 0 or units < 2:
            return errors
        alpha = 2 * _CONSTANT * math.log(16 / _FAILURE)
        missed = np.log1p(-np.minimum(scores / total, 1 - 1e-12))
        kept = np.arange(units, 0, -1)  # with 0, 1, ... removed
        low, high = np.full(units, _SPAN[0]), np.full(units, _SPAN[1])
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            eps = np.exp(middle)
            samples = np.ceil(3 * (6 + 2 * eps) * total * alpha / eps**2)
            expected = -np.expm1(samples[:, None] * missed).sum(1)
            fits = np.ceil(expected - 1e-9) <= kept
            low, high = np.where(fits, low, middle), np.where(fits, middle, high)
        errors[:-1] = np.where(high <= _SPAN[0] + 1e-6, 0.0, np.exp(high))
        errors[0] = 0.0
        errors[-1] = errors[-2]
        return np.maximum.accumulate(errors)

    def _shares(self, stats: Contributions) -> dict[str, Tensor]:
        return dict(stats.largest)


class Sipp(Pfp):
    """Sensitivity as in `pfp`, from the mean share over an image's positions, on which outliers weigh less.

    With `score_images: 1` it is the paper's single-sample form.

    Source: Baykal et al. 2019, "SiPPing Neural Networks: Sensitivity-informed Provable Pruning of Neural Networks",
        arXiv:1910.05422, whose sensitivities of single weights are reduced to their largest for each channel.
    """

    name: ClassVar[str] = "sipp"

    def _shares(self, stats: Contributions) -> dict[str, Tensor]:
        return dict(stats.mean)
