"""Allocation of widths to channel groups under one or several budgets.

Pure arithmetic: scores and costs in, widths out. The damage of a width is measured, or else the square of the sum of
the removed (lowest) scores. Each further channel therefore costs more than the last. The knapsack chooses widths with
the least total damage. Floors and caps always hold, and no budget is exceeded.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compress.allocation.knapsack import allocate, allocate_evenly
from compress.allocation.problem import Budget, Choice, Decision
from compress.errors import NONE_LEFT_HINT, BudgetUnreachable

Widths = dict[str, int]


@dataclass(frozen=True, slots=True)
class Candidates:
    """One channel group in the form that the allocation takes.

    Attributes:
        name: Name of the group.
        scores: (U,) float64, one for each unit that can be removed; larger = keep.
        channels_per_unit: Channels removed with each unit.
        levels: Allowed widths in channels, ascending; the last is the full width.
        order: (U,) int64, units in order of removal; None for the lowest scores first.
        measured: (levels,) float64 >= 0, measured damage of each width; None if not measured.
        errors: (levels,) float64, standard errors of the measured damages.
        scales: (levels, U) float32, factors on the weights that read each unit at each width; None for all 1.
    """

    name: str
    scores: np.ndarray
    channels_per_unit: int
    levels: tuple[int, ...]
    order: np.ndarray | None = None
    measured: np.ndarray | None = None
    errors: np.ndarray | None = None
    scales: np.ndarray | None = None

    @property
    def full(self) -> int:
        """The width with nothing removed."""
        return self.levels[-1]

    @property
    def damages(self) -> np.ndarray:
        """(levels,) measured damages, or squared sums of the lowest scores that a width removes; 0 at full width."""
        if self.measured is not None:
            return self.measured
        lost = np.append(0.0, np.cumsum(np.sort(self.scores)))
        gone = (self.full - np.asarray(self.levels)) // self.channels_per_unit
        return np.asarray(np.maximum(lost[gone], 0.0) ** 2)

    def dearer(self, factor: float) -> "Candidates":
        """Return the same group with every damage multiplied by a factor."""
        measured = None if self.measured is None else self.measured * factor
        return replace(self, scores=self.scores * math.sqrt(factor), measured=measured)

    def unit_scales(self, width: int) -> np.ndarray | None:
        """Return (U,) float32 factors on the weights that read each unit at `width`; None for all 1."""
        return None if self.scales is None else np.asarray(self.scales[self.levels.index(width)])

    def removed_units(self, width: int) -> tuple[int, ...]:
        """Return the units removed at `width`; without an order the lowest scores, among equals the later units."""
        gone = (self.full - width) // self.channels_per_unit
        order = self.order
        if order is None:
            order = np.lexsort((-np.arange(len(self.scores)), self.scores))
        return tuple(sorted(int(unit) for unit in order[:gone]))


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the widths of every group.

    Attributes:
        min_width: Smallest width, in channels.
        max_removed_ratio: Largest share of each group to remove, in (0, 1).
        multiple_of: Number that widths are multiples of, in groups that are at least twice as wide.
    """

    min_width: int = 1
    max_removed_ratio: float = 0.9
    multiple_of: int = 1

    @property
    def text(self) -> str:
        """The limits in words, for messages."""
        return (
            f" (max_removed_ratio {self.max_removed_ratio}, min_width {self.min_width}, multiple_of {self.multiple_of})"
        )


def width_levels(full: int, parts: int, limits: Limits, at_most: int | None = None) -> tuple[int, ...]:
    """Return the widths a group of `full` channels in `parts` equal parts may have, ascending, `full` last.

    Args:
        full: Full width, in channels.
        parts: Number of equal ranges that must lose the same positions.
        limits: Floors, caps and multiples.
        at_most: Largest number of multiples; the multiple is doubled until it is kept.

    >>> width_levels(32, 1, Limits(multiple_of=8))
    (8, 16, 24, 32)
    >>> width_levels(12, 1, Limits(multiple_of=8, max_removed_ratio=0.5))
    (8, 12)
    >>> width_levels(64, 1, Limits(multiple_of=8), at_most=4)
    (16, 32, 48, 64)
    """
    multiple = limits.multiple_of
    while at_most is not None and full // multiple > at_most:
        multiple *= 2
    while multiple > 1 and full < 2 * multiple:
        multiple = multiple // 2 if multiple % 2 == 0 else 1
    step = math.lcm(multiple, parts)
    least = max(limits.min_width, math.ceil(full * (1 - limits.max_removed_ratio) - 1e-9), parts)
    return (*range(math.ceil(least / step) * step, full, step), full)


def allocate_widths(
    groups: Sequence[Candidates], budgets: Sequence[Budget], method: str = "global", limits_text: str = ""
) -> tuple[Widths, bool]:
    """Choose a width for every group so that no budget is exceeded.

    Args:
        groups: The groups, each with its scores and allowed widths; the options of the budgets' tables are `levels`.
        budgets: Budgets, at least one.
        method: "global" minimises the total damage, "uniform" removes the same share of each group, "shared_error"
            narrows each group as far as one shared bound on its damage allows, with the least sufficient bound.
        limits_text: Limits on the widths in words, for the message.

    Returns:
        Group name -> width, and whether it is proved that no widths within the budgets do less damage.

    Raises:
        BudgetUnreachable: No allowed widths are within the budgets; the message states the best reachable.
    """
    if not groups:
        raise BudgetUnreachable("No prunable channel group is left.", hint=NONE_LEFT_HINT)
    decisions = [Decision(group.name, group.damages) for group in groups]
    count = f"{len(groups)} channel {'group' if len(groups) == 1 else 'groups'}"
    text = f", with {count} at the widths allowed{limits_text}"
    if method == "global":
        found = allocate(decisions, budgets, text)
        choice, is_optimal = found.choice, found.is_optimal
    else:
        choices = _even_choices(groups) if method == "uniform" else _shared_error_choices(groups)
        choice, is_optimal = allocate_evenly(decisions, budgets, choices, text).choice, False
    return {group.name: group.levels[choice[group.name]] for group in groups}, is_optimal


def _even_choices(groups: Sequence[Candidates], steps: int = 1024) -> Iterator[Choice]:
    """Yield choices in which every group loses the same, rising share, as nearly as its levels allow."""
    previous: Choice | None = None
    for step in range(steps):
        choice = {g.name: g.levels.index(_nearest_level(g, g.full * (1 - step / steps))) for g in groups}
        if choice != previous:
            yield choice
        previous = choice


def _shared_error_choices(groups: Sequence[Candidates]) -> Iterator[Choice]:
    """Yield choices in which every group is as narrow as one shared, rising bound on the damages allows.

    Source: one tolerance for all layers, as in greedy forward selection (Ye et al. 2020, arXiv:2003.01794), and one
        error parameter for all, as in provable filter pruning (Liebenwein et al. 2020, arXiv:1911.07412).
    """
    damages = {group.name: group.damages for group in groups}
    previous: Choice | None = None
    for bound in np.unique(np.concatenate(list(damages.values()))):
        choice = {group.name: int(np.argmax(damages[group.name] <= bound)) for group in groups}
        if choice != previous:
            yield choice
        previous = choice


def _nearest_level(group: Candidates, width: float) -> int:
    """Return the allowed width nearest to `width`; the wider one when two are as near."""
    return min(group.levels, key=lambda level: (abs(level - width), -level))
