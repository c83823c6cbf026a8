"""Comparison of two networks on the same validation images: differences inside the noise decide nothing."""

import math

import numpy as np
from torch import Tensor

from compress.tasks.base import Facts, Task, chosen
from compress.tasks.classification import Classification
from compress.tasks.paired_answers import is_shown_worse
from compress.verification.jackknife import jackknife_intervals, mean_interval

FEWEST_PARTS = 10  # of a task without intervals of its own, such as detection, whose figures take long


def is_quality_worse(before: Facts, after: Facts, task: Task) -> bool:
    """Whether the primary metric is worse by more than noise.

    Args:
        before: Facts of each image by one network.
        after: Facts of the same images by the other one.
        task: What they are facts of.
    """
    metric = task.main
    values = [task.figures(facts)[metric.name] for facts in (before, after)]
    if not metric.is_better(*values):
        return False
    if any(math.isnan(value) for value in values):
        return True
    if isinstance(task, Classification):
        return is_shown_worse(before["right"], after["right"])
    sign = 1 if metric.higher_is_better else -1

    def loss(places: np.ndarray) -> dict[str, float]:
        old, new = (task.figures(chosen(facts, places))[metric.name] for facts in (before, after))
        return {"loss": sign * (old - new)}

    count = len(next(iter(before.values())))
    interval = jackknife_intervals(loss, count, task.resamples or FEWEST_PARTS).get("loss")
    return interval is None or interval[0] > 0


def is_loss_higher(before: Tensor, after: Tensor) -> bool:
    """Whether the mean loss is higher by more than noise.

    Args:
        before: (N,) loss of each image.
        after: (N,) loss of the same images.
    """
    differences = (after - before).double().numpy()
    if len(differences) < 2 or not np.isfinite(differences).all():
        return not after.mean() <= before.mean()
    return mean_interval(differences)[0] > 0
