"""Where was the file computed? Nodes that fell back to another provider, and other places it was opened in."""

from typing import Any

from compress.report.markup import escape, format_number, render_facts, render_section, render_table
from compress.report.outcome import find


def render_places(report: dict[str, Any]) -> str:
    """Return the section, or "" where everything was computed where it was asked for and nowhere else."""
    providers, also = find(report, "details", "providers") or {}, find(report, "details", "also") or []
    fell_back = providers.get("fell_back") or []
    nodes = providers.get("nodes") or {}
    facts = [
        ("asked for", providers.get("asked")),
        ("nodes", ", ".join(f"{count} on {provider}" for provider, count in nodes.items())),
        ("fell back", ", ".join(map(str, fell_back))),
    ]
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
    table = render_table(head, rows, numeric=(2, 3, 4)) if rows else ""
    return render_section("Runtimes", render_facts(facts) if fell_back else "", table)
