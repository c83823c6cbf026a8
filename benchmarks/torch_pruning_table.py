"""Timing, tables and picture of the comparison with torch-pruning."""

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from made import source_digest
from torch_pruning_cuts import Setting
from torch_pruning_steps import STARTS, WITHIN, Bench

from compress.data.splits import Split
from compress.report.provenance import describe_environment
from compress.verification.measurement import Conditions, latency_inputs

SITTINGS, ROUNDS, UNTIMED, TIMED = 10, 20, 2, 10
OFF_TARGET = WITHIN - 1
QUIET = 0.5  # runnable processes, this one not counted
AGAIN = "baseline again"


@dataclass(frozen=True)
class Network:
    """One file.

    Attributes:
        path: The ONNX file.
        reference: The file it is compared with.
        macs: Times fewer than the reference.
        top1: Of the file, on the evaluation split.
        before: Likewise, before training; None where it was not measured.
    """

    path: Path
    reference: Path
    macs: float
    top1: float
    before: float | None = None


@dataclass(frozen=True)
class Row:
    """One row of the table: networks that differ in their seed.

    Attributes:
        name: In the table.
        networks: At least one.
        on_target: Whether it was cut for the target.
    """

    name: str
    networks: tuple[Network, ...]
    on_target: bool = True


@dataclass(frozen=True)
class Timing:
    """Measured speed-ups.

    Attributes:
        made: Date.
        source: Digest of the package's source.
        machine: Processor, cores, runtime and conditions.
        load: Average number of runnable processes before the first sitting.
        speedups: File -> times as fast as its reference, for each sitting.
        same_file: The same of the first reference opened twice.
    """

    made: str
    source: str
    machine: str
    load: float
    speedups: dict[str, list[float]]
    same_file: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)

    def of(self, row: Row) -> float:
        """Return the speed-up of a row: the mean over its networks of their medians over the sittings."""
        return statistics.fmean(statistics.median(self.speedups[str(one.path)]) for one in row.networks)


def time_networks(
    networks: Sequence[Network],
    split: Split,
    conditions: Conditions,
    sittings: int = SITTINGS,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time all files in turn, in several sittings.

    In each sitting every file is opened anew, in random order. In each round of a sitting every file is called some
    times back to back, in random order again. The first reference is opened twice: how far its two ratios are from 1
    says how far to trust the others.

    Args:
        networks: The files and their references.
        split: Images for the calls.
        conditions: Where and how files are run.
        sittings: How often files are opened.
        clock: Seconds.
    """
    load = os.getloadavg()[0]
    files = {str(path): path for one in networks for path in (one.path, one.reference)}
    first = str(networks[0].reference)
    files[AGAIN] = networks[0].reference
    speedups: dict[str, list[float]] = {str(one.path): [] for one in networks}
    same_file, generator = [], random.Random(0)
    for _ in range(sittings):
        ms = _sitting(files, split, conditions, generator, clock)
        for one in {str(one.path): one for one in networks}.values():
            speedups[str(one.path)].append(ms[str(one.reference)] / ms[str(one.path)])
        same_file.append(ms[first] / ms[AGAIN])
    machine = describe_environment()
    where = f"ONNX Runtime, {conditions}, {machine['cpu']}, {machine['cores']} cores"
    return Timing(date.today().isoformat(), source_digest(), where, load, speedups, same_file)


def _sitting(
    files: Mapping[str, Path],
    split: Split,
    conditions: Conditions,
    generator: random.Random,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Return the median seconds of a call of each file."""
    names = list(files)
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        calls = {}
        for name in generator.sample(names, len(names)):
            session = stack.enter_context(conditions.open(files[name]))
            calls[name] = session.bind(latency_inputs(session, split, conditions.batch_size))
        for _ in range(ROUNDS):
            for name in generator.sample(names, len(names)):
                for number in range(UNTIMED + TIMED):
                    started = clock()
                    calls[name]()
                    if number >= UNTIMED:
                        times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main_table(rows: Sequence[Row], timing: Timing, budget: float) -> str:
    """Return the table of trained networks, and where it was timed.

    Args:
        rows: Of networks that were timed; others are named below the table.
        timing: Measured speed-ups.
        budget: Share of the baseline's latency.
    """
    known = _timed(rows, timing)
    lines = [
        "| network | MACs | measured | speed-up over MACs | top-1 before training | top-1 | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in known:
        speedup, fewer = timing.of(row), statistics.fmean(one.macs for one in row.networks)
        is_off = row.on_target and abs(speedup * budget - 1) > OFF_TARGET
        before = [one.before for one in row.networks if one.before is not None]
        lines.append(
            f"| {row.name} | {fewer:.2f}× fewer | {speedup:.2f}×{' †' if is_off else ''} | {speedup / fewer:.2f} | "
            f"{_range(before)} | {_range([one.top1 for one in row.networks])} | {len(row.networks)} |"
        )
    same = timing.same_file
    missing = [row.name for row in rows if row not in known]
    quiet = "" if timing.load < QUIET else f", beside other work (load average {timing.load:.1f})"
    lines += [
        "",
        f"Target: {1 / budget:.2f}× ({budget:g} of the baseline's latency). † ended more than {OFF_TARGET:.0%} off. "
        f"Timed on {timing.made}{quiet}: {timing.machine}. The baseline against itself: "
        f"{statistics.median(same):.3f}× (from {min(same):.3f} to {max(same):.3f} over {len(same)} sittings).",
    ]
    return "\n".join(lines + ([f"Not timed yet: {'; '.join(missing)}."] if missing else []))


def cuts_table(bench: Bench, settings: Sequence[Setting]) -> str:
    """Return the table of cuts before training; how many are not measured yet is said below it."""
    heads = "".join(f" {start} |" for start in STARTS.values())
    lines = [
        f"| setting | ratio | MACs | latency when cut |{heads} validation, new statistics |",
        f"|---|---|---|---|{'---|' * len(STARTS)}---|",
    ]
    for setting in settings:
        if not bench.has_before(setting):
            continue
        cut = bench.cut(setting)
        before = [bench.before_training(setting, start) for start in STARTS]
        figures = "".join(f" {100 * top1:.2f} % |" for top1 in before)
        is_off = cut["share"] > bench.budget * WITHIN
        lines.append(
            f"| {setting.name} | {cut['ratio']:g} | {cut['macs']:.2f}× fewer | {cut['share']:.3f}"
            f"{' ‡' if is_off else ''} |{figures} {100 * bench.validation(setting, 'batch_norm'):.2f} % |"
        )
    missing = sum(not bench.has_before(setting) for setting in settings)
    notes = ["", "‡ No ratio tried was within the target; the fastest is shown."]
    if missing:
        notes += ["", f"{missing} of {len(settings)} settings were cut, but not measured before training."]
    return "\n".join(lines + notes)


def draw(rows: Sequence[Row], timing: Timing, path: Path) -> None:
    """Draw top-1 over measured speed-up, one point for each row; bars span the seeds."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for row in _timed(rows, timing):
        top1 = [100 * one.top1 for one in row.networks]
        mean = statistics.fmean(top1)
        reach = [[mean - min(top1)], [max(top1) - mean]]
        axes.errorbar(timing.of(row), mean, reach, marker="o", linestyle="none", capsize=3, label=row.name)
    axes.set_xlabel("speed-up over its baseline, measured")
    axes.set_ylabel("top-1 of the ONNX file (%)")
    axes.grid(alpha=0.3)
    axes.margins(0.1)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _timed(rows: Sequence[Row], timing: Timing) -> list[Row]:
    return [row for row in rows if all(str(one.path) in timing.speedups for one in row.networks)]


def _range(values: Sequence[float]) -> str:
    """Return shares as a percentage; of several the mean, the least and the largest."""
    if not values:
        return "–"
    mean = f"{100 * statistics.fmean(values):.2f} %"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.2f} to {100 * max(values):.2f})"
