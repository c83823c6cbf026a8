"""Rows, facts and sentences of a report page on the measurements of `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from compress.report.details import Distribution, Estimate, Latency, Parity, Quality, Robustness, WorstImage
from compress.report.formats import (
    ChangeRow,
    compare_costs,
    compare_quality,
    describe_difference,
    describe_ratio,
    describe_speedup,
    format_bytes,
    format_count,
    format_estimate,
    format_joules,
    format_measure,
    format_metric,
    format_ms,
    format_number,
    format_points,
    format_share,
    format_throughput,
    format_whole,
)
from compress.report.model import Check, Report
from compress.report.plots import Curve, Panel, Point
from compress.report.records import Change, TrainingRecord
from compress.tasks.base import Metric

IMAGES_AT_MOST = 32
NO_BREAK = "\u00a0"
KINDS = {"noise": "Noise", "corruption": "Corruptions", "shifted": "Shifted data"}
_PARTS = {"slimming": "all stages up to the float file", "quantize": "quantisation"}
Fact = tuple[str, object]
Cells = tuple[str, ...]


# -- verdict and networks ------------------------------------------------------------------------------------------


def describe_open(check: Check) -> str:
    """Return the value, the reason and the next step of a check that did not pass, behind its name."""
    values = [
        f"{word} {format_measure(value, check.unit)}".replace(" ", NO_BREAK)
        for word, value in (("got", check.value), ("limit", check.limit))
        if value is not None
    ]
    parts = [", ".join(values), check.detail, f"Next step: {check.remedy}" if check.remedy else ""]
    text = ". ".join(part for part in parts if part)
    status = {"skipped": " was required, but skipped", "inconclusive": " is inconclusive"}.get(check.status, "")
    return f"{status}{': ' if text else ''}{text}"


def list_main_changes(report: Report) -> list[str]:
    """Return the changes that matter most, in words."""
    ratios = [
        describe_ratio(report.change("macs"), "fewer MACs", "more MACs"),
        describe_ratio(report.latency(), "faster", "slower"),
        describe_ratio(report.change("size_bytes"), "smaller", "larger"),
    ]
    metric, quality = report.metric, report.quality(report.metric.name)
    if quality.difference is not None:
        change = describe_difference(quality, metric)
        ratios.append(f"{metric.words} {format_metric(quality.after, metric)} ({change})")
    return [text for text in ratios if text]


def list_comparison(report: Report) -> list[ChangeRow]:
    """Return a row for each cost and each metric known for either network."""
    costs = [
        ("MACs", report.change("macs"), format_count, "fewer", "more"),
        ("Parameters", report.change("params"), format_count, "fewer", "more"),
        ("ONNX size", report.change("size_bytes"), format_bytes, "smaller", "larger"),
    ]
    latencies = [
        (f"Latency {name}", report.latency(name), format_ms, "faster", "slower") for name in report.latency_names
    ]
    metrics = [(report.metric.other(name), report.quality(name)) for name in report.quality_names]
    return [
        *(compare_costs(*cost) for cost in costs if cost[1].is_known),
        *(compare_quality(metric.title, change, metric) for metric, change in metrics),
        *(compare_costs(*latency) for latency in latencies),
    ]


def list_panels(report: Report) -> list[Panel]:
    """Return the primary metric over latency and over MACs, from the baseline to the slim network."""
    macs = report.change("macs")
    panels = []
    for title, cost in (("latency p50 (ms)", report.latency()), ("MACs (millions)", macs.scaled(1e-6))):
        points = [
            make_point(report, value, is_baseline, "" if is_baseline else "slim")
            for value, is_baseline in ((cost.before, True), (cost.after, False))
            if value is not None
        ]
        known = [point for point in points if point is not None]
        if len(known) == 2:
            panels.append(Panel(title, known, is_joined=True))
    return panels


def make_point(report: Report, cost: float, is_baseline: bool, label: str) -> Point | None:
    """Return the point of a network in a plot; None if its quality is not known.

    Args:
        report: Report of the run.
        cost: Cost in the unit of the panel.
        is_baseline: Whether the network is the baseline, else the slim network.
        label: As in `Point`.
    """
    metric, quality = report.metric, report.details.quality
    change = report.quality(metric.name)
    value = change.before if is_baseline else change.after
    if value is None:
        return None
    estimate = (quality.baseline if is_baseline else quality.slim).get(metric.name, Estimate())
    low, high = (None if end is None else metric.scale * end for end in (estimate.low, estimate.high))
    return Point(cost, metric.scale * value, label, low, high, is_baseline)


def describe_conditions(latency: Latency) -> str:
    """Return the conditions that latency was measured under, as a list; "" if none is known."""
    threads, batch = latency.threads, latency.batch_size
    device = f"device {latency.device}" if latency.device else None
    names = [name for name in (device, latency.runtime, latency.provider) if name]
    names += [f"{threads} thread{'' if threads == 1 else 's'}"] if threads is not None else []
    names += [f"batch size {batch}"] if batch is not None else []
    return ", ".join(names)


def list_latency(latency: Latency) -> list[Fact]:
    """Return the conditions of the latency measurement, and the speed-up."""
    facts: list[Fact] = [
        ("device", latency.device),
        ("command on this machine", latency.command),
        ("runtime", latency.runtime),
        ("provider", latency.provider),
        ("threads", latency.threads),
        ("batch size", latency.batch_size),
        ("warm-up calls", latency.warmup),
        ("timed calls, baseline and slim", f"{len(latency.baseline_ms)} and {len(latency.slim_ms)}"),
        ("inputs and outputs", "on the device" if latency.io_binding else None),
        ("timed file of the baseline", "quantised as the slim one" if latency.baseline_file == "int8" else None),
    ]
    ratio = latency.ratio
    if ratio is None or ratio.low is None or ratio.high is None:
        return facts
    value, interval = describe_speedup(ratio, digits=3)
    facts.append(("speed-up (95 % interval)", f"{value}× ({interval})"))
    control = ratio.control
    if control is not None and control.low is not None and control.high is not None:
        text = f"{control.value:.3f} ({control.low:.3f} to {control.high:.3f})"
        facts.append(("baseline / baseline in the same run", text))
    return [*facts, ("sittings", ratio.sittings)]


def list_parity(parity: Parity) -> list[Fact]:
    """Return the differences between the file and the PyTorch network."""
    return [
        ("real samples", parity.samples),
        ("largest difference", format_number(parity.max_abs)),
        ("mean difference", format_number(parity.mean_abs)),
        *((f"difference {name}", format_number(value)) for name, value in parity.quantiles.items()),
        ("same top-1 class", format_share(parity.top1_agreement)),
    ]


def list_resources(report: Report) -> list[ChangeRow]:
    """Return start, memory, energy and throughput of both networks, where they were measured."""
    runtime = report.details.runtime
    costs = [
        ("Cold start", runtime.cold_start_ms, format_ms, "faster", "slower"),
        ("Peak memory", runtime.peak_memory_bytes, format_bytes, "less", "more"),
        ("Energy of a call", runtime.energy_joules, format_joules, "less", "more"),
    ]
    speeds = [(row.batch_size, Change(before=row.baseline, after=row.slim)) for row in runtime.throughput]
    return [
        *(compare_costs(*cost) for cost in costs if cost[1].is_known),
        *(
            compare_costs(
                f"Images per second, batch size {size}", speed, format_throughput, "fewer", "more", more_is_better=True
            )
            for size, speed in speeds
            if speed.is_known
        ),
    ]


# -- quality -------------------------------------------------------------------------------------------------------


def list_quality(quality: Quality) -> list[Fact]:
    """Return the metrics of the slim network with their intervals, and what changed against the baseline."""
    metric, changes = quality.metric, quality.changes
    if quality.task != "classification":
        facts: list[Fact] = [("task", quality.task)]
        for other, estimate in ((metric.other(name), estimate) for name, estimate in quality.slim.items()):
            label, worse = f"{other.words} {other.worse_word} against the baseline", changes.get(other.worsening)
            facts += [(other.words, format_estimate(estimate, other)), (label, format_estimate(worse, other))]
        return facts
    drop = changes.get("drop.top1", Estimate())
    shares = [(metric.other(name).words, quality.slim.get(name)) for name in ("top1", "top5", "worst_class")]
    return [
        *((label, format_estimate(estimate, metric)) for label, estimate in shares),
        ("calibration error", format_share(quality.slim.get("calibration_error", Estimate()).value)),
        ("top-1 drop against the baseline", format_estimate(drop, metric)),
        ("images lost and won", drop.detail or None),
        ("prediction churn", format_estimate(changes.get("churn"), metric)),
        ("mean distance of the probabilities", format_number(changes.get("softmax_distance", Estimate()).value)),
    ]


def class_rows(quality: Quality) -> list[Cells]:
    """Return the cells of each class that has images, the largest drop first; the lowest top-1 first without one."""
    found = []
    for index, after in enumerate(quality.slim_by_class):
        if after is not None:
            top1 = quality.class_quality(index)
            rank = after if top1.difference is None else top1.difference
            count = quality.images_by_class[index] if index < len(quality.images_by_class) else None
            shares = format_share(top1.before), format_share(after), format_points(top1.difference)
            name = quality.name_class(index, "")
            found.append((rank, index, (name, format_whole(count), *shares)))
    return [cells for _, _, cells in sorted(found)]


def group_worst_images(quality: Quality) -> dict[int | None, list[WorstImage]]:
    """Return wrongly classified images by class, in order of appearance; few enough for a page."""
    groups: dict[int | None, list[WorstImage]] = {}
    for image in quality.worst_images[:IMAGES_AT_MOST]:
        if image.image:
            groups.setdefault(image.label, []).append(image)
    return groups


# -- robustness ----------------------------------------------------------------------------------------------------


def describe_kinds(found: Sequence[Distribution]) -> str:
    """Return a title that names the kinds of images."""
    is_shifted = any(one.kind == "shifted" for one in found)
    return "Noise, corruptions and shifted data" if is_shifted else "Noise and corruptions"


def noise_curves(robustness: Robustness) -> tuple[Curve, Curve]:
    """Return (level, value) of the baseline and of the slim network, level 0 first; empty without noise."""
    noisy = robustness.of_kind("noise")
    if not noisy:
        return [], []
    levels = [0.0, *(robustness.wanted.noise_levels if robustness.wanted is not None else ())]
    changes = [_nominal(robustness), *(one.quality for one in noisy)]
    return (
        [(level, change.before) for level, change in zip(levels, changes, strict=False)],
        [(level, change.after) for level, change in zip(levels, changes, strict=False)],
    )


def list_severities(robustness: Robustness) -> dict[str, tuple[Curve, Curve]]:
    """Return (severity, value) of both networks for each corruption that was tried at several severities."""
    each: dict[str, list[tuple[int, Change]]] = {}
    for one in robustness.of_kind("corruption"):
        name, _, severity = one.name.rpartition(" ")
        if name and severity.isdecimal():
            each.setdefault(name, []).append((int(severity), one.quality))
    curves: dict[str, tuple[Curve, Curve]] = {}
    for name, those in each.items():
        if len(those) > 1:
            steps = [(0, _nominal(robustness)), *sorted(those, key=lambda step: step[0])]
            baseline = [(float(severity), change.before) for severity, change in steps]
            curves[name] = baseline, [(float(severity), change.after) for severity, change in steps]
    return curves


def _nominal(robustness: Robustness) -> Change:
    return next((one.quality for one in robustness.of_kind("nominal")), Change())


def list_means(robustness: Robustness, metric: Metric) -> list[ChangeRow]:
    """Return the mean over the distributions of each kind that has several."""
    rows = []
    for kind, label in KINDS.items():
        changes = [one.quality for one in robustness.of_kind(kind)]
        if len(changes) > 1:
            before, after = (_mean([getattr(change, end) for change in changes]) for end in ("before", "after"))
            rows.append(compare_quality(f"{label}, mean of {len(changes)}", Change(before=before, after=after), metric))
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def drop_on(distribution: Distribution | None, metric: Metric) -> float | None:
    """Return the drop of the primary metric on a distribution, positive for a loss; None if it is not known."""
    estimate = None if distribution is None else distribution.changes.get(metric.worsening)
    return None if estimate is None else estimate.value


def distribution_rows(robustness: Robustness, metric: Metric) -> list[Cells]:
    """Return name, both values and the drop on each distribution, the largest drop first.

    Of a classifier also prediction churn and the distance of the probabilities.
    """
    return [
        (
            f"{one.name} (shifted data)" if one.kind == "shifted" else one.name,
            format_metric(one.quality.before, metric),
            format_metric(one.quality.after, metric),
            format_estimate(one.changes.get(metric.worsening), metric),
            *(
                (
                    format_share(one.changes.get("churn", Estimate()).value),
                    format_number(one.changes.get("softmax_distance", Estimate()).value),
                )
                if metric.name == "top1"
                else ()
            ),
        )
        for one in sorted(robustness.distributions, key=lambda one: -(drop_on(one, metric) or 0.0))
    ]


# -- effect of each stage ------------------------------------------------------------------------------------------


class StageEffect(NamedTuple):
    """Change of the primary metric by one stage, or by a part of the pipeline.

    Attributes:
        place: Position of the stage in the pipeline; None for a part of the pipeline.
        name: Name of the stage or part.
        split: "validation" or "evaluation".
        quality: Primary metric before and after.
        metric: Primary metric.
    """

    place: int | None
    name: str
    split: str
    quality: Change
    metric: Metric


def list_effects(report: Report) -> list[StageEffect]:
    """Return the effect of each stage by its own record, and of each part of the pipeline by the verification."""
    effects = []
    for place, stage in enumerate(report.stages, start=1):
        record = stage.record
        quality = record.validation
        if isinstance(record, TrainingRecord) and quality.after is None:  # an early report: only epochs were measured
            after = record.averaged if record.is_averaged else record.reached
            quality = Change(before=quality.before, after=after)
        if quality.difference is not None:
            effects.append(StageEffect(place, stage.stage, "validation", quality, record.metric))
    for share in report.details.shares:
        name = _PARTS.get(share.stage or "", share.stage or "")
        effects.append(StageEffect(None, name, "evaluation", share.quality, report.metric))
    return effects
