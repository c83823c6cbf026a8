"""Latency of a model's calls, and the ratio of two models' latencies.

Models are opened anew in several sittings, in alternating order, and timed in blocks of back-to-back calls
(`verification/call_blocks.py`). The ratio of a sitting is one observation; the interval is taken over the sittings.
The reasons: docs/decisions/020-latency-over-reopened-sittings.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import fmean, median, stdev

import numpy as np

from compress.errors import DataError
from compress.progress import Progress, SilentProgress
from compress.verification.call_blocks import (
    SITTINGS,
    alternate,
    count_sittings,
    count_warmup,
    median_of_blocks,
    plan_blocks,
    time_in_blocks,
)
from compress.verification.runtimes.base import Runtime

FEWEST_CALLS = {"p50": 1, "p90": 10, "p95": 20, "p99": 100}  # fewer calls do not determine the quantile
AGAIN = " (opened again)"  # ends the label of the model that is compared with itself
_CALLS_MS, _CALLS = 40.0, (0.2, 5.0)  # the latter: fewest and most calls for each requested repeat
MORE_TIMES = 3
PRECISE = 0.01
SPREAD, _PAUSE_S = 6, 3.0
_BETWEEN_SITTINGS = 0.05  # largest difference seen between one sitting and the next

Models = Mapping[str, Callable[[], Runtime]]
Feed = Callable[[Runtime], Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Source of time.

    Attributes:
        clock: Function that returns the seconds since an arbitrary start.
        wait: Function that sleeps for a number of seconds.
    """

    clock: Callable[[], float] = time.perf_counter
    wait: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls of each model.

    Attributes:
        warmup: Untimed calls after the first opening; slow models get fewer after later openings.
        repeats: Timed calls, at least 1. Fast models get up to five times as many, slow models in a comparison down to
            a fifth.
    """

    warmup: int
    repeats: int


@dataclass(frozen=True, slots=True)
class LatencySample:
    """The timed calls of one model.

    Attributes:
        milliseconds: Every timed call, in the order they were made.
        sittings: (S,) median of the block medians of each sitting; empty for calls that were not made in blocks.
    """

    milliseconds: tuple[float, ...]
    sittings: tuple[float, ...] = ()

    @property
    def p50(self) -> float:
        """Median over the sittings; without sittings, over the calls."""
        return median(self.sittings or self.milliseconds)

    @property
    def p50_interval(self) -> tuple[float, float]:
        """The interval in which the median lies with 95 % confidence, whatever the distribution of the sittings.

        For six or more sittings it follows from their ranks. Ranks of fewer sittings reach no 95 %, so Student's t on
        the logarithms widens the range. A single sitting gets 5 % to either side.
        """
        values = self.sittings or self.milliseconds
        if len(self.sittings) == 1:
            return values[0] / (1 + _BETWEEN_SITTINGS), values[0] * (1 + _BETWEEN_SITTINGS)
        low, high = _rank_interval(values)
        if not 1 < len(self.sittings) < SITTINGS:
            return low, high
        middle, half = _log_interval(self.sittings)
        return min(low, math.exp(middle - half)), max(high, math.exp(middle + half))

    def to_metrics(self) -> dict[str, float]:
        """Return "p50", "p90", "p95", "p99" -> milliseconds; quantiles with too few calls are left out."""
        slow = {
            name: float(np.quantile(self.milliseconds, int(name[1:]) / 100))
            for name, fewest in FEWEST_CALLS.items()
            if len(self.milliseconds) >= fewest
        }
        return {**slow, "p50": self.p50}


@dataclass(frozen=True, slots=True)
class LatencyRatio:
    """Latency of one model / latency of another.

    Attributes:
        value: Geometric mean of the ratios of the sittings.
        low: Lower end of the 95 % confidence interval of `value`.
        high: Upper end of that interval.
        error: Standard error of the logarithm of `value`, which is nearly its relative error.
        sittings: Observations behind the interval; 1 where opening the models takes too long for more.
        control: Ratio of the second model to a second opening of itself in the same sittings; None if not measured.
    """

    value: float
    low: float
    high: float
    error: float
    sittings: int = SITTINGS
    control: LatencyRatio | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Models timed side by side.

    Attributes:
        samples: Label -> timed calls.
        ratio: First model / second model; None for one model alone.
        runtime: Runtime that a device states; "" elsewhere.
    """

    samples: dict[str, LatencySample]
    ratio: LatencyRatio | None
    runtime: str = ""


def measure_latency(
    sessions: Mapping[str, Runtime],
    inputs: Mapping[str, Mapping[str, np.ndarray]],
    warmup: int,
    repeats: int,
    progress: Progress | None = None,
) -> dict[str, LatencySample]:
    """Time calls of open models in one sitting, in rounds of blocks whose order alternates.

    Args:
        sessions: Label -> open runtime.
        inputs: Label -> inputs of that runtime; checked once, before any call.
        warmup: Untimed calls of each model.
        repeats: Timed calls of each model, at least 1; `call_blocks.plan_blocks` divides them into blocks.
        progress: Receives progress by round.

    Returns:
        Label -> timed calls.

    Raises:
        DataError: There is no model, or no call to make.
        ModelError: Inputs do not fit, or a network fails on them.
    """
    require_calls(len(sessions), repeats)
    calls = {label: session.bind(inputs[label]) for label, session in sessions.items()}
    sizes = plan_blocks(repeats)
    with (progress or SilentProgress()).task("latency", warmup + len(sizes)) as task:
        for _ in range(warmup):
            for call in calls.values():
                call()
            task.advance()
        orders = alternate(list(calls), seed=0)
        blocks = time_in_blocks(calls, sizes, orders, time.perf_counter, task.advance)
    return {label: sample_of([of_model]) for label, of_model in blocks.items()}


def compare_latency(
    models: Models,
    feed: Feed,
    calls: Calls,
    progress: Progress | None = None,
    *,
    has_control: bool = False,
    is_close: Callable[[LatencyRatio], bool] = lambda ratio: False,
    stopwatch: Stopwatch | None = None,
) -> Comparison:
    """Time one model, or two side by side, in sittings for which they are opened anew.

    There are six sittings, and up to three times as many until the ratio is known to 1 %. Fewer are made where opening
    takes long. A machine keeps the same speed for seconds, and its changes do not affect every network alike. So a
    ratio close to its limit is measured in six more sittings with pauses, and the earlier sittings count as one.

    Args:
        models: Label -> function that makes the runtime, not opened yet. The first is compared with the second.
        feed: Function that returns the inputs of an open runtime; called once for each model.
        calls: Untimed and timed calls of each model.
        progress: Receives progress by sitting.
        has_control: True opens the second model once more in each sitting and compares it with itself. The interval of
            the ratio is then at least as wide as the interval of this A/A ratio, and as its distance from 1.
        is_close: Function that returns True for a ratio close to its limit.
        stopwatch: Source of time.

    Raises:
        DataError: There is no model, or no call to make.
        ModelError: Inputs do not fit, or a network fails on them.
        ArtifactError, RuntimeUnavailable: A model cannot be opened.
    """
    require_calls(len(models), calls.repeats)
    labels = tuple(models)[:2]
    if has_control and len(labels) == 2:
        models = {**models, labels[1] + AGAIN: models[labels[1]]}
    run = _Sittings(models, feed, calls, stopwatch or Stopwatch())
    with (progress or SilentProgress()).task("latency", SITTINGS) as task:
        run.make(0.0, task.advance)
    while len(labels) == 2 and run.may_go_on and ratio_of(run.found, labels).error > PRECISE:
        with (progress or SilentProgress()).task("latency, for longer", SITTINGS) as task:
            run.make(0.0, task.advance)
    if len(labels) < 2:
        return Comparison(run.samples(), None)
    ratio = ratio_of(run.found, labels)
    if run.wanted == SITTINGS and is_close(ratio):
        at_once = len(run.found)
        with (progress or SilentProgress()).task("latency, with pauses", SPREAD) as task:
            run.make(_PAUSE_S, task.advance)
        ratio = ratio_of(run.found, labels, at_once)
    return Comparison(run.samples(), ratio)


@dataclass(frozen=True, slots=True)
class ManyLatencies:
    """Several models timed in turn.

    Attributes:
        samples: Label -> timed calls.
        ratios: Label of each model but the last -> its latency / latency of the last model.
        control: Ratio of the last model to a second opening of itself.
    """

    samples: dict[str, LatencySample]
    ratios: dict[str, LatencyRatio]
    control: LatencyRatio | None


def compare_all(
    models: Models,
    feed: Feed,
    calls: Calls,
    progress: Progress | None = None,
    *,
    stopwatch: Stopwatch | None = None,
) -> ManyLatencies:
    """Time any number of models in turn, in sittings for which all are opened anew, and compare each with the last.

    Args:
        models: Label -> function that makes the runtime, not opened yet; at least two. The last is the baseline, which
            is opened twice to be compared with itself as well.
        feed: Function that returns the inputs of an open runtime; called once for each model.
        calls: Untimed and timed calls of each model.
        progress: Receives progress by sitting.
        stopwatch: Source of time.

    Raises:
        As `compare_latency`.
    """
    require_calls(len(models) - 1, calls.repeats)
    *labels, baseline = models
    run = _Sittings({**models, baseline + AGAIN: models[baseline]}, feed, calls, stopwatch or Stopwatch())
    with (progress or SilentProgress()).task("latency of all networks in turn", SITTINGS) as task:
        run.make(0.0, task.advance)
    ratios = {label: ratio_of(run.found, (label, baseline)) for label in labels}
    control = next(iter(ratios.values())).control
    return ManyLatencies(run.samples(), ratios, control)


@dataclass
class _Sittings:
    """Sittings of the same models, one after the other.

    Attributes:
        asked: Requested calls of each model, over all sittings.
        wanted: Sittings to make at a time; known from the first opening on.
        calls: Timed calls of each model in a sitting; known from the first sitting on.
        found: One entry a sitting: label -> (rounds, calls) milliseconds.
    """

    models: Models
    feed: Feed
    asked: Calls
    watch: Stopwatch
    wanted: int = SITTINGS
    calls: int = 0
    found: list[dict[str, list[list[float]]]] = field(default_factory=list)
    inputs: dict[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    openings: Iterator[tuple[str, ...]] = field(init=False)
    rounds: Iterator[tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.openings, self.rounds = (alternate(list(self.models), seed) for seed in (0, 1))

    @property
    def may_go_on(self) -> bool:
        """True where more sittings may be made, for a more precise ratio."""
        return self.wanted == SITTINGS and len(self.found) < MORE_TIMES * SITTINGS

    def make(self, pause_s: float, on_sitting: Callable[[], None]) -> None:
        """Make `wanted` sittings, each after a pause."""
        number = 0
        while number < self.wanted:
            if pause_s:
                self.watch.wait(pause_s)
            self._sit()
            on_sitting()
            number += 1

    def _sit(self) -> None:
        """Open every model, warm it up and time it; the first sitting sets the numbers of calls and sittings."""
        with ExitStack() as stack:
            started = self.watch.clock()
            sessions = {label: stack.enter_context(self.models[label]()) for label in next(self.openings)}
            opening_s = self.watch.clock() - started
            for label, session in sessions.items():
                if label not in self.inputs:
                    self.inputs[label] = self.feed(session)
            calls = {label: session.bind(self.inputs[label]) for label, session in sessions.items()}
            if self.found:
                self._warm_up(calls, count_warmup(self.asked.warmup, self._slowest_ms))
            else:
                self.wanted = count_sittings(opening_s)
                self.calls = self._count_calls(self._warm_up(calls, max(1, self.asked.warmup)))
            self.found.append(time_in_blocks(calls, plan_blocks(self.calls), self.rounds, self.watch.clock))

    def _warm_up(self, calls: Mapping[str, Callable[[], object]], count: int) -> dict[str, float]:
        """Make some calls of each model; return label -> median milliseconds of the last three."""
        times: dict[str, list[float]] = {label: [] for label in calls}
        for label, call in calls.items():
            for _ in range(count):
                started = self.watch.clock()
                call()
                times[label].append((self.watch.clock() - started) * 1e3)
        return {label: median(of_model[-3:]) for label, of_model in times.items()}

    def _count_calls(self, first_ms: Mapping[str, float]) -> int:
        """Return the timed calls of a model in a sitting: more of fast models, fewer of slow ones."""
        together = sum(first_ms[label] for label in list(self.models)[:2])
        fewest, most = _CALLS if len(self.models) > 1 else (1.0, _CALLS[1])
        share = float(np.clip(_CALLS_MS / max(together, 1e-6), fewest, most))
        return max(1, math.ceil(share * self.asked.repeats / self.wanted))

    @property
    def _slowest_ms(self) -> float:
        return max(median_of_blocks(blocks) for blocks in self.found[0].values())

    def samples(self) -> dict[str, LatencySample]:
        """Return label -> all timed calls; the control is left out."""
        return {
            label: sample_of([sitting[label] for sitting in self.found])
            for label in self.models
            if not label.endswith(AGAIN)
        }


def sample_of(sittings: Sequence[list[list[float]]]) -> LatencySample:
    """Return the calls of one model: for each sitting, the milliseconds of its blocks."""
    every = tuple(call for blocks in sittings for block in blocks for call in block)
    return LatencySample(every, tuple(median_of_blocks(blocks) for blocks in sittings))


def ratio_of(
    found: Sequence[Mapping[str, list[list[float]]]], labels: tuple[str, ...], at_once: int = 1
) -> LatencyRatio:
    """Return the ratio of two models over the sittings, of which the first `at_once` count as one observation."""
    first, second = labels
    control = None
    if second + AGAIN in found[0]:
        control = estimate_ratio(*_observe(found, second + AGAIN, second, at_once))
    return estimate_ratio(*_observe(found, first, second, at_once), control)


def _observe(
    found: Sequence[Mapping[str, list[list[float]]]], one: str, other: str, at_once: int
) -> tuple[list[float], list[float]]:
    """Return the ratio of each sitting, and of each round of the first one.

    A sitting's ratio is the median of its rounds' ratios. The two blocks of a round are next to each other in time. A
    change of the machine's speed between them spoils one round only.
    """
    rounds = [[median(a) / median(b) for a, b in zip(sitting[one], sitting[other], strict=True)] for sitting in found]
    ratios = [median(of_sitting) for of_sitting in rounds]
    together = math.exp(fmean(map(math.log, ratios[:at_once])))
    return [together, *ratios[at_once:]], rounds[0]


def estimate_ratio(
    ratios: Sequence[float], rounds: Sequence[float] = (), control: LatencyRatio | None = None
) -> LatencyRatio:
    """Return a ratio with its interval: Student's t on the logarithms of the ratios of the sittings.

    Args:
        ratios: (S,) ratios, one a sitting.
        rounds: (R,) ratios of the rounds of the first sitting, used where it is the only one. They do not predict the
            next sitting, so the interval then reaches at least 5 % to either side.
        control: Ratio of the second model to itself. The interval is made at least as wide as the interval of
            `control`, and as its distance from 1.

    >>> str(estimate_ratio([0.5, 0.51, 0.49, 0.5, 0.505, 0.495]))
    '0.500 (0.493 to 0.507)'
    """
    is_alone = len(ratios) == 1
    middle = math.log(ratios[0]) if is_alone else fmean(map(math.log, ratios))
    spread = rounds if is_alone else ratios
    half = _log_interval(spread)[1] if len(spread) > 1 else 0.0
    error = stdev(map(math.log, spread)) / math.sqrt(len(spread)) if len(spread) > 1 else _BETWEEN_SITTINGS / 2
    if is_alone:
        half, error = max(half, math.log1p(_BETWEEN_SITTINGS)), max(error, _BETWEEN_SITTINGS / 2)
    if control is not None:
        half = max(half, math.log(control.high / control.low) / 2, abs(math.log(control.value)))
    return LatencyRatio(math.exp(middle), math.exp(middle - half), math.exp(middle + half), error, len(ratios), control)


def _log_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of the logarithms of at least two values, and half of the width of its 95 % interval."""
    from scipy.stats import t  # scipy takes a second to import

    logs = [math.log(value) for value in values]
    return fmean(logs), float(t.ppf(0.975, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))


def _rank_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the two values between which the median lies with 95 % confidence; the extremes of few values."""
    from scipy.stats import binom

    count = len(values)
    below = int(binom.ppf(0.025, count, 0.5))
    ordered = sorted(values)
    return ordered[max(0, below - 1)], ordered[min(count - 1, count - below)]


def require_calls(models: int, repeats: int) -> None:
    """Raise DataError where there is no model, or no call to make."""
    if not models or repeats < 1:
        raise DataError(f"Latency must be measured on at least one model and call, got {models} and {repeats}.")
