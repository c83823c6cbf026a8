"""What does the file get wrong? Images of the classes that suffered most, with label and prediction."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from compress.report.changes import describe_points
from compress.report.markup import escape, format_share, render_section
from compress.report.outcome import find

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
