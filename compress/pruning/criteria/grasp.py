"""Gradient signal preservation: channels whose removal lowers the gradient norm least go first."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from compress.errors import InternalError
from compress.pruning.criteria.base import Evidence, GradientStats, Order, WidthsBy, gate_sum, require_producers
from compress.pruning.groups import ChannelGroup


class Grasp:
    """Derivative of the gradient norm by a gate of each channel, signed on an untrained network.

        untrained   signed: a channel whose removal raises the gradient norm goes first (temperature 200)
        trained     absolute: the channel whose removal changes the gradient norm least goes first (temperature 1);
                    a trained network has hardly any gradient, and raising it means leaving the minimum

    Source: Wang et al. 2020, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR,
        arXiv:2002.07376; for trained networks Lubana and Dick 2021, "A Gradient Flow Framework For Analyzing Network
        Pruning", ICLR. Gates in place of single weights, and widths by a budget, are adaptations.
    """

    name: ClassVar[str] = "grasp"
    evidence: ClassVar[Evidence] = "gradient_flow"
    order: ClassVar[Order] = "scores"
    widths_by: ClassVar[WidthsBy] = "scores"
    comparable: ClassVar[bool] = True
    treats_equals_equally: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        pass

    def scores(self, group: ChannelGroup, stats: GradientStats | None) -> Tensor:
        """Score each channel of `group` by the derivative of <g, g(s)> by its gate.

        The derivatives of all producers of a channel are added before any absolute value is taken.

        Args:
            group: C coupled channels.
            stats: From `collect_gradient_flow`; signed where it was collected from an untrained network.

        Returns:
            (C,) float32; negative only where `stats.is_signed`.

        Raises:
            UnsupportedLayer: The group has no producer.
        """
        if stats is None:
            raise InternalError("Criterion 'grasp' was called without derivatives of the gradient norm.")
        require_producers(group)
        total = sum((gate_sum(group, entry) for entry in stats.batches), start=torch.zeros(group.width))
        return total if stats.is_signed else total.abs()

    def damages(self, scores: np.ndarray) -> np.ndarray:
        """Return (U + 1,) the gradient norm lost with the n lowest scores; what raises it counts as no loss.

        First-order changes of the gradient norm add up, so the sum is not squared.
        """
        lost: np.ndarray = np.append(0.0, np.cumsum(np.maximum(np.sort(scores), 0.0)))
        return lost
