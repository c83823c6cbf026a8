"""Does the network stand as much as before? The section on noise, corruptions and shifted data."""

from collections.abc import Sequence
from typing import Any

from compress.report.lines import plot_severities
from compress.report.markup import (
    escape,
    format_known,
    format_known_share,
    format_whole,
    render_details,
    render_facts,
    render_figure,
    render_section,
    render_split,
    render_table,
)
from compress.report.metric import (
    CHANGE_COLUMNS,
    TOP1,
    compare_quality,
    format_metric,
    format_metric_interval,
    metric_of_report,
    worse_by,
)
from compress.report.outcome import find
from compress.report.plots import plot_noise
from compress.tasks.base import Metric

SHOWN = 12
KINDS = {"noise": "Noise", "corruption": "Corruptions", "shifted": "Shifted data"}
Distributions = Sequence[dict[str, Any]]


def render_robustness(report: dict[str, Any]) -> str:
    """Return quality under noise and by severity as pictures, and on every distribution, the largest loss first."""
    metric = metric_of_report(report)
    robustness = find(report, "details", "robustness") or {}
    found = robustness.get("distributions") or []
    if not found:
        return ""
    wanted = robustness.get("wanted") or {}
    facts = render_facts(
        [("images of each", format_whole(wanted.get("images"))), *((key, wanted.get(key)) for key in ("noise", "seed"))]
    )
    levels, before, after = noise_curves(robustness, metric)
    noise = render_figure(plot_noise("noise", levels, before, after, metric))
    severities = render_figure(plot_severities("severities", list_severities(found, metric), metric))
    return render_section(
        describe_kinds(found),
        render_split(facts, noise) if noise else facts,
        severities,
        _render_means(found, metric),
        _render_distributions(found, metric),
    )


def noise_curves(
    robustness: dict[str, Any], metric: Metric = TOP1
) -> tuple[list[float], list[float | None], list[float | None]]:
    """Return the levels of noise, 0 first, and quality of baseline and slim network at each; empty without noise."""
    found = robustness.get("distributions") or []
    noisy = [one for one in found if one.get("kind") == "noise"]
    if not noisy:
        return [], [], []
    those = [_nominal(found), *noisy]
    levels = [0.0, *((robustness.get("wanted") or {}).get("noise_levels") or [])]
    return levels, [one.get(f"baseline_{metric.name}") for one in those], [one.get(metric.name) for one in those]


def list_severities(found: Distributions, metric: Metric = TOP1) -> dict[str, tuple[list[Any], list[Any]]]:
    """Return the curves of every corruption that was looked at at several severities, for `plot_severities`."""
    each: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for one in found:
        name, _, severity = str(one.get("name")).rpartition(" ")
        if one.get("kind") == "corruption" and name and severity.isdecimal():
            each.setdefault(name, []).append((int(severity), one))
    curves = {}
    for name, those in each.items():
        if len(those) > 1:
            steps = [(0, _nominal(found)), *sorted(those, key=lambda step: step[0])]
            curves[name] = (
                [(severity, one.get(f"baseline_{metric.name}")) for severity, one in steps],
                [(severity, one.get(metric.name)) for severity, one in steps],
            )
    return curves


def _nominal(found: Distributions) -> dict[str, Any]:
    return next((one for one in found if one.get("kind") == "nominal"), {})


def describe_kinds(found: Distributions) -> str:
    """Return a title that names the kinds of images looked at."""
    names = ["noise", "corruptions"] + ["shifted data"] * any(one.get("kind") == "shifted" for one in found)
    return f"{', '.join(names[:-1])} and {names[-1]}".capitalize()


def _render_means(found: Distributions, metric: Metric) -> str:
    """Return mean quality over the distributions of each kind, where there are several of any."""
    rows = []
    for kind, label in KINDS.items():
        those = [one for one in found if one.get("kind") == kind]
        if len(those) > 1:
            before, after = (_mean([one.get(key) for one in those]) for key in (f"baseline_{metric.name}", metric.name))
            rows.append(compare_quality(f"{label}, mean of {len(those)}", before, after, metric))
    return render_table(CHANGE_COLUMNS[:-1], [row[:-1] for row in rows], numeric=(1, 2, 3)) if rows else ""


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _render_distributions(found: Distributions, metric: Metric) -> str:
    worse = worse_by(metric)
    rows: list[tuple[str, ...]] = [
        (
            _render_name(one),
            format_metric(metric, one.get(f"baseline_{metric.name}")),
            format_metric(metric, one.get(metric.name)),
            escape(format_metric_interval(metric, find(one, "changes", worse))),
            escape(format_known_share(find(one, "changes", "churn", "value"))),
            escape(format_known(find(one, "changes", "softmax_distance", "value"))),
        )
        for one in sorted(found, key=lambda one: -(find(one, "changes", worse, "value") or 0.0))
    ]
    lost = f"{metric.words} lost" if metric.higher_is_better else f"{metric.words} more"
    head: tuple[str, ...]
    numeric: tuple[int, ...]
    head, numeric = ("images", "baseline", "slim", lost, "other class", "distance"), (1, 2, 3, 4, 5)
    if metric.name != "top1":  # which alone is of classes
        head, numeric, rows = head[:4], (1, 2, 3), [row[:4] for row in rows]
    shown = render_table(head, rows[:SHOWN], numeric=numeric)
    if len(rows) <= SHOWN:
        return shown
    return shown + render_details(
        f"{len(rows) - SHOWN} more, where no more was lost", render_table(head, rows[SHOWN:], numeric=numeric)
    )


def _render_name(one: dict[str, Any]) -> str:
    """Return a distribution's name; what a name does not say of its kind stands beside it."""
    is_shifted = one.get("kind") == "shifted"
    return escape(one.get("name")) + (' <small class="muted">shifted data</small>' if is_shifted else "")
