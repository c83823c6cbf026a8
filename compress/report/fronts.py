"""Which network gives how much quality at which cost? Pictures in which the best lie in the upper left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.metric import TOP1, axis_of, title_of
from compress.report.svg import BASELINE, CARD, MUTED, SLIM, are_numbers, render_svg
from compress.tasks.base import Metric

HEIGHT_INCHES = 2.5
LABELS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Point:
    """One network.

    Attributes:
        cost: In the unit of the panel.
        quality: Top-1, or what else decides; a share in percent.
        label: Short; of a baseline the runs that it belongs to, or "" for all of them.
        low: Lower end of its interval, in the same unit; None where it is not known.
        high: Upper end.
        is_baseline: Whether it is the untouched network.
    """

    cost: float
    quality: float
    label: str
    low: float | None = None
    high: float | None = None
    is_baseline: bool = False

    @classmethod
    def of(
        cls, cost: float, quality: float, interval: Any, label: str, is_baseline: bool = False, scale: float = 100.0
    ) -> Point:
        """Return a point, quality times `scale`; `interval` is {"low", "high"} or anything else for none."""
        low, high = (interval.get(end) if isinstance(interval, dict) else None for end in ("low", "high"))
        if low is None or high is None or not are_numbers(low, high):
            return cls(cost, scale * quality, label, is_baseline=is_baseline)
        return cls(cost, scale * quality, label, scale * low, scale * high, is_baseline)


@dataclass(frozen=True, slots=True)
class Panel:
    """Quality over one cost.

    Attributes:
        title: Of the axis of cost.
        points: The networks.
        is_joined: Whether an arrow leads from the first to the last, in place of a line along the front.
    """

    title: str
    points: Sequence[Point]
    is_joined: bool = False


def list_front(points: Sequence[Point], metric: Metric = TOP1) -> list[Point]:
    """Return the points that no other betters, the cheapest first."""
    sign = 1 if metric.higher_is_better else -1
    front = [
        one
        for one in points
        if not any(
            other.cost <= one.cost
            and sign * other.quality >= sign * one.quality
            and (other.cost, other.quality) != (one.cost, one.quality)
            for other in points
        )
    ]
    return sorted(front, key=lambda one: (one.cost, one.quality))


def plot_fronts(key: str, panels: Sequence[Panel], metric: Metric = TOP1) -> str:
    """Return quality over each cost, one panel beside the other; "" when no panel has a point.

    Args:
        key: Unique in the page.
        panels: One or two.
        metric: What quality is.
    """
    drawn = [panel for panel in panels if panel.points]
    if not drawn:
        return ""

    def draw(figure: Any) -> None:
        every = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
        for axes, panel in zip(every, drawn, strict=True):
            _draw_panel(axes, panel, metric)
        every[0].set_ylabel(axis_of(metric))

    costs = " and over ".join(panel.title for panel in drawn)
    return render_svg(key, f"{title_of(metric)} over {costs} of {len(drawn[0].points)} networks", HEIGHT_INCHES, draw)


def _draw_panel(axes: Any, panel: Panel, metric: Metric) -> None:
    if panel.is_joined:
        first, last = panel.points[0], panel.points[-1]
        arrow = {"arrowstyle": "->", "color": MUTED, "shrinkA": 6, "shrinkB": 6}
        axes.annotate("", (last.cost, last.quality), xytext=(first.cost, first.quality), arrowprops=arrow)
        front = list(panel.points)
    else:
        front = list_front(panel.points, metric)
        axes.plot([one.cost for one in front], [one.quality for one in front], color=SLIM, linewidth=1.4)
    largest = max(one.cost for one in panel.points)
    labels: dict[tuple[float, float, bool], list[str]] = {}
    for one in panel.points:
        color = BASELINE if one.is_baseline else SLIM
        if one.low is not None and one.high is not None:
            axes.plot([one.cost] * 2, [one.low, one.high], color=color, linewidth=1.1)
        fill = color if one.is_baseline or one in front else CARD
        shape = "s" if one.is_baseline else "o"
        axes.plot([one.cost], [one.quality], shape, color=color, markersize=6, markerfacecolor=fill)
        labels.setdefault((one.cost, one.quality, one.is_baseline), []).append(one.label)
    for (cost, quality, is_baseline), names in labels.items():
        # To the right and below a run lies what it betters; the baseline is the dearest as a rule, at the right edge.
        align, shift = ("right", -6) if cost > (0.6 if is_baseline else 0.85) * largest else ("left", 6)
        place = {"textcoords": "offset points", "xytext": (shift, 5 if is_baseline else -11), "ha": align}
        axes.annotate(_join(names, is_baseline), (cost, quality), fontsize=8, **place)
    axes.margins(0.14)
    axes.set_xlim(0, largest * 1.08)
    axes.set_xlabel(panel.title)


def _join(labels: Sequence[str], is_baseline: bool) -> str:
    """Return one label for the networks that lie on one point; a picture has room for a few.

    >>> _join(["A", "B"], False), _join(["A", "B", "C", "D", "E"], True), _join([""], True)
    ('A, B', 'baseline of A, B, C …', 'baseline')
    """
    text = ", ".join(labels[:LABELS_SHOWN]) + (" …" if len(labels) > LABELS_SHOWN else "")
    return " of ".join(filter(None, ("baseline", text))) if is_baseline else text
