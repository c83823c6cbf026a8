"""Which figures of several runs stand side by side? One row for each figure, one cell for each run.

In which settings do runs differ? Resolved pipelines as flat keys, stages by name, and only what is not the same.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import yaml

from compress.report.markup import (
    MISSING,
    format_bytes,
    format_count,
    format_ms,
    format_seconds,
)
from compress.report.metric import (
    TOP1,
    describe_ratio,
    format_metric,
    format_metric_interval,
    metric_of_report,
    title_of,
    worse_by,
)
from compress.report.outcome import find, find_quality, is_broken, list_keys, name_metric, outcome_of, quality_kind
from compress.report.runtime import format_joules
from compress.tasks.base import Metric

Report = dict[str, Any]
_COSTS = (
    ("MACs", ("macs",), format_count, "fewer", "more"),
    ("Parameters", ("params",), format_count, "fewer", "more"),
    ("ONNX size", ("size_bytes",), format_bytes, "smaller", "larger"),
)
_RUNTIME = (
    ("Cold start", "cold_start_ms", format_ms),
    ("Peak memory", "peak_memory_bytes", format_bytes),
    ("Energy of a call", "energy_joules", format_joules),
)


class Cell(NamedTuple):
    """A figure, and what is to be said of it in small print; both plain text."""

    text: str = MISSING
    note: str = ""


class Row(NamedTuple):
    """A figure of the baseline and of each run."""

    label: str
    baseline: Cell
    runs: list[Cell]


def letters_of(count: int) -> list[str]:
    """Return what so many runs are called in pictures.

    >>> letters_of(3), letters_of(27)[-1]
    (['A', 'B', 'C'], '27')
    """
    return [string.ascii_uppercase[number] if number < 26 else str(number + 1) for number in range(count)]


def figure_rows(reports: Sequence[Report]) -> list[Row]:
    """Return the figures of runs, those left out that none of them knows; the baseline's are those of the first run."""
    rows = [_verdict_row(reports)]
    for label, keys, form, less, more in _COSTS:
        rows.append(_row(label, reports, _at(*keys), form, _ratio(keys, less, more)))
    for name in _union(reports, "quality"):
        rows.append(_quality_row(name, reports))
    metric = metric_of_report(reports[0])
    lost = f"{title_of(metric)} {'lost' if metric.higher_is_better else 'gained'}"
    for label, key, kind in ((lost, worse_by(metric), metric), ("Other predictions", "churn", TOP1)):
        estimates = [find(report, "details", "quality", "changes", key) for report in reports]
        rows.append(Row(label, Cell(), [_interval_cell(estimate, kind) for estimate in estimates]))
    for name in _union(reports, "latency_ms"):
        note = _ratio(("latency_ms", name), "faster", "slower")
        rows.append(_row(f"Latency {name}", reports, _at("latency_ms", name), format_ms, note))
    rows.append(Row("Speed-up", Cell(), [_speedup_cell(report) for report in reports]))
    for label, key, form in _RUNTIME:
        rows.append(_row(label, reports, _measured_at(key), form))
    rows.append(Row("Time of the stages", Cell(), [_time_cell(report) for report in reports]))
    return [row for row in rows if any(cell.text != MISSING for cell in row.runs)]


def _verdict_row(reports: Sequence[Report]) -> Row:
    cells = []
    for report in reports:
        broken = [check for check in find(report, "verdict", "checks") or [] if is_broken(check, report)]
        outcome = outcome_of(report)
        word = "inconclusive" if outcome == "inconclusive" else "failed"
        cells.append(Cell(outcome, f"{len(broken)} {word}" if broken else ""))
    return Row("Verdict", Cell(), cells)


def _row(
    label: str,
    reports: Sequence[Report],
    value: Callable[[Report, str], Any],
    form: Callable[[Any], str],
    note: Callable[[Report], str] = lambda report: "",
) -> Row:
    """Return a row of values, `value` being given a report and "baseline" or "slim"."""
    cells = [Cell(form(value(report, "slim")), note(report)) for report in reports]
    return Row(label, Cell(form(value(reports[0], "baseline"))), cells)


def _at(*keys: str) -> Callable[[Report, str], Any]:
    return lambda report, network: find(report, network, *keys)


def _measured_at(key: str) -> Callable[[Report, str], Any]:
    return lambda report, network: find(report, "details", "runtime", key, network)


def _ratio(keys: tuple[str, ...], less: str, more: str) -> Callable[[Report], str]:
    def describe(report: Report) -> str:
        before, after = find(report, "baseline", *keys), find(report, "slim", *keys)
        return describe_ratio(before, after, less, more) if before and after else ""

    return describe


def _quality_row(metric: str, reports: Sequence[Report]) -> Row:
    cells = []
    for report in reports:
        value = find(report, "slim", "quality", metric)
        estimate = find(report, "details", "quality", "slim", metric)
        kind = quality_kind(report, metric)
        cells.append(Cell(format_metric(kind, value), _interval_cell(estimate, kind).note))
    before = find_quality(reports[0], "baseline", metric)
    return Row(name_metric(metric), Cell(format_metric(quality_kind(reports[0], metric), before)), cells)


def _interval_cell(estimate: Any, metric: Metric) -> Cell:
    """Return a figure, and its interval as the note."""
    text = format_metric_interval(metric, estimate)
    if text is None:
        return Cell()
    value, _, interval = text.partition(" (")
    return Cell(value, interval.removesuffix(")"))


def _speedup_cell(report: Report) -> Cell:
    ratio = find(report, "details", "latency", "ratio")
    value, low, high = (find(ratio, key) for key in ("value", "low", "high"))
    if value and low and high:
        return Cell(f"{1 / value:.2f}×", f"{1 / high:.2f} to {1 / low:.2f}")
    before, after = (find(report, network, "latency_ms", "p50") for network in ("baseline", "slim"))
    return Cell(f"{before / after:.2f}×") if before and after else Cell()


def _time_cell(report: Report) -> Cell:
    seconds = [stage.get("seconds") for stage in report.get("stages") or []]
    known = [value for value in seconds if value is not None]
    return Cell(format_seconds(sum(known))) if known else Cell()


def _union(reports: Sequence[Report], group: str) -> list[str]:
    return list(dict.fromkeys(key for report in reports for key in list_keys(report, group)))


MISSING_VALUE = "–"
IGNORED = ("name",)  # it heads the column


def list_differences(configs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the keys whose values are not the same in all pipelines, with the value in each as text.

    A stage that some pipelines lack is one key. A stage that comes twice in a pipeline is "stages.prune", then
    "stages.prune (2)".

    Args:
        configs: Resolved pipelines.

    >>> list_differences([{"seed": 0, "deploy": {"threads": 1}}, {"seed": 1, "deploy": {"threads": 1}}])
    [('seed', ['0', '1'])]
    """
    named = [_name_stages(config) for config in configs]
    order = [list(one.get("stages") or {}) for one in named]
    rows = []
    if len({tuple(stages) for stages in order}) > 1:
        rows.append(("order of the stages", [" → ".join(stages) or MISSING_VALUE for stages in order]))
    _compare(named, "", rows)
    return rows


def _name_stages(config: dict[str, Any]) -> dict[str, Any]:
    """Return a pipeline whose list of stages is a dict by name."""
    stages: dict[str, Any] = {}
    for stage in config.get("stages") or []:
        if not isinstance(stage, dict):
            continue
        name = str(stage.get("stage"))
        count = sum(other == name or other.startswith(f"{name} (") for other in stages)
        stages[name if not count else f"{name} ({count + 1})"] = {k: v for k, v in stage.items() if k != "stage"}
    return {**{key: value for key, value in config.items() if key not in IGNORED}, "stages": stages}


def _compare(values: Sequence[Any], key: str, rows: list[tuple[str, list[str]]]) -> None:
    """Add a row for `values`, or for what lies below them, where they are not all the same."""
    if all(isinstance(value, dict) for value in values):
        for name in dict.fromkeys(name for value in values for name in value):
            _compare([value.get(name, _ABSENT) for value in values], f"{key}.{name}" if key else str(name), rows)
        return
    if any(value != values[0] or isinstance(value, bool) != isinstance(values[0], bool) for value in values):
        rows.append((key, [_show(value) for value in values]))


def _show(value: Any) -> str:
    """Return a value as it would stand in a pipeline file, on one line."""
    if value is _ABSENT:
        return MISSING_VALUE
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...").strip()


_ABSENT = object()
