"""Where else was the file opened, and what came out there?"""

from typing import Any

from compress.report.markup import escape, format_number, render_section, render_table
from compress.report.outcome import find


def render_places(report: dict[str, Any]) -> str:
    """Return the section, or "" where the file was opened nowhere else."""
    also = find(report, "details", "also") or []
    rows = [
        (
            f"<code>{escape(one.get('label'))}</code>",
            escape(one.get("status")),
            escape(format_number(one.get("p50_ms"))),
            escape(format_number(one.get("shipping_p50_ms"))),
            escape(format_number(one.get("max_abs"))),
            f'<div class="text">{escape(one.get("reason") or "")}</div>',
        )
        for one in also
    ]
    head = ("place", "result", "p50 (ms)", "beside it (ms)", "largest difference", "why")
    table = render_table(head, rows, numeric=(2, 3, 4))
    return render_section("Elsewhere", table) if rows else ""
