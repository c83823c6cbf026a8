"""Warning where validation images are far easier than evaluation images: the network was probably trained on them."""

import math
from collections.abc import Callable

from torch import nn

from compress.search.context import Record, StageContext
from compress.search.records import metric_of
from compress.tasks.base import Metric
from compress.tasks.classification import Classification
from compress.training.evaluate import quality_facts
from compress.verification.metrics import share_interval
from compress.verification.task_metrics import Measured, estimate_measured

LEAST_SHARE, LEAST_RATIO = 0.02, 0.05  # of a share as it is, of other metrics relative to evaluation


def compare_with_evaluation(
    module: nn.Module, evaluation: float, ctx: StageContext, warn: Callable[[str], None]
) -> Record:
    """Measure the baseline on validation and warn where it does far better there than on evaluation.

    Nothing is chosen by that comparison.

    Args:
        module: Baseline.
        evaluation: Its primary metric on the evaluation split.
        ctx: Has the splits.
        warn: Takes the warning.

    Returns:
        Value on validation; empty without labels, where the baseline is compared with itself.
    """
    split, metric = ctx.data.validation, metric_of(ctx.data.validation)
    if not split.task.needs_targets:
        return {}
    facts = quality_facts(module, split, progress=ctx.progress)
    value, count = split.task.figures(facts)[metric.name], len(ctx.data.evaluation)
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
    return {f"validation_{metric.name}": value}


def is_far_better(validation: float, evaluation: float, noise: float, metric: Metric) -> bool:
    """Whether a value on validation is better than on evaluation by more than noise, and by enough to matter.

    >>> is_far_better(0.9985, 0.917, 0.006, Metric("top1")), is_far_better(0.93, 0.917, 0.006, Metric("top1"))
    (True, False)
    """
    better = (validation - evaluation) if metric.higher_is_better else (evaluation - validation)
    return better > noise and better >= (LEAST_SHARE if metric.is_share else LEAST_RATIO * abs(evaluation))


def _half(share: float, count: int) -> float:
    low, high = share_interval(round(share * count), count)
    return (high - low) / 2
