"""Choice of the removed channels from scores, costs and limits; the arithmetic is in `compress.allocation`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from compress.allocation.problem import Budget
from compress.allocation.widths import Candidates, Limits, allocate_widths
from compress.errors import NonFinite
from compress.pruning.criteria.base import Criterion
from compress.pruning.groups import ChannelGroup

Groups = Mapping[str, ChannelGroup]


@dataclass(frozen=True, slots=True)
class Selection:
    """Choice of widths and removed channels.

    Attributes:
        widths: Group name -> width after the cut.
        removed: Group name -> indices of removed channels; groups that keep all channels are absent.
        is_optimal: Whether it is proved that no widths within the budgets do less damage.
    """

    widths: dict[str, int]
    removed: dict[str, tuple[int, ...]]
    is_optimal: bool


def score_groups(groups: Groups, criterion: Criterion, stats: Any) -> dict[str, Tensor]:
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


def find_candidates(
    groups: Groups, scores: Mapping[str, Tensor], levels: Mapping[str, tuple[int, ...]], comparable: bool
) -> list[Candidates]:
    """Return the groups in the form that the allocation takes.

    Args:
        groups: Prunable groups.
        scores: Group name -> (C,) scores; larger = keep.
        levels: Group name -> allowed widths, ascending; the last is the full width.
        comparable: Whether scores of different groups have one scale; else each group's scores are divided by their
            mean.
    """
    return [
        Candidates(name, _unit_scores(group, scores[name], comparable), group.parts, levels[name])
        for name, group in groups.items()
    ]


def select_channels(
    groups: Groups,
    candidates: Sequence[Candidates],
    budgets: Sequence[Budget],
    limits: Limits,
    method: str,
) -> Selection:
    """Choose the removed channels so that the costs stay within the budgets.

    Args:
        groups: Prunable groups.
        candidates: The same groups, with scores and allowed widths.
        budgets: Budgets, with costs as tables over the allowed widths.
        limits: Limits from which the allowed widths were made; used in error messages only.
        method: "global", "uniform" or "shared_error".

    Raises:
        BudgetUnreachable: No allowed widths are within the budgets.
    """
    widths, is_optimal = allocate_widths(candidates, budgets, method, limits.text)
    removed = {
        c.name: groups[c.name].expand(c.removed_units(widths[c.name])) for c in candidates if widths[c.name] < c.full
    }
    return Selection(widths, removed, is_optimal)


def _unit_scores(group: ChannelGroup, scores: Tensor, comparable: bool) -> np.ndarray:
    """Return (U,) unit scores, sums of (C,) channel scores; divided by their mean if scores have no common scale."""
    units: np.ndarray = scores.double().numpy().reshape(group.parts, -1).sum(0)
    if not comparable:
        mean = float(units.mean())
        units = units / mean if mean > 0 else np.zeros_like(units)
    return units
