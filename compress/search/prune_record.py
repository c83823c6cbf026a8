"""Record of the prune stage: costs before and after, requested and reached targets, width and damage of each group."""

from collections.abc import Mapping

from compress.allocation.widths import Candidates
from compress.checkpoint.rebuild import example_input
from compress.cost.macs import count_macs, count_params
from compress.errors import InternalError
from compress.model.artifacts import TorchModel
from compress.model.stage_records import ExcludedGroup, GroupWidth, PruneRecord
from compress.search.latency_loop import WITHIN as LATENCY_WITHIN
from compress.search.latency_loop import latency_record
from compress.search.pruner import Attempt
from compress.search.scoring import criterion_name
from compress.tasks.base import Metric

MET_WITHIN = 0.005
UNITS = {
    "latency": "of the baseline's latency",
    "latency_ms": "ms",
    "macs": "of the baseline's macs",
    "params": "of the baseline's params",
    "size_mb": "MB",
}


def prune_record(before: TorchModel, attempt: Attempt, metric: Metric, validation: tuple[float, float]) -> PruneRecord:
    """Return the record of an attempt, without the search that led to it.

    Args:
        before: The network before the stage.
        attempt: The slim network.
        metric: The primary metric.
        validation: Its value on the validation split, before the stage and after it.

    Raises:
        InternalError: MACs or params differ from the predicted ones.
    """
    surveyed, selection = attempt.prepared.surveyed, attempt.selection
    config, latency = surveyed.config, surveyed.targets.latency
    asked, reached = asked_and_reached(attempt)
    first, costs = next(iter(config.target.given())), _costs(before, attempt)
    return PruneRecord(
        metric=metric,
        validation_before=validation[0],
        validation_after=validation[1],
        target=config.target.given(),
        asked_ratio=asked[first],
        reached_ratio=reached[first],
        asked=asked,
        reached=reached,
        criterion=criterion_name(config) if config.method is None else None,
        is_optimal=selection.is_optimal,
        damage=attempt.prepared.damage,
        groups=tuple(_group_width(one, selection.widths[one.name]) for one in attempt.prepared.candidates),
        shortfall=_shortfall(asked, reached, config.multiple_of, bool(attempt.removed_blocks)),
        latency=None if latency is None else latency_record(latency, selection.widths, attempt.timed),
        removed_blocks=tuple(name for name in attempt.removed_blocks if name not in attempt.merged_blocks),
        merged_blocks=attempt.merged_blocks,
        excluded=tuple(ExcludedGroup(name=item.name, reason=item.reason) for item in surveyed.excluded),
        repairs=attempt.prepared.shortened.repairs + attempt.repairs,
        macs_before=costs["macs_before"],
        macs_after=costs["macs_after"],
        params_before=costs["params_before"],
        params_after=costs["params_after"],
    )


def asked_and_reached(attempt: Attempt) -> tuple[dict[str, float], dict[str, float]]:
    """Return the requested value and the reached value of each target: shares of the baseline, MB or ms."""
    selection, targets = attempt.selection, attempt.prepared.surveyed.targets
    asked, reached = targets.config.given(), targets.reached(selection.widths)
    if targets.latency is not None:
        chosen = [choice.ratio for choice in attempt.timed if choice.widths == selection.widths]
        ratio = chosen[-1] if chosen else targets.latency.predict_ratio(selection.widths)
        reached |= {"latency": ratio, "latency_ms": ratio * targets.latency.reference_ms}
    if "size_mb" in asked:
        reached["size_mb"] = targets.size_mb(selection.widths)
    return asked, {name: reached[name] for name in asked}


def _costs(before: TorchModel, attempt: Attempt) -> dict[str, int]:
    """Return MACs and params before and after, and check them against the predicted ones."""
    example, targets = example_input(before.signature), attempt.prepared.surveyed.targets
    found = {
        f"{unit}_{when}": count
        for when, model in (("before", before), ("after", attempt.model))
        for unit, count in (("macs", count_macs(model.module, example)), ("params", count_params(model.module)))
    }
    for unit in ("macs", "params"):
        predicted = targets.cost(unit).at(attempt.selection.widths)
        if found[f"{unit}_after"] != round(predicted):
            raise InternalError(f"The cut was predicted to leave {predicted} {unit}, it left another number.")
    return found


def _shortfall(
    asked: Mapping[str, float], reached: Mapping[str, float], multiple_of: int, has_removed: bool
) -> str | None:
    """Return a sentence if a target is exceeded, or if no target is met closely; else None."""
    misses = {name: reached[name] / asked[name] - 1 for name in asked}
    tolerance = {name: LATENCY_WITHIN if name.startswith("latency") else MET_WITHIN for name in asked}
    if all(misses[name] <= tolerance[name] for name in asked) and any(
        abs(misses[name]) <= tolerance[name] for name in asked
    ):
        return None
    name = min(asked, key=lambda name: abs(misses[name]))
    return (
        f"asked for {asked[name]:.4f} {UNITS[name]}, reached {reached[name]:.4f}: the widths that the "
        f"ranking and the limits allow (multiples of {multiple_of} where groups are wide enough"
        f"{', blocks removed first' if has_removed else ''}) come no nearer"
    )


def _group_width(one: Candidates, width: int) -> GroupWidth:
    level = one.levels.index(width)
    return GroupWidth(
        name=one.name,
        width_before=one.full,
        width_after=width,
        damage=float(one.damages[level]),
        damage_error=None if one.errors is None else float(one.errors[level]),
    )
