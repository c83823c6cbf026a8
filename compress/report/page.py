"""HTML pages from the templates in `templates/`: self-contained, without scripts, every value escaped.

A page needs neither a network nor any other file: the style sheet and the plots are part of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compress.report import formats, plots, results, stage_facts
from compress.report.model import Report
from compress.report.records import Change

FOLDER = Path(__file__).parent
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
CHANGE_FORMATS: dict[str, formats.Format] = {
    "bytes": formats.format_bytes,
    "count": formats.format_count,
    "number": formats.format_number,
}


def render_report(report: Report) -> str:
    """Return the page of one run; the same report yields the same text."""
    return render("report.html.j2", f"{report.name}: {report.verdict.outcome}", report.name, report=report)


def render(template: str, title: str, name: str, command: str = "compress report", **values: Any) -> str:
    """Return an HTML page from a template.

    Args:
        template: Name of a file in `templates/`.
        title: Title of the window.
        name: Heading of the page.
        command: Command, shown in small print above the heading.
        values: Variables of the template.
    """
    return _environment().get_template(template).render(title=title, name=name, command=command, **values)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: formats.MISSING if value is None else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        **CHANGE_FORMATS,
        "change": _describe_change,
        "difference": formats.describe_difference,
        "known": _keep_known,
        "measure": formats.format_measure,
        "metric": formats.format_metric,
        "points": formats.format_points,
        "seconds": formats.format_seconds,
        "share": formats.format_share,
        "times": formats.format_times,
        "whole": formats.format_whole,
        "yaml": _to_yaml,
        "yes_no": _yes_no,
    }
    environment.globals |= {
        "content_policy": CONTENT_POLICY,
        "plots": plots,
        "results": results,
        "stage_facts": stage_facts,
        "style_sheet": Markup((FOLDER / "style.css").read_text(encoding="utf-8")),
    }
    return environment


def _describe_change(change: Change, form: str) -> str:
    return formats.describe_change(change, CHANGE_FORMATS[form])


def _keep_known(facts: list[results.Fact]) -> list[results.Fact]:
    """Return the facts whose value is known."""
    return [(name, value) for name, value in facts if value not in (None, formats.MISSING)]


def _yes_no(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"


def _to_yaml(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    return text
