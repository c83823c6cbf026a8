"""Which channels go? Joins scores, costs and limits into one choice; the arithmetic is in `compress.allocation`."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from compress.allocation.costs import CoupledCost
from compress.allocation.widths import Candidates, Limits, allocate_widths, width_levels
from compress.errors import NonFinite
from compress.pruning.criteria.base import Criterion, GradientStats
from compress.pruning.graph import ChannelGroup


@dataclass(frozen=True, slots=True)
class Selection:
    """What a choice of channels comes to.

    Attributes:
        widths: Group name -> width after the cut.
        removed: Group name -> indices that go; groups that lose nothing are absent.
        cost: Predicted cost after the cut.
    """

    widths: dict[str, int]
    removed: dict[str, tuple[int, ...]]
    cost: float


def score_groups(
    groups: Mapping[str, ChannelGroup], criterion: Criterion, stats: GradientStats | None
) -> dict[str, Tensor]:
    """Return (C,) scores for every group.

    Raises:
        NonFinite: A score is NaN or infinite.
        UnsupportedLayer: The criterion cannot score a group.
    """
    scores = {name: criterion.scores(group, stats) for name, group in groups.items()}
    for name, values in scores.items():
        if not bool(values.isfinite().all()):
            raise NonFinite(
                f"Scores must be finite, criterion '{criterion.name}' gives NaN or infinity in group '{name}'."
            )
    return scores


def select_channels(
    groups: Mapping[str, ChannelGroup],
    scores: Mapping[str, Tensor],
    cost: CoupledCost,
    budget: float,
    limits: Limits,
    method: str,
    comparable: bool,
    whole: tuple[float, str] | None = None,
) -> Selection:
    """Choose the channels that go so that the cost stays within the budget.

    Args:
        groups: Groups that may be cut.
        scores: (C,) for each group; larger = keep.
        cost: Of the network, by widths.
        budget: In the unit of `cost`.
        limits: Floors, caps and multiples.
        method: "global" or "uniform".
        comparable: Whether scores of different groups have one scale; else each group's are divided by their mean.
        whole: As in `allocate_widths`.

    Raises:
        BudgetUnreachable: Even the least widths cost more.
    """
    candidates = [
        _candidates(group, scores[name], limits, cost if comparable else None) for name, group in groups.items()
    ]
    text = (
        f" (max_removed_ratio {limits.max_removed_ratio}, min_width {limits.min_width}, "
        f"multiple_of {limits.multiple_of})"
    )
    widths = allocate_widths(candidates, cost, budget, method, text, whole)
    removed = {
        c.name: groups[c.name].expand(c.removed_units(widths[c.name])) for c in candidates if widths[c.name] < c.full
    }
    return Selection(widths, removed, cost.at(widths))


def _candidates(group: ChannelGroup, scores: Tensor, limits: Limits, priced_by: CoupledCost | None) -> Candidates:
    """Turn (C,) channel scores into unit scores on one scale over all groups.

    Scores that estimate damage are divided by what a channel costs, so that the threshold asks for the same damage
    per cost everywhere; mere sizes are divided by their mean in the group.
    """
    units = scores.double().numpy().reshape(group.parts, -1).sum(0)
    if priced_by is not None:
        price = priced_by.full - priced_by.at({group.name: group.width - group.parts})
        units = units / max(price, 1e-12)
    else:
        mean = float(units.mean())
        units = units / mean if mean > 0 else np.zeros_like(units)
    return Candidates(group.name, units, group.parts, width_levels(group.width, group.parts, limits))
