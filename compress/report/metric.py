"""By which figure is a network judged, and how is it said? Top-1 unless a report or a record says something else."""

from __future__ import annotations

from typing import Any

from compress.report.changes import describe_points
from compress.report.markup import MISSING, escape, format_interval, format_number, format_share
from compress.tasks.base import Metric
from compress.tasks.classification import CLASSIFICATION

TOP1 = CLASSIFICATION.main


def metric_of(values: Any) -> Metric:
    """Return the figure that `metric` in a record, or in the quality of a report, describes; top-1 where there is none.

    >>> metric_of({"metric": {"name": "miou", "label": "mIoU"}}).words, metric_of({}).words
    ('mIoU', 'top-1')
    """
    given = values.get("metric") if isinstance(values, dict) else None
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return TOP1
    return Metric(
        given["name"], bool(given.get("higher_is_better", True)), bool(given.get("is_share", True)),
        str(given.get("label", "")),
    )  # fmt: skip


def metric_of_report(report: dict[str, Any]) -> Metric:
    """Return the figure that a report's verdict leads with."""
    details = report.get("details")
    return metric_of((details or {}).get("quality") if isinstance(details, dict) else None)


def worse_by(metric: Metric) -> str:
    """Return under which name a report holds by how much the figure got worse."""
    return f"{'drop' if metric.higher_is_better else 'rise'}.{metric.name}"


def format_metric(metric: Metric, value: float | None) -> str:
    """Return a value: a share in percent, else a number.

    >>> format_metric(TOP1, 0.9173), format_metric(Metric("rmse", is_share=False), 0.25)
    ('91.73 %', '0.25')
    """
    return format_share(value) if metric.is_share else format_number(value)


def format_metric_interval(metric: Metric, estimate: Any) -> str | None:
    """Return a value with its interval; None where it is not known."""
    if metric.is_share:
        return format_interval(estimate)
    if not isinstance(estimate, dict) or estimate.get("value") is None:
        return None
    value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
    ends = "" if low is None or high is None else f" ({format_number(low)} to {format_number(high)})"
    return f"{format_number(value)}{ends}"


def format_change(metric: Metric, before: float | None, after: float | None) -> str:
    """Return a change: of a share in points, else as a number.

    >>> format_change(Metric("rmse", is_share=False), 0.5, 0.75)
    '+0.25'
    """
    if before is None or after is None:
        return MISSING
    return describe_points(before, after) if metric.is_share else f"{after - before:+.4g}".replace("-", "−")


def compare_quality(label: str, before: float | None, after: float | None, metric: Metric) -> tuple[str, ...]:
    """Return the cells of `changes.CHANGE_COLUMNS` (HTML) for the figure that decides."""
    change = format_change(metric, before, after)
    return (
        escape(label),
        escape(format_metric(metric, before)),
        escape(format_metric(metric, after)),
        escape(change),
        "",
    )


def scale_of(metric: Metric) -> float:
    """Return by what a value is multiplied for a picture: shares are drawn in percent."""
    return 100.0 if metric.is_share else 1.0


def axis_of(metric: Metric) -> str:
    """Return the title of an axis."""
    return f"{metric.words} (%)" if metric.is_share else metric.words


def title_of(metric: Metric) -> str:
    """Return the figure's name at the beginning of a sentence.

    >>> title_of(TOP1), title_of(Metric("miou", label="mIoU"))
    ('Top-1', 'mIoU')
    """
    words = metric.words
    return words if words[:2] != words[:2].lower() else words[:1].upper() + words[1:]
