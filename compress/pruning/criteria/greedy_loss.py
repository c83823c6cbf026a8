"""Greedy forward selection by the loss: from no channels on, add the channel with which the loss is least."""

import math
import zlib
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from compress.pruning.criteria.base import Order, Ranking, WidthsBy
from compress.pruning.criteria.taylor import Taylor
from compress.pruning.groups import ChannelGroup

_MISSED = 0.1  # the chance that a random subset holds none of the best
_SELECTED = 0.5  # the share of the units that subsets are sized for


class GreedyLoss(Taylor):
    """Stochastic greedy selection: each step tries a random subset of the unselected channels on one fixed batch.

    With n of U units selected, the weights that read them are multiplied by U / n: the paper's uniform weights. Subsets
    hold ln(10) / 0.5 candidates, which finds one of the best of a half-full group with a chance of 90 %. The selection
    costs a few forward passes for each channel, so it suits small networks.

    Source: Ye et al. 2020, "Good Subnetworks Provably Exist: Pruning via Greedy Forward Selection", ICML,
        arXiv:2003.01794; subsets as in Khanna et al. 2017, "Scalable Greedy Feature Selection via Weak Submodularity",
        AISTATS, arXiv:1703.02723. The network around the group is unchanged (the paper goes from layer to layer and
        trains in between).
    """

    name: ClassVar[str] = "greedy_loss"
    order: ClassVar[Order] = "loss"
    widths_by: ClassVar[WidthsBy] = "errors"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def rank_by_loss(self, group: ChannelGroup, loss_of: Callable[[Tensor], float], most: int) -> Ranking:
        """Rank the units of a group by losses of the complete network.

        Args:
            group: C channels in `parts` equal parts, U = C / parts.
            loss_of: (C,) float32 factors on the weights that read each channel -> mean loss on one fixed batch.
            most: Largest number of units to remove.

        Returns:
            The order; errors are rises of the loss in nats; `scales` are U / n for the n units kept.
        """
        units = group.width // group.parts
        generator = np.random.default_rng([self.seed, zlib.crc32(group.name.encode())])
        size = max(1, math.ceil(-math.log(_MISSED) / _SELECTED))
        whole = loss_of(torch.ones(group.width))
        left = list(range(units))
        entered: list[int] = []
        errors, scales = np.zeros(units + 1), np.ones((units + 1, units), dtype=np.float32)

        def loss_with(chosen: list[int]) -> float:
            mask = torch.zeros(units)
            mask[chosen] = units / len(chosen)
            return loss_of(mask.repeat(group.parts))

        while len(left) > 1:
            tried = generator.choice(left, size=min(size, len(left)), replace=False).tolist()
            losses = [loss_with([*entered, unit]) for unit in tried]
            best = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))
            entered.append(tried[best])
            left.remove(tried[best])
            removed = len(left)
            errors[removed] = max(losses[best] - whole, 0.0) if math.isfinite(losses[best]) else math.inf
            scales[removed] = 0.0
            scales[removed, entered] = units / len(entered)
        order = np.asarray([*left, *entered[::-1]], dtype=np.int64)
        worst = float(errors[np.isfinite(errors)].max())
        errors = np.maximum.accumulate(np.nan_to_num(errors, posinf=2 * worst + 1))
        errors[most + 1 :] = errors[most]
        return Ranking(order, errors, scales)
