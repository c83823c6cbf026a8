"""How wide does each channel group become under one budget?

Pure arithmetic: scores and a cost in, widths out. A threshold on the scores is bisected until the cost of the whole
network meets the budget; what rounding to multiples leaves unspent is then spent on the channels that score best for
their cost. Floors and caps always hold, and the budget is never exceeded.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.allocation.costs import CoupledCost
from compress.errors import BudgetUnreachable, InternalError

Widths = dict[str, int]


@dataclass(frozen=True, slots=True)
class Candidates:
    """One channel group as the allocation sees it.

    Attributes:
        name: The group.
        scores: (U,) float64, one for each unit that can be removed; larger = keep.
        channels_per_unit: Channels that go with each unit.
        levels: Allowed widths in channels, ascending; the last is the full width.
    """

    name: str
    scores: np.ndarray
    channels_per_unit: int
    levels: tuple[int, ...]

    @property
    def full(self) -> int:
        """The width with nothing removed."""
        return self.levels[-1]

    def removed_units(self, width: int) -> tuple[int, ...]:
        """Return the units that go at `width`: the lowest scores, the later position first among equals."""
        gone = (self.full - width) // self.channels_per_unit
        order = np.lexsort((-np.arange(len(self.scores)), self.scores))
        return tuple(sorted(int(unit) for unit in order[:gone]))


@dataclass(frozen=True, slots=True)
class Limits:
    """What every group must keep.

    Attributes:
        min_width: Channels.
        max_removed_ratio: In (0, 1), of each group.
        multiple_of: Widths are multiples of this where the group is at least twice as wide.
    """

    min_width: int = 1
    max_removed_ratio: float = 0.9
    multiple_of: int = 1


def width_levels(full: int, parts: int, limits: Limits) -> tuple[int, ...]:
    """Return the widths a group of `full` channels in `parts` equal parts may have, ascending, `full` last.

    >>> width_levels(32, 1, Limits(multiple_of=8))
    (8, 16, 24, 32)
    >>> width_levels(12, 1, Limits(multiple_of=8, max_removed_ratio=0.5))
    (8, 12)
    """
    multiple = limits.multiple_of
    while multiple > 1 and full < 2 * multiple:
        multiple = multiple // 2 if multiple % 2 == 0 else 1
    step = math.lcm(multiple, parts)
    least = max(limits.min_width, math.ceil(full * (1 - limits.max_removed_ratio) - 1e-9), parts)
    return (*range(math.ceil(least / step) * step, full, step), full)


def allocate_widths(
    groups: Sequence[Candidates],
    cost: CoupledCost,
    budget: float,
    method: str = "global",
    limits_text: str = "",
    whole: tuple[float, str] | None = None,
) -> Widths:
    """Choose a width for every group so that the cost stays within the budget.

    Args:
        groups: The groups, each with its scores and allowed widths.
        cost: Cost of the network by widths.
        budget: In the unit of `cost`; not exceeded.
        method: "global" ranks all units together, "uniform" removes the same share of each group.
        limits_text: What limits the widths, for the message.
        whole: What shares in the message are taken of, and its name; the cost with nothing removed by default.

    Returns:
        Group name -> width.

    Raises:
        BudgetUnreachable: Even the smallest allowed widths cost more; says the best reachable.
    """
    if cost.at({group.name: group.full for group in groups}) <= budget:
        return {group.name: group.full for group in groups}
    smallest = {group.name: group.levels[0] for group in groups}
    if cost.at(smallest) > budget:
        raise _unreachable(groups, cost, budget, limits_text, whole or (cost.full, "the present cost"))
    widths_at = _by_threshold(groups) if method == "global" else _by_share(groups)
    widths = _bisect(widths_at, smallest, cost, budget)
    return _spend_rest(groups, widths, cost, budget)


def _by_threshold(groups: Sequence[Candidates]) -> tuple[Callable[[float], Widths], int]:
    """Return widths as a function of how many of all units, lowest scores first, lie below the threshold."""
    thresholds = np.unique(np.concatenate([group.scores for group in groups]))

    def widths_at(position: float) -> Widths:
        index = int(position)
        limit = thresholds[index] if index < len(thresholds) else np.inf
        return {g.name: _nearest_level(g, int((g.scores >= limit).sum()) * g.channels_per_unit) for g in groups}

    return widths_at, len(thresholds)


def _by_share(groups: Sequence[Candidates], steps: int = 4096) -> tuple[Callable[[float], Widths], int]:
    """Return widths as a function of the share that every group loses, in `steps` equal steps."""

    def widths_at(position: float) -> Widths:
        return {g.name: _nearest_level(g, g.full * (1 - position / steps)) for g in groups}

    return widths_at, steps


def _bisect(
    search: tuple[Callable[[float], Widths], int], smallest: Widths, cost: CoupledCost, budget: float
) -> Widths:
    """Return the widths at the lowest position whose cost is within the budget."""
    widths_at, high = search
    low = 0
    while low < high:
        middle = (low + high) // 2
        if cost.at(widths_at(middle)) <= budget:
            high = middle
        else:
            low = middle + 1
    widths = widths_at(high)
    return widths if cost.at(widths) <= budget else smallest


def _spend_rest(groups: Sequence[Candidates], widths: Widths, cost: CoupledCost, budget: float) -> Widths:
    """Widen groups, one level at a time, best score for the cost first, as long as the budget allows.

    Among equals the first name goes first, so that the order of the groups does not matter.
    """
    widths = dict(widths)
    groups = sorted(groups, key=lambda group: group.name)
    while True:
        current = cost.at(widths)
        best: tuple[float, str, int] | None = None
        for group in groups:
            wider = next((level for level in group.levels if level > widths[group.name]), None)
            if wider is None:
                continue
            price = cost.at({**widths, group.name: wider}) - current
            if current + price > budget:
                continue
            value = _score_between(group, widths[group.name], wider) / max(price, 1e-12)
            if best is None or value > best[0]:
                best = (value, group.name, wider)
        if best is None:
            return widths
        widths[best[1]] = best[2]


def _score_between(group: Candidates, narrow: int, wide: int) -> float:
    gained = set(group.removed_units(narrow)) - set(group.removed_units(wide))
    return float(sum(group.scores[unit] for unit in gained))


def _nearest_level(group: Candidates, width: float) -> int:
    """Return the allowed width nearest to `width`; the wider one when two are as near."""
    return min(group.levels, key=lambda level: (abs(level - width), -level))


def _unreachable(
    groups: Sequence[Candidates], cost: CoupledCost, budget: float, limits_text: str, whole: tuple[float, str]
) -> BudgetUnreachable:
    if not groups:
        return BudgetUnreachable("There must be at least one channel group that can be cut, there is none.")
    best = cost.at({group.name: group.levels[0] for group in groups})
    if best <= budget:
        raise InternalError("A budget that can be met was called unreachable.")
    names: Mapping[bool, str] = {True: "group", False: "groups"}
    total, name = whole
    return BudgetUnreachable(
        f"Target {budget / total:.3f} of {name} cannot be reached; the best is {best / total:.3f}, with "
        f"{len(groups)} channel {names[len(groups) == 1]} at the least width allowed{limits_text}.",
    )
