"""How does a figure change along a scale? Lines over severities, over levels of noise and over batch sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.report.metric import TOP1, axis_of, scale_of, title_of
from compress.report.svg import BASELINE, MUTED, RUNS, SLIM, are_numbers, render_svg, shorten
from compress.tasks.base import Metric

COLUMNS = 3
TOP = 104  # percent: room for a marker at 100
Curve = Sequence[tuple[float, float | None]]


def plot_severities(key: str, curves: Mapping[str, tuple[Curve, Curve]], metric: Metric = TOP1) -> str:
    """Return a small picture for each corruption, quality of both networks over its severity; "" when there is none.

    Args:
        key: Unique in the page.
        curves: Name of the corruption -> (severity, top-1 in [0, 1] or what else decides) of the baseline and of the
            slim network; the severity 0 stands for the images as they are.
        metric: What decides.
    """
    drawn = {name: tuple(_drawn(curve, metric) for curve in pair) for name, pair in curves.items()}
    drawn = {name: pair for name, pair in drawn.items() if any(len(curve) > 1 for curve in pair)}
    if not drawn:
        return ""
    columns = min(COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)

    def draw(figure: Any) -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        names = list(drawn)
        for place, axes in enumerate(grid.flat):
            if place >= len(names):
                axes.set_axis_off()
                continue
            for label, color, curve in zip(("baseline", "slim"), (BASELINE, SLIM), drawn[names[place]], strict=True):
                if curve:
                    axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.5, label=label if not place else None)
            axes.set_title(shorten(names[place].replace("_", " "), 22), fontsize=7.5)
            axes.tick_params(labelsize=7)
            _limit(axes, metric)
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.supxlabel("severity, 0: images as they are", fontsize=8.5, color=MUTED)
        figure.supylabel(axis_of(metric), fontsize=8.5, color=MUTED)
        figure.legend(loc="outside upper left", ncols=2)

    return render_svg(key, f"{title_of(metric)} over the severity of {len(drawn)} corruptions", 0.8 + 1.2 * rows, draw)


def plot_throughput(key: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return images per second of both networks over the batch size; "" when there are fewer than two sizes.

    Args:
        key: Unique in the page.
        rows: {"batch_size", "baseline", "slim"}; a network may be missing.
    """
    rows = sorted((row for row in rows if are_numbers(row.get("batch_size"))), key=lambda row: row["batch_size"])
    series = {
        label: [(place, row[label]) for place, row in enumerate(rows) if are_numbers(row.get(label))]
        for label in ("baseline", "slim")
    }
    if len(rows) < 2 or not any(series.values()):
        return ""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for color, (label, points) in zip((BASELINE, SLIM), series.items(), strict=True):
            if points:
                axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, marker="o", markersize=4, label=label)
        axes.set_xticks(range(len(rows)), labels=[f"{row['batch_size']:g}" for row in rows])
        axes.set(xlabel="images a call", ylabel="images per second")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=2)

    return render_svg(key, "Images per second over the batch size", 2.4, draw)


def plot_runs(key: str, curves: Mapping[str, Curve], baseline: Curve, scale: str, metric: Metric = TOP1) -> str:
    """Return quality of several runs along a scale; "" when no run has two points.

    Args:
        key: Unique in the page.
        curves: Label of a run -> (place on the scale, top-1 in [0, 1] or what else decides).
        baseline: The same of the untouched network; empty when the runs do not share one.
        scale: What the scale is.
        metric: What decides.
    """
    drawn = {label: points for label, curve in curves.items() if len(points := _drawn(curve, metric)) > 1}
    before = _drawn(baseline, metric)
    if not drawn:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        if len(before) > 1:
            axes.plot(*zip(*before, strict=True), color=BASELINE, linewidth=1.8, linestyle="--", label="baseline")
        for place, (label, points) in enumerate(drawn.items()):
            style = {"color": RUNS[place % len(RUNS)], "linestyle": ("-", ":", "-.")[place // len(RUNS) % 3]}
            axes.plot(*zip(*points, strict=True), linewidth=1.8, marker="o", markersize=4, label=label, **style)
        axes.set(xlabel=scale, ylabel=axis_of(metric))
        _limit(axes, metric)
        figure.legend(loc="outside upper left", ncols=6)

    return render_svg(key, f"{title_of(metric)} of {len(drawn)} runs over the {scale}", 2.8, draw)


def _drawn(curve: Curve, metric: Metric) -> list[tuple[float, float]]:
    return [(x, scale_of(metric) * y) for x, y in curve if y is not None and are_numbers(x, y)]


def _limit(axes: Any, metric: Metric) -> None:
    """Let the axis of quality begin at 0, and end a little above 100 where it is in percent."""
    axes.set_ylim(0, TOP if metric.is_share else None)
