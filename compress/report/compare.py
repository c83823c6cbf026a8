"""How do several runs compare? One page, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.report.caveats import list_caveats, list_latency_caveats, share_baseline
from compress.report.columns import Cell, Report, figure_rows, letters_of, list_differences
from compress.report.fronts import Panel, Point, plot_fronts
from compress.report.lines import plot_runs
from compress.report.markup import (
    MISSING,
    escape,
    format_measure,
    render_details,
    render_figure,
    render_section,
    render_table,
)
from compress.report.metric import (
    format_metric,
    format_metric_interval,
    metric_of_report,
    scale_of,
    title_of,
    worse_by,
)
from compress.report.outcome import describe_broken, find, is_broken, list_changes, outcome_of, render_badge
from compress.report.page import render_page
from compress.report.robustness import SHOWN, describe_kinds, noise_curves
from compress.report.svg import are_numbers
from compress.tasks.base import Metric

KIND = "runs"
_STATUS = {"passed": "pass", "failed": "fail", "inconclusive": "inconclusive"}


def render_comparison(reports: Sequence[Report], names: Sequence[str]) -> str:
    """Return the whole page.

    Args:
        reports: As in `report.json`, two or more.
        names: What each run is called; no two the same.
    """
    letters = letters_of(len(reports))
    heads = [f"{letter} {name}" for letter, name in zip(letters, names, strict=True)]
    body = "".join(
        (
            _render_caveats(reports, letters),
            _render_verdicts(reports, heads),
            _render_figures(reports, heads),
            _render_fronts(reports, letters),
            _render_robustness(reports, heads, letters),
            _render_checks(reports, heads),
            _render_differences(reports, heads),
            _render_environments(reports, heads),
        )
    )
    return render_page(f"{len(reports)} runs compared", "compress report", f"{len(reports)} runs compared", body)


def comparison_rows(reports: Sequence[Report], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the figures, for the terminal: of the small print only intervals."""
    has_baseline = share_baseline(reports)
    rows = []
    for row in figure_rows(reports):
        cells = [row.baseline, *row.runs] if has_baseline else row.runs
        texts = [f"{cell.text} ({cell.note})" if " to " in cell.note else cell.text for cell in cells]
        rows.append([row.label, *texts])
    return ["figure", *["baseline"] * has_baseline, *names], rows


def name_runs(reports: Sequence[Report], given: Sequence[str]) -> list[str]:
    """Return the runs' names; those that are not the only ones of that name with what the user called them."""
    names = [str(report.get("name")) for report in reports]
    return [name if names.count(name) == 1 else f"{name} ({place})" for name, place in zip(names, given, strict=True)]


def _render_caveats(reports: Sequence[Report], letters: Sequence[str]) -> str:
    caveats = list_caveats(reports, letters)
    if not caveats:
        return ""
    items = "".join(f"<li>{escape(caveat)}</li>\n" for caveat in caveats)
    return f'<div class="verdict warn" role="note"><h2>Before you compare</h2>\n<ul>{items}</ul></div>\n'


def _render_verdicts(reports: Sequence[Report], heads: Sequence[str]) -> str:
    """Return each run's verdict, its gist, and why it failed."""
    rows = []
    for report, head in zip(reports, heads, strict=True):
        broken = [check for check in find(report, "verdict", "checks") or [] if is_broken(check, report)]
        gist = escape(", ".join(list_changes(report)) or None)
        why = "".join(f"<li>{describe_broken(check)}</li>" for check in broken)
        outcome = outcome_of(report)
        if outcome != "passed" and not broken:
            why = "<li>Nothing was checked, or a required check was not made.</li>"
        badge = render_badge(_STATUS[outcome])
        rows.append((escape(head), badge, f'<div class="text">{gist}{f"<ul>{why}</ul>" if why else ""}</div>'))
    return render_section(
        "Verdicts", render_table(("run", "verdict", "gist, and what failed"), rows, kind="stacked verdicts")
    )


def _render_figures(reports: Sequence[Report], heads: Sequence[str]) -> str:
    has_baseline = share_baseline(reports)
    rows = []
    for row in figure_rows(reports):
        cells = [row.baseline, *row.runs] if has_baseline else row.runs
        rows.append((escape(row.label), *(_render_cell(cell) for cell in cells)))
    columns = ("", *["baseline"] * has_baseline, *heads)
    table = render_table(columns, rows, numeric=range(1, len(columns)), kind=KIND)
    note = (
        "In small print: the 95 % interval, and the change against the baseline of the same run."
        f"{' The baseline is as measured in the first run.' if has_baseline else ''}"
    )
    return render_section("Figures", table, f'<p class="muted">{note}</p>\n')


def _render_cell(cell: Cell) -> str:
    text = render_badge(_STATUS[cell.text]) if cell.text in _STATUS else ""
    note = f'<br><small class="muted">{escape(cell.note)}</small>' if cell.note else ""
    return f"{text or escape(cell.text)}{note}"


def _render_fronts(reports: Sequence[Report], letters: Sequence[str]) -> str:
    """Return quality over latency and over MACs; latency as a share of the baseline's where it is not comparable."""
    is_alike = not list_latency_caveats(reports, letters)
    latency = "latency p50 (ms)" if is_alike else "latency, % of the baseline's"
    costs = [[_latency(report, network, is_alike) for network in ("baseline", "slim")] for report in reports]
    macs = [[_millions(find(report, network, "macs")) for network in ("baseline", "slim")] for report in reports]
    panels = [
        Panel(title, _list_points(reports, letters, found)) for title, found in ((latency, costs), ("MACs (M)", macs))
    ]
    caption = "Each point is a run. Filled points are the front: no other costs less and is as accurate, or more."
    if not is_alike:
        caption += " Milliseconds are not comparable here, so each latency is relative to its own baseline's."
    return render_section(
        "Accuracy and cost", render_figure(plot_fronts("fronts", panels, metric_of_report(reports[0])), escape(caption))
    )


def _latency(report: Report, network: str, is_alike: bool) -> float | None:
    p50 = find(report, network, "latency_ms", "p50")
    if is_alike or p50 is None:
        return p50  # type: ignore[no-any-return]
    before = find(report, "baseline", "latency_ms", "p50")
    return 100 * p50 / before if before else None


def _millions(macs: float | None) -> float | None:
    return None if macs is None else macs / 1e6


def _list_points(reports: Sequence[Report], letters: Sequence[str], costs: Sequence[Sequence[Any]]) -> list[Point]:
    """Return a point for each run, and one for each baseline: for the first alone where they share it."""
    points, metric = [], metric_of_report(reports[0])
    is_shared = share_baseline(reports)
    for number, (report, letter, (before, after)) in enumerate(zip(reports, letters, costs, strict=True)):
        for network, cost in (("baseline", before), ("slim", after)):
            quality = find(report, network, "quality", metric.name)
            is_baseline = network == "baseline"
            if not are_numbers(cost, quality) or (is_baseline and is_shared and number):
                continue
            label = "" if is_baseline and is_shared else letter
            interval = find(report, "details", "quality", network, metric.name)
            points.append(Point.of(cost, quality, interval, label, is_baseline, scale_of(metric)))
    return points


def _render_robustness(reports: Sequence[Report], heads: Sequence[str], letters: Sequence[str]) -> str:
    """Return quality of every run on every distribution, and under noise as a picture."""
    metric = metric_of_report(reports[0])
    found = [{one.get("name"): one for one in _distributions(report)} for report in reports]
    every = [one for those in found for one in those.values()]
    names = list(dict.fromkeys(one.get("name") for one in every))
    if not names:
        return ""
    names.sort(key=lambda name: -max(_drop(one.get(name), metric) for one in found))
    rows = [(escape(name), *(_render_standing(one.get(name), metric) for one in found)) for name in names]
    columns = ("images", *heads)
    numeric = range(1, len(columns))
    table = render_table(columns, rows[:SHOWN], numeric=numeric, kind=KIND)
    if len(rows) > SHOWN:
        rest = render_table(columns, rows[SHOWN:], numeric=numeric, kind=KIND)
        table += render_details(f"{len(rows) - SHOWN} more, where no run lost more", rest)
    what = f"{escape(title_of(metric))} of each run; in small print what it lost against its baseline there."
    note = f'<p class="muted">{what}</p>\n'
    return render_section(describe_kinds(every), _render_noise(reports, letters), table, note)


def _render_noise(reports: Sequence[Report], letters: Sequence[str]) -> str:
    metric = metric_of_report(reports[0])
    curves: dict[str, list[tuple[float, float | None]]] = {}
    baseline: list[tuple[float, float | None]] = []
    for report, letter in zip(reports, letters, strict=True):
        levels, before, after = noise_curves(find(report, "details", "robustness") or {}, metric)
        curves[letter] = list(zip(levels, after, strict=False))
        baseline = baseline or (list(zip(levels, before, strict=False)) if share_baseline(reports) else [])
    return render_figure(plot_runs("noise", curves, baseline, "level of the noise", metric))


def _distributions(report: Report) -> list[dict[str, Any]]:
    return find(report, "details", "robustness", "distributions") or []


def _drop(standing: dict[str, Any] | None, metric: Metric) -> float:
    return find(standing, "changes", worse_by(metric), "value") or 0.0


def _render_standing(standing: dict[str, Any] | None, metric: Metric) -> str:
    if standing is None:
        return MISSING
    lost = format_metric_interval(metric, {"value": find(standing, "changes", worse_by(metric), "value")})
    return _render_cell(Cell(format_metric(metric, standing.get(metric.name)), f"{lost} lost" if lost else ""))


def _render_checks(reports: Sequence[Report], heads: Sequence[str]) -> str:
    """Return every check of every run, those that fail in some run first."""
    each = [{check.get("name"): check for check in find(report, "verdict", "checks") or []} for report in reports]
    names = list(dict.fromkeys(name for checks in each for name in checks))
    broken = {
        name
        for report, checks in zip(reports, each, strict=True)
        for name, check in checks.items()
        if is_broken(check, report)
    }
    names.sort(key=lambda name: name not in broken)
    rows = [(f"<code>{escape(name)}</code>", *(_render_check(checks.get(name)) for checks in each)) for name in names]
    table = render_table(("check", *heads), rows, kind=KIND)
    if not rows:
        return ""
    failed = f"{len(broken)} of {len(names)} checks fail in some run." if broken else f"No check of {len(names)} fails."
    return render_section("Checks", f"<p>{failed}</p>\n", render_details("every check, side by side", table))


def _render_check(check: dict[str, Any] | None) -> str:
    if check is None:
        return MISSING
    unit = check.get("unit") or ""
    value, limit = (format_measure(check.get(key), unit) for key in ("value", "limit"))
    figures = "" if value == MISSING else f"{value}{'' if limit == MISSING else f' of {limit}'}"
    return f'{render_badge(check.get("status", "skipped"))}<br><small class="muted">{escape(figures)}</small>'


def _render_differences(reports: Sequence[Report], heads: Sequence[str]) -> str:
    rows = list_differences([report.get("config") or {} for report in reports])
    if not rows:
        return render_section("Settings", "<p>The resolved pipelines are the same but for their names.</p>\n")
    cells = [(_render_key(key), *(f"<code>{escape(value)}</code>" for value in values)) for key, values in rows]
    return render_section("Settings that differ", render_table(("setting", *heads), cells, kind=KIND))


def _render_key(key: str) -> str:
    """Return a setting that may be broken after its dots."""
    return f"<code>{escape(key).replace('.', '.<wbr>')}</code>"


def _render_environments(reports: Sequence[Report], heads: Sequence[str]) -> str:
    rows = list_differences([report.get("environment") or {} for report in reports])
    if not rows:
        return ""
    cells = [(escape(key), *map(escape, values)) for key, values in rows if key != "stages"]
    return render_section("Environments that differ", render_table(("", *heads), cells, kind=KIND))
