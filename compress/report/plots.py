"""Which pictures does a report hold? Widths, stairs of latency, layers, training, noise and latency."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from compress.report.markup import format_ms
from compress.report.metric import TOP1, axis_of, format_metric, scale_of, title_of
from compress.report.svg import BASELINE, CARD, GRID, INK, MARK, MUTED, SLIM, are_numbers, render_svg, shorten
from compress.tasks.base import Metric

TAIL_QUANTILE = 0.95
STAIRS_AT_MOST = 12


def plot_widths(key: str, groups: Sequence[dict[str, Any]]) -> str:
    """Return one bar for each channel group, what is left of it filled; "" when there is none.

    Args:
        key: Unique in the page; prefix of the picture's ids.
        groups: {"name", "width_before", "width_after"}, in definition order.
    """
    rows = [g for g in groups if are_numbers(g.get("width_before"), g.get("width_after"))]
    if not rows:
        return ""
    widest = max(row["width_before"] for row in rows)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        places = range(len(rows))
        axes.barh(places, [r["width_before"] for r in rows], 0.66, color=BASELINE, alpha=0.35, label="before")
        axes.barh(places, [r["width_after"] for r in rows], 0.66, color=SLIM, label="after")
        for place, row in zip(places, rows, strict=True):
            text = f"{row['width_before']:g} → {row['width_after']:g}"
            axes.text(row["width_before"] + widest * 0.015, place, text, va="center", fontsize=8)
        axes.set_yticks(places, labels=[shorten(row.get("name")) for row in rows], color=INK, fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(0, widest * 1.2), ylim=(len(rows) - 0.4, -0.6), xlabel="channels")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper left", ncols=2)

    title = f"Channels of {len(rows)} channel groups before and after pruning"
    return render_svg(key, title, 0.8 + 0.2 * len(rows), draw)


def plot_stairs(key: str, groups: Sequence[dict[str, Any]]) -> str:
    """Return what the network takes at each width of each group, the chosen width marked; "" when there is none.

    Args:
        key: Unique in the page.
        groups: {"name", "chosen", "steps": [{"width", "ms"}]}; those where the width matters most are drawn.
    """
    drawn = sorted(
        (group for group in groups if len(group.get("steps") or []) > 1),
        key=lambda group: min(s["ms"] for s in group["steps"]) - max(s["ms"] for s in group["steps"]),
    )[:STAIRS_AT_MOST]
    if not drawn:
        return ""
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)

    def draw(figure: Any) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place >= len(drawn):
                axes.set_axis_off()
                continue
            group = drawn[place]
            points = [(step["width"], step["ms"]) for step in group["steps"]]
            axes.plot(*zip(*points, strict=True), color=BASELINE, linewidth=1.4, marker="o", markersize=3)
            axes.plot(*zip(*[p for p in points if p[0] == group["chosen"]], strict=True), "o", color=SLIM, markersize=6)
            axes.set_title(shorten(group["name"], 22), fontsize=7.5)
            axes.tick_params(labelsize=7)
        figure.supxlabel("channels", fontsize=8.5, color=MUTED)
        figure.supylabel("network (ms)", fontsize=8.5, color=MUTED)

    return render_svg(key, f"Latency at each width of {len(drawn)} channel groups", 0.5 + 1.3 * rows, draw)


def plot_prediction(key: str, variants: Sequence[dict[str, Any]], rounds: Sequence[tuple[float, float]]) -> str:
    """Return predicted over measured latency, of variants and of the networks that were chosen; "" without any.

    Args:
        key: Unique in the page.
        variants: {"predicted_ms", "measured_ms"}.
        rounds: Predicted and measured milliseconds of each network that was timed as a whole.
    """
    found = [(v["measured_ms"], v["predicted_ms"]) for v in variants if are_numbers(*v.values())]
    if not found:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        ends = [min(map(min, found)), max(map(max, found))]
        axes.plot(ends, ends, color=GRID, linewidth=1.2)
        axes.plot(*zip(*found, strict=True), "o", color=BASELINE, markersize=4, label="variants in the table")
        if rounds:
            chosen = [(measured, predicted) for predicted, measured in rounds]
            axes.plot(*zip(*chosen, strict=True), "o", color=SLIM, markersize=6, label="networks chosen")
        axes.set(xlabel="measured (ms)", ylabel="predicted (ms)")
        figure.legend(loc="outside upper left", ncols=2)

    return render_svg(key, f"Predicted and measured latency of {len(found)} variants", 3.0, draw)


def plot_layers(key: str, layers: Sequence[dict[str, Any]]) -> str:
    """Return what each layer takes before and after; "" when there is none.

    Args:
        key: Unique in the page.
        layers: {"layer", "ms_before", "ms_after"}, in the order of the graph.
    """
    rows = [row for row in layers if are_numbers(row.get("ms_before"), row.get("ms_after"))]
    if not rows:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        places = range(len(rows))
        axes.barh(places, [row["ms_before"] for row in rows], 0.66, color=BASELINE, alpha=0.35, label="whole")
        axes.barh(places, [row["ms_after"] for row in rows], 0.4, color=SLIM, label="slim")
        axes.set_yticks(places, labels=[shorten(row["layer"]) for row in rows], color=INK, fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="milliseconds, by the table")
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper left", ncols=2)

    return render_svg(key, f"Latency of {len(rows)} layers before and after", 0.8 + 0.2 * len(rows), draw)


def plot_front(
    key: str, points: Sequence[tuple[float | None, float | None, str]], baseline: float | None, metric: Metric = TOP1
) -> str:
    """Return accuracy over speed-up, the runs that no other betters filled and joined; "" when there is none.

    Args:
        key: Unique in the page.
        points: Speed-up, top-1 in [0, 1] or what else decides, label.
        baseline: That of the untouched network.
        metric: What decides.
    """
    scale, sign = scale_of(metric), 1 if metric.higher_is_better else -1
    found = [(x, scale * y, label) for x, y, label in points if x is not None and y is not None and are_numbers(x, y)]
    if not found:
        return ""
    front = sorted(
        (x, y)
        for x, y, _ in found
        if not any(u >= x and sign * v >= sign * y and (u, v) != (x, y) for u, v, _ in found)
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(*zip(*front, strict=True), color=SLIM, linewidth=1.4)
        for x, y, label in found:
            axes.plot([x], [y], "o", color=SLIM, markersize=6, markerfacecolor=SLIM if (x, y) in front else CARD)
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8)
        if baseline is not None:
            axes.plot([1], [scale * baseline], "s", color=BASELINE, markersize=6)
            axes.annotate("untouched", (1, scale * baseline), textcoords="offset points", xytext=(6, 5), fontsize=8)
        axes.margins(0.12)
        axes.set(xlabel="speed-up, measured in turn with the untouched network", ylabel=axis_of(metric))

    return render_svg(key, f"{title_of(metric)} and speed-up of {len(found)} runs", 3.2, draw)


def plot_training(key: str, epochs: Sequence[dict[str, Any]], chosen: int | None, metric: Metric = TOP1) -> str:
    """Return training loss above what decides on validation, the chosen epoch marked; "" when there is no epoch.

    Args:
        key: Unique in the page.
        epochs: {"epoch", "loss", "validation_top1"}, counted from 1.
        chosen: The epoch whose weights were kept.
        metric: What decides; top-1 by default.
    """
    reached = f"validation_{metric.name}"
    losses = [(e["epoch"], e["loss"]) for e in epochs if are_numbers(e.get("epoch"), e.get("loss"))]
    quality = [
        (e["epoch"], scale_of(metric) * e[reached]) for e in epochs if are_numbers(e.get("epoch"), e.get(reached))
    ]
    if not losses and not quality:
        return ""

    def draw(figure: Any) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, points, color in ((upper, losses, BASELINE), (lower, quality, SLIM)):
            marker = "o" if len(points) <= 30 else ""
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, marker=marker, markersize=4.5)
        upper.set_ylabel("training loss")
        lower.set(ylabel=f"validation {axis_of(metric)}", xlabel="epoch")
        numbers = [epoch for epoch, _ in (*losses, *quality)]
        lower.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
        lower.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        _mark_chosen(upper, lower, dict(quality), chosen, metric)

    return render_svg(key, f"Training loss and validation {metric.words} of each epoch", 3.4, draw)


def plot_noise(
    key: str,
    levels: Sequence[float],
    baseline: Sequence[float | None],
    slim: Sequence[float | None],
    metric: Metric = TOP1,
) -> str:
    """Return quality of both networks over the level of noise; "" when there is no noise.

    Args:
        key: Unique in the page.
        levels: Of the noise, 0 first.
        baseline: Top-1 at each level, in [0, 1], or what else decides; entries may be missing.
        slim: The same of the slim network.
        metric: What decides.
    """
    scale = scale_of(metric)
    series = [
        (label, color, [(x, scale * (y or 0)) for x, y in zip(levels, values, strict=False) if are_numbers(x, y)])
        for label, color, values in (("baseline", BASELINE, baseline), ("slim", SLIM, slim))
    ]
    drawn = [one for one in series if len(one[2]) > 1]
    if not drawn:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for label, color, points in drawn:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, marker="o", markersize=4, label=label)
        axes.set(xlabel="level of the noise", ylabel=axis_of(metric))
        axes.set_ylim(0, 104 if metric.is_share else None)  # room for a marker at 100
        figure.legend(loc="outside upper left", ncols=2)

    return render_svg(key, f"{title_of(metric)} over the level of noise", 2.4, draw)


def plot_latency(key: str, baseline_ms: Sequence[float | None], slim_ms: Sequence[float | None]) -> str:
    """Return histograms of both networks' latency with their medians; "" when neither was measured.

    A long tail is cut off at the right edge, where it would squeeze the rest; `count_beyond_edge` says how much.

    Args:
        key: Unique in the page.
        baseline_ms: One value for each timed call.
        slim_ms: The same of the slim network.
    """
    series = [
        (name, color, values)
        for name, color, raw in (("baseline", BASELINE, baseline_ms), ("slim", SLIM, slim_ms))
        if (values := _keep_numbers(raw))
    ]
    if not series:
        return ""
    low, high = _latency_range([values for _, _, values in series])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, color, values in series:
            median = statistics.median(values)
            shown = [value for value in values if value <= high]
            axes.hist(
                shown, bins=48, range=(low, high), color=color, alpha=0.6, label=f"{name}, median {format_ms(median)}"
            )
            axes.axvline(median, color=color, linewidth=1.6, linestyle=(0, (4, 2)))
        axes.set(xlim=(low, high), xlabel="latency of one call (ms)", ylabel="calls")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False, axis="x")
        figure.legend(loc="outside upper left", ncols=2)

    return render_svg(key, "Distribution of latency, baseline and slim network", 2.6, draw)


def count_beyond_edge(baseline_ms: Sequence[float | None], slim_ms: Sequence[float | None]) -> int:
    """Return how many timed calls `plot_latency` leaves out at its right edge."""
    series = [values for raw in (baseline_ms, slim_ms) if (values := _keep_numbers(raw))]
    if not series:
        return 0
    _, high = _latency_range(series)
    return sum(value > high for values in series for value in values)


def _mark_chosen(upper: Any, lower: Any, quality: dict[int, float], chosen: int | None, metric: Metric) -> None:
    if chosen is None:
        return
    for axes in (upper, lower):
        axes.axvline(chosen, color=MARK, linewidth=1.2, linestyle=(0, (4, 2)))
    if chosen in quality:
        ring = {"markersize": 8, "color": CARD, "markeredgecolor": MARK, "markeredgewidth": 2, "clip_on": False}
        lower.plot([chosen], [quality[chosen]], "o", **ring)
    label = f"epoch {chosen} chosen"
    label += f" ({format_metric(metric, quality[chosen] / scale_of(metric))})" if chosen in quality else ""
    upper.set_title(label, color=MARK, fontsize=8.5, loc="right")


def _latency_range(series: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the left and right edge for sorted series; a long tail does not decide the right one."""
    low = min(values[0] for values in series)
    full = max(values[-1] for values in series)
    bulk = max(values[math.ceil(TAIL_QUANTILE * len(values)) - 1] for values in series)
    margin = 0.15 * (bulk - low) or 0.05 * abs(bulk) or 1.0
    return max(0.0, low - margin / 2), bulk + margin if full > bulk + margin else full + margin / 2


def _keep_numbers(values: Sequence[float | None]) -> list[float]:
    return sorted(value for value in values if value is not None and are_numbers(value))
