"""Metrics of any task with confidence intervals, and their change against the baseline.

A task stores a few facts of each image and computes its metrics from the facts of any subset of images. So images can
be left out in turn for an interval (jackknife), the same images of both networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from compress.errors import DataError
from compress.tasks.base import Facts, Metric, Task, chosen, require_finite
from compress.verification.metrics import Estimate
from compress.verification.statistics import jackknife_intervals


@dataclass(frozen=True)
class Measured:
    """Metrics of a network over a split.

    Attributes:
        task: Task with the metrics.
        facts: Facts of each image.
    """

    task: Task
    facts: Facts

    def __len__(self) -> int:
        return len(next(iter(self.facts.values())))

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Every metric of the task over all images; raises NonFinite where one is not finite."""
        found = self.task.aggregate(self.facts)
        require_finite(found)
        return found

    @property
    def metric(self) -> Metric:
        """The primary metric."""
        return self.task.main

    @property
    def value(self) -> float:
        """Value of the primary metric."""
        return self.metrics[self.task.metric]


def estimate_measured(found: Measured) -> dict[str, Estimate]:
    """Return the metrics of a network, with intervals where the task allows for it."""
    count = len(found)
    intervals = jackknife_intervals(
        lambda places: found.task.aggregate(chosen(found.facts, places)), count, found.task.resamples
    )
    ends = {name: intervals.get(name, (None, None)) for name in found.metrics}
    return {
        name: Estimate(value, ends[name][0], ends[name][1], f"{count:,} images", count)
        for name, value in found.metrics.items()
    }


def changes_of_measured(before: Measured, after: Measured) -> dict[str, Estimate]:
    """Return the changes of the metrics from one network to another on the same images.

    Returns:
        For each metric "drop.NAME", its decrease, and "rise.NAME", its increase.

    Raises:
        DataError: The numbers of images differ.
    """
    if len(before) != len(after):
        raise DataError(f"Networks must be compared on the same images, got {len(before)} and {len(after)}.")

    def drops(places: np.ndarray) -> dict[str, float]:
        old, new = (one.task.aggregate(chosen(one.facts, places)) for one in (before, after))
        return {name: old[name] - new[name] for name in new}

    intervals = jackknife_intervals(drops, len(after), after.task.resamples)
    found = {}
    for name, value in after.metrics.items():
        drop, (low, high) = before.metrics[name] - value, intervals.get(name, (None, None))
        detail = f"{before.metrics[name]:.4g} before, {value:.4g} now, the same {len(after):,} images"
        found[f"drop.{name}"] = Estimate(drop, low, high, detail, len(after))
        risen = replace(found[f"drop.{name}"], value=-drop)
        found[f"rise.{name}"] = risen if low is None or high is None else replace(risen, low=-high, high=-low)
    return found


def loss_of(changes: Mapping[str, Estimate], metric: Metric) -> Estimate:
    """Return the loss of the primary metric."""
    return changes[metric.worsening]
