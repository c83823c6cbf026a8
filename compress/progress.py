"""Progress reporting of long work to an unknown listener.

Library code takes a `Progress` and opens a task for anything that can take longer than two seconds; `console.py`
draws it on a terminal or prints plain lines; `SilentProgress` ignores it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Say that `amount` more units are done; `fields` are shown beside the bar (`loss="0.31"`)."""


class Progress(Protocol):
    """Listener that work reports its progress to."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """Open a task of `total` units; it is closed when the block ends."""
        ...

    def note(self, text: str) -> None:
        """Say one sentence that stays visible."""

    def warn(self, text: str) -> None:
        """Say one sentence that the user must not miss."""

    def curve(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Give the values that curves, by name, have at a step of a training; `name` says of which."""


class SilentTask:
    """A task that nobody watches."""

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
