"""Values as text: counts, sizes, times, shares, metrics, and changes between two values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from compress.report.details import Estimate, LatencyRatio
from compress.report.records import Change
from compress.tasks.base import Metric

MISSING = "–"
Format = Callable[[float | None], str]


def format_count(value: float | None) -> str:
    """Return a count in three or four digits.

    >>> format_count(40551424), format_count(272474), format_count(64)
    ('40.55 M', '272.5 k', '64')
    """
    if value is None:
        return MISSING
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            scaled = value / factor
            return f"{scaled:.1f} {unit}" if abs(scaled) >= 100 else f"{scaled:.2f} {unit}"
    return f"{value:g}"


def format_whole(value: float | None) -> str:
    """Return an integer with separated thousands.

    >>> format_whole(10000), format_whole(None)
    ('10,000', '–')
    """
    return MISSING if value is None else f"{value:,.0f}"


def format_number(value: float | None) -> str:
    """Return a number with four significant digits; whole numbers and large ones in full.

    >>> format_number(11723008.0), format_number(0.00123456), format_number(None)
    ('11,723,008', '0.001235', '–')
    """
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 10_000 else f"{value:.4g}"


def format_bytes(value: float | None) -> str:
    """Return a size in powers of ten.

    >>> format_bytes(1094000), format_bytes(512)
    ('1.09 MB', '512 B')
    """
    return MISSING if value is None else f"{format_count(value)}{'' if abs(value) >= 1e3 else ' '}B"


def format_share(value: float | None) -> str:
    """Return a share in percent.

    >>> format_share(0.9173)
    '91.73 %'
    """
    return MISSING if value is None else f"{value:.2%}".replace("%", " %")


def format_ms(value: float | None) -> str:
    """Return milliseconds with three digits.

    >>> format_ms(0.41234), format_ms(1.5), format_ms(12.3456), format_ms(1234.5)
    ('0.412 ms', '1.50 ms', '12.3 ms', '1,234 ms')
    """
    if value is None:
        return MISSING
    digits = next((digits for limit, digits in ((1, 3), (10, 2), (100, 1)) if abs(value) < limit), 0)
    return f"{value:,.{digits}f} ms"


def format_seconds(value: float | None) -> str:
    """Return a duration.

    >>> format_seconds(0.04), format_seconds(4.21), format_seconds(83.0), format_seconds(7290.0)
    ('0.04 s', '4.2 s', '1 min 23 s', '2 h 1 min')
    """
    if value is None:
        return MISSING
    if value < 60:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_joules(value: float | None) -> str:
    """Return an energy.

    >>> format_joules(0.0123), format_joules(None)
    ('0.0123 J', '–')
    """
    return MISSING if value is None else f"{format_number(value)} J"


def format_throughput(value: float | None) -> str:
    """Return images per second, whole from 100 on.

    >>> format_throughput(1234.56), format_throughput(12.345)
    ('1,235', '12.35')
    """
    return format_number(round(value) if value is not None and value >= 100 else value)


def format_measure(value: float | None, unit: str) -> str:
    """Return the value of a check in its unit: "ms", "x", "share", "bytes" or any other text.

    >>> format_measure(1.6234, "x"), format_measure(0.0021, "share"), format_measure(3.2e-06, "")
    ('1.62×', '0.21 %', '3.2e-06')
    """
    known: dict[str, Format] = {"ms": format_ms, "share": format_share, "bytes": format_bytes, "x": format_times}
    if value is None:
        return MISSING
    return known[unit](value) if unit in known else f"{format_number(value)} {unit}".rstrip()


def format_times(value: float | None) -> str:
    """Return a factor.

    >>> format_times(1.6234)
    '1.62×'
    """
    return MISSING if value is None else f"{value:.2f}×"


def format_metric(value: float | None, metric: Metric) -> str:
    """Return the value of a metric in its unit.

    >>> format_metric(0.9173, Metric("top1")), format_metric(0.25, Metric("rmse", is_share=False))
    ('91.73 %', '0.25')
    """
    return format_share(value) if metric.is_share else format_number(value)


def format_interval(estimate: Estimate | None, metric: Metric) -> str:
    """Return the 95 % interval of an estimate, without its unit; "" if it is not known.

    >>> format_interval(Estimate(value=-0.002, low=-0.012, high=0.008), Metric("top1"))
    '−1.20 to 0.80'
    """
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    ends = (estimate.low, estimate.high)
    text = " to ".join(f"{100 * end:.2f}" if metric.is_share else format_number(end) for end in ends)
    return text.replace("-", "−")


def format_estimate(estimate: Estimate | None, metric: Metric) -> str:
    """Return an estimate with its 95 % interval.

    >>> format_estimate(Estimate(value=-0.002, low=-0.012, high=0.008), Metric("top1"))
    '−0.20 % (−1.20 to 0.80)'
    """
    if estimate is None or estimate.value is None:
        return MISSING
    value, interval = format_metric(estimate.value, metric).replace("-", "−"), format_interval(estimate, metric)
    return f"{value} ({interval})" if interval else value


def format_points(difference: float | None) -> str:
    """Return the change of a share in percentage points, without the unit.

    >>> format_points(-0.0065), format_points(0.0)
    ('−0.65', '+0.00')
    """
    return MISSING if difference is None else f"{100 * difference:+.2f}".replace("-", "−")


def describe_difference(change: Change, metric: Metric) -> str:
    """Return the change of a metric, in percentage points for a share, else as a number.

    >>> describe_difference(Change(before=0.92, after=0.9135), Metric("top1"))
    '−0.65 percentage points'
    >>> describe_difference(Change(before=0.5, after=0.75), Metric("rmse", is_share=False))
    '+0.25'
    """
    difference = change.difference
    if difference is None:
        return MISSING
    if not metric.is_share:
        return f"{difference:+.4g}".replace("-", "−")
    points = format_points(difference)
    return "no change" if points[1:] == "0.00" else f"{points} percentage points"


def describe_ratio(change: Change, less: str, more: str) -> str:
    """Return the factor by which a value became smaller or larger; "" if it is not known.

    >>> describe_ratio(Change(before=2, after=1), "faster", "slower")
    '2.00× faster'
    >>> describe_ratio(Change(before=1, after=1.5), "faster", "slower")
    '1.50× slower'
    """
    before, after = change.before, change.after
    if not before or not after:
        return ""
    ratio = before / after
    if f"{ratio:.2f}" == "1.00":
        return "about the same" if before != after else "the same"
    return f"{ratio:.2f}× {less}" if ratio > 1 else f"{1 / ratio:.2f}× {more}"


def describe_change(change: Change, form: Format) -> str:
    """Return both values with an arrow between them; "–" if neither is known.

    >>> describe_change(Change(before=2, after=1), format_number)
    '2 → 1'
    """
    return f"{form(change.before)} → {form(change.after)}" if change.is_known else MISSING


def describe_speedup(ratio: LatencyRatio, digits: int = 2) -> tuple[str, str]:
    """Return the speed-up and its interval; "" for an unknown interval.

    >>> describe_speedup(LatencyRatio(value=0.5, low=0.4, high=0.625))
    ('2.00', '1.60 to 2.50')
    """
    value = f"{1 / ratio.value:.{digits}f}"
    if ratio.low is None or ratio.high is None:
        return value, ""
    return value, f"{1 / ratio.high:.{digits}f} to {1 / ratio.low:.{digits}f}"


class ChangeRow(NamedTuple):
    """A value of the baseline and of the slim network as a row of a table.

    Attributes:
        label: Name of the value.
        before: Value of the baseline, as text.
        after: Value of the slim network, as text.
        change: Change in words.
        tone: "gain", "loss", or "" for neither.
        ratio: Slim / baseline; None if the ratio has no meaning.
    """

    label: str
    before: str
    after: str
    change: str
    tone: str = ""
    ratio: float | None = None


def compare_costs(
    label: str, change: Change, form: Format, less: str, more: str, *, more_is_better: bool = False
) -> ChangeRow:
    """Return the row of a cost, or of another value that is best compared by its ratio."""
    text, tone, ratio = describe_ratio(change, less, more) or MISSING, "", None
    if change.before and change.after:
        ratio = change.after / change.before
        is_gain = ratio > 1 if more_is_better else ratio < 1
        tone = "" if ratio == 1 else "gain" if is_gain else "loss"
    return ChangeRow(label, form(change.before), form(change.after), text, tone, ratio)


def compare_quality(label: str, change: Change, metric: Metric) -> ChangeRow:
    """Return the row of a metric."""
    before, after = format_metric(change.before, metric), format_metric(change.after, metric)
    return ChangeRow(label, before, after, describe_difference(change, metric))
