"""How is a run read by people? One page, verdict first, that needs neither a network nor any other file."""

from typing import Any

import yaml

from compress.report.markup import escape
from compress.report.outcome import (
    outcome_of,
    render_checks,
    render_comparison,
    render_config,
    render_latency,
    render_parity,
    render_verdict,
)
from compress.report.quality import render_quality, render_worst_images
from compress.report.robustness import render_robustness
from compress.report.runtime import render_places, render_runtime
from compress.report.shares import render_shares
from compress.report.style import STYLE_SHEET
from compress.report.work import render_environment, render_notes, render_stages, render_times

CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render_html(report: dict[str, Any]) -> str:
    """Return the whole page; the same report gives the same text.

    Args:
        report: As from `build_report`. Everything but "verdict" may be missing or None; its section is then left out.

    Returns:
        HTML without scripts and without references to anything outside; every value of the report is escaped.
    """
    word = outcome_of(report)
    config = report.get("config")
    body = "".join(
        (
            render_verdict(report),
            render_comparison(report),
            render_checks(report),
            render_notes(report),
            render_stages(report),
            render_shares(report),
            render_quality(report),
            render_worst_images(report),
            render_robustness(report),
            render_latency(report),
            render_runtime(report),
            render_places(report),
            render_parity(report),
            render_times(report),
            render_environment(report),
            render_config(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)) if config else "",
        )
    )
    return render_page(f"{report.get('name')}: {word}", "compress report", str(report.get("name")), body)


def render_page(title: str, kind: str, name: str, body: str) -> str:
    """Return a page around a body.

    Args:
        title: Plain text, for the window.
        kind: Plain text, small above the name.
        name: Plain text, the heading.
        body: HTML.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<title>{escape(title)}</title>
<style>{STYLE_SHEET}</style>
</head>
<body>
<main>
<h1><small>{escape(kind)}</small>{escape(name)}</h1>
{body}</main>
</body>
</html>
"""
