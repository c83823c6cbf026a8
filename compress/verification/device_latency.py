"""Latency on a device whose command times one file at a time: models in turn, in sittings.

One sitting runs the command once for each model, in alternating order. Its ratio is one observation, as a sitting with
opened sessions is in `verification/latency.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compress.progress import Progress, SilentProgress
from compress.verification.call_blocks import SITTINGS, alternate
from compress.verification.device_command import DeviceTimes
from compress.verification.latency import (
    AGAIN,
    MORE_TIMES,
    PRECISE,
    SPREAD,
    Comparison,
    LatencyRatio,
    LatencySample,
    Stopwatch,
    ratio_of,
    require_calls,
    sample_of,
)

FEWEST = 3  # sittings, where one takes minutes
_SITTINGS_S = 600.0  # to be spent on the usual sittings

Timer = Callable[[Path], DeviceTimes]


def compare_on_device(
    files: Mapping[str, Path],
    timer: Timer,
    progress: Progress | None = None,
    *,
    has_control: bool = False,
    is_close: Callable[[LatencyRatio], bool] = lambda ratio: False,
    stopwatch: Stopwatch | None = None,
) -> Comparison:
    """Time one file, or two in turn, by a command.

    There are six sittings, and up to three times as many until the ratio is known to 1 %; at least three where a
    sitting takes minutes. A ratio close to its limit gets six more.

    Args:
        files: Label -> .onnx file. The first is compared with the second.
        timer: Function that times one file on the device.
        progress: Receives progress by sitting.
        has_control: True times the second file twice in each sitting and compares it with itself, as in
            `latency.compare_latency`.
        is_close: Function that returns True for a ratio close to its limit.
        stopwatch: Source of time.

    Raises:
        DataError: There is no file.
        DeviceFailed: The command fails.
    """
    require_calls(len(files), 1)
    labels = tuple(files)[:2]
    if has_control and len(labels) == 2:
        files = {**files, labels[1] + AGAIN: files[labels[1]]}
    run, listener = _Sittings(files, timer, stopwatch or Stopwatch()), progress or SilentProgress()
    run.make("latency on the device", listener)
    if len(labels) < 2:
        return Comparison(run.samples(), None, run.runtime)
    while run.may_go_on and ratio_of(run.found, labels).error > PRECISE:
        run.make("latency on the device, for longer", listener)
    ratio = ratio_of(run.found, labels)
    if run.wanted == SITTINGS and is_close(ratio):
        at_once = len(run.found)
        run.make("latency on the device, close to a limit", listener, SPREAD)
        ratio = ratio_of(run.found, labels, at_once)
    return Comparison(run.samples(), ratio, run.runtime)


@dataclass
class _Sittings:
    """Sittings of the same files, one after the other.

    Attributes:
        wanted: Sittings to make at a time; known from the first one on.
        found: One entry a sitting: label -> one block of milliseconds.
    """

    files: Mapping[str, Path]
    timer: Timer
    watch: Stopwatch
    wanted: int = SITTINGS
    runtime: str = ""
    found: list[dict[str, list[list[float]]]] = field(default_factory=list)
    orders: Iterator[tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.orders = alternate(list(self.files), seed=0)

    @property
    def may_go_on(self) -> bool:
        """True where more sittings may be made, for a more precise ratio."""
        return self.wanted == SITTINGS and len(self.found) < MORE_TIMES * SITTINGS

    def make(self, label: str, progress: Progress, count: int | None = None) -> None:
        """Make `count` sittings, by default `wanted` ones."""
        with progress.task(label, SITTINGS) as task:
            number = 0
            while number < (count or self.wanted):
                started = self.watch.clock()
                self.found.append({name: self._block(name) for name in next(self.orders)})
                if len(self.found) == 1:
                    self.wanted = _count_sittings(self.watch.clock() - started)
                number += 1
                task.advance()

    def _block(self, label: str) -> list[list[float]]:
        times = self.timer(self.files[label])
        self.runtime = times.runtime or self.runtime
        return [list(times.milliseconds)]

    def samples(self) -> dict[str, LatencySample]:
        """Return label -> all timed calls; the control is left out."""
        return {
            label: sample_of([sitting[label] for sitting in self.found])
            for label in self.files
            if not label.endswith(AGAIN)
        }


def _count_sittings(seconds: float) -> int:
    """Return the number of sittings, given the seconds of the first.

    >>> _count_sittings(1.0), _count_sittings(150.0), _count_sittings(900.0)
    (6, 4, 3)
    """
    return max(FEWEST, min(SITTINGS, int(_SITTINGS_S / max(seconds, 1e-9))))
