"""Progress reports of long work to any listener.

Library code takes a `Progress` and opens a task for anything that can take longer than two seconds; `console.py`
draws it on a terminal or prints plain lines; `SilentProgress` ignores it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """Running piece of work whose progress is reported."""

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Report that `amount` more units are done; `fields` are shown beside the bar (`loss="0.31"`)."""


class Progress(Protocol):
    """Listener that work reports its progress to."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """Open a task of `total` units; it is closed when the block ends."""
        ...

    def note(self, text: str) -> None:
        """Report one sentence that stays visible."""

    def warn(self, text: str) -> None:
        """Report one sentence as a warning."""

    def curve(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Report the values of curves by name at a step of the training called `name`."""


class SilentTask:
    """Task that ignores its progress."""

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Do nothing."""


class SilentProgress:
    """A listener that ignores everything."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """Yield a task that ignores everything."""
        yield SilentTask()

    def note(self, text: str) -> None:
        """Do nothing."""

    def warn(self, text: str) -> None:
        """Do nothing."""

    def curve(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""
