"""Executors of jobs: this process, or several processes beside each other. `ray_cluster.py` has one for Ray."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

from typing_extensions import Self

from compress.catalog import require_packages
from compress.engine.jobs import Failure, Job, JobResult, RunJob, execute, to_plain
from compress.engine.resources import Resources
from compress.engine.timing_lock import TimingLock
from compress.errors import ArtifactError, InternalError, StageError
from compress.progress import Progress, SilentTask, Task

J = TypeVar("J", bound=Job)
_PROCESS = "compress.engine.job_process"


def open_executor(resources: Resources, runs_dir: Path, progress: Progress) -> "Executor":
    """Return the executor for some resources, to be entered by `with`.

    Args:
        resources: Processes and hosts.
        runs_dir: Parent folder of all run folders, which all hosts must see.
        progress: Receives progress by stage of jobs in this process, and notes on the cluster.

    Raises:
        PackageMissing: Ray is asked for and not installed.
    """
    if resources.ray is not None:
        require_packages(["ray"], "--ray (the extra 'ray' of this project)")
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # keeps Ray's states of lost nodes out of our output
        from compress.engine.ray_cluster import RayCluster  # imports ray

        return RayCluster(resources, runs_dir, progress)
    return InProcess(progress) if resources.jobs in (None, 1) else Processes(resources.jobs or 1)


@contextmanager
def counted(progress: Progress, executor: "Executor", total: int) -> Iterator[Task]:
    """Yield a task that counts jobs, where several are executed at a time; those in this process show their own."""
    if executor.capacity == 1:
        yield SilentTask()
    else:
        with progress.task("runs", total) as task:
            yield task


class Executor(Protocol):
    """Context manager that executes jobs.

    Attributes:
        capacity: Number of jobs that are executed at the same time.
        words: Phrase for messages, such as "one after the other".
    """

    capacity: int
    words: str

    def submit(self, job: Job) -> "Future[JobResult]":
        """Begin a job, and return its future result; errors of the job are results."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def run_all(executor: Executor, jobs: Iterator[J]) -> Iterator[tuple[J, JobResult]]:
    """Execute jobs, as many at a time as the executor can, and yield each with its result as soon as it is done.

    Args:
        executor: The executor.
        jobs: Jobs; the next one is taken when there is room for it.
    """
    running: dict[Future[JobResult], J] = {}
    while True:
        while len(running) < executor.capacity and (job := next(jobs, None)) is not None:
            running[executor.submit(job)] = job
        if not running:
            return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield running.pop(future), future.result()


class InProcess:
    """Executor that runs jobs in this process, one after the other.

    Args:
        progress: Receives progress by stage.
    """

    capacity = 1
    words = "one after the other"

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def submit(self, job: Job) -> "Future[JobResult]":
        """Execute a job."""
        future: Future[JobResult] = Future()
        given = replace(job, patience_s=0.0) if isinstance(job, RunJob) else job
        future.set_result(execute(given, self._progress, TimingLock()))
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Processes:
    """Executor that runs each job in a process of its own, several beside each other on this machine.

    A process that dies, of a lack of memory for example, is a failed job. All processes end with this one.

    Args:
        count: Number of processes at a time.
    """

    def __init__(self, count: int) -> None:
        self.capacity = count
        self.words = f"{count} at a time"
        self._pool = ThreadPoolExecutor(count)
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    def submit(self, job: Job) -> "Future[JobResult]":
        """Begin a job."""
        return self._pool.submit(self._execute, job)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_closed = True
            for process in self._running:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def _execute(self, job: Job) -> JobResult:
        try:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("a", encoding="utf-8") as log:
                output, code = self._communicate(json.dumps(to_plain(job)), log.fileno())
        except OSError as error:
            text = f"The process of '{job.name}' could not be started: {error.strerror or error}."
            return JobResult(Failure("failed", text, None, ArtifactError.exit_code))
        if code == 0:
            return JobResult.from_plain(json.loads(output))
        return JobResult(_failure_of_process(job, code))

    def _communicate(self, text: str, log: int) -> tuple[str, int]:
        """Start a process, send it the job and return its output and exit code."""
        with self._lock:
            if self._is_closed:
                raise OSError("the sweep was ended")
            process = subprocess.Popen(
                [sys.executable, "-m", _PROCESS],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=_environment(self.capacity),
            )
            self._running.add(process)
        try:
            if process.stdin is None or process.stdout is None:
                raise InternalError("A process was started without pipes.")
            try:
                process.stdin.write(f"{text}\n")
                process.stdin.flush()  # the pipe stays open: the process ends when it is closed
                output = process.stdout.read()
            except BrokenPipeError:
                output = ""
            code = process.wait()
            process.stdout.close()
            with suppress(BrokenPipeError):
                process.stdin.close()
            return output, code
        finally:
            with self._lock:
                self._running.discard(process)


def _environment(count: int) -> dict[str, str]:
    """Return the environment of a process: its share of the cores, unless the user has set the threads."""
    share = max(1, (os.cpu_count() or 1) // count)
    return {"OMP_NUM_THREADS": str(share), **os.environ}


def _failure_of_process(job: Job, code: int) -> Failure:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        text = f"Its process was ended by signal {name}"
        lacks_memory = name == "SIGKILL"
        hint = "The system does so when memory is short: run fewer jobs at a time." if lacks_memory else None
        return Failure("failed", f"{text}.", hint, StageError.exit_code)
    text = f"Its process ended with exit code {code}; see '{job.log}'."
    return Failure("failed", text, None, InternalError.exit_code)
