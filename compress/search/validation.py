"""Quality on the validation split: values for records, comparisons beyond noise, warnings about a baseline."""

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from compress.data.splits import Split, known_labels
from compress.search.context import StageContext
from compress.tasks.base import Facts, Metric, Task, chosen, is_shown_worse
from compress.tasks.classification import Classification
from compress.training.evaluate import evaluate_quality, quality_facts
from compress.verification.metrics import share_interval
from compress.verification.statistics import jackknife_intervals, mean_interval
from compress.verification.task_metrics import Measured, estimate_measured

FEWEST_PARTS = 10  # of a task without intervals of its own, such as detection, whose metrics take long
SIGNIFICANCE = 0.05
LEAST_SHARE, LEAST_RATIO = 0.02, 0.05  # shares: absolute; other metrics: relative to evaluation


def metric_of(split: Split) -> Metric:
    """Return the primary metric of a split's task."""
    return split.task.main


def validation_quality(module: nn.Module, ctx: StageContext) -> float:
    """Return the primary metric on the validation split."""
    return evaluate_quality(module, ctx.data.validation, progress=ctx.progress)


def is_quality_worse(before: Facts, after: Facts, task: Task) -> bool:
    """Return whether the primary metric is worse by more than noise.

    Args:
        before: Facts of each image, from the network before.
        after: Facts of the same images, from the network after.
        task: Task of the images.
    """
    metric = task.main
    values = [task.aggregate(facts)[metric.name] for facts in (before, after)]
    if not metric.is_better(*values):
        return False
    if any(math.isnan(value) for value in values):
        return True
    if isinstance(task, Classification):
        return is_shown_worse(before["right"], after["right"])
    sign = 1 if metric.higher_is_better else -1

    def loss(places: np.ndarray) -> dict[str, float]:
        old, new = (task.aggregate(chosen(facts, places))[metric.name] for facts in (before, after))
        return {"loss": sign * (old - new)}

    count = len(next(iter(before.values())))
    interval = jackknife_intervals(loss, count, task.resamples or FEWEST_PARTS).get("loss")
    return interval is None or interval[0] > 0


def is_loss_higher(before: Tensor, after: Tensor) -> bool:
    """Return whether the mean loss is higher by more than noise.

    Args:
        before: (N,) loss of each image.
        after: (N,) loss of the same images.
    """
    differences = (after - before).double().numpy()
    if len(differences) < 2 or not np.isfinite(differences).all():
        return not after.mean() <= before.mean()
    return mean_interval(differences)[0] > 0


def chance_warning(quality: float, evaluation: Split) -> str | None:
    """Return a warning if a classifier's top-1 is not significantly above chance, else None.

    Chance is the share of the most frequent class; the test is the exact binomial one, one-sided, at 5 %.

    Args:
        quality: Top-1 in [0, 1].
        evaluation: Split that it was measured on.
    """
    if not isinstance(evaluation.task, Classification):
        return None
    labels = known_labels(evaluation)
    labels = evaluation.labels if labels is None else labels
    counts = np.bincount(labels)
    most, images = int(counts.max()), len(labels)
    from scipy.stats import binomtest  # scipy takes a second to import

    right = round(quality * images)
    if len(counts) < 2 or binomtest(right, images, most / images, alternative="greater").pvalue <= SIGNIFICANCE:
        return None
    return (
        f"The baseline is at chance level: {right} of {images} evaluation images are right, and {most} would be with "
        "the same answer for all of them. Check weights, data.preprocessing (mean, std, scale, channels) and the order "
        "of the classes. The change of quality in the verdict is relative to this baseline."
    )


def compare_with_evaluation(
    module: nn.Module, evaluation: float, ctx: StageContext, warn: Callable[[str], None]
) -> float | None:
    """Measure the baseline on validation and warn if it does far better there than on evaluation.

    No choice depends on this comparison.

    Args:
        module: The baseline.
        evaluation: Primary metric of the baseline on the evaluation split.
        ctx: Context of the stage, with the splits.
        warn: Function that is called with the warning.

    Returns:
        The metric on validation; None without labels, where the baseline is compared with itself.
    """
    split, metric = ctx.data.validation, metric_of(ctx.data.validation)
    if not split.task.needs_targets:
        return None
    facts = quality_facts(module, split, progress=ctx.progress)
    value, count = split.task.aggregate(facts)[metric.name], len(ctx.data.evaluation)
    if isinstance(split.task, Classification):
        noise = math.hypot(_half(value, len(split)), _half(evaluation, count))
    else:
        found = estimate_measured(Measured(split.task, facts))[metric.name]
        half = 0.0 if found.low is None or found.high is None else (found.high - found.low) / 2
        noise = math.hypot(half, half * math.sqrt(len(split) / count))
    if is_far_better(value, evaluation, noise, metric):
        warn(
            f"The baseline does far better on validation ({metric.words} {metric.show(value)}) than on evaluation "
            f"({metric.show(evaluation)}): it was probably trained on validation images, and what is chosen by them "
            "(epochs, repairs, numbers of blocks) is chosen by easy images. Name images of their own: data.validation."
        )
    return value


def is_far_better(validation: float, evaluation: float, noise: float, metric: Metric) -> bool:
    """Return whether a value on validation beats that on evaluation by more than noise, and by enough to matter.

    >>> is_far_better(0.9985, 0.917, 0.006, Metric("top1")), is_far_better(0.93, 0.917, 0.006, Metric("top1"))
    (True, False)
    """
    better = (validation - evaluation) if metric.higher_is_better else (evaluation - validation)
    return better > noise and better >= (LEAST_SHARE if metric.is_share else LEAST_RATIO * abs(evaluation))


def _half(share: float, count: int) -> float:
    low, high = share_interval(round(share * count), count)
    return (high - low) / 2
