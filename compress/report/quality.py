"""What do predictions say? The sections on quality by class, on what changed, and on noise and corruptions."""

from typing import Any

from compress.report.markup import (
    escape,
    format_number,
    format_share,
    format_whole,
    render_details,
    render_facts,
    render_figure,
    render_section,
    render_split,
    render_table,
)
from compress.report.outcome import find
from compress.report.plots import plot_noise

WORST = 10


def render_quality(report: dict[str, Any]) -> str:
    """Return how sure the figures are, what changed against the baseline, and top-1 of each class."""
    quality = find(report, "details", "quality") or {}
    changes = quality.get("changes") or {}
    facts: list[tuple[str, Any]] = [
        (label, _with_interval(find(quality, "slim", key)))
        for label, key in (("top-1", "top1"), ("top-5", "top5"), ("worst class", "worst_class"))
    ]
    facts += [
        ("calibration error", _percent(find(quality, "slim", "calibration_error", "value"))),
        ("top-1 lost against the baseline", _with_interval(changes.get("drop.top1"))),
        ("image by image", find(changes, "drop.top1", "detail")),
        ("predictions that are others", _with_interval(changes.get("churn"))),
        ("mean distance of the probabilities", _number(find(changes, "softmax_distance", "value"))),
    ]
    facts = [(label, value) for label, value in facts if value is not None]
    return render_section("Quality", render_facts(facts), _render_classes(quality)) if facts else ""


def render_robustness(report: dict[str, Any]) -> str:
    """Return top-1 under noise as a picture, and on every distribution as a table, the largest loss first."""
    robustness = find(report, "details", "robustness") or {}
    found = robustness.get("distributions") or []
    if not found:
        return ""
    wanted = robustness.get("wanted") or {}
    nominal: dict[str, Any] = next((one for one in found if one.get("kind") == "nominal"), {})
    noisy = [one for one in found if one.get("kind") == "noise"]
    levels = [0.0, *(wanted.get("noise_levels") or [])]
    curves = {
        label: [one.get(key) for one in (nominal, *noisy)] if noisy else []
        for label, key in (("baseline", "baseline_top1"), ("slim", "top1"))
    }
    figure = render_figure(plot_noise("noise", levels, curves["baseline"], curves["slim"]))
    rows = [
        (
            escape(one.get("name")),
            format_share(one.get("baseline_top1")),
            format_share(one.get("top1")),
            escape(_with_interval(find(one, "changes", "drop.top1")) or "–"),
            _percent(find(one, "changes", "churn", "value")) or "–",
            _number(find(one, "changes", "softmax_distance", "value")) or "–",
        )
        for one in sorted(found, key=lambda one: -(find(one, "changes", "drop.top1", "value") or 0.0))
    ]
    head = ("images", "baseline", "slim", "top-1 lost", "other class", "distance")
    table = render_table(head, rows, numeric=(1, 2, 3, 4, 5))
    facts = render_facts(
        [("images of each", format_whole(wanted.get("images"))), *((key, wanted.get(key)) for key in ("noise", "seed"))]
    )
    return render_section("Noise and corruptions", render_split(facts, figure) if figure else facts, table)


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


def _with_interval(estimate: dict[str, Any] | None) -> str | None:
    """Return a share with its 95 % interval, in percent; None where it is not known."""
    value = find(estimate, "value")
    if value is None:
        return None
    low, high = find(estimate, "low"), find(estimate, "high")
    interval = "" if low is None or high is None else f" ({100 * low:.2f} to {100 * high:.2f})"
    return f"{format_share(value)}{interval}".replace("-", "−")


def _percent(value: float | None) -> str | None:
    return None if value is None else format_share(value)


def _number(value: float | None) -> str | None:
    return None if value is None else format_number(value)
