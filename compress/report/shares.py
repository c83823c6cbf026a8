"""Which stage cost how much? On the validation split by the stages' own records, on the evaluation split by verify."""

from collections.abc import Iterator
from typing import Any

from compress.report.markup import escape, render_section, render_table
from compress.report.metric import format_change, format_metric, metric_of, metric_of_report
from compress.report.outcome import find
from compress.tasks.base import Metric

Row = tuple[str, str, str, str, str]
_LABELS = {"slimming": "all stages up to the float file", "quantize": "quantisation"}


def render_shares(report: dict[str, Any]) -> str:
    """Return what each stage did to top-1, or to what decides in its place; "" where nothing is known of it."""
    metric = metric_of_report(report)
    rows = [
        _row(f"{number} <code>{escape(stage)}</code>", "validation", before, after, judged)
        for number, stage, judged, before, after in _list_stages(report)
    ]
    rows += [
        _row(
            escape(_LABELS.get(str(share.get("stage")), share.get("stage"))),
            "evaluation",
            share.get(f"{metric.name}_before"),
            share.get(f"{metric.name}_after"),
            metric,
        )
        for share in find(report, "details", "shares") or []
    ]
    if not rows:
        return ""
    change = "points" if metric.is_share else "change"
    table = render_table(("stage", "split", f"{metric.words} before", "after", change), rows, numeric=(2, 3, 4))
    note = '<p class="muted">The two splits are different images: their rows do not add up.</p>\n'
    return render_section(f"What each stage did to {metric.words}", table, note)


def _list_stages(report: dict[str, Any]) -> Iterator[tuple[int, str, Metric, float, float]]:
    """Yield (place, name, figure, that on validation before, after) of the stages that measured both."""
    for number, run in enumerate(report.get("stages") or [], start=1):
        record = run.get("record") or {}
        metric = metric_of(record)
        key = f"validation_{metric.name}"
        before, after = record.get(f"{key}_before"), record.get(f"{key}_after")
        if after is None:  # training measures each epoch
            epochs = {epoch.get("epoch"): epoch.get(key) for epoch in record.get("epochs") or []}
            averaged = record.get(f"averaged_{metric.name}")
            after = averaged if record.get("is_averaged") else epochs.get(record.get("chosen_epoch"))
        if before is not None and after is not None:
            yield number, str(run.get("stage")), metric, before, after


def _row(stage: str, split: str, before: float | None, after: float | None, metric: Metric) -> Row:
    if metric.is_share:
        change = "–" if before is None or after is None else f"{100 * (after - before):+.2f}".replace("-", "−")
    else:
        change = format_change(metric, before, after)
    judged = "" if metric.name == "top1" else f" ({metric.words})"
    return f"{stage}{escape(judged)}", split, format_metric(metric, before), format_metric(metric, after), change
