"""How good is a network at another task than classification, how sure is that, and what changed against the baseline?

A task keeps a few facts of each image; figures follow from the facts of any choice of images, so that they can be drawn
again and again for an interval (bootstrap), the same images for both networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from compress.errors import DataError
from compress.tasks.base import Facts, Metric, Task, chosen, require_finite
from compress.verification.metrics import CONFIDENCE, Estimate


@dataclass(frozen=True)
class Measured:
    """What a network does over a split.

    Attributes:
        task: What is measured.
        facts: Of each image.
    """

    task: Task
    facts: Facts

    def __len__(self) -> int:
        return len(next(iter(self.facts.values())))

    @cached_property
    def figures(self) -> dict[str, float]:
        """Every figure of the task over all images; NonFinite where one is no finite number."""
        found = self.task.figures(self.facts)
        require_finite(found)
        return found

    @property
    def metric(self) -> Metric:
        """The figure that decides."""
        return self.task.main

    @property
    def value(self) -> float:
        """Its value."""
        return self.figures[self.task.metric]


def estimate_measured(found: Measured) -> dict[str, Estimate]:
    """Return the figures of a network, with intervals where the task can be drawn again."""
    intervals = _intervals(found.task, len(found), lambda places: found.task.figures(chosen(found.facts, places)))
    detail = f"{len(found):,} images"
    ends = {name: intervals.get(name, (None, None)) for name in found.figures}
    return {name: Estimate(value, ends[name][0], ends[name][1], detail) for name, value in found.figures.items()}


def changes_of_measured(before: Measured, after: Measured) -> dict[str, Estimate]:
    """Return what changed from one network to another on the same images.

    Returns:
        For each figure "drop.NAME", by how much it is lower, and "rise.NAME", by how much it is higher.

    Raises:
        DataError: They are not of the same images.
    """
    if len(before) != len(after):
        raise DataError(f"Networks must be compared on the same images, got {len(before)} and {len(after)}.")

    def drops(places: np.ndarray) -> dict[str, float]:
        old, new = (one.task.figures(chosen(one.facts, places)) for one in (before, after))
        return {name: old[name] - new[name] for name in new}

    intervals = _intervals(after.task, len(after), drops)
    found = {}
    for name, value in after.figures.items():
        drop, (low, high) = before.figures[name] - value, intervals.get(name, (None, None))
        detail = f"{before.figures[name]:.4g} before, {value:.4g} now, the same {len(after):,} images"
        found[f"drop.{name}"] = Estimate(drop, low, high, detail)
        found[f"rise.{name}"] = Estimate(-drop, None if high is None else -high, None if low is None else -low, detail)
    return found


def loss_of(changes: Mapping[str, Estimate], metric: Metric) -> Estimate:
    """Return by how much the figure that decides is worse."""
    return changes[f"{'drop' if metric.higher_is_better else 'rise'}.{metric.name}"]


def _intervals(
    task: Task, count: int, figures: Callable[[np.ndarray], dict[str, float]]
) -> dict[str, tuple[float, float]]:
    """Return for each figure where it lies with 95 % confidence; nothing where the task is not drawn again.

    Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife"; percentiles, always the same draws.
    """
    random, found = np.random.default_rng(0), []
    for _ in range(task.resamples):
        found.append(figures(random.integers(0, count, count)))
    if not found:
        return {}
    ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    return {
        name: (float(low), float(high))
        for name in found[0]
        for low, high in [np.nanquantile([one[name] for one in found], ends)]
    }
