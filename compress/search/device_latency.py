"""Latency table of a device that times complete files only: planned variants, then those that the table is unsure of.

    baseline, four variants, baseline, four variants, ...     each variant is stored as soon as it is timed
    -> fit -> the networks with the largest standard errors are timed next -> fit -> ...

The baseline is timed before and after every four variants, and three times at the start. The speed of the device is the
median of its last measurements. Where one differs from that by more than noise, the device has changed its speed: the
four variants before it are timed once more, and the speed is interpolated between both ends.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from compress.cost.conditions import TableConditions
from compress.cost.fitted_table import FittedTable, fit_table
from compress.cost.latency_table import BEFORE, Sample, spread_of
from compress.cost.table_file import TableFile, network_digest
from compress.cost.variants import Site, Sizes
from compress.errors import InternalError
from compress.progress import Progress
from compress.pruning.width_costs import LayerAxes
from compress.verification.device_command import DeviceTimes

FIRST, BETWEEN = 3, 4  # measurements of the baseline at the start, variants between two of the later ones
WINDOW = 5  # measurements of the baseline that its present latency is the median of
MOVED = 0.05  # difference of the baseline's latency that is more than noise
MORE = 8  # variants timed after each fit
PRECISE = 0.015  # median error at which no more variants are timed
_NOISES = 1.5  # an error of this many standard deviations of one measurement cannot be lowered by much
_CANDIDATES = 200
_JITTER = 0.25

Widths = Mapping[str, int]


@dataclass
class DeviceTiming:
    """Timing of one network's variants on a device.

    Attributes:
        sites: Sites of the network.
        axes: Sizes of its layers by the widths of its channel groups.
        levels: Channel group -> its allowed widths.
        reference: File of the baseline.
        write_variants: Function that writes variants of given sizes into a folder, one by one.
        time_file: Function that times a file on the device.
        folder: Folder for temporary files.
        progress: Receives progress by variant, notes and warnings.
    """

    sites: Sequence[Site]
    axes: LayerAxes
    levels: Mapping[str, Sequence[int]]
    reference: Path
    write_variants: Callable[[Sequence[Sizes], Path], Iterator[Path]]
    time_file: Callable[[Path], DeviceTimes]
    folder: Path
    progress: Progress
    _kept: "_Kept | None" = field(default=None, init=False)
    _baseline_ms: list[float] = field(default_factory=list, init=False)  # since the device last changed its speed

    def complete(
        self, known: TableFile | None, planned: Sequence[Widths], here: TableConditions, path: Path, most: int
    ) -> TableFile:
        """Return the table with every planned variant, and more until the fit is precise or has `most` variants.

        Args:
            known: Variants that were timed before; None for none.
            planned: Widths of the variants to begin with.
            here: Conditions of the device.
            path: File of the table; it is written after each variant.
            most: Largest number of variants.

        Raises:
            DeviceFailed: The command fails; the variants timed so far are in the file.
        """
        self._baseline_ms = []
        self._kept = kept = _Kept(here, network_digest(self.sites), path, known)
        self._time_missing(list(map(self.axes.sizes, planned[:most])), "time variants of the network on the device")
        while len(kept.samples) < most:
            table = fit_table(self.sites, kept.samples)
            candidates = self._candidates(len(kept.samples))
            unsure = float(np.median(table.errors(candidates))) if candidates else 0.0
            if not candidates or max(table.error, unsure) <= max(PRECISE, _NOISES * table.noise):
                break
            self.progress.note(
                f"{len(kept.samples)} variants timed: the latency table is {table.error:.1%} off for a variant that it "
                f"does not hold (median), and unsure by {unsure:.1%}; {MORE} more are timed"
            )
            wanted = table.least_known(candidates, min(MORE, most - len(kept.samples)))
            self._time_missing([candidates[place] for place in wanted], "time more variants on the device")
        return kept.file()

    def _candidates(self, seed: int) -> list[Sizes]:
        """Return sizes of networks that are not timed yet: from narrow to wide, each group off by chance."""
        random, have = np.random.default_rng(seed), [sample.sizes for sample in self._known.samples]
        found: list[Sizes] = []
        for scale in random.uniform(0, 1, _CANDIDATES):
            places = np.clip(scale + random.normal(0, _JITTER, len(self.levels)), 0, 1)
            widths = {
                name: levels[round(place * (len(levels) - 1))]
                for (name, levels), place in zip(sorted(self.levels.items()), places, strict=True)
            }
            sizes = self.axes.sizes(widths)
            if sizes not in have and sizes not in found:
                found.append(sizes)
        return found

    def _time_missing(self, wanted: Sequence[Sizes], label: str) -> None:
        """Time the variants that the table lacks, each once."""
        have = [sample.sizes for sample in self._known.samples]
        missing = [sizes for number, sizes in enumerate(wanted) if sizes not in [*have, *wanted[:number]]]
        with self.progress.task(label, len(missing)) as task:
            for start in range(0, len(missing), BETWEEN):
                chunk = missing[start : start + BETWEEN]
                if self._time_between(chunk):
                    self.progress.note("the baseline's latency has changed: the last variants are timed again")
                    self._time_between(chunk)
                task.advance(len(chunk))

    def _time_between(self, chunk: Sequence[Sizes]) -> bool:
        """Time variants between two measurements of the baseline; return whether the device has changed its speed."""
        if not self._baseline_ms:
            self._baseline_ms = [self._time_baseline() for _ in range(FIRST)]
        before = median(self._baseline_ms[-WINDOW:])
        kept, times = self._known, []
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            for sizes, path in zip(chunk, self.write_variants(chunk, Path(folder)), strict=True):
                times.append(self.time_file(path))
                kept.put(sizes, times[-1], before)
        last = self._time_baseline()
        has_moved = max(before, last) > (1 + MOVED) * min(before, last)
        self._baseline_ms = [last] if has_moved else [*self._baseline_ms, last]
        after = median(self._baseline_ms[-WINDOW:])
        for number, (sizes, found) in enumerate(zip(chunk, times, strict=True), start=1):
            kept.put(sizes, found, before + (after - before) * number / (len(chunk) + 1))
        return has_moved

    def _time_baseline(self) -> float:
        found = self.time_file(self.reference)
        self._known.check_runtime(found, self.progress)
        return found.p50

    @property
    def _known(self) -> "_Kept":
        if self._kept is None:
            raise InternalError("Variants were to be timed before the table was opened.")
        return self._kept


class _Kept:
    """Variants of a table file, which is written after each change.

    Attributes:
        samples: Timed variants.
    """

    def __init__(self, here: TableConditions, network: str, path: Path, known: TableFile | None) -> None:
        self.samples: list[Sample] = [] if known is None else list(known.samples)
        self._here, self._network, self._path = here, network, path
        self._reference_ms = None if known is None else known.reference_ms
        self._runtime = "" if known is None else known.runtime

    def check_runtime(self, baseline: DeviceTimes, progress: Progress) -> None:
        """Drop the variants of another runtime than the baseline has just been timed in."""
        if self._runtime and baseline.runtime and baseline.runtime != self._runtime:
            progress.warn(
                f"The device states runtime '{baseline.runtime}', the latency table was made with '{self._runtime}': "
                f"{len(self.samples)} variants are timed again."
            )
            self.samples, self._reference_ms = [], None
        self._runtime = baseline.runtime or self._runtime

    def put(self, sizes: Sizes, times: DeviceTimes, baseline_ms: float) -> None:
        """Store a variant; its time is divided by the slowness of the device, as the baseline shows it."""
        self._reference_ms = self._reference_ms or baseline_ms
        calls = np.asarray(times.milliseconds)
        total = times.p50 * self._reference_ms / baseline_ms
        self.samples = [sample for sample in self.samples if sample.sizes != sizes]
        self.samples.append(Sample(sizes, {}, {BEFORE: spread_of(calls)}, total))
        self.file().write(self._path)

    def file(self) -> TableFile:
        """Return the table file."""
        if self._reference_ms is None:
            raise InternalError("A latency table was completed without a measurement of the baseline.")
        return TableFile(self._here, self._network, self._reference_ms, tuple(self.samples), self._runtime)


def describe_fit(table: FittedTable) -> str:
    """Return a sentence on the table, for the console."""
    return (
        f"latency table: {len(table.samples)} complete variants timed, {len(table.entry_errors_ms)} entries fitted, "
        f"each known to {table.entry_error:.1%} of the network's latency (median); a variant is predicted without its "
        f"own time within {table.error:.1%} (median)"
    )
