"""Incremental regularisation: penalties rise for channels of low rank and fall again for channels that climb."""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from compress.config.schema.methods import IncRegConfig
from compress.pruning.methods.base import Setting
from compress.pruning.methods.scored import Scored

_MIDDLE = 0.25


class IncReg(Scored):
    """Training-time method: an L2 penalty of each channel changes every few steps, by the channel's average rank.

    The change is +A for the weakest channel, 0 at the rank where the budget is met, and negative beyond; a penalty is
    never below 0. A channel whose penalty has reached the ceiling keeps it, and is removed first. After the final
    choice, removed channels have the ceiling and all others no penalty.

    Args:
        setting: Network, budget and schedule.
        options: See `IncRegConfig`.

    Raises:
        StageError: The run is too short for the penalties to bring the channels down; the hint names a
            sufficient number of steps.

    Source: Wang et al. 2018, "Structured Pruning for Efficient ConvNets via Incremental Regularization",
        arXiv:1804.09461. One ranking of all channels under a budget in place of ratios by layer, penalties on the batch
        norms too, and a schedule in shares of the run are adaptations.
    """

    name: ClassVar[str] = "increg"

    def __init__(self, setting: Setting, options: IncRegConfig | None = None) -> None:
        options = options or IncRegConfig()
        super().__init__(setting, round(setting.steps * (1 - options.frozen_ratio)), options.interval)
        self.penalties = {name: torch.zeros(group.width) for name, group in setting.groups.items()}
        self.ranks = {name: torch.zeros(group.width) for name, group in setting.groups.items()}
        self.rankings = 0
        if options.ceiling is None:
            self.ceiling = setting.sized_ceiling(self.frozen, 1.0)
        else:
            self.ceiling = options.ceiling
            setting.require_decay(self.frozen, self.ceiling, f"a penalty of {self.ceiling:g}")
        # the weakest reach the ceiling halfway to the final choice
        self.most = 2 * self.ceiling * options.interval / max(1, self.frozen)

    def on_gradients(self, step: int) -> None:
        """Rank, change the penalties on schedule, and add them to the gradients."""
        self.observe(step)
        if step < self.frozen and step % self.interval == 0:
            self._change()
        for name, penalties in self.penalties.items():
            self.tensors[name].decay(penalties, with_filters=True)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` resumes."""
        own = {"penalties": self.penalties, "ranks": self.ranks, "rankings": self.rankings}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        super().load_state_dict(state)
        self.penalties, self.ranks, self.rankings = state["penalties"], state["ranks"], state["rankings"]

    def _choose(self, is_final: bool) -> None:
        """Add the present ranks to their averages, and choose by the averages."""
        every = torch.cat(list(self.scores.values()))
        present = torch.empty(len(every)).scatter_(0, every.argsort(stable=True), torch.arange(float(len(every))))
        self.rankings += 1
        for name, ranks in self._parted(present).items():
            self.ranks[name].lerp_(ranks + 1, 1 / self.rankings)  # no rank is 0, so that none is removed for nothing
        gone = {name: self.penalties[name] >= self.ceiling for name in self.ranks}
        wanted = {name: torch.where(gone[name], torch.zeros_like(ranks), ranks) for name, ranks in self.ranks.items()}
        before, self.scores = self.scores, wanted
        try:
            super()._choose(is_final)
        finally:
            self.scores = before
        if is_final:
            for name, penalties in self.penalties.items():
                penalties.copy_(self.goes(name) * self.ceiling)

    def _change(self) -> None:
        """Change every penalty by its channel's position: removed channels before kept ones, both by average rank."""
        ranks = torch.cat([self.ranks[name] for name in self.penalties])
        goes = torch.cat([self.goes(name) for name in self.penalties])
        order = torch.from_numpy(np.lexsort((ranks.numpy(), ~goes.numpy())))
        places = torch.empty(len(order), dtype=torch.int64).scatter_(0, order, torch.arange(len(order)))
        changes = self._parted(increments(len(order), int(goes.sum()), self.most)[places])
        for name, penalties in self.penalties.items():
            changed = (penalties + changes[name]).clamp(0, self.ceiling)
            penalties.copy_(torch.where(penalties >= self.ceiling, penalties, changed))

    def _parted(self, every: Tensor) -> dict[str, Tensor]:
        """Split a row of all channels by group."""
        parts = torch.split(every, [len(penalties) for penalties in self.penalties.values()])
        return dict(zip(self.penalties, parts, strict=True))


def increments(count: int, going: int, most: float) -> Tensor:
    """Return (count,) the change of the penalty of each channel, weakest channel first.

    The curve falls from `most`, is 0 at position `going`, and is symmetric by rotation about its middle, but never
    below -`most`.

    >>> [round(float(value), 3) for value in increments(9, 4, 1.0)]
    [1.0, 0.595, 0.354, 0.203, 0.0, -0.341, -0.914, -1.0, -1.0]
    """
    if going == 0:
        return torch.full((count,), -most)
    places = torch.arange(count, dtype=torch.float64)
    rate = math.log(2 / _MIDDLE) / going
    middle = -math.log(_MIDDLE) / rate
    falling = torch.exp(-rate * places)
    beyond = 2 * _MIDDLE - torch.exp((-rate * (2 * middle - places)).clamp_max(1.0))
    return (most * torch.where(places < middle, falling, beyond).clamp_min(-1.0)).float()
