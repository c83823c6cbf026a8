"""Which stage cost how much? On the validation split by the stages' own records, on the evaluation split by verify."""

from collections.abc import Iterator
from typing import Any

from compress.report.markup import escape, format_share, render_section, render_table
from compress.report.outcome import find

Row = tuple[str, str, str, str, str]
_LABELS = {"slimming": "all stages up to the float file", "quantize": "quantisation"}


def render_shares(report: dict[str, Any]) -> str:
    """Return what each stage did to top-1, or "" where nothing is known of it."""
    rows = [
        _row(f"{number} <code>{escape(stage)}</code>", "validation", before, after)
        for number, stage, before, after in _list_stages(report)
    ]
    rows += [
        _row(
            escape(_LABELS.get(str(share.get("stage")), share.get("stage"))),
            "evaluation",
            share.get("top1_before"),
            share.get("top1_after"),
        )
        for share in find(report, "details", "shares") or []
    ]
    if not rows:
        return ""
    table = render_table(("stage", "split", "top-1 before", "after", "points"), rows, numeric=(2, 3, 4))
    note = '<p class="muted">The two splits are different images: their rows do not add up.</p>\n'
    return render_section("What each stage did to top-1", table, note)


def _list_stages(report: dict[str, Any]) -> Iterator[tuple[int, str, float, float]]:
    """Yield (place, name, validation top-1 before, after) of the stages that measured both."""
    for number, run in enumerate(report.get("stages") or [], start=1):
        record = run.get("record") or {}
        before, after = record.get("validation_top1_before"), record.get("validation_top1_after")
        if after is None:  # training measures each epoch
            epochs = {epoch.get("epoch"): epoch.get("validation_top1") for epoch in record.get("epochs") or []}
            after = record.get("averaged_top1") if record.get("is_averaged") else epochs.get(record.get("chosen_epoch"))
        if before is not None and after is not None:
            yield number, str(run.get("stage")), before, after


def _row(stage: str, split: str, before: float | None, after: float | None) -> Row:
    points = "–" if before is None or after is None else f"{100 * (after - before):+.2f}".replace("-", "−")
    return stage, split, format_share(before), format_share(after), points
