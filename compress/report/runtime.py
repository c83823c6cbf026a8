"""What does the file cost besides the time of a call? Start, memory, throughput, energy, and who computes.

Where else was the file opened, and what came out there?
"""

from typing import Any

from compress.report.lines import plot_throughput
from compress.report.markup import (
    MISSING,
    escape,
    format_bytes,
    format_ms,
    format_number,
    format_whole,
    render_figure,
    render_section,
    render_table,
)
from compress.report.metric import CHANGE_COLUMNS, CHANGE_KIND, compare_figures
from compress.report.outcome import find

NODES_SHOWN = 20


def format_joules(value: float | None) -> str:
    """Return an energy.

    >>> format_joules(0.0123), format_joules(None)
    ('0.0123 J', '–')
    """
    return MISSING if value is None else f"{format_number(value)} J"


def format_number_of_images(value: float | None) -> str:
    """Return images per second with as many digits as say something.

    >>> format_number_of_images(1234.56), format_number_of_images(12.345)
    ('1,235', '12.35')
    """
    return format_number(round(value) if value is not None and value >= 100 else value)


_FIGURES = (
    ("cold_start_ms", "Cold start", format_ms, "faster", "slower"),
    ("peak_memory_bytes", "Peak memory", format_bytes, "less", "more"),
    ("energy_joules", "Energy of a call", format_joules, "less", "more"),
)


def render_runtime(report: dict[str, Any]) -> str:
    """Return the table of both networks, a picture of throughput, and which nodes ran where; "" without any."""
    runtime = find(report, "details", "runtime") or {}
    rows = [
        compare_figures(label, find(runtime, key, "baseline"), find(runtime, key, "slim"), form, less, more)
        for key, label, form, less, more in _FIGURES
    ]
    throughput = [row for row in runtime.get("throughput") or [] if isinstance(row, dict)]
    rows += [
        compare_figures(
            f"Images per second, batch {row.get('batch_size')}",
            row.get("baseline"),
            row.get("slim"),
            format_number_of_images,
            "fewer",
            "more",
            more_is_better=True,
        )
        for row in throughput
    ]
    shown = [row for row in rows if row]
    table = render_table(CHANGE_COLUMNS, shown, numeric=(1, 2, 3), kind=CHANGE_KIND) if shown else ""
    figure = render_figure(plot_throughput("throughput", throughput))
    return render_section("At run time", table, figure, _describe_providers(report))


def _describe_providers(report: dict[str, Any]) -> str:
    """Return a paragraph on how many nodes each execution provider ran and which fell back; "" when not known."""
    providers = find(report, "details", "providers") or {}
    nodes = providers.get("nodes") or {}
    if not nodes:
        return ""
    counts = ", ".join(f"{escape(format_whole(count))} on {escape(name)}" for name, count in nodes.items())
    asked = providers.get("asked")
    text = f"Nodes by execution provider: {counts}." + (f" {escape(asked)} was asked for." if asked else "")
    fell_back = providers.get("fell_back") or []
    if fell_back:
        names = ", ".join(f"<code>{escape(node)}</code>" for node in fell_back[:NODES_SHOWN])
        rest = len(fell_back) - NODES_SHOWN
        text += f" Fell back to another one: {names}{f' and {rest:,} more' if rest > 0 else ''}."
    elif asked:
        text += " None fell back to another one."
    return f"<p>{text}</p>\n"


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
