"""How do the figures of a network on the validation split stand in a stage's record?"""

from typing import Any

from torch import nn

from compress.data.splits import Split
from compress.search.context import StageContext
from compress.tasks.base import Metric
from compress.training.evaluate import evaluate_quality


def metric_of(split: Split) -> Metric:
    """Return the figure that decides."""
    return split.task.main


def stated(metric: Metric) -> dict[str, Any]:
    """Return what a record says of its figure, {"metric": {...}}; nothing of top-1, which it is without."""
    if metric.name == "top1":
        return {}
    return {"metric": metric.to_dict()}


def validation_quality(module: nn.Module, ctx: StageContext) -> float:
    """Return the figure that decides, on the validation split."""
    return evaluate_quality(module, ctx.data.validation, progress=ctx.progress)


def before_and_after(ctx: StageContext, before: float, after: float) -> dict[str, Any]:
    """Return the figures around a stage, under names such as "validation_top1_before"."""
    metric = metric_of(ctx.data.validation)
    name = f"validation_{metric.name}"
    return {f"{name}_before": before, f"{name}_after": after, **stated(metric)}
