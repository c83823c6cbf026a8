"""How much energy does a call take, where the processor counts it?

Linux shows the counters of Intel's and AMD's processors (RAPL) below /sys/class/powercap in microjoules;
on most systems only root may read them. They count whatever the package does, other processes too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_SHORTEST_S = 0.5  # the counters move once a millisecond or so


@dataclass(frozen=True, slots=True)
class EnergyMeter:
    """The counters of all packages.

    Attributes:
        counters: Their folders; each holds `energy_uj` and `max_energy_range_uj`, at which it begins anew.
    """

    counters: tuple[Path, ...]

    @classmethod
    def find(cls, root: Path = POWERCAP) -> EnergyMeter | None:
        """Return the meter of this machine; None where there is none, or it may not be read."""
        counters = tuple(sorted(root.glob("*-rapl:[0-9]"))) if root.is_dir() else ()
        try:
            for counter in counters:
                int((counter / "energy_uj").read_text())
                int((counter / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            return None
        return cls(counters) if counters else None

    def joules_of(self, call: Callable[[], object], seconds: float = _SHORTEST_S) -> float:
        """Return the joules of one call, from as many as fit into some time."""
        before, started, calls = self._read(), time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - started < seconds:
            call()
            calls += 1
        return self._between(before, self._read()) / calls

    def _read(self) -> list[int]:
        return [int((counter / "energy_uj").read_text()) for counter in self.counters]

    def _between(self, before: list[int], after: list[int]) -> float:
        """Return the joules from one reading to the next; a counter may have begun anew once."""
        microjoules = 0
        for counter, first, last in zip(self.counters, before, after, strict=True):
            again = int((counter / "max_energy_range_uj").read_text()) if last < first else 0
            microjoules += last - first + again
        return microjoules / 1e6
