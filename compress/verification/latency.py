"""How long does one call take? Several models measured in turn, so that they share whatever else the machine does."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from compress.errors import DataError
from compress.progress import Progress, SilentProgress
from compress.verification.runtimes.base import Runtime

FEWEST_CALLS = {"p50": 1, "p90": 10, "p95": 20, "p99": 100}  # fewer say nothing about it
_BLOCK_MS, _CALLS = 40.0, (0.2, 5.0)  # the latter for each of the repeats asked for
_BLOCKS, _MORE_TIMES = 8, 3
_PRECISE = 0.01
_SITTINGS, _PAUSE_S = 6, 2.0


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
    def p50_interval(self) -> tuple[float, float]:
        """Where the median lies with 95 % confidence, by the ranks of the calls; all of them where they are few."""
        from scipy.stats import binom  # scipy takes a second to import

        count = len(self.milliseconds)
        below = int(binom.ppf(0.025, count, 0.5))
        ordered = np.sort(self.milliseconds)
        return float(ordered[max(0, below - 1)]), float(ordered[min(count - 1, count - below)])

    def to_figures(self) -> dict[str, float]:
        """Return {"p50", "p90", "p95", "p99"}, as far as there are calls enough to know them."""
        return {
            name: float(np.quantile(self.milliseconds, int(name[1:]) / 100))
            for name, fewest in FEWEST_CALLS.items()
            if len(self.milliseconds) >= fewest
        }


@dataclass(frozen=True, slots=True)
class LatencyRatio:
    """What one model takes, over what another one takes.

    Attributes:
        value: Ratio of the medians.
        low: Lower end of the interval in which it lies with 95 % confidence.
        high: Upper end.
        error: Its standard error, as a share of it: by how much the blocks of calls differ.
    """

    value: float
    low: float
    high: float
    error: float


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


def compare_latency(
    sessions: Mapping[str, Runtime],
    inputs: Mapping[str, Mapping[str, np.ndarray]],
    warmup: int,
    repeats: int,
    progress: Progress | None = None,
) -> tuple[LatencyRatio, dict[str, LatencySample]]:
    """Time two models in turn until their ratio is known to 1 %, or there is an end to that.

    The calls are made in blocks, and how far these differ says how precise the ratio is; the shorter a call, the more
    are made.

    Args:
        sessions: Label -> open runtime; the first is compared with the second.
        inputs: Label -> inputs of that runtime.
        warmup: Untimed calls of each.
        repeats: Timed calls of each, more or less; at least 1.
        progress: Told about each block.

    Returns:
        The ratio, and label -> its calls.

    Raises:
        As `measure_latency`.
    """
    first = measure_latency(sessions, inputs, warmup, 3)
    share = np.clip(_BLOCK_MS / sum(sample.p50 for sample in first.values()), *_CALLS)
    calls = max(2, math.ceil(share * repeats / _BLOCKS))
    times: dict[str, list[np.ndarray]] = {label: [] for label in sessions}
    for _ in range(_MORE_TIMES):
        with (progress or SilentProgress()).task("latency", _BLOCKS) as task:
            for _ in range(_BLOCKS):
                for label, sample in measure_latency(sessions, inputs, 0, calls).items():
                    times[label].append(np.asarray(sample.milliseconds))
                task.advance()
        ratio = _ratio(*times.values())
        if ratio.error <= _PRECISE:
            break
    return ratio, {label: LatencySample(tuple(np.concatenate(blocks).tolist())) for label, blocks in times.items()}


def compare_for_longer(
    sessions: Mapping[str, Runtime],
    inputs: Mapping[str, Mapping[str, np.ndarray]],
    repeats: int,
    first: tuple[LatencyRatio, Mapping[str, LatencySample]],
    progress: Progress | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> tuple[LatencyRatio, dict[str, LatencySample]]:
    """Time two models again and again with pauses, where one sitting may not say what is true of the next one.

    A machine keeps the same speed for seconds at a time, and not all networks change with it alike: within a sitting
    the ratio is known to 1 %, from sitting to sitting it was seen to differ by 5 %.

    Args:
        sessions: As for `compare_latency`.
        inputs: Likewise.
        repeats: Likewise.
        first: What one sitting came to.
        progress: Told about each sitting.
        wait: Lets a number of seconds pass.

    Returns:
        The geometric mean of the ratios of all sittings, as sure as they are alike, and label -> all calls.

    Raises:
        As `measure_latency`.
    """
    ratios, calls = [first[0].value], {label: list(sample.milliseconds) for label, sample in first[1].items()}
    with (progress or SilentProgress()).task("latency in several sittings", _SITTINGS - 1) as task:
        for _ in range(_SITTINGS - 1):
            wait(_PAUSE_S)
            ratio, samples = compare_latency(sessions, inputs, 1, repeats)
            ratios.append(ratio.value)
            for label, sample in samples.items():
                calls[label] += sample.milliseconds
            task.advance()
    value = float(np.exp(np.mean(np.log(ratios))))
    return _as_ratio(value, ratios), {label: LatencySample(tuple(all_)) for label, all_ in calls.items()}


def _ratio(blocks: list[np.ndarray], reference: list[np.ndarray]) -> LatencyRatio:
    """Return the ratio of two medians; how sure it is follows from the ratios of the blocks."""
    value = float(np.median(np.concatenate(blocks)) / np.median(np.concatenate(reference)))
    return _as_ratio(value, [float(np.median(a) / np.median(b)) for a, b in zip(blocks, reference, strict=True)])


def _as_ratio(value: float, each: list[float]) -> LatencyRatio:
    """Return a ratio whose parts say how sure it is."""
    from scipy.stats import t  # scipy takes a second to import

    error = float(np.std(each, ddof=1)) / math.sqrt(len(each)) / value
    half = float(t.ppf(0.975, len(each) - 1)) * error * value
    return LatencyRatio(value, value - half, value + half, error)


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3
