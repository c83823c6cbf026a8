"""Plots of a report as inline SVG: widths, latency, training, robustness, throughput, and quality over cost.

Every function takes a key that is unique in the page, and returns "" if there are no data to draw.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from markupsafe import Markup

from compress.report.details import Latency, Throughput
from compress.report.formats import format_metric, format_ms
from compress.report.records import Group, LatencyBudget, LayerLatency, Stairs, TrainingRecord
from compress.report.svg import BASELINE, CARD, GRID, INK, MARK, MUTED, RUNS, SLIM, render_svg, shorten
from compress.tasks.base import Metric

Curve = Sequence[tuple[float, float | None]]
TAIL_QUANTILE = 0.95
STAIRS_AT_MOST = 12
COLUMNS = 3
TOP = 104  # percent: room for a marker at 100
LABELS_SHOWN = 3
NOTHING = Markup("")


# -- stages --------------------------------------------------------------------------------------------------------


def plot_widths(key: str, groups: Sequence[Group]) -> Markup:
    """Return one bar for each channel group, the kept channels filled."""
    rows = [
        (group.name, group.width.before, group.width.after)
        for group in groups
        if group.width.before is not None and group.width.after is not None
    ]
    if not rows:
        return NOTHING
    names, before, after = zip(*rows, strict=True)

    def draw(figure: Any) -> None:
        axes = _draw_bars(figure, names, before, after, 0.66)
        for place, (_, old, new) in enumerate(rows):
            axes.text(old + max(before) * 0.015, place, f"{old:g} → {new:g}", va="center", fontsize=8)
        axes.set(xlim=(0, max(before) * 1.2), xlabel="channels")
        axes.xaxis.get_major_locator().set_params(integer=True)

    title = f"Channels of {len(rows)} channel groups before and after pruning"
    return render_svg(key, title, 0.8 + 0.2 * len(rows), draw)


def plot_layers(key: str, layers: Sequence[LayerLatency]) -> Markup:
    """Return the latency of each layer before and after."""
    rows = [
        (one.layer, one.ms.before, one.ms.after)
        for one in layers
        if one.ms.before is not None and one.ms.after is not None
    ]
    if not rows:
        return NOTHING

    def draw(figure: Any) -> None:
        names, before, after = zip(*rows, strict=True)
        _draw_bars(figure, names, before, after, 0.4).set_xlabel("milliseconds, by the latency table")

    return render_svg(key, f"Latency of {len(rows)} layers before and after", 0.8 + 0.2 * len(rows), draw)


def _draw_bars(
    figure: Any, names: Sequence[str], before: Sequence[float], after: Sequence[float], thickness: float
) -> Any:
    """Draw horizontal bars of two series, one over the other, and return the axes."""
    axes, places = figure.subplots(), range(len(names))
    axes.barh(places, before, 0.66, color=BASELINE, alpha=0.35, label="before")
    axes.barh(places, after, thickness, color=SLIM, label="after")
    axes.set_yticks(places, labels=[shorten(name) for name in names], color=INK, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper left", ncols=2)
    return axes


def plot_stairs(key: str, stairs: Sequence[Stairs]) -> Markup:
    """Return the latency of the network over the width of the groups with the largest effect."""
    drawn = sorted(
        (one for one in stairs if len(one.steps) > 1),
        key=lambda one: min(step.ms for step in one.steps) - max(step.ms for step in one.steps),
    )[:STAIRS_AT_MOST]
    if not drawn:
        return NOTHING

    def draw(figure: Any) -> None:
        for axes, one in _small_axes(figure, drawn):
            points = [(step.width, step.ms) for step in one.steps]
            chosen = [point for point in points if point[0] == one.chosen]
            axes.plot(*zip(*points, strict=True), color=BASELINE, linewidth=1.4, marker="o", markersize=3)
            axes.plot(*zip(*chosen, strict=True), "o", color=SLIM, markersize=6)
            axes.set_title(shorten(one.name, 22), fontsize=7.5)
            axes.tick_params(labelsize=7)
        figure.supxlabel("channels", fontsize=8.5, color=MUTED)
        figure.supylabel("network (ms)", fontsize=8.5, color=MUTED)

    rows = -(-len(drawn) // COLUMNS)
    return render_svg(key, f"Latency at each width of {len(drawn)} channel groups", 0.5 + 1.3 * rows, draw)


def plot_sensitivity(key: str, curves: Sequence[Mapping[str, Any]], at_most: int = 24) -> Markup:
    """Return the rise of the loss over the width of channel groups, with standard errors.

    Args:
        key: Prefix of the picture's ids.
        curves: For each group its name, widths, rises and errors.
        at_most: Number of curves to draw, the first ones.
    """
    drawn = [one for one in curves if len(one["widths"]) > 1][:at_most]
    if not drawn:
        return NOTHING

    def draw(figure: Any) -> None:
        for axes, one in _small_axes(figure, drawn):
            axes.errorbar(
                one["widths"], one["rises"], one["errors"], color=SLIM, linewidth=1.4, marker="o", markersize=3
            )
            axes.set_title(shorten(one["name"], 22), fontsize=7.5)
            axes.set_ylim(bottom=0)
            axes.tick_params(labelsize=7)
        figure.supxlabel("channels", fontsize=8.5, color=MUTED)
        figure.supylabel("rise of the loss", fontsize=8.5, color=MUTED)

    rows = -(-len(drawn) // COLUMNS)
    return render_svg(key, f"Rise of the loss over the width of {len(drawn)} channel groups", 0.5 + 1.3 * rows, draw)


def _small_axes(figure: Any, drawn: Sequence[Any], **options: bool) -> Iterator[tuple[Any, Any]]:
    """Yield axes of a grid with the item to draw on each; the rest of the grid stays empty."""
    columns = min(COLUMNS, len(drawn))
    grid = figure.subplots(-(-len(drawn) // columns), columns, squeeze=False, **options)
    for axes in grid.flat[len(drawn) :]:
        axes.set_axis_off()
    yield from zip(grid.flat, drawn, strict=False)


def plot_prediction(key: str, budget: LatencyBudget) -> Markup:
    """Return predicted over measured latency, of the variants in the table and of the networks that were timed."""
    found = [
        (one.measured_ms, one.predicted_ms)
        for one in budget.variants
        if one.measured_ms is not None and one.predicted_ms is not None
    ]
    reference = budget.reference_ms or 0.0
    chosen = [(one.measured * reference, one.predicted * reference) for one in budget.rounds]
    if not found:
        return NOTHING

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        ends = [min(map(min, found)), max(map(max, found))]
        axes.plot(ends, ends, color=GRID, linewidth=1.2)
        axes.plot(*zip(*found, strict=True), "o", color=BASELINE, markersize=4, label="variants in the table")
        if chosen:
            axes.plot(*zip(*chosen, strict=True), "o", color=SLIM, markersize=6, label="networks chosen")
        axes.set(xlabel="measured (ms)", ylabel="predicted (ms)")
        figure.legend(loc="outside upper left", ncols=2)

    return render_svg(key, f"Predicted and measured latency of {len(found)} variants", 3.0, draw)


def plot_training(key: str, record: TrainingRecord) -> Markup:
    """Return the training loss above the primary metric on validation, the chosen epoch marked."""
    metric = record.metric
    losses = [(one.epoch, one.loss) for one in record.epochs if one.epoch is not None and one.loss is not None]
    quality = [
        (one.epoch, metric.scale * one.validation)
        for one in record.epochs
        if one.epoch is not None and one.validation is not None
    ]
    if not losses and not quality:
        return NOTHING

    def draw(figure: Any) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, points, color in ((upper, losses, BASELINE), (lower, quality, SLIM)):
            marker = "o" if len(points) <= 30 else ""
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, marker=marker, markersize=4.5)
        upper.set_ylabel("training loss")
        lower.set(ylabel=f"validation {_axis(metric)}", xlabel="epoch")
        epochs = [epoch for epoch, _ in chain(losses, quality)]
        lower.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        lower.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if record.chosen_epoch is not None:
            _mark_epoch(upper, lower, record.chosen_epoch, record.reached, metric)

    return render_svg(key, f"Training loss and validation {metric.words} of each epoch", 3.4, draw)


def _mark_epoch(upper: Any, lower: Any, chosen: int, reached: float | None, metric: Metric) -> None:
    for axes in (upper, lower):
        axes.axvline(chosen, color=MARK, linewidth=1.2, linestyle=(0, (4, 2)))
    label = f"epoch {chosen} chosen"
    if reached is not None:
        ring = {"markersize": 8, "color": CARD, "markeredgecolor": MARK, "markeredgewidth": 2, "clip_on": False}
        lower.plot([chosen], [metric.scale * reached], "o", **ring)
        label += f" ({format_metric(reached, metric)})"
    upper.set_title(label, color=MARK, fontsize=8.5, loc="right")


# -- verification --------------------------------------------------------------------------------------------------


def plot_noise(key: str, curves: Mapping[str, Curve], baseline: Curve, metric: Metric) -> Markup:
    """Return the primary metric over the level of noise.

    Args:
        key: Unique in the page.
        curves: Label of a network -> (level, value).
        baseline: (level, value) of the baseline; empty if the networks do not share one.
        metric: Primary metric.
    """
    drawn = {label: points for label, curve in curves.items() if len(points := _scale(curve, metric)) > 1}
    before = _scale(baseline, metric)
    if not drawn:
        return NOTHING

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        if len(before) > 1:
            axes.plot(*zip(*before, strict=True), color=BASELINE, linewidth=1.8, linestyle="--", label="baseline")
        for place, (label, points) in enumerate(drawn.items()):
            style = {"color": RUNS[place % len(RUNS)], "linestyle": ("-", ":", "-.")[place // len(RUNS) % 3]}
            axes.plot(*zip(*points, strict=True), linewidth=1.8, marker="o", markersize=4, label=label, **style)
        axes.set(xlabel="level of noise", ylabel=_axis(metric))
        _limit(axes, metric)
        figure.legend(loc="outside upper left", ncols=6)

    return render_svg(key, f"{metric.title} over the level of noise", 2.6, draw)


def plot_severities(key: str, curves: Mapping[str, tuple[Curve, Curve]], metric: Metric) -> Markup:
    """Return a small plot for each corruption, the primary metric over its severity.

    Args:
        key: Unique in the page.
        curves: Corruption -> (severity, value) of the baseline and of the slim network; 0 for unchanged images.
        metric: Primary metric.
    """
    scaled = {name: [_scale(curve, metric) for curve in pair] for name, pair in curves.items()}
    drawn = [(name, pair) for name, pair in scaled.items() if any(len(curve) > 1 for curve in pair)]
    if not drawn:
        return NOTHING

    def draw(figure: Any) -> None:
        for place, (axes, (name, pair)) in enumerate(_small_axes(figure, drawn, sharex=True, sharey=True)):
            for label, color, curve in zip(("baseline", "slim"), (BASELINE, SLIM), pair, strict=True):
                if curve:
                    axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.5, label=label if not place else None)
            axes.set_title(shorten(name.replace("_", " "), 22), fontsize=7.5)
            axes.tick_params(labelsize=7)
            _limit(axes, metric)
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.supxlabel("severity (0: unchanged images)", fontsize=8.5, color=MUTED)
        figure.supylabel(_axis(metric), fontsize=8.5, color=MUTED)
        figure.legend(loc="outside upper left", ncols=2)

    rows = -(-len(drawn) // COLUMNS)
    return render_svg(key, f"{metric.title} over the severity of {len(drawn)} corruptions", 0.8 + 1.2 * rows, draw)


def plot_latency(key: str, latency: Latency) -> Markup:
    """Return histograms of both networks' latency with their medians.

    A long tail is cut off at the right edge, since it would squeeze the rest; `count_beyond_edge` counts its calls.
    """
    calls = {"baseline": _known(latency.baseline_ms), "slim": _known(latency.slim_ms)}
    series = [(name, calls[name], color) for name, color in (("baseline", BASELINE), ("slim", SLIM)) if calls[name]]
    if not series:
        return NOTHING
    low, high = _latency_range([values for _, values, _ in series])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, values, color in series:
            median = statistics.median(values)
            shown = [value for value in values if value <= high]
            label = f"{name}, median {format_ms(median)}"
            axes.hist(shown, bins=48, range=(low, high), color=color, alpha=0.6, label=label)
            axes.axvline(median, color=color, linewidth=1.6, linestyle=(0, (4, 2)))
        axes.set(xlim=(low, high), xlabel="latency of one call (ms)", ylabel="calls")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False, axis="x")
        figure.legend(loc="outside upper left", ncols=2)

    return render_svg(key, "Distribution of latency, baseline and slim network", 2.6, draw)


def count_beyond_edge(latency: Latency) -> int:
    """Return the number of timed calls that `plot_latency` leaves out at its right edge."""
    series = [values for raw in (latency.baseline_ms, latency.slim_ms) if (values := _known(raw))]
    if not series:
        return 0
    _, high = _latency_range(series)
    return sum(value > high for values in series for value in values)


def _latency_range(series: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the left and right edge for sorted series; the right edge ignores a long tail."""
    low = min(values[0] for values in series)
    full = max(values[-1] for values in series)
    bulk = max(values[math.ceil(TAIL_QUANTILE * len(values)) - 1] for values in series)
    margin = 0.15 * (bulk - low) or 0.05 * abs(bulk) or 1.0
    return max(0.0, low - margin / 2), bulk + margin if full > bulk + margin else full + margin / 2


def plot_throughput(key: str, rows: Sequence[Throughput]) -> Markup:
    """Return images per second of both networks over the batch size, for several batch sizes."""
    known = sorted((row for row in rows if row.batch_size is not None), key=lambda row: row.batch_size or 0)
    series = [
        (label, color, [(place, getattr(row, label)) for place, row in enumerate(known)])
        for label, color in (("baseline", BASELINE), ("slim", SLIM))
    ]
    drawn = [(label, color, points) for label, color, pairs in series if (points := _measured(pairs))]
    if len(known) < 2 or not drawn:
        return NOTHING

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for label, color, points in drawn:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, marker="o", markersize=4, label=label)
        axes.set_xticks(range(len(known)), labels=[f"{row.batch_size:g}" for row in known])
        axes.set(xlabel="batch size", ylabel="images per second")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=2)

    return render_svg(key, "Images per second over the batch size", 2.4, draw)


# -- quality over cost ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """Quality and cost of one network in a plot.

    Attributes:
        cost: Cost in the unit of the panel.
        quality: Primary metric; a share is in percent.
        label: Short name of the run; for a baseline, the names of its runs, or "" for all runs.
        low: Lower end of the interval of the quality, in the same unit; None if it is not known.
        high: Upper end of the interval of the quality; None if it is not known.
        is_baseline: Whether the network is the baseline.
        is_failed: Whether the network did not pass its verification; it is drawn as a cross.
    """

    cost: float
    quality: float
    label: str
    low: float | None = None
    high: float | None = None
    is_baseline: bool = False
    is_failed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """Plot of quality over one cost.

    Attributes:
        title: Title of the cost axis.
        points: Points of the networks.
        is_joined: Whether an arrow leads from the first to the last point, in place of a line along the front.
        more_is_better: Whether the cost is a gain, such as a speed-up.
        gate: Limit of the quality, drawn as a line; None for no line.
    """

    title: str
    points: Sequence[Point]
    is_joined: bool = False
    more_is_better: bool = False
    gate: float | None = None


def list_front(points: Sequence[Point], metric: Metric, more_is_better: bool = False) -> list[Point]:
    """Return the Pareto front of the points in cost and quality, the smallest cost first."""
    better_quality, better_cost = (1 if is_high else -1 for is_high in (metric.higher_is_better, more_is_better))
    front = [
        one
        for one in points
        if not any(
            better_cost * other.cost >= better_cost * one.cost
            and better_quality * other.quality >= better_quality * one.quality
            and (other.cost, other.quality) != (one.cost, one.quality)
            for other in points
        )
    ]
    return sorted(front, key=lambda one: (one.cost, one.quality))


def plot_fronts(key: str, panels: Sequence[Panel], metric: Metric) -> Markup:
    """Return the primary metric over each cost, the panels side by side."""
    drawn = [panel for panel in panels if panel.points]
    if not drawn:
        return NOTHING

    def draw(figure: Any) -> None:
        every = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
        for axes, panel in zip(every, drawn, strict=True):
            _draw_panel(axes, panel, metric)
        every[0].set_ylabel(_axis(metric))

    costs = " and over ".join(panel.title for panel in drawn)
    return render_svg(key, f"{metric.title} over {costs}, {len(drawn[0].points)} networks", 2.5, draw)


def _draw_panel(axes: Any, panel: Panel, metric: Metric) -> None:
    front = list(panel.points) if panel.is_joined else list_front(panel.points, metric, panel.more_is_better)
    if panel.is_joined:
        first, last = panel.points[0], panel.points[-1]
        arrow = {"arrowstyle": "->", "color": MUTED, "shrinkA": 6, "shrinkB": 6}
        axes.annotate("", (last.cost, last.quality), xytext=(first.cost, first.quality), arrowprops=arrow)
    else:
        axes.plot([one.cost for one in front], [one.quality for one in front], color=SLIM, linewidth=1.4)
    labels: dict[tuple[float, float, bool], list[str]] = {}
    for one in panel.points:
        color, shape = (BASELINE, "s") if one.is_baseline else (SLIM, "o")
        if one.low is not None and one.high is not None:
            axes.plot([one.cost] * 2, [one.low, one.high], color=color, linewidth=1.1)
        fill = color if one.is_baseline or one in front else CARD
        shape = "X" if one.is_failed else shape
        axes.plot([one.cost], [one.quality], shape, color=color, markersize=6, markerfacecolor=fill)
        labels.setdefault((one.cost, one.quality, one.is_baseline), []).append(one.label)
    largest = max(one.cost for one in panel.points)
    for (cost, quality, is_baseline), names in labels.items():
        # To the right and below a run lies what it betters; the baseline is the dearest as a rule, at the right edge.
        align, shift = ("right", -6) if cost > (0.6 if is_baseline else 0.85) * largest else ("left", 6)
        place = {"textcoords": "offset points", "xytext": (shift, 5 if is_baseline else -11), "ha": align}
        axes.annotate(_join(names, is_baseline), (cost, quality), fontsize=8, **place)
    if panel.gate is not None:
        axes.axhline(panel.gate, color=MARK, linewidth=1.1, linestyle="--")
        axes.annotate("gate", (0, panel.gate), fontsize=8, color=MARK, textcoords="offset points", xytext=(4, 3))
    axes.margins(0.14)
    axes.set_xlim(0, largest * 1.08)
    axes.set_xlabel(panel.title)


def _join(labels: Sequence[str], is_baseline: bool) -> str:
    """Return one label for the networks that lie on one point.

    >>> _join(["A", "B"], False), _join(["A", "B", "C", "D", "E"], True), _join([""], True)
    ('A, B', 'baseline of A, B, C …', 'baseline')
    """
    text = ", ".join(labels[:LABELS_SHOWN]) + (" …" if len(labels) > LABELS_SHOWN else "")
    return " of ".join(filter(None, ("baseline", text))) if is_baseline else text


# -- axes ----------------------------------------------------------------------------------------------------------


def _axis(metric: Metric) -> str:
    return f"{metric.words} ({metric.unit})" if metric.unit else metric.words


def _limit(axes: Any, metric: Metric) -> None:
    """Start the axis of quality at 0, and end it slightly above 100 if it is in percent."""
    axes.set_ylim(0, TOP if metric.is_share else None)


def _measured(curve: Curve) -> list[tuple[float, float]]:
    return [(x, y) for x, y in curve if y is not None]


def _scale(curve: Curve, metric: Metric) -> list[tuple[float, float]]:
    return [(x, metric.scale * y) for x, y in _measured(curve)]


def _known(values: Sequence[float | None]) -> list[float]:
    return sorted(value for value in values if value is not None)
