"""By which figure is a network judged, and how is it said? Top-1 unless a report or a record says something else.

How is a change from the baseline to the slim network put? In words, in colour and as a bar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


CHANGE_COLUMNS = ("", "baseline", "slim", "change", "slim / baseline")
CHANGE_KIND = "comparison"  # CSS class of such a table


def compare_figures(
    label: str,
    before: float | None,
    after: float | None,
    form: Callable[[float | None], str],
    less: str,
    more: str,
    *,
    more_is_better: bool = False,
) -> tuple[str, ...]:
    """Return the cells of `CHANGE_COLUMNS` (HTML) for a figure; () when neither value is known.

    Args:
        label: Plain text.
        before: Of the baseline.
        after: Of the slim network.
        form: Shows a value.
        less: The word for a smaller value, such as "faster".
        more: The word for a larger one, such as "slower".
        more_is_better: Whether a larger value is a gain.
    """
    if before is None and after is None:
        return ()
    change, bar = MISSING, ""
    if before and after:
        is_gain = after > before if more_is_better else after < before
        tone = "" if after == before else "gain" if is_gain else "loss"
        change = f'<span class="{tone}">{escape(describe_ratio(before, after, less, more))}</span>'
        bar = render_bar(after / before)
    return escape(label), escape(form(before)), escape(form(after)), change, bar


def compare_shares(label: str, before: float | None, after: float | None) -> tuple[str, ...]:
    """Return the cells of `CHANGE_COLUMNS` (HTML) for a share such as top-1."""
    change = MISSING if before is None or after is None else describe_points(before, after)
    return escape(label), format_share(before), format_share(after), escape(change), ""


def describe_ratio(before: float, after: float, less: str, more: str) -> str:
    """Return by how many times a figure became smaller or larger.

    >>> describe_ratio(2.0, 1.0, "faster", "slower"), describe_ratio(1.0, 1.5, "faster", "slower")
    ('2.00× faster', '1.50× slower')
    """
    ratio = before / after
    if f"{ratio:.2f}" == "1.00":
        return "about the same" if before != after else "the same"
    return f"{ratio:.2f}× {less}" if ratio > 1 else f"{1 / ratio:.2f}× {more}"


def describe_points(before: float, after: float) -> str:
    """Return a change of a share in percentage points.

    >>> describe_points(0.92, 0.9135), describe_points(0.5, 0.5)
    ('−0.65 points', 'no change')
    """
    points = 100 * (after - before)
    return "no change" if f"{points:.2f}" in ("0.00", "-0.00") else f"{points:+.2f} points".replace("-", "−")


def render_bar(share: float) -> str:
    """Return a bar that is filled as far as the slim network's figure reaches of the baseline's."""
    return (
        f'<svg class="share" role="img" aria-label="{share:.0%}"><rect width="100%" height="100%" rx="3"/>'
        f'<rect width="{min(1.0, share):.1%}" height="100%" rx="3"/></svg>'
    )
