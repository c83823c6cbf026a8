"""How large is the batch-norm scale of a channel?"""

from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import UnsupportedLayer
from compress.pruning.criteria.base import Evidence, GradientStats, Order, WidthsBy
from compress.pruning.groups import ChannelGroup


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
