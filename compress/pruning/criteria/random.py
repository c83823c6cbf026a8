"""What is the baseline that every criterion must beat?"""

import zlib
from typing import ClassVar

import torch
from torch import Tensor

from compress.pruning.criteria.base import Evidence, GradientStats, Order, WidthsBy
from compress.pruning.groups import ChannelGroup


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
            group: C coupled channels; only its name and width matter.
            stats: Unused.

        Returns:
            (C,) float32 in [0, 1).
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + zlib.crc32(group.name.encode()))
        return torch.rand(group.width, generator=generator)
