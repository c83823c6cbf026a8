"""Latency loop: a choice is timed as a complete network, and chosen again until the latency budget is met.

The latency table is some per cent off for a single network. Timing the chosen network measures this error, and the
limit of the next choice is corrected by it. The loop ends when the latency is met, or when widths come no nearer.

Every choice is timed beside the baseline. If the baseline's latency differs from its last one, the machine has changed
its speed; the choice and the baseline are then timed again.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from compress.cost.conditions import COMMAND
from compress.cost.fitted_table import FittedTable
from compress.errors import BudgetUnreachable
from compress.model.stage_records import LayerLatency, Round, Stairs, Step, Variant, WidthLatencyRecord
from compress.progress import Progress
from compress.search.width_latency import LatencyModel, Widths
from compress.verification.measurement import PairLatency

WITHIN = 0.03
ROUNDS = 6
UNEXPECTED, MORE_TIMES = 0.08, 2
MOVED = 0.1  # more than a quartile of some calls differs from the median of others on a quiet machine


@dataclass(frozen=True, slots=True)
class TimedChoice:
    """A choice of widths that was timed as a complete network.

    Attributes:
        widths: Group name -> chosen width.
        predicted: Predicted share of the baseline's latency, by the table.
        ratio: Measured share of the baseline's latency.
        reference_ms: Latency of the baseline in the same measurement, in ms; None if not recorded.
    """

    widths: dict[str, int]
    predicted: float
    ratio: float
    reference_ms: float | None = None


class Chosen(Protocol):
    """A choice within a budget; `widths` is equal for equal choices."""

    @property
    def widths(self) -> dict[str, int]:
        """Chosen width or option, by name."""
        ...


class Timed(Protocol):
    """Model that predicts and measures the latency of a choice."""

    @property
    def reference_ms(self) -> float:
        """Latency of the baseline, in milliseconds."""
        ...

    def predict_ratio(self, widths: Widths, /) -> float:
        """Return the predicted share of the baseline's latency."""
        ...

    @property
    def time_pair(self) -> Callable[[Mapping[str, int]], PairLatency]:
        """Choice -> measured share of the baseline's latency, and the baseline's latency in that measurement."""
        ...


C = TypeVar("C", bound=Chosen)


def meet_latency(
    select: Callable[[float], C], model: Timed, asked: float, progress: Progress, in_ms: bool = False
) -> tuple[C, list[TimedChoice]]:
    """Return the choice whose measured latency comes nearest to the target from below, within 3 % of it if any does.

    Args:
        select: Function that makes a choice with the latency limit multiplied by a factor.
        model: Model that predicts and measures latencies.
        asked: Target, as a share of the baseline's latency.
        progress: Receives progress by round.
        in_ms: True states latencies in milliseconds in errors, for a target in milliseconds.

    Returns:
        The choice, and all timed choices in order.

    Raises:
        BudgetUnreachable: No choice meets the target in its measurement.
    """
    correction = 1.0
    timed: list[TimedChoice] = []
    choices: list[C] = []
    for number in range(ROUNDS):
        selection = _select(select, correction, asked, timed, model)
        if _is_timed(selection, timed):
            # the limit moved by less than the gap to the next choice: move it past the last choice
            correction = timed[-1].predicted / timed[-1].ratio
            selection = _select(select, correction, asked, timed, model)
            if _is_timed(selection, timed):
                break
        predicted = model.predict_ratio(selection.widths)
        found = _time_well(selection.widths, predicted, timed, model, progress)
        choice = TimedChoice(selection.widths, predicted, found.ratio, found.reference_ms)
        timed.append(choice)
        choices.append(selection)
        progress.note(
            f"round {number + 1}: predicted {choice.predicted:.3f} of the baseline's latency, measured "
            f"{choice.ratio:.3f}, asked {asked:.3f}"
        )
        if abs(choice.ratio / asked - 1) <= WITHIN:
            break
        correction *= asked / choice.ratio
    _warn_of_speed(timed, model, progress)
    best = min(range(len(timed)), key=lambda index: _distance(timed[index].ratio, asked))
    if timed[best].ratio > asked * (1 + WITHIN):
        wanted, reached = f"{asked:.3f} of the baseline's latency", f"{timed[best].ratio:.3f} of it"
        if in_ms:
            wanted = f"{asked * model.reference_ms:.4g} ms ({wanted})"
            reached = f"{timed[best].ratio * model.reference_ms:.4g} ms ({reached})"
        raise BudgetUnreachable(
            f"Target {wanted} cannot be reached: the fastest choice found takes {reached}, measured.",
            best=timed[best].ratio,
        )
    return choices[best], timed


def latency_record(model: LatencyModel, widths: Widths, timed: list[TimedChoice]) -> WidthLatencyRecord:
    """Return the report's entry on the latency."""
    measured = [choice.ratio for choice in timed if choice.widths == widths]
    return WidthLatencyRecord(
        reference_ms=model.reference_ms,
        fixed_ms=model.cost.fixed,
        predicted_ratio=model.predict_ratio(widths),
        measured_ratio=measured[-1] if measured else None,
        table_error=model.table.error,
        scatter=model.table.spread,
        rounds=rounds_record(timed),
        variants=tuple(Variant(predicted_ms=predicted, measured_ms=took) for predicted, took in model.variants),
        stairs=tuple(
            Stairs(name=name, chosen=widths[name], steps=tuple(Step(width=width, ms=ms) for width, ms in steps))
            for name, steps in model.stairs(widths).items()
        ),
        layers=tuple(
            LayerLatency(layer=layer, ms_before=before, ms_after=after)
            for layer, (before, after) in model.layers(widths).items()
        ),
        **_device_values(model),
    )


def _device_values(model: LatencyModel) -> dict[str, Any]:
    """Return the entries on a device that times complete variants; {} for a table of single layers."""
    if not isinstance(model.table, FittedTable):
        return {}
    conditions = model.file.conditions
    return {
        "device": conditions.machine,
        "device_runtime": (model.file.runtime or None) if conditions.runtime == COMMAND else conditions.runtime,
        "entry_error": model.table.entry_error,
    }


def rounds_record(timed: Sequence[TimedChoice]) -> tuple[Round, ...]:
    """Return the report's entries on the timed choices."""
    return tuple(Round(predicted=one.predicted, measured=one.ratio, baseline_ms=one.reference_ms) for one in timed)


def _select(select: Callable[[float], C], correction: float, asked: float, timed: list[TimedChoice], model: Timed) -> C:
    """Choose with the limit multiplied by `correction`; the fastest by the cost table when nothing is within it."""
    try:
        return select(correction)
    except BudgetUnreachable as error:
        if not timed or error.best is None:
            raise
        return select(error.best * (1 + 1e-6) / (asked * model.reference_ms))


def _is_timed(selection: Chosen, timed: list[TimedChoice]) -> bool:
    return any(choice.widths == selection.widths for choice in timed)


def _time_well(
    widths: Widths, predicted: float, timed: Sequence[TimedChoice], model: Timed, progress: Progress
) -> PairLatency:
    """Time a choice; if the first result is unexpected, time it again and return the medians.

    The expected ratio is the table's, corrected by the relative error of the last choice. The expected latency of the
    baseline is its last one.
    """
    before = timed[-1] if timed else None
    expected = predicted * (before.ratio / before.predicted if before else 1.0)
    expected_ms = (before.reference_ms if before else None) or model.reference_ms
    found = [model.time_pair(widths)]
    if surprise := _surprise(found[0], expected, expected_ms):
        progress.note(f"{surprise}: measured again")
        found += [model.time_pair(widths) for _ in range(MORE_TIMES)]
    return PairLatency(
        statistics.median(one.ratio for one in found), statistics.median(one.reference_ms for one in found)
    )


def _surprise(found: PairLatency, expected: float, expected_ms: float) -> str | None:
    """Describe the value of a measurement that is far from the expected one; None if both are near."""
    if abs(found.ratio / expected - 1) > UNEXPECTED:
        return f"measured {found.ratio:.3f} where {expected:.3f} was expected"
    if _has_moved(found.reference_ms, expected_ms):
        return f"the baseline takes {found.reference_ms:.3g} ms where it took {expected_ms:.3g} ms"
    return None


def _warn_of_speed(timed: Sequence[TimedChoice], model: Timed, progress: Progress) -> None:
    """Warn if the baseline's latency has changed since the table was made."""
    here = [choice.reference_ms for choice in timed if choice.reference_ms is not None]
    now_ms = statistics.median(here) if here else model.reference_ms
    if _has_moved(now_ms, model.reference_ms):
        where = "the device" if isinstance(getattr(model, "table", None), FittedTable) else "this machine"
        progress.warn(
            f"The baseline takes {now_ms:.3g} ms, it took {model.reference_ms:.3g} ms when the latency table was made: "
            f"{where} has changed its speed. Shares of the baseline's latency are measured side by side and hold; "
            "milliseconds are those of the table. Run again on a quiet machine for a target in milliseconds."
        )


def _has_moved(now_ms: float, before_ms: float) -> bool:
    """Return whether two latencies of the same network differ by more than noise, in either direction."""
    return max(now_ms, before_ms) > (1 + MOVED) * min(now_ms, before_ms)


def _distance(ratio: float, asked: float) -> tuple[bool, float]:
    """Rank choices within the target, or nearly, before the others; then by nearness."""
    return ratio > asked * (1 + WITHIN), abs(ratio / asked - 1)
