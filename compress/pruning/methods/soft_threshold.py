"""Soft threshold on the scales of channels, over an accumulator of their gradients (`grda.py`)."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import StageError
from compress.pruning.groups import ChannelGroup
from compress.pruning.methods.base import Choose, Removed, Setting
from compress.pruning.methods.group_tensors import Rows, Shortcuts, rows_of


class ThresholdedGroup:
    """Accumulators of the gradients of one group.

    Args:
        setting: Setting with the network and the allowed widths of the group.
        group: The group.

    Attributes:
        width: Number of channels, C.
        parts: Channels in a unit; with U units, channel p * U + u belongs to unit u and part p.
        units: Number of units, U.
        rows: Thresholded parameters.
        shortcuts: Contribution of zero-padded shortcuts.
        values: The accumulator of each of `rows`.
        readers: (U,) norm of the weights that read each unit at the start, 1 on average.
        protected: (U,) bool: units without a threshold.
        before: (C,) norm of the thresholded weights of each channel, at the start.
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
        """Return (U,) the share of each unit that the threshold leaves, in [0, 1]."""
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


class ZeroBudget:
    """Choice of removed channels by importance above a threshold, with the share of them at 0.

    Args:
        choose: Chooses the removed channels within the budget.
        groups: Group name -> accumulators.
    """

    def __init__(self, choose: Choose, groups: Mapping[str, ThresholdedGroup]) -> None:
        self._choose_within, self._groups = choose, groups

    def choose(
        self, importance: Mapping[str, Tensor], factors: Mapping[str, Tensor], is_final: bool = False
    ) -> Removed:
        """Return the choice by importance times factors, both (U,) by group: units at 0 cost nothing."""
        scores = {name: (importance[name] * factors[name]).repeat(group.parts) for name, group in self._groups.items()}
        return self._choose_within(scores, is_final=is_final)

    def zero_share(self, removed: Removed, factors: Mapping[str, Tensor]) -> float:
        """Return the share of the removed channels whose unit is at 0."""
        count = zero = 0
        for name, channels in removed.items():
            count += len(channels)
            zero += int((factors[name].repeat(self._groups[name].parts)[list(channels)] == 0).sum())
        return zero / max(1, count)

    def least_threshold(self) -> float:
        """Return the least threshold that zeroes enough units for the budget, at the present weights."""
        importance = {name: group.importance() for name, group in self._groups.items()}
        every = [importance[name][~group.protected] for name, group in self._groups.items()]
        steps = np.unique(torch.cat([torch.zeros(0), *every]).numpy())
        if not len(steps):
            raise StageError("A channel must be allowed to go for a threshold to be found, none is.")
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            factors = {
                name: ((importance[name] > steps[middle]) | group.protected).float()
                for name, group in self._groups.items()
            }
            if self.zero_share(self.choose(importance, factors), factors) == 1:
                high = middle
            else:
                low = middle + 1
        return max(float(steps[low]), 1e-12)


def threshold_growth(rates: np.ndarray, mu: float) -> np.ndarray:
    """Return (steps,) the growth of the threshold in each step at c = 1: rate^(1/2 + mu) (t^mu - (t - 1)^mu).

    >>> threshold_growth(np.array([0.1, 0.1, 0.1]), 0.5).cumsum().round(4).tolist()
    [0.1, 0.1414, 0.1732]
    """
    times = np.arange(len(rates) + 1, dtype=np.float64) ** mu
    return np.asarray(rates ** (0.5 + mu) * np.diff(times))


def reader_norms(module: nn.Module, group: ChannelGroup) -> Tensor:
    """Return (C,) the norms of the columns that read each channel; all 1 if nothing reads the group.

    The norms of each weight are divided by their root mean square, because a norm behind the reader makes its scale
    arbitrary. Over several weights, the root mean square is taken.

    Args:
        module: The network that the group belongs to.
        group: Any channel group.
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
