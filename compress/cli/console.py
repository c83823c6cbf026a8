"""Terminal output: plan, progress, verdict. The only module that prints.

On a terminal: bars, tables and colours by rich. Anywhere else: plain lines, one about every five seconds for each
task, so that a log file stays short and shows that the work is alive. Results go to stdout, warnings and errors to
stderr.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

from compress.cli.text import (
    LIMIT_COLUMNS,
    VALUE_COLUMNS,
    check_lines,
    limit_rows,
    next_steps,
    value_rows,
    verdict_sentence,
)

if TYPE_CHECKING:  # rich is imported for terminals only, the artifacts not at all: both cost start-up time
    from rich.console import Console as RichConsole
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from compress.errors import CompressError
    from compress.model.artifacts import Verdict
    from compress.progress import Task

LINE_INTERVAL_S = 5.0


class Console:
    """Prints; also the `Progress` that stages report to.

    Args:
        quiet: Say nothing but warnings, errors, verdicts and what was asked for.
        stdout: For results; `sys.stdout` by default.
        stderr: For warnings and errors; `sys.stderr` by default.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        quiet: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet = quiet
        self._stdout, self._stderr = stdout, stderr
        self._clock = clock
        self._bars: _Bars | None = None

    # -- progress ------------------------------------------------------------------------------------------------

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """Show a piece of work of `total` units while the block runs, and the time it took after it.

        Tasks may be opened inside tasks.
        """
        if self.quiet:
            yield _QuietTask()
        elif self._out.isatty():
            with self._drawn(label, total) as task:
                yield task
        else:
            with self._logged(label, total) as task:
                yield task

    def note(self, text: str) -> None:
        """Say one sentence, unless quiet."""
        if not self.quiet:
            self._write(self._out, text)

    def warn(self, text: str) -> None:
        """Say one sentence on stderr, also when quiet."""
        self._write(self._err, f"Warning: {text}", "yellow")

    def curve(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Do nothing: what a curve shows is beside the bar."""

    # -- results -------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print what the user asked for, also when quiet."""
        self._write(self._out, text)

    def print_error(self, error: CompressError) -> None:
        """Print message and hint on stderr."""
        for line in str(error).splitlines():
            self._write(self._err, line, "" if line.startswith("Hint: ") else "bold red")

    def print_failure(self, text: str) -> None:
        """Print one paragraph on stderr: the work ended for a reason that is no CompressError."""
        self._write(self._err, text, "bold red")

    def print_plan(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Print what would run: stage, "unchanged" or "run", reasons."""
        self.print_table("Plan", ("stage", "status", "why"), rows)

    def print_verdict(self, verdict: Verdict) -> None:
        """Print the checks, both networks' values, and one sentence, within 80 columns; also when quiet."""
        if rows := limit_rows(verdict):
            self.print_table("Checks", LIMIT_COLUMNS, rows)
        for line in check_lines(verdict):
            self._write(self._out, line)
        if values := value_rows(verdict):
            self.print_table("Before and after", VALUE_COLUMNS, values)
        for step in next_steps(verdict):
            self._write(self._out, f"Next step for {step}")
        self._write(self._out, verdict_sentence(verdict), _OUTCOME_STYLES[verdict.outcome])

    def print_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table; cells are shown by `str`."""
        cells = [[str(cell) for cell in row] for row in rows]
        if self._out.isatty():
            self._draw_table(title, columns, cells)
        else:
            for line in _plain_table(title, columns, cells):
                self._write(self._out, line)

    # -- how -----------------------------------------------------------------------------------------------------

    @property
    def _out(self) -> TextIO:
        return self._stdout or sys.stdout

    @property
    def _err(self) -> TextIO:
        return self._stderr or sys.stderr

    def _rich(self, stream: TextIO) -> RichConsole:
        from rich.console import Console as RichConsole

        if self._bars is not None:  # bars are redrawn below what is printed through their own console
            return self._bars.progress.console
        return RichConsole(file=stream, highlight=False)

    def _write(self, stream: TextIO, text: str, style: str = "") -> None:
        if stream.isatty():
            self._rich(stream).print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=stream, flush=True)

    def _draw_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
            table.add_column(column, justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        self._rich(self._out).print(table)

    @contextmanager
    def _drawn(self, label: str, total: int) -> Iterator[Task]:
        outermost = self._bars is None
        if self._bars is None:
            self._bars = _Bars(self._rich(self._out))
            self._bars.progress.start()
        bars = self._bars
        task = _DrawnTask(bars.progress, label, total)
        started = self._clock()
        outcome = "stopped"
        try:
            yield task
            outcome = "done"
        finally:
            bars.progress.remove_task(task.identity)
            bars.progress.console.print(f"{label}: {outcome} in {_duration(self._clock() - started)}", markup=False)
            if outermost:
                bars.progress.stop()
                self._bars = None

    @contextmanager
    def _logged(self, label: str, total: int) -> Iterator[Task]:
        started = self._clock()
        outcome = "stopped"
        try:
            yield _LoggedTask(self, label, total)
            outcome = "done"
        finally:
            self.note(f"{label}: {outcome} in {_duration(self._clock() - started)}")


class _QuietTask:
    def advance(self, amount: int = 1, **fields: str) -> None:
        """Say nothing."""


class _LoggedTask:
    """Writes a line now and then."""

    def __init__(self, console: Console, label: str, total: int) -> None:
        self._console, self._label, self._total = console, label, total
        self._done = 0
        self._first: tuple[int, float] | None = None  # what was done, and when, after the first step
        self._spoke = console._clock()

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Count, and write a line when the last one is old."""
        self._done += amount
        now = self._console._clock()
        if self._first is None:
            self._first = self._done, now
        if now - self._spoke >= LINE_INTERVAL_S and self._done < self._total:
            self._spoke = now
            extra = "".join(f", {name} {value}" for name, value in fields.items())
            share = 100 * self._done // max(self._total, 1)
            self._console.note(f"{self._label}: {self._done}/{self._total} ({share} %){extra}{self._left(now)}")

    def _left(self, now: float) -> str:
        """Return the estimated time left, in words, by the speed since the first step; nothing before that."""
        if self._first is None or self._done == self._first[0]:
            return ""
        done, since = self._first
        seconds = (now - since) / (self._done - done) * (self._total - self._done)
        return f", {timedelta(seconds=round(seconds))} left"


class _Bars:
    """The bars of all tasks under way."""

    def __init__(self, console: RichConsole) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress: RichProgress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[extra]}", markup=False),
            console=console,
            transient=True,
        )


class _DrawnTask:
    """Moves one bar."""

    def __init__(self, progress: RichProgress, label: str, total: int) -> None:
        self._progress = progress
        self.identity: TaskID = progress.add_task(label, total=total, extra="")

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Move the bar; fields stay until they are replaced."""
        update: dict[str, Any] = {"advance": amount}
        if fields:
            update["extra"] = "  ".join(f"{name} {value}" for name, value in fields.items())
        self._progress.update(self.identity, **update)


_OUTCOME_STYLES = {"passed": "bold green", "failed": "bold red", "inconclusive": "bold yellow"}
_STYLES = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "bold yellow",
    "skipped": "yellow",
    "run": "yellow",
    "unchanged": "green",
}


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table with two spaces between columns."""
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    right = [bool(rows) and all(_is_number(row[index]) for row in rows) for index in range(len(columns))]
    yield f"{title}:"
    for row in [columns, *rows]:
        cells = (
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        yield f"  {'  '.join(cells)}".rstrip()


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"|-|[-+]?[0-9.,]+(e[-+]?[0-9]+)?", cell) is not None


def _duration(seconds: float) -> str:
    """Return a time as people say it.

    >>> _duration(3.21), _duration(75), _duration(3700)
    ('3.2 s', '1 min 15 s', '1 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
