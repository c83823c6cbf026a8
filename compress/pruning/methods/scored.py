"""Base of training-time methods that choose channels by scores."""

from typing import Any

import torch
from torch import Tensor

from compress.pruning.methods.base import FADE, Removed, Setting, TrainingMethod
from compress.pruning.methods.group_tensors import GroupTensors

_REMEMBERED = 0.9


class Scored(TrainingMethod):
    """Base of methods that score channels and choose by the scores on a schedule.

    Args:
        setting: Network, budget and schedule.
        frozen: Step of the final choice.
        interval: Steps from one choice to the next before the final one.
        first: Step of the first choice; no channel is removed before.
    """

    def __init__(self, setting: Setting, frozen: int, interval: int, first: int = 0) -> None:
        self.setting, self.frozen, self.interval, self.first = setting, frozen, interval, first
        self.tensors = {name: GroupTensors(group) for name, group in setting.groups.items()}
        self.scores = {name: torch.zeros(group.width) for name, group in setting.groups.items()}
        self.chosen: Removed = {}
        self.reactivated = 0
        self._before = {name: tensors.strength() for name, tensors in self.tensors.items()}

    @property
    def removed(self) -> Removed:
        """Removed channels."""
        return self.chosen

    def on_step_end(self, step: int) -> None:
        """Fade the contribution of zero-padded shortcuts to removed channels, once the choice is final."""
        if step < self.frozen:
            return
        left = faded(step, self.frozen, self.setting.steps)
        for name in self.chosen:
            self.tensors[name].shortcuts.give(torch.where(self.goes(name), left, 1.0))

    def observe(self, step: int) -> None:
        """Add the gradients of this step to the scores, and choose on schedule."""
        derivatives = torch.cat([tensors.derivatives() for tensors in self.tensors.values()]).cpu()
        widths = [len(scores) for scores in self.scores.values()]
        for name, present in zip(self.scores, torch.split(derivatives, widths), strict=True):
            self._average(name, present.abs())
        is_due = self.first <= step < self.frozen and (step - self.first) % self.interval == 0
        if is_due or step == self.frozen:
            self._choose(step == self.frozen)

    def goes(self, name: str) -> Tensor:
        """Return (C,) bool: the channels of a group that the present choice removes."""
        goes = torch.zeros(self.setting.groups[name].width, dtype=torch.bool)
        goes[list(self.chosen.get(name, ()))] = True
        return goes

    def metrics(self) -> dict[str, float]:
        """Return the number of reactivated channels, and the mean share of their strength left in removed channels."""
        left = [
            (tensors.strength() / self._before[name].clamp_min(1e-12))[self.goes(name)]
            for name, tensors in self.tensors.items()
        ]
        every = torch.cat(left) if left else torch.zeros(0)
        return {"reactivated": self.reactivated, "left_ratio": float(every.mean()) if len(every) else 0.0}

    def cause(self) -> str:
        """Return the likely cause of a higher loss after the cut, and the remedy."""
        left = self.metrics()["left_ratio"]
        return (
            f"The removed channels had {left:.2%} of their strength left; more steps after the final choice would help."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` resumes."""
        return {
            "scores": self.scores,
            "chosen": {name: list(channels) for name, channels in self.chosen.items()},
            "reactivated": self.reactivated,
            "before": self._before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.scores, self._before = state["scores"], state["before"]
        self.chosen = {name: tuple(channels) for name, channels in state["chosen"].items()}
        self.reactivated = state["reactivated"]

    def _average(self, name: str, present: Tensor) -> None:
        """Add the (C,) absolute derivatives of one step to the scores of a group."""
        self.scores[name].mul_(_REMEMBERED).add_(present, alpha=1 - _REMEMBERED)

    def _choose(self, is_final: bool) -> None:
        before = {(name, channel) for name, channels in self.chosen.items() for channel in channels}
        self.chosen = self.setting.choose(self.scores, is_final=is_final)
        after = {(name, channel) for name, channels in self.chosen.items() for channel in channels}
        self.reactivated += len(before - after)


def faded(step: int, first: int, steps: int) -> float:
    """Return the factor in [0, 1] after a step; it falls linearly to 0 within half of the steps from `first` on.

    >>> [faded(step, 4, 8) for step in range(4, 8)]
    [0.5, 0.0, 0.0, 0.0]
    """
    return max(0.0, 1 - (step + 1 - first) / max(1.0, FADE * (steps - first)))
