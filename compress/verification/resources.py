"""Resources of a file besides latency: start, memory, energy, throughput by batch size.

Start and memory are measured in a separate process for each file, without the other file, torch and the images. Energy
comes from the counters of Intel's and AMD's processors (RAPL) below /sys/class/powercap, in microjoules. On most
systems only root may read them. They count the complete package, including other processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from compress.data.splits import Split
from compress.progress import Progress, SilentProgress, Task
from compress.verification.latency import measure_latency
from compress.verification.measurement import Conditions, latency_inputs
from compress.verification.runtimes.base import Runtime
from compress.verification.samples import fixed_batch

Answer = dict[str, float | None]
STARTS = 3
_CALLS, _LONGEST_MS = 7, 3000.0  # for one batch size
_PATIENCE_S = 120
_PACKAGE = Path(__file__).resolve().parents[1]
_START = """
import importlib.util, json, sys
folders, package, request = sys.argv[1:]
sys.path[:] = json.loads(folders)
place = package + "/__init__.py"
spec = importlib.util.spec_from_file_location("compress", place, submodule_search_locations=[package])
sys.modules["compress"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["compress"])
from compress.verification.start_probe import main
sys.exit(main(request))
"""  # the package by its path: found by name, the folder that holds it would be searched for every module


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of each file; a label is "slim" or "baseline".

    Attributes:
        cold_start_ms: Label -> median time until a session is ready in a new process.
        peak_memory_bytes: Label -> largest growth of memory, from before the session until after some calls.
        throughput: One entry a batch size: {"batch_size": n, label: images per second}.
        energy_joules: Label -> energy of one call in all packages of the processor; empty where it cannot be read.
        missing: Measurement that failed ("start", "memory", "energy") -> reason.
    """

    cold_start_ms: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    throughput: list[dict[str, float]] = field(default_factory=list)
    energy_joules: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def best_throughput(self, label: str) -> float | None:
        """Return the highest images per second of any batch size; None where throughput was not measured."""
        return max((entry[label] for entry in self.throughput if label in entry), default=None)


def measure_resources(
    files: Mapping[str, Path],
    split: Split,
    conditions: Conditions,
    batch_sizes: Sequence[int],
    progress: Progress | None = None,
) -> Resources:
    """Measure start, memory, energy and throughput of each file; the files take turns.

    Args:
        files: Label -> .onnx file.
        split: Split of at least one image.
        conditions: Conditions of the measurement; their batch size is used for start, memory and energy.
        batch_sizes: Batch sizes for the throughput; with a fixed batch axis, only the fixed size is measured.
        progress: Receives progress by part.

    Raises:
        ModelError: A network fails on a batch.
        RuntimeUnavailable: The provider is not available.
    """
    found = Resources()
    progress = progress or SilentProgress()
    with progress.task("start and memory", STARTS * len(files)) as task:
        try:
            seen = _starts(files, conditions, task)
        except _Failed as failure:
            seen = {}
            found.missing.update(dict.fromkeys(("start", "memory"), str(failure)))
    found.cold_start_ms.update(_medians(seen, "start_ms", found.missing))
    memory = _medians(seen, "memory_bytes", found.missing)
    found.peak_memory_bytes.update({label: int(value) for label, value in memory.items()})
    with ExitStack() as stack:
        sessions = {label: stack.enter_context(conditions.open(file)) for label, file in files.items()}
        found.throughput.extend(_throughput(sessions, split, batch_sizes, progress))
        found.energy_joules.update(_energy(sessions, split, conditions, found.missing))
    return found


class _Failed(Exception):
    """Failure of a process that measures a file."""


def _starts(files: Mapping[str, Path], conditions: Conditions, task: Task) -> dict[str, list[Answer]]:
    """Return label -> measurements of `STARTS` new processes; the files take turns."""
    seen: dict[str, list[Answer]] = {label: [] for label in files}
    for _ in range(STARTS):
        for label, file in files.items():
            seen[label].append(_probe(file, conditions))
            task.advance()
    return seen


def _probe(path: Path, conditions: Conditions) -> Answer:
    """Measure start and memory of a file in a new process (`start_probe`)."""
    request = json.dumps({"path": str(path.absolute()), "conditions": asdict(conditions)})
    try:
        command = [sys.executable, "-I", "-c", _START, json.dumps(_search_path()), str(_PACKAGE), request]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Failed(f"a new process could not be measured: {error}") from error
    if done.returncode != 0:
        raise _Failed(f"a new process could not open the file: {(done.stderr.strip() or '?').splitlines()[-1]}")
    said: Answer = json.loads(done.stdout.strip().splitlines()[-1])
    return said


def _search_path() -> list[str]:
    """Return the module search path without the current folder, which may hold modules of any name."""
    here = Path.cwd().resolve()
    folders = [folder for folder in sys.path if folder and Path(folder).is_absolute()]
    return [folder for folder in folders if Path(folder).resolve() != here]


def _medians(seen: Mapping[str, Sequence[Answer]], key: str, missing: dict[str, str]) -> dict[str, float]:
    """Return label -> median of one metric; nothing where the system does not report it, with a reason in `missing`."""
    values = {label: [answer[key] for answer in answers] for label, answers in seen.items()}
    if any(value is None for those in values.values() for value in those):
        missing[key.rpartition("_")[0]] = "it cannot be read on this system"
        return {}
    return {label: median(value for value in those if value is not None) for label, those in values.items()}


def _throughput(
    sessions: Mapping[str, Runtime], split: Split, batch_sizes: Sequence[int], progress: Progress
) -> list[dict[str, float]]:
    fixed = {size for one in sessions.values() if (size := fixed_batch(one)) is not None}
    sizes = sorted(fixed) if fixed else sorted(set(batch_sizes))
    entries: list[dict[str, float]] = []
    with progress.task("throughput", len(sizes)) as task:
        for size in sizes:
            fitting = {label: one for label, one in sessions.items() if fixed_batch(one) in (size, None)}
            inputs = {label: latency_inputs(session, split, size) for label, session in fitting.items()}
            if fitting:
                first = measure_latency(fitting, inputs, 1, 1)
                calls = int(np.clip(_LONGEST_MS / sum(sample.p50 for sample in first.values()), 1, _CALLS))
                samples = measure_latency(fitting, inputs, 0, calls)
                speeds = {label: size * 1e3 / sample.p50 for label, sample in samples.items()}
                entries.append({"batch_size": size, **speeds})
            task.advance()
    return entries


def _energy(
    sessions: Mapping[str, Runtime], split: Split, conditions: Conditions, missing: dict[str, str]
) -> dict[str, float]:
    """Return joules of one call of each session, in turn; nothing where no meter can be read."""
    meter = EnergyMeter.find()
    if meter is None:
        missing["energy"] = "no energy counter can be read here"
        return {}
    calls = {label: one.bind(latency_inputs(one, split, conditions.batch_size)) for label, one in sessions.items()}
    taken: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(STARTS):
        for label, call in calls.items():
            taken[label].append(meter.joules_of(call))
    return {label: float(np.median(values)) for label, values in taken.items()}


POWERCAP = Path("/sys/class/powercap")
_SHORTEST_S = 0.5  # the counters move once a millisecond or so


@dataclass(frozen=True, slots=True)
class EnergyMeter:
    """Energy counters of all packages of the processor.

    Attributes:
        counters: Folders of the counters; each holds `energy_uj` and `max_energy_range_uj`, at which it wraps to 0.
    """

    counters: tuple[Path, ...]

    @classmethod
    def find(cls, root: Path = POWERCAP) -> EnergyMeter | None:
        """Return the meter of this machine; None where it has no counters, or they may not be read."""
        counters = tuple(sorted(root.glob("*-rapl:[0-9]"))) if root.is_dir() else ()
        try:
            for counter in counters:
                int((counter / "energy_uj").read_text())
                int((counter / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            return None
        return cls(counters) if counters else None

    def joules_of(self, call: Callable[[], object], seconds: float = _SHORTEST_S) -> float:
        """Return the joules of one call: the mean over the calls that fit into `seconds`, at least one."""
        before, started, calls = self._read(), time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - started < seconds:
            call()
            calls += 1
        return self._between(before, self._read()) / calls

    def _read(self) -> list[int]:
        return [int((counter / "energy_uj").read_text()) for counter in self.counters]

    def _between(self, before: list[int], after: list[int]) -> float:
        """Return the joules from one reading to the next; a counter may have wrapped once."""
        microjoules = 0
        for counter, first, last in zip(self.counters, before, after, strict=True):
            again = int((counter / "max_energy_range_uj").read_text()) if last < first else 0
            microjoules += last - first + again
        return microjoules / 1e6
