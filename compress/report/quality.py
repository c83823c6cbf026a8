"""What do predictions say? The section on quality by class and on what changed.

What does the file get wrong? Images of the classes that suffered most, with label and prediction.
"""

import base64
import binascii
from collections.abc import Sequence
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
from compress.report.metric import describe_points, format_metric_interval
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


IMAGES_AT_MOST = 32
BYTES_AT_MOST = 64_000  # of one picture; 64 x 64 pixels take at most 13,000
_PNG = b"\x89PNG\r\n\x1a\n"


def render_worst_images(report: dict[str, Any]) -> str:
    """Return the images, one row of them for each class; "" when there is none."""
    quality = find(report, "details", "quality") or {}
    names = quality.get("classes") or []
    rows: dict[Any, list[str]] = {}
    for one in (quality.get("worst_images") or [])[:IMAGES_AT_MOST]:
        if figure := _render_image(one, names):
            rows.setdefault(one.get("class"), []).append(figure)
    body = "".join(
        f'<h3>{_describe_class(label, quality)}</h3>\n<div class="images">{"".join(figures)}</div>\n'
        for label, figures in rows.items()
    )
    if not body:
        return ""
    has_baseline = bool(quality.get("baseline"))
    chosen = (
        "Evaluation images that the baseline gets right and the file gets wrong, of the classes that lost most."
        if has_baseline
        else "Evaluation images that the file gets wrong, of the classes with the lowest top-1."
    )
    note = f'<p class="muted">{chosen} Below each: its label → what the file says, and its number in the data.</p>\n'
    return render_section("Images of the worst classes", note, body)


def _describe_class(label: Any, quality: dict[str, Any]) -> str:
    """Return a class's name and its top-1 before and after, as HTML."""
    slim, baseline = (_pick(quality.get(f"{network}_by_class"), label) for network in ("slim", "baseline"))
    text = escape(_name(label, quality.get("classes") or []))
    if slim is None:
        return text
    figures = f"top-1 {format_share(slim)}"
    if baseline is not None:
        figures = f"top-1 {format_share(baseline)} → {format_share(slim)}, {describe_points(baseline, slim)}"
    return f'{text} <small class="muted">{escape(figures)}</small>'


def _render_image(one: dict[str, Any], names: Sequence[str]) -> str:
    """Return a picture with its caption; "" when it holds no small PNG."""
    content = one.get("image")
    if not isinstance(content, str) or not _is_png(content):
        return ""
    label, predicted = (_pick(names, one.get(key)) or one.get(key) for key in ("label", "predicted"))
    words = f"{label} → {predicted}"
    number = "" if one.get("index") is None else f'<span class="muted"> no. {escape(one["index"])}</span>'
    return (
        f'<figure><img src="data:image/png;base64,{content}" alt="{escape(words)}">'
        f"<figcaption>{escape(words)}{number}</figcaption></figure>\n"
    )


def _is_png(content: str) -> bool:
    """Whether a text is base64 of a small PNG; nothing else may stand in the page."""
    if len(content) > BYTES_AT_MOST * 4 // 3 or not content.isascii():
        return False
    try:
        return base64.b64decode(content, validate=True).startswith(_PNG)
    except binascii.Error:
        return False


def _name(label: Any, names: Sequence[str]) -> str:
    found = _pick(names, label)
    return f"class {label}" if found is None else str(found)


def _pick(values: Any, index: Any) -> Any:
    """Return an entry of a list, or None where there is none."""
    is_there = isinstance(values, list) and isinstance(index, int) and 0 <= index < len(values)
    return values[index] if is_there else None
