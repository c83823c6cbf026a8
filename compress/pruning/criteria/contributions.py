"""Relative contributions of channels to the outputs of the layers that read them: the evidence of `pfp` and `sipp`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.cost.macs import eval_mode
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

    At most 16 positions of each image and layer are looked at. Layers of other kinds, transposed convolutions among
    them, are left out.

    Args:
        module: The network; left as it is.
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
    """Shares at one layer while images pass.

    Attributes:
        largest: (groups, unknowns) over everything seen.
        mean: (outputs, unknowns) over images.
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
        """Look at some positions of each image of a batch."""
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
