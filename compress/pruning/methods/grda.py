"""Directional pruning: a threshold on batch-norm scales grows until those at zero are enough for the budget."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from compress.config.schema.methods import GrdaConfig
from compress.errors import StageError
from compress.pruning.groups import ChannelGroup
from compress.pruning.methods.base import FADE, Removed, Rows, Setting, Shortcuts, rows_of, unfit_gate

_LEAST_STEPS = 10  # for the threshold to grow in
_LEAST_AFTER = 2  # in which what goes is brought to zero
_MANY_AT_ZERO = 0.1  # of the kept channels, when the choice is made


class Grda:
    """Scales and shifts of batch norms are an accumulator behind a soft threshold that grows with every step.

        accumulator   v starts as the weights; v <- v - rate * gradient. No momentum, no weight decay
        threshold     g_t = c * sum over the steps s up to t of rate_s^(1/2 + mu) * (s^mu - (s - 1)^mu)
        weights       v * max(0, 1 - g_t / importance), the same factor for all scales and shifts of a unit
        importance    root mean square of the unit's scales v, times the norm of what reads it at the start

    A unit is a channel in all layers of its group, or several that are removed together. Where no norm follows a layer,
    the norms of its filters, bias included in what is thresholded, stand in for the scale. All other weights are
    trained by SGD as ever. As many units of each group as its smallest width has, the most important at the start, have
    no threshold: a layer without channels would end the network.

    By itself c is such that after `reached_at` of the steps the threshold is the quantile of the importance at the
    start that leaves zeros enough for the budget. Once the zeros are enough the choice is final and the threshold grows
    no more. Where they are not after `until` of the steps, the choice is made by importance. In half of the steps that
    remain, removed units that are not zero, as where the final widths were timed, are brought to zero, and so is what
    zero-padded shortcuts give to removed channels, which have no threshold. Kept units at zero are brought to their
    accumulators times the mean factor of the group, for the budget has room for them.

    Args:
        setting: What to work with.
        options: See `GrdaConfig`.

    Raises:
        StageError: The run has too few steps for the threshold to grow in or after the choice, the interval leaves one
            look only, or a given c is too small for the budget; says which number would do.

    Source: Chao et al. 2020, "Directional Pruning of Deep Neural Networks", NeurIPS, arXiv:2006.09358 (single weights).
        Li et al. 2021, arXiv:2107.05328, prune structures so but have no code: the group form here is a reconstruction.
        Batch-norm scales alone, the norm of the readers, c and the end by a budget are adaptations.
    """

    name: ClassVar[str] = "grda"

    def __init__(self, setting: Setting, options: GrdaConfig | None = None) -> None:
        self.setting, self.options = setting, options or GrdaConfig()
        reached, self.last = (round(setting.steps * share) for share in (self.options.reached_at, self.options.until))
        setting.require_left(self.last)
        growing, left = int(np.count_nonzero(setting.rates[:reached])), setting.steps - self.last
        if growing < _LEAST_STEPS:
            least = math.ceil(_LEAST_STEPS / self.options.reached_at)
            raise StageError(
                f"The threshold must grow over {_LEAST_STEPS} steps at least whose learning rate is not 0, of "
                f"{setting.steps} steps it has {growing}.",
                hint=f"Train for at least {least} steps, or raise grda.reached_at.",
            )
        if left < _LEAST_AFTER:
            raise StageError(
                f"At least {_LEAST_AFTER} steps must follow the choice, of {setting.steps} steps it leaves {left}.",
                hint=f"Train for at least {math.ceil(_LEAST_AFTER / (1 - self.options.until))} steps, or lower "
                "grda.until.",
            )
        if self.options.interval >= self.last:
            raise StageError(
                f"Zeros must be looked for while the threshold grows, got grda.interval {self.options.interval} and a "
                f"last choice after {self.last} of {setting.steps} steps.",
                hint=f"Lower grda.interval below {self.last}, or train for longer.",
            )
        self.groups = {name: _Thresholded(setting, group) for name, group in setting.groups.items()}
        growth = threshold_growth(setting.rates, self.options.mu)
        self._growth = float(growth[:reached].sum())
        self.needed = self._needed()
        self.c = self.options.c or self.needed / self._growth
        self.thresholds = self.c * np.cumsum(growth)  # (steps,) after each step, until it grows no more
        if self.thresholds[self.last - 1] < self.needed:
            wanted = self.needed / float(growth[: self.last].sum())
            raise StageError(
                f"The threshold must grow to {self.needed:.3g}, so that zeros are enough for the budget; grda.c "
                f"{self.c:g} brings it to {self.thresholds[self.last - 1]:.3g} in {self.last} steps.",
                hint=f"Set grda.c to {wanted:.3g} or more, or leave it out.",
            )
        self.chosen: Removed | None = None
        self.stopped: int | None = None
        self.zero_ratio = 0.0
        self.kept, self.kept_zero = 0, 0  # channels at the choice: those that stay, and how many of them were at 0
        self.revived = {name: torch.zeros(group.units) for name, group in self.groups.items()}  # (U,) factors to come

    @staticmethod
    def unfit(group: ChannelGroup) -> str | None:
        """Say why a group cannot be cut by this method, or None."""
        return unfit_gate(group)

    @property
    def removed(self) -> Removed:
        """The removed channels; none before the choice is final."""
        return self.chosen or {}

    @property
    def closed(self) -> tuple[str, ...]:
        """No residual block goes."""
        return ()

    def parameters(self) -> Iterable[Tensor]:
        """Return nothing: all that is learned is the network."""
        return ()

    def threshold(self, step: int) -> float:
        """Return the threshold after a step."""
        return float(self.thresholds[step if self.stopped is None else min(step, self.stopped)])

    def on_step_begin(self, step: int) -> None:
        """Nothing is done."""

    def on_gradients(self, step: int) -> None:
        """Let the gradients into the accumulators, and leave none to the optimizer."""
        for group in self.groups.values():
            group.accumulate(float(self.setting.rates[step]))

    def on_step_end(self, step: int) -> None:
        """Set the weights to the accumulators behind the threshold; choose when it is time to."""
        threshold = self.threshold(step)
        importance = {name: group.importance() for name, group in self.groups.items()}
        factors = {name: group.factors(importance[name], threshold) for name, group in self.groups.items()}
        if self.chosen is None and (step >= self.last or step % self.options.interval == 0):
            self._choose(step, importance, factors)
        left = self._left(step)
        for name, group in self.groups.items():
            faded = torch.where(self._going(name), left, 1.0)
            group.write(torch.maximum(factors[name] * faded, self.revived[name] * (1 - left)))
            group.shortcuts.give(faded.repeat(group.parts))

    def finish(self) -> None:
        """The network is as it is to be cut."""

    def figures(self) -> dict[str, float]:
        """Return the threshold, when it stopped, the share of removed channels it had brought to 0, and what remains.

        `returned_channels` counts those that are kept and were at 0 when the choice was made: widths are multiples, and
        the threshold is one for all groups; `kept_zero_ratio` is the share of kept channels that were at 0 then,
        whether they came back or not. `kept_at_zero` counts those that are kept and still at 0.
        """
        stopped = self.setting.steps - 1 if self.stopped is None else self.stopped
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
            "zero_ratio": self.zero_ratio,
            "returned_channels": sum(
                int((self.revived[name] > 0).sum()) * group.parts for name, group in self.groups.items()
            ),
            "kept_zero_ratio": self.kept_zero / max(1, self.kept),
            "kept_at_zero": kept_at_zero,
            "left_ratio": float(every.mean()) if len(every) else 0.0,
        }

    def cause(self) -> str:
        """Say how much the threshold did; and what would help, were the loss higher after the cut."""
        left = self.figures()["left_ratio"]
        if left == 0:
            return (
                f"All removed channels are at zero, {self.zero_ratio:.1%} of them were when the choice was made. "
                "Layers behind them turn zero into something else."
            )
        return (
            f"The threshold had brought {self.zero_ratio:.1%} of the removed channels to zero; the others were "
            f"chosen by their importance. Removed channels have {left:.2%} of their strength. Longer training or a "
            "larger grda.c would help."
        )

    def warnings(self) -> list[str]:
        """Say what the threshold has spoilt: kept channels that were at zero when the choice was made."""
        if self.kept_zero <= _MANY_AT_ZERO * self.kept:
            return []
        remedy = "Longer training, a smaller grda.interval or another method, such as 'regrow', would help."
        if self.options.c is not None:
            remedy = f"Leave grda.c out, or lower it towards {self.needed / self._growth:.3g}."
        return [
            f"{self.kept_zero} of {self.kept} kept channels ({self.kept_zero / self.kept:.0%}) were at zero when the "
            f"choice was made. The threshold was {self.threshold(self.setting.steps - 1):.3g}; of the weights as they "
            f"were at the start, {self.needed:.3g} leaves zeros enough for the budget. They were brought back where "
            f"their group had others, but have lost training. {remedy}"
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` goes on."""
        return {
            "accumulators": {name: group.values for name, group in self.groups.items()},
            "readers": {name: group.readers for name, group in self.groups.items()},
            "protected": {name: group.protected for name, group in self.groups.items()},
            "before": {name: group.before for name, group in self.groups.items()},
            "c": self.c,
            "needed": self.needed,
            "thresholds": torch.from_numpy(self.thresholds),
            "chosen": None if self.chosen is None else {name: list(gone) for name, gone in self.chosen.items()},
            "stopped": self.stopped,
            "zero_ratio": self.zero_ratio,
            "kept": [self.kept, self.kept_zero],
            "revived": self.revived,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for name, group in self.groups.items():
            group.values, group.readers = state["accumulators"][name], state["readers"][name]
            group.protected, group.before = state["protected"][name], state["before"][name]
        self.c, self.needed, self.thresholds = state["c"], state["needed"], state["thresholds"].numpy()
        chosen = state["chosen"]
        self.chosen = None if chosen is None else {name: tuple(gone) for name, gone in chosen.items()}
        self.kept, self.kept_zero = state["kept"]
        self.stopped, self.zero_ratio, self.revived = state["stopped"], state["zero_ratio"], state["revived"]

    def _needed(self) -> float:
        """Return the least threshold that leaves zeros enough for the budget, of the weights as they are."""
        importance = {name: group.importance() for name, group in self.groups.items()}
        every = [importance[name][~group.protected] for name, group in self.groups.items()]
        steps = np.unique(torch.cat([torch.zeros(0), *every]).numpy())
        if not len(steps):
            raise StageError("A channel must be allowed to go for a threshold to be found, none is.")
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            factors = {
                name: ((importance[name] > steps[middle]) | group.protected).float()
                for name, group in self.groups.items()
            }
            if self._zero_share(self._ask(importance, factors), factors) == 1:
                high = middle
            else:
                low = middle + 1
        return max(float(steps[low]), 1e-12)

    def _ask(self, importance: Mapping[str, Tensor], factors: Mapping[str, Tensor], is_final: bool = False) -> Removed:
        """Ask for a choice by the importance above the threshold: units at 0 cost nothing."""
        scores = {name: (importance[name] * factors[name]).repeat(self.groups[name].parts) for name in self.groups}
        return self.setting.choose(scores, is_final=is_final)

    def _zero_share(self, removed: Removed, factors: Mapping[str, Tensor]) -> float:
        """Return the share of the removed channels whose unit is at 0."""
        count = zero = 0
        for name, channels in removed.items():
            count += len(channels)
            zero += int((factors[name].repeat(self.groups[name].parts)[list(channels)] == 0).sum())
        return zero / max(1, count)

    def _choose(self, step: int, importance: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
        """Make the choice final where the zeros are enough for it, or it is time to."""
        if step < self.last and self._zero_share(self._ask(importance, factors), factors) < 1:
            return
        self.chosen, self.stopped = self._ask(importance, factors, is_final=True), step
        self.zero_ratio = self._zero_share(self.chosen, factors)
        for name, present in factors.items():
            kept = ~self._going(name)
            self.kept += int(kept.sum()) * self.groups[name].parts
            self.kept_zero += int((kept & (present == 0)).sum()) * self.groups[name].parts
            among = kept & (present > 0) & ~self.groups[name].protected
            among = among if among.any() else kept & (present > 0)
            if among.any():
                self.revived[name] = torch.where(kept & (present == 0), present[among].mean(), 0.0)

    def _going(self, name: str) -> Tensor:
        """Return (U,) bool: the units of a group that the final choice removes."""
        group = self.groups[name]
        return _members(self.removed.get(name, ()), group.width).reshape(group.parts, -1).any(0)

    def _left(self, step: int) -> float:
        """Return 1 up to the final choice, from where it falls to 0 in half of the steps that remain."""
        if self.stopped is None:
            return 1.0
        return max(0.0, 1 - (step - self.stopped) / max(1.0, FADE * (self.setting.steps - 1 - self.stopped)))


class _Thresholded:
    """The accumulators of one group.

    Attributes:
        width: Number of channels, C.
        shortcuts: What zero-padded shortcuts give to them.
        parts: Channels in a unit; of U units channel p * U + u is the one of unit u in part p.
        values: The accumulator of each of `rows`.
        readers: (U,) norm of what reads each unit at the start, 1 on average.
        protected: (U,) bool: those without a threshold.
        before: (C,) root of the sum of squares of what is thresholded in each channel, at the start.
    """

    def __init__(self, setting: Setting, group: ChannelGroup) -> None:
        self.width, self.parts, self.units = group.width, group.parts, group.width // group.parts
        self.rows: list[Rows] = []
        self._are_scales: list[bool] = []
        for member in (*group.norms, *group.bare):
            for rows in rows_of(member):
                self.rows.append(rows)
                self._are_scales.append(rows.parameter is member.module.weight)
        self.shortcuts = Shortcuts(group)
        self.values = [rows.values for rows in self.rows]
        self.readers = reader_norms(setting.module, group).square().reshape(self.parts, -1).mean(0).sqrt()
        self.before = self.strength()
        least = setting.levels[group.name][0] // group.parts
        self.protected = torch.zeros(self.units, dtype=torch.bool)
        self.protected[self.importance().argsort(descending=True, stable=True)[:least]] = True

    def accumulate(self, rate: float) -> None:
        """Take a step of plain SGD on the accumulators, and zero the gradients."""
        for number, rows in enumerate(self.rows):
            gradient = rows.gradient
            self.values[number] = self.values[number].to(gradient.device) - rate * gradient
            rows.set_gradient(torch.zeros_like(gradient))

    def importance(self) -> Tensor:
        """Return (U,) the root mean square of the accumulated scales of each unit, times the norm of its readers."""
        total, count = torch.zeros(self.width), torch.zeros(self.width)
        for rows, values, is_scale in zip(self.rows, self.values, self._are_scales, strict=True):
            if is_scale:
                squares = values.reshape(len(rows.slots), -1).square().sum(1)
                total.index_add_(0, rows.channels, squares.cpu())
                count.index_add_(0, rows.channels, torch.ones(len(rows.channels)))
        of_units, counts = (one.reshape(self.parts, -1).sum(0) for one in (total, count))
        return (of_units / counts.clamp_min(1)).sqrt() * self.readers

    def factors(self, importance: Tensor, threshold: float) -> Tensor:
        """Return (U,) what the threshold leaves of each unit, in [0, 1]."""
        left = (1 - threshold / importance.clamp_min(1e-30)).clamp_min(0)
        return torch.where(self.protected, torch.ones_like(left), left)

    def write(self, factors: Tensor) -> None:
        """Set the weights to the accumulators times (U,) factors."""
        by_channel = factors.repeat(self.parts)
        for rows, values in zip(self.rows, self.values, strict=True):
            rows.set_values(values * rows.spread(by_channel))

    def strength(self) -> Tensor:
        """Return (C,) the root of the sum of squares of the weights in each channel."""
        total = torch.zeros(self.width)
        for rows in self.rows:
            total.index_add_(0, rows.channels, rows.values.reshape(len(rows.slots), -1).square().sum(1).cpu())
        return total.sqrt()


def threshold_growth(rates: np.ndarray, mu: float) -> np.ndarray:
    """Return (steps,) by how much the threshold grows in each step, c left out: rate^(1/2 + mu) (t^mu - (t - 1)^mu).

    >>> threshold_growth(np.array([0.1, 0.1, 0.1]), 0.5).cumsum().round(4).tolist()
    [0.1, 0.1414, 0.1732]
    """
    times = np.arange(len(rates) + 1, dtype=np.float64) ** mu
    return np.asarray(rates ** (0.5 + mu) * np.diff(times))


def reader_norms(module: nn.Module, group: ChannelGroup) -> Tensor:
    """Return (C,) the norms of the columns that read each channel.

    Each weight's are divided by their root mean square, for a norm behind the reader makes its scale arbitrary; over
    several weights it is the root of the mean of squares.

    Args:
        module: The network that the group belongs to.
        group: Any; 1 for each channel that nothing reads.
    """
    found = []
    for read in group.reads:
        weight = getattr(module.get_submodule(read.path), read.name).detach()
        columns = weight.transpose(0, read.dim)[read.slots]
        squares = torch.zeros(group.width)
        squares.index_add_(0, read.channels, columns.reshape(len(read.slots), -1).square().sum(1).cpu())
        mean = float(squares.mean())
        if math.isfinite(mean) and mean > 0:
            found.append(squares / mean)
    return torch.stack(found).mean(0).sqrt() if found else torch.ones(group.width)


def _members(channels: Iterable[int], width: int) -> Tensor:
    goes = torch.zeros(width, dtype=torch.bool)
    goes[list(channels)] = True
    return goes
