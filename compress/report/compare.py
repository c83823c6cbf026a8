"""Comparison of several runs: metrics side by side, checks, settings that differ, as a page and as a table."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import yaml
from markupsafe import Markup
from pydantic import JsonValue

from compress.report.comparability import list_caveats, list_latency_caveats, share_baseline
from compress.report.details import Estimate
from compress.report.formats import (
    MISSING,
    Format,
    describe_ratio,
    describe_speedup,
    format_bytes,
    format_count,
    format_interval,
    format_joules,
    format_measure,
    format_metric,
    format_ms,
    format_seconds,
)
from compress.report.model import Check, Report
from compress.report.page import render
from compress.report.plots import Curve, Panel, Point, plot_fronts, plot_noise
from compress.report.records import Change
from compress.report.results import describe_kinds, drop_on, make_point, noise_curves
from compress.tasks.base import Metric

_COSTS: tuple[tuple[str, str, Format, str, str], ...] = (
    ("MACs", "macs", format_count, "fewer", "more"),
    ("Parameters", "params", format_count, "fewer", "more"),
    ("ONNX size", "size_bytes", format_bytes, "smaller", "larger"),
)
_RESOURCES: tuple[tuple[str, str, Format], ...] = (
    ("Cold start", "cold_start_ms", format_ms),
    ("Peak memory", "peak_memory_bytes", format_bytes),
    ("Energy of a call", "energy_joules", format_joules),
)


class Cell(NamedTuple):
    """A value and a note in small print, as text."""

    text: str = MISSING
    note: str = ""


class Row(NamedTuple):
    """A value of the baseline and of each run."""

    label: str
    baseline: Cell
    runs: list[Cell]


# -- rows ----------------------------------------------------------------------------------------------------------


def value_rows(reports: Sequence[Report]) -> list[Row]:
    """Return rows of costs, metrics and times that any run has; the baseline is that of the first run."""
    metric = reports[0].metric
    details = [report.details for report in reports]
    changes = [one.quality.changes for one in details]
    latencies = _union(name for report in reports for name in report.latency_names)
    rows = [
        Row("Verdict", Cell(), [_verdict_cell(report) for report in reports]),
        *(
            _cost_row(label, [report.change(name) for report in reports], form, less, more)
            for label, name, form, less, more in _COSTS
        ),
        *(_quality_row(name, reports) for name in _union(name for report in reports for name in report.quality_names)),
        Row(
            f"{metric.title} {metric.worse_word}",
            Cell(),
            [_estimate_cell(one.get(metric.worsening), metric) for one in changes],
        ),
        Row("Prediction churn", Cell(), [_estimate_cell(one.get("churn"), metric.other("churn")) for one in changes]),
        *(
            _cost_row(f"Latency {name}", [report.latency(name) for report in reports], format_ms, "faster", "slower")
            for name in latencies
        ),
        Row("Speed-up", Cell(), [_speedup_cell(report) for report in reports]),
        *(_cost_row(label, [getattr(one.runtime, name) for one in details], form) for label, name, form in _RESOURCES),
        Row("Time of the stages", Cell(), [Cell(format_seconds(report.seconds)) for report in reports]),
    ]
    return [row for row in rows if any(cell.text != MISSING for cell in row.runs)]


def _union(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _verdict_cell(report: Report) -> Cell:
    count, outcome = len(report.verdict.open_checks), report.verdict.outcome
    word = "inconclusive" if outcome == "inconclusive" else "failed"
    return Cell(outcome, f"{count} {word}" if count else "")


def _cost_row(label: str, changes: Sequence[Change], form: Format, less: str = "", more: str = "") -> Row:
    """Return a row of values, with the ratio to the baseline as the note if `less` is given."""
    notes = [describe_ratio(change, less, more) if less else "" for change in changes]
    cells = [Cell(form(change.after), note) for change, note in zip(changes, notes, strict=True)]
    return Row(label, Cell(form(changes[0].before)), cells)


def _quality_row(name: str, reports: Sequence[Report]) -> Row:
    cells = []
    for report in reports:
        metric, estimate = report.metric.other(name), report.details.quality.slim.get(name)
        cells.append(Cell(format_metric(report.quality(name).after, metric), format_interval(estimate, metric)))
    metric = reports[0].metric.other(name)
    return Row(metric.title, Cell(format_metric(reports[0].quality(name).before, metric)), cells)


def _estimate_cell(estimate: Estimate | None, metric: Metric) -> Cell:
    if estimate is None or estimate.value is None:
        return Cell()
    return Cell(format_metric(estimate.value, metric).replace("-", "−"), format_interval(estimate, metric))


def _speedup_cell(report: Report) -> Cell:
    ratio, speedup = report.details.latency.ratio, report.speedup
    if ratio is not None:
        value, interval = describe_speedup(ratio)
        return Cell(f"{value}×", interval)
    return Cell() if speedup is None else Cell(f"{speedup:.2f}×")


def comparison_rows(reports: Sequence[Report], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows for the terminal; of the notes in small print, only intervals."""
    has_baseline = share_baseline(reports)
    rows = []
    for row in value_rows(reports):
        cells = [row.baseline, *row.runs] if has_baseline else row.runs
        texts = [f"{cell.text} ({cell.note})" if " to " in cell.note else cell.text for cell in cells]
        rows.append([row.label, *texts])
    return ["metric", *["baseline"] * has_baseline, *names], rows


# -- page ----------------------------------------------------------------------------------------------------------


def render_comparison(reports: Sequence[Report], names: Sequence[str]) -> str:
    """Return the HTML page of a comparison.

    Args:
        reports: Reports of two runs or more.
        names: Names of the runs, all different.
    """
    letters, metric = letters_of(len(reports)), reports[0].metric
    heads = [f"{letter} {name}" for letter, name in zip(letters, names, strict=True)]
    has_baseline, are_times_alike = share_baseline(reports), not list_latency_caveats(reports, letters)
    title = f"{len(reports)} runs compared"
    return render(
        "comparison.html.j2",
        title,
        title,
        heads=heads,
        metric=metric,
        caveats=list_caveats(reports, letters),
        runs=list(zip(heads, reports, strict=True)),
        has_baseline=has_baseline,
        rows=[(row.label, [row.baseline, *row.runs] if has_baseline else row.runs) for row in value_rows(reports)],
        are_times_alike=are_times_alike,
        fronts=plot_fronts("fronts", _list_panels(reports, letters, are_times_alike), metric),
        robustness_title=describe_kinds([one for report in reports for one in report.details.robustness.distributions]),
        distributions=_distribution_rows(reports),
        noise=_plot_noise(reports, letters),
        checks=_check_rows(reports),
        settings=list_differences([report.config for report in reports]),
        environments=list_differences([report.environment.to_settings() for report in reports]),
    )


def name_runs(reports: Sequence[Report], given: Sequence[str]) -> list[str]:
    """Return the names of runs, with the path that the user gave where names are equal."""
    names = [report.name for report in reports]
    return [name if names.count(name) == 1 else f"{name} ({place})" for name, place in zip(names, given, strict=True)]


def letters_of(count: int) -> list[str]:
    """Return short names of a number of runs, for plots.

    >>> letters_of(3), letters_of(27)[-1]
    (['A', 'B', 'C'], '27')
    """
    return [string.ascii_uppercase[number] if number < 26 else str(number + 1) for number in range(count)]


def _list_panels(reports: Sequence[Report], letters: Sequence[str], are_times_alike: bool) -> list[Panel]:
    """Return quality over latency and over MACs; latency relative to the baseline where it is not comparable."""
    latencies = [report.latency() for report in reports]
    if not are_times_alike:
        latencies = [one.scaled(100 / one.before) if one.before else Change() for one in latencies]
    millions = [report.change("macs").scaled(1e-6) for report in reports]
    title = "latency p50 (ms)" if are_times_alike else "latency, % of the baseline's"
    return [
        Panel(title, _list_points(reports, letters, latencies)),
        Panel("MACs (M)", _list_points(reports, letters, millions)),
    ]


def _list_points(reports: Sequence[Report], letters: Sequence[str], costs: Sequence[Change]) -> list[Point]:
    """Return a point for each run and for each baseline; only the first baseline if the runs share it."""
    is_shared = share_baseline(reports)
    points = []
    for number, (report, letter, cost) in enumerate(zip(reports, letters, costs, strict=True)):
        if cost.before is not None and not (is_shared and number):
            points.append(make_point(report, cost.before, True, "" if is_shared else letter))
        if cost.after is not None:
            points.append(make_point(report, cost.after, False, letter))
    return [point for point in points if point is not None]


def _plot_noise(reports: Sequence[Report], letters: Sequence[str]) -> Markup:
    curves: dict[str, Curve] = {}
    baseline: Curve = []
    for report, letter in zip(reports, letters, strict=True):
        before, curves[letter] = noise_curves(report.details.robustness)
        baseline = baseline or (before if share_baseline(reports) else [])
    return plot_noise("noise", curves, baseline, reports[0].metric)


def _distribution_rows(reports: Sequence[Report]) -> list[tuple[str, list[Cell]]]:
    """Return a value and its drop on each distribution for each run, the largest drop first."""
    metric = reports[0].metric
    found = [{one.name: one for one in report.details.robustness.distributions} for report in reports]
    rows = []
    for name in _union(name for those in found for name in those):
        drops = [drop_on(those.get(name), metric) for those in found]
        values = [format_metric(those[name].quality.after if name in those else None, metric) for those in found]
        notes = [
            "" if drop is None else f"{format_metric(drop, metric)} {metric.worse_word}".replace("-", "−")
            for drop in drops
        ]
        rows.append((max(drop or 0.0 for drop in drops), (name, list(map(Cell, values, notes)))))
    return [row for _, row in sorted(rows, key=lambda row: -row[0])]


def _check_rows(reports: Sequence[Report]) -> list[tuple[str, bool, list[Cell]]]:
    """Return for each check its name, whether it is open in any run, and its status and values, open checks first."""
    found = [{check.name: check for check in report.verdict.checks} for report in reports]
    rows = []
    for name in _union(name for checks in found for name in checks):
        each = [checks.get(name) for checks in found]
        is_open = any(
            check is not None and run.verdict.is_open(check) for check, run in zip(each, reports, strict=True)
        )
        cells = [Cell() if check is None else Cell(check.status, _describe_value(check)) for check in each]
        rows.append((name, is_open, cells))
    return sorted(rows, key=lambda row: not row[1])


def _describe_value(check: Check) -> str:
    value, limit = (format_measure(number, check.unit) for number in (check.value, check.limit))
    return "" if value == MISSING else f"{value}{'' if limit == MISSING else f' of {limit}'}"


# -- settings ------------------------------------------------------------------------------------------------------

_IGNORED = ("name",)  # it heads the column
_ABSENT = object()


def list_differences(configs: Sequence[Mapping[str, JsonValue]]) -> list[tuple[str, list[str]]]:
    """Return the keys whose values are not the same in all pipelines, with the value in each as text.

    A stage that some pipelines lack is one key. A stage that comes twice in a pipeline is "stages.prune", then
    "stages.prune (2)".

    Args:
        configs: Resolved pipelines.

    >>> list_differences([{"seed": 0, "deploy": {"threads": 1}}, {"seed": 1, "deploy": {"threads": 1}}])
    [('seed', ['0', '1'])]
    """
    named = [_name_stages(config) for config in configs]
    order = [stages for _, stages in named]
    rows = []
    if len({tuple(stages) for stages in order}) > 1:
        rows.append(("order of the stages", [" → ".join(stages) or MISSING for stages in order]))
    _compare([{**settings, "stages": stages} for settings, stages in named], "", rows)
    return rows


def _name_stages(config: Mapping[str, JsonValue]) -> tuple[dict[str, JsonValue], dict[str, JsonValue]]:
    """Return the settings of a pipeline without its stages, and the stages by name."""
    stages: dict[str, JsonValue] = {}
    listed = config.get("stages")
    for stage in listed if isinstance(listed, list) else []:
        if not isinstance(stage, dict):
            continue
        name = str(stage.get("stage"))
        count = sum(other == name or other.startswith(f"{name} (") for other in stages)
        stages[name if not count else f"{name} ({count + 1})"] = {k: v for k, v in stage.items() if k != "stage"}
    return {key: value for key, value in config.items() if key not in (*_IGNORED, "stages")}, stages


def _compare(values: Sequence[object], key: str, rows: list[tuple[str, list[str]]]) -> None:
    """Add a row for `values`, or for each entry of mappings, if they are not all equal."""
    mappings = [value for value in values if isinstance(value, dict)]
    if len(mappings) == len(values):
        for name in _union(name for mapping in mappings for name in mapping):
            _compare([mapping.get(name, _ABSENT) for mapping in mappings], f"{key}.{name}" if key else str(name), rows)
        return
    if any(value != values[0] or isinstance(value, bool) != isinstance(values[0], bool) for value in values):
        rows.append((key, [_show(value) for value in values]))


def _show(value: object) -> str:
    """Return a value as one line of YAML, as in a pipeline file."""
    if value is _ABSENT:
        return MISSING
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...").strip()
