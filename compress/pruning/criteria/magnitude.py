"""Criteria without data: norms of filters (l1, l2), batch-norm scales (bn_scale), random scores (random).

A batch norm divides the size of a filter out, so filters are multiplied by gamma / sqrt(variance + eps) of the norm
behind them before they are measured. Random scores are the reference for all criteria.
"""

import zlib
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedLayer
from compress.pruning.criteria.base import Evidence, GradientStats, Order, WidthsBy, require_producers
from compress.pruning.groups import ChannelGroup, Member


class _FilterNorm:
    """The norm of order `power` over all folded filters that produce a channel."""

    name: ClassVar[str]
    evidence: ClassVar[Evidence] = "weights"
    order: ClassVar[Order] = "scores"
    widths_by: ClassVar[WidthsBy] = "scores"
    comparable: ClassVar[bool] = False
    treats_equals_equally: ClassVar[bool] = True
    power: ClassVar[int]

    def __init__(self, seed: int = 0) -> None:
        pass

    @torch.no_grad()
    def scores(self, group: ChannelGroup, stats: GradientStats | None) -> Tensor:
        """Score each channel of `group` by the norm of the filters that produce it.

        Args:
            group: C coupled channels; every producer in it is read, none is changed.
            stats: Unused; this criterion needs no data.

        Returns:
            (C,) float32, >= 0. Zero for a channel whose filters are all zero.

        Raises:
            UnsupportedLayer: The group has no convolution or linear producer.

        Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710.
        """
        require_producers(group)
        total = torch.zeros(group.width, dtype=torch.float64)
        for producer, gate in zip(group.producers, group.gates, strict=True):
            sizes = folded_filters(producer, gate).abs().pow(self.power).sum(1)
            total.index_add_(0, producer.channels, sizes[producer.slots])
        return total.pow(1 / self.power).float()


class L1(_FilterNorm):
    """Sum of absolute filter values."""

    name = "l1"
    power = 1


class L2(_FilterNorm):
    """Euclidean norm of the filters."""

    name = "l2"
    power = 2


def folded_filters(producer: Member, gate: Member) -> Tensor:
    """Return a producer's filters, (outputs, values) float64, scaled by the batch norm that follows it."""
    layer = producer.module
    weight = layer.weight.detach().double()  # type: ignore[union-attr,operator]
    if getattr(layer, "transposed", False):
        weight = weight.transpose(0, 1)
    filters = weight.reshape(weight.shape[0], -1)
    norm = gate.module
    if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and norm.running_var is not None:
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.affine:
            scale = scale * norm.weight.detach().double()
        if len(scale) == len(filters):
            filters = filters * scale[:, None]
    return filters


class BnScale:
    """The absolute scale (gamma) of the batch norm behind each producer."""

    name: ClassVar[str] = "bn_scale"
    evidence: ClassVar[Evidence] = "weights"
    order: ClassVar[Order] = "scores"
    widths_by: ClassVar[WidthsBy] = "scores"
    comparable: ClassVar[bool] = False
    treats_equals_equally: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        pass

    @torch.no_grad()
    def scores(self, group: ChannelGroup, stats: GradientStats | None) -> Tensor:
        """Score each channel of `group` by the sum of |gamma| over its batch norms.

        Args:
            group: C coupled channels; its batch norms are read, none is changed.
            stats: Unused; this criterion needs no data.

        Returns:
            (C,) float32, >= 0.

        Raises:
            UnsupportedLayer: The group has no norm with a scale.

        Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming",
            arXiv:1708.06519.
        """
        total = torch.zeros(group.width)
        scaled = [gate for gate in group.gates if gate.is_norm and isinstance(gate.module.weight, Tensor)]
        if not scaled:
            raise UnsupportedLayer(
                f"Criterion 'bn_scale' needs a batch norm with a scale, group '{group.name}' has none.",
                hint="Exclude the group, or choose taylor or l1.",
            )
        for gate in scaled:
            assert isinstance(gate.module.weight, Tensor)
            total.index_add_(0, gate.channels, gate.module.weight.detach().abs().float()[gate.slots])
        return total


class Random:
    """Uniform random scores, the same for the same seed and group."""

    name: ClassVar[str] = "random"
    evidence: ClassVar[Evidence] = "weights"
    order: ClassVar[Order] = "scores"
    widths_by: ClassVar[WidthsBy] = "scores"
    comparable: ClassVar[bool] = True
    treats_equals_equally: ClassVar[bool] = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, group: ChannelGroup, stats: GradientStats | None) -> Tensor:
        """Score each channel of `group` by a uniform random number.

        Args:
            group: C coupled channels; only its name and width are used.
            stats: Unused.

        Returns:
            (C,) float32 in [0, 1).
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + zlib.crc32(group.name.encode()))
        return torch.rand(group.width, generator=generator)
