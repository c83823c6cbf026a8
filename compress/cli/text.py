"""Verdicts and metrics as rows and sentences for the terminal."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the artifacts import numpy, which nobody needs for `compress --help`
    from compress.model.artifacts import CheckResult, ModelMetrics, Verdict

CHECK_COLUMNS = ("check", "status", "value", "limit", "unit", "detail")
LIMIT_COLUMNS = CHECK_COLUMNS[:-1]
LINE = 78  # characters of a line of text
VALUE_COLUMNS = ("metric", "baseline", "slim", "change")


def check_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    """Return the cells of CHECK_COLUMNS for each check."""
    return [
        (c.name, c.status, format_number(c.value), format_number(c.limit), c.unit, c.detail) for c in verdict.checks
    ]


def limit_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    """Return the cells of LIMIT_COLUMNS for each check that has a limit or did not pass."""
    return [row[:-1] for row, check in zip(check_rows(verdict), verdict.checks, strict=True) if _is_shown(check)]


def check_lines(verdict: Verdict) -> list[str]:
    """Return wrapped lines: the detail of each check that did not pass, and the names of all others."""
    lines: list[str] = []
    for check in verdict.checks:
        if check.status != "pass" and check.detail:
            lines += textwrap.wrap(f"{check.name}: {check.detail}", LINE, initial_indent="  ", subsequent_indent="    ")
    others = [check.name for check in verdict.checks if not _is_shown(check)]
    if others:
        lines += textwrap.wrap(f"also passed: {', '.join(others)}", LINE, initial_indent="  ", subsequent_indent="    ")
    return lines


def _is_shown(check: CheckResult) -> bool:
    return check.limit is not None or check.status != "pass"


def value_rows(verdict: Verdict) -> list[tuple[str, str, str, str]]:
    """Return the cells of VALUE_COLUMNS for costs, quality and latency; [] when either network was not measured."""
    before, after = verdict.baseline, verdict.slim
    if before is None or after is None:
        return []
    rows = [
        ("MACs", _count(before.macs), _count(after.macs), _fewer(before.macs, after.macs)),
        ("params", _count(before.params), _count(after.params), _fewer(before.params, after.params)),
        ("size (MB)", _megabytes(before), _megabytes(after), _fewer(before.size_bytes, after.size_bytes, "smaller")),
    ]
    for name in before.quality:
        if name in after.quality:
            old, new = before.quality[name], after.quality[name]
            if verdict.metric.other(name).is_share:
                change = f"{100 * (new - old):+.2f} percentage points"
                rows.append((f"{name} (%)", f"{100 * old:.2f}", f"{100 * new:.2f}", change))
            else:
                rows.append((name, f"{old:.4g}", f"{new:.4g}", f"{new - old:+.4g}"))
    for name in before.latency_ms:
        if name in after.latency_ms:
            old, new = before.latency_ms[name], after.latency_ms[name]
            rows.append((f"latency {name} (ms)", f"{old:.3f}", f"{new:.3f}", _fewer(old, new, "faster")))
    return rows


def verdict_sentence(verdict: Verdict) -> str:
    """Return the verdict in one sentence."""
    made = [check for check in verdict.checks if check.status != "skipped"]
    failed = [check.name for check in made if check.status == "fail"]
    skipped = [name for name in verdict.required if name not in {check.name for check in made}]
    count = f"{len(made)} {'check' if len(made) == 1 else 'checks'}"
    if verdict.outcome == "passed":
        return f"PASSED: {count} made, none failed."
    if verdict.outcome == "inconclusive":
        names = ", ".join(check.name for check in made if check.status == "inconclusive")
        return f"INCONCLUSIVE: {names} can be shown neither kept nor broken, of {count} made; none failed."
    if not made:
        return "FAILED: nothing was checked."
    reasons = [f"{', '.join(failed)} failed"] * bool(failed) + [f"{', '.join(skipped)} not made"] * bool(skipped)
    return f"FAILED: {' and '.join(reasons)}, of {count} made."


def next_steps(verdict: Verdict) -> list[str]:
    """Return one line for each check that did not pass and has a remedy."""
    return [f"{check.name}: {check.remedy}" for check in verdict.open_checks if check.remedy]


def format_number(value: float | None) -> str:
    """Return a number with four significant digits, large ones in full with separators; "-" for None.

    >>> format_number(0.00123456), format_number(1234567.0), format_number(2.0), format_number(None)
    ('0.001235', '1,234,567', '2', '-')
    """
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _count(number: int) -> str:
    return f"{number:,}" if number else "not counted"


def _megabytes(metrics: ModelMetrics) -> str:
    return f"{metrics.size_bytes / 1e6:.3f}"


def _fewer(before: float, after: float, word: str = "fewer") -> str:
    """Return "2.00x fewer", or "1.50x more" where there is more after than before."""
    if before <= 0 or after <= 0:
        return "-"
    if f"{before / after:.2f}" == "1.00":
        return "the same" if before == after else "about the same"
    opposite = {"fewer": "more", "smaller": "larger", "faster": "slower"}[word]
    return f"{before / after:.2f}x {word}" if before >= after else f"{after / before:.2f}x {opposite}"
