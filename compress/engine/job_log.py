"""Log of a run that another process or host executes, in its run folder."""

import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from compress.progress import SilentTask, Task

LOG_FILE = "job.log"


class JobLog:
    """A `Progress` that appends lines to a file; each has the time, the host and the process.

    Args:
        path: The file, created if missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """Yield a task; the time that it took is logged."""
        started = time.monotonic()
        yield SilentTask()
        self.note(f"{label}: {time.monotonic() - started:.1f} s")

    def note(self, text: str) -> None:
        """Log a sentence."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self.path.open("a", encoding="utf-8", errors="replace") as stream:
            stream.write(f"{now} {platform.node()} {os.getpid()} {text}\n")

    def warn(self, text: str) -> None:
        """Log a warning."""
        self.note(f"Warning: {text}")

    def curve(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""
