"""Taylor criterion: first-order change of the loss when a channel is scaled down."""

from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import InternalError
from compress.pruning.criteria.base import Evidence, GradientStats, Order, WidthsBy, gate_sum, require_producers
from compress.pruning.groups import ChannelGroup


class Taylor:
    """The first-order effect of a virtual gate behind the batch norm, summed over all producers of the channel."""

    name: ClassVar[str] = "taylor"
    evidence: ClassVar[Evidence] = "gate_gradients"
    order: ClassVar[Order] = "scores"
    widths_by: ClassVar[WidthsBy] = "scores"
    comparable: ClassVar[bool] = True
    treats_equals_equally: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        pass

    def scores(self, group: ChannelGroup, stats: GradientStats | None) -> Tensor:
        """Score each channel of `group` by the mean over batches of |d loss / d gate|.

        The derivatives of all producers of a channel are added before the absolute value is taken, so each channel of
        a residual stream gets one score.

        Args:
            group: C coupled channels.
            stats: From `collect_gradients`.

        Returns:
            (C,) float32, >= 0. Zero for a channel that nothing reads.

        Raises:
            UnsupportedLayer: The group has no producer.

        Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv:1906.10771, with the
            gate of each channel placed behind its batch norm.
        """
        if stats is None:
            raise InternalError("Criterion 'taylor' was called without gradients.")
        require_producers(group)
        total = torch.zeros(group.width)
        for batch in stats.batches:
            total += gate_sum(group, batch).abs()
        return total / max(1, len(stats.batches))
