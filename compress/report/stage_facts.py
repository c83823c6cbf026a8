"""Facts of a report page on the work of the stages."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping

from compress.report.formats import (
    describe_change,
    format_bytes,
    format_metric,
    format_ms,
    format_number,
    format_share,
)
from compress.report.model import Environment
from compress.report.records import (
    Exclusion,
    Group,
    Isometry,
    LatencyBudget,
    MethodRecord,
    PruneRecord,
    QuantizeRecord,
    Record,
    TrainingRecord,
)
from compress.report.results import Fact

METHOD_VALUES = {
    "reactivated": "channels kept again after they had been chosen for removal",
    "left_ratio": "strength of the removed channels left before the cut",
    "multiplier": "multiplier of the budget at the end",
    "channels_closed_ratio": "channels masked by the method itself",
    "blocks_closed_ratio": "blocks masked by the method itself",
}
_UNITS = {"latency_ms": "latency (ms)", "size_mb": "size of the file (MB)"}


def list_targets(record: PruneRecord) -> Iterator[Fact]:
    """Yield the limit and the reached value of each target."""
    for name, values in record.targets.items():
        label = _UNITS.get(name, f"{name.replace('macs', 'MACs')} kept")
        form = format_number if name in _UNITS else format_share
        yield f"{label}, target", form(values.before)
        yield f"{label}, reached", form(values.after)


def list_latency_budget(latency: LatencyBudget | None) -> Iterator[Fact]:
    """Yield the latency that widths or ranks were chosen by."""
    if latency is None:
        return
    timed = "not measured" if latency.measured_ratio is None else format_share(latency.measured_ratio)
    beside = [one.baseline_ms for one in latency.rounds if one.baseline_ms is not None]
    if latency.device:
        stated = f" ({latency.device_runtime})" if latency.device_runtime else ""
        yield "complete networks timed on", f"{latency.device}{stated}"
    yield "baseline latency in the latency table", format_ms(latency.reference_ms)
    yield "share of it, by the table", format_share(latency.predicted_ratio)
    yield "share of it, measured in turn", timed
    if beside:
        yield "baseline latency when choices were measured", format_ms(statistics.median(beside))
    yield "networks measured until the budget was met", len(latency.rounds)
    yield "median error of the table on its variants", format_share(latency.table_error)
    if latency.entry_error is not None:
        yield "standard error of the time of a layer, median share of the network's", format_share(latency.entry_error)
    yield "scatter of single calls", format_share(latency.scatter)


def list_method(method: MethodRecord | None) -> Iterator[Fact]:
    """Yield the values of a method that chose while the network trained."""
    if method is None:
        return
    yield "training-time method", method.name
    for label, change, form in (
        ("loss", method.cut_loss, format_number),
        (method.metric.words, method.cut_quality, lambda value: format_metric(value, method.metric)),
    ):
        if change.difference is not None:
            yield f"validation {label}, trained network before and after the cut", describe_change(change, form)
    for name, value in method.metrics.items():
        form = format_share if name.endswith("_ratio") else format_number
        yield METHOD_VALUES.get(name, name), form(value)


def list_isometry(isometry: Isometry, labels: Mapping[str, str]) -> Iterator[Fact]:
    """Yield the mean singular value of the input-output Jacobian at the points of a stage that `labels` names."""
    known = {name: value for name in labels if (value := getattr(isometry, name)) is not None}
    if known:
        label = f"mean singular value of the Jacobian, {', '.join(labels[name] for name in known)}"
        yield label, " → ".join(map(format_number, known.values()))
    elif isometry.skipped:
        yield "mean singular value of the Jacobian", f"not measured: {isometry.skipped}"


def list_prune(record: PruneRecord) -> Iterator[Fact]:
    """Yield the facts of a `prune` stage that precede its costs."""
    yield "criterion", record.criterion
    yield from list_targets(record)
    yield from list_latency_budget(record.latency)


def list_training(record: TrainingRecord, before: float | None) -> Iterator[Fact]:
    """Yield the facts of a training.

    Args:
        record: Record of the training.
        before: Primary metric on validation before the training, for records that do not state it.
    """
    metric, rates = record.metric, [one.learning_rate for one in record.epochs if one.learning_rate is not None]
    words = f"validation {metric.words}"
    start = before if record.validation.before is None else record.validation.before
    probes = [
        f"{format_number(one.learning_rate)}: "
        f"{'diverged' if one.validation is None else format_metric(one.validation, metric)}"
        for one in record.probed_learning_rates
    ]
    yield "chosen epoch", _describe_chosen(record)
    yield f"{words} before training", format_metric(start, metric)
    yield f"{words} of the chosen epoch", format_metric(record.reached, metric)
    if record.averaged is not None:
        kept = "kept" if record.is_averaged else "not kept"
        yield f"{words} of the average of the last steps", f"{format_metric(record.averaged, metric)}, {kept}"
    yield "peak learning rate", format_number(record.peak_learning_rate)
    yield "learning rates tried", ", ".join(probes) or None
    yield "final learning rate", format_number(rates[-1] if rates else None)
    yield from list_rewinding(record)
    labels = {"baseline": "baseline", "before": "before training", "after": "after training"}
    yield from list_isometry(record.isometry, labels)
    yield "batch size", record.batch_size
    yield "steps", None if record.steps is None else f"{record.steps:,}"


def _describe_chosen(record: TrainingRecord) -> str | None:
    chosen, count = record.chosen_epoch, len(record.epochs)
    if chosen is None:
        return None
    if chosen == 0:
        return "none: training made the network worse and was rolled back"
    return f"{chosen} of {count}" if count else str(chosen)


def list_rewinding(record: TrainingRecord) -> Iterator[Fact]:
    """Yield the initial weights of a training if they were not inherited, and its schedule if it was rewound."""
    epoch = record.rewind_epoch
    if record.weights not in (None, "inherited"):
        is_known = record.weights == "rewound" and epoch is not None
        yield "weights at the start", f"rewound to epoch {epoch:g}" if is_known else record.weights
    if record.rewind_schedule is not None:
        is_tail = record.rewind_schedule == "tail" and epoch is not None
        yield "learning-rate schedule", f"tail from epoch {epoch:g}" if is_tail else "whole"


def describe_damage(group: Group) -> str:
    """Return the damage of narrowing a group, with its standard error if it was measured."""
    damage = format_number(group.damage)
    return damage if group.damage_error is None else f"{damage} ± {format_number(group.damage_error)}"


def describe_weights(record: QuantizeRecord) -> str | None:
    """Return the type of quantised weights."""
    return f"{record.weight_type}, 7 bits" if record.weight_type and record.reduce_range else record.weight_type


def describe_validation(record: Record) -> str:
    """Return the primary metric on validation before and after a stage."""
    return describe_change(record.validation, lambda value: format_metric(value, record.metric))


def group_by_reason(exclusions: Iterable[Exclusion]) -> dict[str, list[str]]:
    """Return the names that share each reason, in the order met: 18 groups with one reason are one note."""
    reasons: dict[str, list[str]] = {}
    for one in exclusions:
        reasons.setdefault(one.reason or "no reason given", []).append(one.name)
    return reasons


def list_machine(environment: Environment) -> list[Fact]:
    """Return the facts of the machine."""
    return [
        ("cpu", environment.cpu),
        ("cores", environment.cores),
        ("memory", format_bytes(environment.memory_bytes)),
        ("platform", environment.platform),
        ("python", environment.python),
        *environment.others.items(),
    ]


def list_versions(environment: Environment) -> list[Fact]:
    """Return the versions of libraries."""
    return [(name, version or "not installed") for name, version in environment.versions.items()]
