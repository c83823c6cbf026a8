"""Start of one file in a new process, which `resources` launches.

The request is JSON with "path" and "conditions". The answer is JSON with "start_ms" and "memory_bytes" (null where the
system does not report it).
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path

import numpy as np

from compress.errors import CompressError
from compress.verification.measurement import Conditions
from compress.verification.runtimes.base import Runtime

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CALLS = 3


def main(request: str) -> int:
    """Answer a request on stdout; return the exit code."""
    values = json.loads(request)
    try:
        answer = probe(Path(values["path"]), Conditions(**values["conditions"]))
    except CompressError as error:
        sys.stderr.write(f"{error.message}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def probe(path: Path, conditions: Conditions) -> dict[str, float | None]:
    """Open a file, call it some times on zeros, and return time and memory.

    Returns:
        "start_ms": time until the session was ready. "memory_bytes": growth from before the session to the peak.

    Raises:
        As `Conditions.open`, and ModelError when the network fails.
    """
    with contextlib.suppress(OSError):  # the most there ever was is then no more than there is now
        _FORGET.write_text("5")
    before = _memory("VmRSS")
    with conditions.open(path) as session:
        inputs = _zeros(session, conditions.batch_size)
        for _ in range(_CALLS):
            session.run(inputs)
        most, started = _memory("VmHWM"), session.start_ms
    return {"start_ms": started, "memory_bytes": None if before is None or most is None else float(most - before)}


def _zeros(session: Runtime, batch_size: int) -> dict[str, np.ndarray]:
    """Return inputs of zeros for every input; open axes other than the first are taken as 1."""
    arrays = {}
    for spec in session.signature.inputs:
        first, *others = spec.shape
        shape = (first if isinstance(first, int) else batch_size, *(n if isinstance(n, int) else 1 for n in others))
        arrays[spec.name] = np.zeros(shape, spec.dtype)
    return arrays


def _memory(name: str) -> int | None:
    """Return a memory metric of this process in bytes, as Linux reports it; None on other systems."""
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
