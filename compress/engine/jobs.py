"""Jobs of a sweep or search: plain values that this process, another one or another host executes.

    RunJob      one pipeline at one budget and seed, as an ordinary run, or its first stages
    CompareJob  latency of the networks of finished runs, timed in turn

All results are in the run folders and the store, so that a job that was lost with its process is given again. Whoever
executes a job must see the folders under the same paths.
"""

import os
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from compress.config.load import Pipeline, parse_pipeline
from compress.engine.early_stop import find_hopeless, list_stops
from compress.engine.job_log import LOG_FILE
from compress.engine.latency_comparison import compare_runs
from compress.engine.runner import run, run_stages
from compress.engine.timing_lock import Turns
from compress.errors import (
    ArtifactError,
    BudgetUnreachable,
    CompressError,
    ConfigError,
    InternalError,
    OutOfMemory,
    RunLocked,
    RuntimeUnavailable,
    StageError,
    first_line,
    is_out_of_memory,
)
from compress.progress import Progress
from compress.report.build import StageRun
from compress.report.sweep import Sweep
from compress.user_code import as_stage_error

PATIENCE_S = 150.0  # for which a job waits for a run folder that a lost process may still hold
_POLL_S = 1.0
_DONE = ": done in "
T = TypeVar("T")
Kind = Literal["not met", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Reason why a job has no result.

    Attributes:
        kind: "not met" for a budget that cannot be reached, "stopped" for a run that cannot pass its gates any more,
            "failed" for everything else.
        message: Reason in a sentence.
        hint: Remedy, if one is known.
        exit_code: Exit code of the error; 0 if it was stopped.
    """

    kind: Kind
    message: str
    hint: str | None = None
    exit_code: int = StageError.exit_code


@dataclass(frozen=True, slots=True)
class JobResult:
    """Result of a job.

    Attributes:
        failure: Reason for a missing result; None if the job is done.
        host: Name of the host that executed it.
        ran: Stages that were computed, not taken from the store, as in "[2/5] prune".
        values: Result of a comparison.
    """

    failure: Failure | None = None
    host: str = ""
    ran: tuple[str, ...] = ()
    values: dict[str, Any] | None = None

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "JobResult":
        """Return the result whose `asdict` is given."""
        failure = values["failure"]
        ran = tuple(values["ran"])
        return cls(None if failure is None else Failure(**failure), values["host"], ran, values["values"])


@dataclass(frozen=True, slots=True)
class RunJob:
    """One run.

    Attributes:
        name: Name of the run folder.
        text: Resolved pipeline, as YAML.
        path: Path of the pipeline file, which user code is looked up beside.
        runs_dir: Parent folder of all run folders.
        store: URL of a remote store, or None.
        is_judged: True to stop the run as soon as it cannot pass its gates any more.
        stages: Number of stages to run; None for the complete run with its report.
        patience_s: Seconds to wait while another process holds the run folder.
    """

    name: str
    text: str
    path: str
    runs_dir: str
    store: str | None = None
    is_judged: bool = False
    stages: int | None = None
    patience_s: float = PATIENCE_S

    @classmethod
    def of(cls, pipeline: Pipeline, runs_dir: Path, store: str | None = None, *, is_judged: bool = False) -> "RunJob":
        """Return the job of a pipeline."""
        path, folder = str(pipeline.path.absolute()), str(runs_dir.absolute())
        return cls(pipeline.config.name, pipeline.to_yaml(), path, folder, store, is_judged)

    @property
    def log(self) -> Path:
        """Log of the job, where another process executes it."""
        return Path(self.runs_dir) / self.name / LOG_FILE

    def pipeline(self) -> Pipeline:
        """Return the pipeline."""
        return parse_pipeline(self.text, Path(self.path))

    def execute(self, progress: Progress, turns: Turns) -> JobResult:
        """Run the stages that are not cached.

        Args:
            progress: Receives progress by stage.
            turns: Turns of the stages on this machine.

        Raises:
            CompressError: As `run`, except for budgets that cannot be met.
        """
        from compress.storage.remote import open_remote  # imports fsspec

        pipeline, runs_dir = self.pipeline(), Path(self.runs_dir)
        remote = None if self.store is None else open_remote(self.store)
        counted = _Counted(progress)

        def first(count: int) -> list[StageRun]:
            call = lambda: run_stages(pipeline, runs_dir, count, counted, remote, turns)  # noqa: E731
            return self._when_free(call, progress)

        for count in list_stops(pipeline) if self.is_judged else ():
            if self.stages is not None and count > self.stages:
                break
            reason = find_hopeless(pipeline, first(count))
            if reason is not None:
                return self._result(counted, Failure("stopped", f"{reason}.", exit_code=0))
        if self.stages is not None:
            first(self.stages)
        else:
            self._when_free(lambda: run(pipeline, runs_dir, counted, remote, turns), progress)
        return self._result(counted)

    def _result(self, counted: "_Counted", failure: Failure | None = None) -> JobResult:
        return JobResult(failure, platform.node(), tuple(counted.ran))

    def _when_free(self, call: Callable[[], T], progress: Progress) -> T:
        """Return the result of a call; while another process holds the run folder, it is repeated."""
        ends = time.monotonic() + self.patience_s
        while True:
            try:
                return call()
            except RunLocked as error:
                if time.monotonic() >= ends:
                    raise
                progress.note(f"{error.message} It is tried again.")
                time.sleep(_POLL_S)


@dataclass(frozen=True, slots=True)
class CompareJob:
    """Comparison of latencies.

    Attributes:
        name: Name of the sweep, for messages and the log.
        text: Resolved pipeline of one of the runs.
        path: Path of the pipeline file.
        runs_dir: Parent folder of all run folders.
        names: Names of the finished runs.
    """

    name: str
    text: str
    path: str
    runs_dir: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, pipeline: Pipeline, runs_dir: Path, name: str, whole: Sweep) -> "CompareJob":
        """Return the job for the finished runs of a sweep or search.

        Args:
            pipeline: Pipeline of one of the runs.
            runs_dir: Parent folder of all run folders.
            name: Name of the folder of the sweep or search.
            whole: The sweep or search.
        """
        names = tuple(run.run for run in whole.runs if run.report is not None)
        return cls(name, pipeline.to_yaml(), str(pipeline.path.absolute()), str(runs_dir.absolute()), names)

    def pipeline(self) -> Pipeline:
        """Return the pipeline."""
        return parse_pipeline(self.text, Path(self.path))

    @property
    def log(self) -> Path:
        """Log of the job, where another process executes it."""
        return Path(self.runs_dir) / self.name / LOG_FILE

    def execute(self, progress: Progress, turns: Turns) -> JobResult:
        """Time the networks in turn, alone on this machine.

        Raises:
            CompressError: A file is missing or cannot be run.
        """
        pipeline = self.pipeline()
        with turns.hold(True, progress.note):
            values = compare_runs(pipeline, self.names, Path(self.runs_dir), progress)
        return JobResult(None, platform.node(), (), values)


Job = RunJob | CompareJob
_KINDS: dict[str, type[RunJob] | type[CompareJob]] = {"RunJob": RunJob, "CompareJob": CompareJob}


def to_plain(job: Job) -> dict[str, Any]:
    """Return a job as values for JSON."""
    return {"kind": type(job).__name__, **asdict(job)}


def from_plain(values: Mapping[str, Any]) -> Job:
    """Return the job whose `to_plain` is given."""
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    kind = _KINDS[given.pop("kind")]
    return kind(**given)


def execute(job: Job, progress: Progress, turns: Turns, *, catches_all: bool = False) -> JobResult:
    """Execute a job; an error of this program is a result.

    Args:
        job: The job.
        progress: Receives progress.
        turns: Turns of the stages on this machine.
        catches_all: True turns bugs into results as well, with their traceback in the log.
    """
    try:
        return job.execute(progress, turns)
    except BaseException as error:  # a failed run is a row of the table, whatever user code raises
        if isinstance(error, KeyboardInterrupt):
            raise
        ours = _as_ours(error)
        if ours is None:
            if not catches_all:
                raise
            progress.note("".join(traceback.format_exception(error)))
            text = f"Internal error of compress ({type(error).__name__}: {first_line(error)}); see '{job.log}'."
            ours = InternalError(text)
        return JobResult(failure_of(ours), platform.node())


def failure_of(error: CompressError) -> Failure:
    """Return an error as the reason for a missing result."""
    kind: Kind = "not met" if isinstance(error, BudgetUnreachable) else "failed"
    return Failure(kind, error.message, error.hint, error.exit_code)


def error_of(failure: Failure) -> CompressError:
    """Return the reason for a missing result as the error that it was."""
    kinds: dict[int, type[CompressError]] = {
        one.exit_code: one for one in (ConfigError, StageError, ArtifactError, RuntimeUnavailable)
    }
    return kinds.get(failure.exit_code, InternalError)(failure.message, hint=failure.hint)


def enter_folder(folder: str) -> None:
    """Make a folder the current one if it exists: user code is looked up there, too."""
    if os.path.isdir(folder):
        os.chdir(folder)


def _as_ours(error: BaseException) -> CompressError | None:
    if is_out_of_memory(error):
        said = " ".join(str(error).split())[:300].rstrip(".")
        return OutOfMemory(f"What was to be computed did not fit into memory{f': {said}' if said else ''}.")
    if isinstance(error, CompressError):
        return error
    return as_stage_error(error)


class _Counted:
    """A `Progress` that passes everything on, and keeps the labels of stages that were computed."""

    def __init__(self, progress: Progress) -> None:
        self.ran: list[str] = []
        self.warn, self.curve, self.task = progress.warn, progress.curve, progress.task
        self._note = progress.note

    def note(self, text: str) -> None:
        if _DONE in text and text.startswith("["):
            self.ran.append(text.partition(_DONE)[0])
        self._note(text)
