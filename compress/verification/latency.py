"""How long does one call take? Several models measured in turn, so that they share whatever else the machine does."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from compress.errors import DataError
from compress.progress import Progress, SilentProgress
from compress.verification.runtimes.base import Runtime

FEWEST_FOR_P95 = 20


@dataclass(frozen=True, slots=True)
class LatencySample:
    """The timed calls of one model.

    Attributes:
        milliseconds: Every call, in the order they were made.
    """

    milliseconds: tuple[float, ...]

    @property
    def p50(self) -> float:
        """Median."""
        return float(np.quantile(self.milliseconds, 0.5))

    @property
    def p95(self) -> float | None:
        """95th percentile; None below 20 calls, which say nothing about it."""
        return float(np.quantile(self.milliseconds, 0.95)) if len(self.milliseconds) >= FEWEST_FOR_P95 else None

    def to_figures(self) -> dict[str, float]:
        """Return {"p50", "p95"}, without p95 where there are too few calls."""
        figures = {"p50": self.p50}
        if self.p95 is not None:
            figures["p95"] = self.p95
        return figures


def measure_latency(
    sessions: Mapping[str, Runtime],
    inputs: Mapping[str, Mapping[str, np.ndarray]],
    warmup: int,
    repeats: int,
    progress: Progress | None = None,
) -> dict[str, LatencySample]:
    """Time calls of every model in turn: A B, B A, A B ... so that drift and load hit all alike.

    Args:
        sessions: Label -> open runtime.
        inputs: Label -> inputs of that runtime; checked once, before any call.
        warmup: Untimed calls of each.
        repeats: Timed calls of each, at least 1.
        progress: Told about each round.

    Returns:
        Label -> its calls.

    Raises:
        DataError: There is nothing to measure, or no call to make.
        ModelError: Inputs do not fit, or a network fails on them.
    """
    if not sessions or repeats < 1:
        raise DataError(f"Latency must be measured on at least one model and call, got {len(sessions)} and {repeats}.")
    calls = {label: session.bind(inputs[label]) for label, session in sessions.items()}
    times: dict[str, list[float]] = {label: [] for label in calls}
    collecting = gc.isenabled()
    with (progress or SilentProgress()).task("latency", warmup + repeats) as task:
        for _ in range(warmup):
            for call in calls.values():
                call()
            task.advance()
        gc.disable()  # a collection in the middle of a call would be counted as its time
        try:
            for number in range(repeats):
                for label in list(calls)[:: 1 if number % 2 == 0 else -1]:
                    times[label].append(_timed(calls[label]))
                task.advance()
        finally:
            if collecting:
                gc.enable()
    return {label: LatencySample(tuple(values)) for label, values in times.items()}


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3
