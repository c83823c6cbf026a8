"""What do predictions say? The section on quality by class and on what changed."""

from typing import Any

from compress.report.markup import (
    escape,
    format_interval,
    format_known,
    format_known_share,
    format_share,
    format_whole,
    render_details,
    render_facts,
    render_section,
    render_table,
)
from compress.report.metric import format_metric_interval
from compress.report.outcome import find, name_metric, quality_kind

WORST = 10


def render_quality(report: dict[str, Any]) -> str:
    """Return how sure the figures are, what changed against the baseline, and top-1 of each class."""
    quality = find(report, "details", "quality") or {}
    changes = quality.get("changes") or {}
    if quality.get("metric"):
        return _render_measured(report, quality, changes)
    facts: list[tuple[str, Any]] = [
        (label, format_interval(find(quality, "slim", key)))
        for label, key in (("top-1", "top1"), ("top-5", "top5"), ("worst class", "worst_class"))
    ]
    facts += [
        ("calibration error", format_known_share(find(quality, "slim", "calibration_error", "value"))),
        ("top-1 lost against the baseline", format_interval(changes.get("drop.top1"))),
        ("image by image", find(changes, "drop.top1", "detail")),
        ("predictions that are others", format_interval(changes.get("churn"))),
        ("mean distance of the probabilities", format_known(find(changes, "softmax_distance", "value"))),
    ]
    facts = [(label, value) for label, value in facts if value is not None]
    return render_section("Quality", render_facts(facts), _render_classes(quality)) if facts else ""


def _render_measured(report: dict[str, Any], quality: dict[str, Any], changes: dict[str, Any]) -> str:
    """Return the same of another task than classification: every figure, and what changed."""
    facts: list[tuple[str, Any]] = [("task", quality.get("task"))]
    for name in quality.get("slim") or {}:
        kind = quality_kind(report, name)
        facts.append((name_metric(name), format_metric_interval(kind, find(quality, "slim", name))))
        lost = format_metric_interval(kind, changes.get(f"drop.{name}"))
        facts.append((f"{name_metric(name)} lost against the baseline", lost))
    return render_section("Quality", render_facts([(label, value) for label, value in facts if value is not None]))


def _render_classes(quality: dict[str, Any]) -> str:
    """Return the classes that lost most, the others folded."""
    slim, counts = quality.get("slim_by_class") or [], quality.get("images_by_class") or []
    baseline = quality.get("baseline_by_class") or [None] * len(slim)
    names = quality.get("classes") or []
    found = [
        (index, before, after, counts[index] if index < len(counts) else None)
        for index, (before, after) in enumerate(zip(baseline, slim, strict=True))
        if after is not None
    ]
    found.sort(key=lambda one: (one[2] - one[1], one[0]) if one[1] is not None else (one[2], one[0]))
    rows = [
        (
            escape(names[index] if index < len(names) else index),
            format_whole(count) or "–",
            format_share(before),
            format_share(after),
            "–" if before is None else f"{100 * (after - before):+.2f}".replace("-", "−"),
        )
        for index, before, after, count in found
    ]
    if not rows:
        return ""
    head, numeric = ("class", "images", "baseline", "slim", "points"), (1, 2, 3, 4)
    shown = render_table(head, rows[:WORST], numeric=numeric)
    if len(rows) <= WORST:
        return shown
    return shown + render_details(
        f"{len(rows) - WORST} more classes", render_table(head, rows[WORST:], numeric=numeric)
    )
