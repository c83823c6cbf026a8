"""Connection sensitivity: first-order change of the loss at a gate, over all images at once."""

from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import InternalError
from compress.pruning.criteria.base import GradientStats, gate_sum, require_producers
from compress.pruning.criteria.taylor import Taylor
from compress.pruning.groups import ChannelGroup


class Snip(Taylor):
    """|d loss / d gate| of the mean loss of all images: `taylor` with one gradient, made for untrained networks.

    Source: Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR,
        arXiv:1810.02340. Gates of channels in place of single weights, and widths by a budget, are adaptations.
    """

    name: ClassVar[str] = "snip"

    def scores(self, group: ChannelGroup, stats: GradientStats | None) -> Tensor:
        """Score each channel of `group` by the absolute value of the mean derivative over all images.

        Args:
            group: C coupled channels.
            stats: From `collect_gradients`, in entries of equally many images.

        Returns:
            (C,) float32, >= 0.

        Raises:
            UnsupportedLayer: The group has no producer.
        """
        if stats is None:
            raise InternalError("Criterion 'snip' was called without gradients.")
        require_producers(group)
        total = sum((gate_sum(group, batch) for batch in stats.batches), start=torch.zeros(group.width))
        return total.abs() / max(1, len(stats.batches))
