"""Directional pruning: a threshold on batch-norm scales grows until enough scales are zero for the budget."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from compress.config.schema.methods import GrdaConfig
from compress.errors import StageError
from compress.pruning.methods.base import FADE, Removed, Setting, TrainingMethod
from compress.pruning.methods.soft_threshold import ThresholdedGroup, ZeroBudget, threshold_growth

_LEAST_STEPS = 10  # for the threshold to grow in
_LEAST_AFTER = 2  # in which removed channels are brought to zero
_MANY_AT_ZERO = 0.1  # of the kept channels, when the choice is made


class Grda(TrainingMethod):
    """Training-time method: a growing soft threshold on accumulators of the scales and shifts of batch norms.

        accumulator   v starts as the weights; v <- v - rate * gradient. No momentum, no weight decay
        threshold     g_t = c * sum over the steps s up to t of rate_s^(1/2 + mu) * (s^mu - (s - 1)^mu)
        weights       v * max(0, 1 - g_t / importance), the same factor for all scales and shifts of a unit
        importance    root mean square of the unit's scales v, times the norm of its readers at the start

    A unit is a channel in all layers of its group, or several that are removed together. Where no norm follows a layer,
    the norms of its filters replace the scale, and its bias is thresholded as well. All other weights are trained by
    SGD. The most important units at the start, as many as the smallest width of the group has, have no threshold: a
    layer without channels would end the network.

    Without `c` in the options, the threshold after `reached_at` of the steps is the quantile of the importance at the
    start that leaves enough zeros for the budget. Once there are enough zeros, the choice is final and the threshold
    grows no more. If zeros are still too few after `until` of the steps, the choice is made by importance. In half of
    the remaining steps, removed units that are not zero are brought to zero, and so is the contribution of zero-padded
    shortcuts to removed channels, which has no threshold. Kept units at zero are brought to their accumulators times
    the mean factor of the group, because the budget has room for them.

    Args:
        setting: Network, budget and schedule.
        options: See `GrdaConfig`.

    Raises:
        StageError: The run has too few steps for the threshold to grow in or after the choice, the interval allows one
            check only, or a given c is too small for the budget. The hint names a sufficient number.

    Source: Chao et al. 2020, "Directional Pruning of Deep Neural Networks", NeurIPS, arXiv:2006.09358 (single weights).
        Li et al. 2021, arXiv:2107.05328, prune structures so but have no code: the group form here is a reconstruction.
        Batch-norm scales alone, the norm of the readers, c and the end by a budget are adaptations.
    """

    name: ClassVar[str] = "grda"

    def __init__(self, setting: Setting, options: GrdaConfig | None = None) -> None:
        self.setting, self.options = setting, options or GrdaConfig()
        reached, self.last = (round(setting.steps * share) for share in (self.options.reached_at, self.options.until))
        _require_steps(setting, self.options, reached, self.last)
        self.groups = {name: ThresholdedGroup(setting, group) for name, group in setting.groups.items()}
        self.budget = ZeroBudget(setting.choose, self.groups)
        growth = threshold_growth(setting.rates, self.options.mu)
        self._growth = float(growth[:reached].sum())
        self.needed = self.budget.least_threshold()
        self.c = self.options.c or self.needed / self._growth
        self.thresholds = self.c * np.cumsum(growth)  # (steps,) after each step, until it grows no more
        if self.thresholds[self.last - 1] < self.needed:
            wanted = self.needed / float(growth[: self.last].sum())
            raise StageError(
                f"The threshold must grow to {self.needed:.3g}, so that zeros are enough for the budget; grda.c "
                f"{self.c:g} brings it to {self.thresholds[self.last - 1]:.3g} in {self.last} steps.",
                hint=f"Set grda.c to {wanted:.3g} or more, or leave it out.",
            )
        self.choice = FinalChoice(self.groups)

    @property
    def removed(self) -> Removed:
        """Removed channels; none before the choice is final."""
        return self.choice.removed or {}

    def threshold(self, step: int) -> float:
        """Return the threshold after a step."""
        return float(self.thresholds[step if self.choice.stopped is None else min(step, self.choice.stopped)])

    def on_gradients(self, step: int) -> None:
        """Add the gradients to the accumulators, and leave none to the optimizer."""
        for group in self.groups.values():
            group.accumulate(float(self.setting.rates[step]))

    def on_step_end(self, step: int) -> None:
        """Set the weights to the accumulators behind the threshold; choose on schedule."""
        threshold = self.threshold(step)
        importance = {name: group.importance() for name, group in self.groups.items()}
        factors = {name: group.factors(importance[name], threshold) for name, group in self.groups.items()}
        if self.choice.removed is None and (step >= self.last or step % self.options.interval == 0):
            self._choose(step, importance, factors)
        left = self.choice.left(step, self.setting.steps)
        for name, group in self.groups.items():
            faded = torch.where(self.choice.going(name), left, 1.0)
            group.write(torch.maximum(factors[name] * faded, self.choice.revived[name] * (1 - left)))
            group.shortcuts.give(faded.repeat(group.parts))

    def metrics(self) -> dict[str, float]:
        """Return the threshold, its last step, removed channels at 0 at the choice, and their strength now.

        `returned_channels` counts kept channels that were at 0 at the choice and came back: widths are multiples, and
        all groups have one threshold. `kept_zero_ratio` is the share of kept channels that were at 0 at the choice,
        returned or not. `kept_at_zero` counts kept channels that are still at 0.
        """
        choice = self.choice
        stopped = self.setting.steps - 1 if choice.stopped is None else choice.stopped
        left, kept_at_zero = [torch.zeros(0)], 0
        for name, group in self.groups.items():
            goes = _members(self.removed.get(name, ()), group.width)
            strength = group.strength()
            left.append((strength / group.before.clamp_min(1e-12))[goes])
            kept_at_zero += int((strength[~goes] == 0).sum())
        every = torch.cat(left)
        return {
            "threshold": self.threshold(stopped),
            "stopped_at_ratio": (stopped + 1) / self.setting.steps,
            "zero_ratio": choice.zero_ratio,
            "returned_channels": sum(
                int((choice.revived[name] > 0).sum()) * group.parts for name, group in self.groups.items()
            ),
            "kept_zero_ratio": choice.kept_zero / max(1, choice.kept),
            "kept_at_zero": kept_at_zero,
            "left_ratio": float(every.mean()) if len(every) else 0.0,
        }

    def cause(self) -> str:
        """Return the effect of the threshold, and the remedy for a higher loss after the cut."""
        left = self.metrics()["left_ratio"]
        if left == 0:
            return (
                f"All removed channels are at zero, {self.choice.zero_ratio:.1%} of them were when the choice was "
                "made. Layers behind them turn zero into something else."
            )
        return (
            f"The threshold had brought {self.choice.zero_ratio:.1%} of the removed channels to zero; the others were "
            f"chosen by their importance. Removed channels have {left:.2%} of their strength. Longer training or a "
            "larger grda.c would help."
        )

    def warnings(self) -> list[str]:
        """Return a warning where many kept channels were at zero when the choice was made."""
        kept, kept_zero = self.choice.kept, self.choice.kept_zero
        if kept_zero <= _MANY_AT_ZERO * kept:
            return []
        remedy = "Longer training, a smaller grda.interval or another method, such as 'regrow', would help."
        if self.options.c is not None:
            remedy = f"Leave grda.c out, or lower it towards {self.needed / self._growth:.3g}."
        return [
            f"{kept_zero} of {kept} kept channels ({kept_zero / kept:.0%}) were at zero when the "
            f"choice was made. The threshold was {self.threshold(self.setting.steps - 1):.3g}; of the weights as they "
            f"were at the start, {self.needed:.3g} leaves zeros enough for the budget. They were brought back where "
            f"their group had others, but have lost training. {remedy}"
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` resumes."""
        return {
            "accumulators": {name: group.values for name, group in self.groups.items()},
            "readers": {name: group.readers for name, group in self.groups.items()},
            "protected": {name: group.protected for name, group in self.groups.items()},
            "before": {name: group.before for name, group in self.groups.items()},
            "c": self.c,
            "needed": self.needed,
            "thresholds": torch.from_numpy(self.thresholds),
            **self.choice.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        for name, group in self.groups.items():
            group.values, group.readers = state["accumulators"][name], state["readers"][name]
            group.protected, group.before = state["protected"][name], state["before"][name]
        self.c, self.needed, self.thresholds = state["c"], state["needed"], state["thresholds"].numpy()
        self.choice.load_state_dict(state)

    def _choose(self, step: int, importance: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
        """Make the choice final once the zeros are enough for it, or on the last step."""
        if step < self.last and self.budget.zero_share(self.budget.choose(importance, factors), factors) < 1:
            return
        removed = self.budget.choose(importance, factors, is_final=True)
        self.choice.make(removed, step, factors, self.budget.zero_share(removed, factors))


class FinalChoice:
    """The final choice of removed channels, and the state of the others at that time.

    Args:
        groups: Group name -> accumulators.

    Attributes:
        removed: Removed channels; None before the choice.
        stopped: Step of the choice, after which the threshold grows no more.
        zero_ratio: Share of the removed channels that were at 0.
        kept: Number of kept channels.
        kept_zero: Kept channels that were at 0.
        revived: Group name -> (U,) factors to which kept units at 0 are brought back; 0 for all others.
    """

    def __init__(self, groups: Mapping[str, ThresholdedGroup]) -> None:
        self._groups = groups
        self.removed: Removed | None = None
        self.stopped: int | None = None
        self.zero_ratio = 0.0
        self.kept, self.kept_zero = 0, 0
        self.revived = {name: torch.zeros(group.units) for name, group in groups.items()}

    def make(self, removed: Removed, step: int, factors: Mapping[str, Tensor], zero_ratio: float) -> None:
        """Make the choice at a step, with the (U,) factors of the threshold by group."""
        self.removed, self.stopped, self.zero_ratio = removed, step, zero_ratio
        for name, present in factors.items():
            kept = ~self.going(name)
            self.kept += int(kept.sum()) * self._groups[name].parts
            self.kept_zero += int((kept & (present == 0)).sum()) * self._groups[name].parts
            among = kept & (present > 0) & ~self._groups[name].protected
            among = among if among.any() else kept & (present > 0)
            if among.any():
                self.revived[name] = torch.where(kept & (present == 0), present[among].mean(), 0.0)

    def going(self, name: str) -> Tensor:
        """Return (U,) bool: the removed units of a group."""
        group = self._groups[name]
        return _members((self.removed or {}).get(name, ()), group.width).reshape(group.parts, -1).any(0)

    def left(self, step: int, steps: int) -> float:
        """Return the factor of removed units: 1 up to the choice, then falling to 0 in half of the remaining steps."""
        if self.stopped is None:
            return 1.0
        return max(0.0, 1 - (step - self.stopped) / max(1.0, FADE * (steps - 1 - self.stopped)))

    def state_dict(self) -> dict[str, Any]:
        """Return the entries of the method's state that `load_state_dict` reads."""
        return {
            "chosen": None if self.removed is None else {name: list(gone) for name, gone in self.removed.items()},
            "stopped": self.stopped,
            "zero_ratio": self.zero_ratio,
            "kept": [self.kept, self.kept_zero],
            "revived": self.revived,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the state of the method."""
        chosen = state["chosen"]
        self.removed = None if chosen is None else {name: tuple(gone) for name, gone in chosen.items()}
        self.kept, self.kept_zero = state["kept"]
        self.stopped, self.zero_ratio, self.revived = state["stopped"], state["zero_ratio"], state["revived"]


def _require_steps(setting: Setting, options: GrdaConfig, reached: int, last: int) -> None:
    """Raise StageError where the steps are too few for the threshold to grow in, or after the choice."""
    setting.require_left(last)
    growing, left = int(np.count_nonzero(setting.rates[:reached])), setting.steps - last
    if growing < _LEAST_STEPS:
        least = math.ceil(_LEAST_STEPS / options.reached_at)
        raise StageError(
            f"The threshold must grow over {_LEAST_STEPS} steps at least whose learning rate is not 0, of "
            f"{setting.steps} steps it has {growing}.",
            hint=f"Train for at least {least} steps, or raise grda.reached_at.",
        )
    if left < _LEAST_AFTER:
        raise StageError(
            f"At least {_LEAST_AFTER} steps must follow the choice, of {setting.steps} steps it leaves {left}.",
            hint=f"Train for at least {math.ceil(_LEAST_AFTER / (1 - options.until))} steps, or lower grda.until.",
        )
    if options.interval >= last:
        raise StageError(
            f"Zeros must be looked for while the threshold grows, got grda.interval {options.interval} and a "
            f"last choice after {last} of {setting.steps} steps.",
            hint=f"Lower grda.interval below {last}, or train for longer.",
        )


def _members(channels: Iterable[int], width: int) -> Tensor:
    goes = torch.zeros(width, dtype=torch.bool)
    goes[list(channels)] = True
    return goes
