"""Sweep: one pipeline at several budgets and seeds, results side by side.

    runs/NAME-sweep/        sweep.json  sweep.html  .holder
    runs/NAME-0.5/          an ordinary run folder for each budget
    runs/NAME-0.5-seed1/    the same with several seeds

Every run is an ordinary one. Results that runs share (the loaded network, latency tables) are made once, and a killed
sweep resumes. A run that fails, or whose budget cannot be met, is a row with that reason. At the end, the latencies of
all networks are measured in turn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from compress.config.load import Pipeline, load_pipeline
from compress.engine.executors import Executor, InProcess, counted, run_all
from compress.engine.jobs import CompareJob, Failure, JobResult, RunJob
from compress.engine.latency_comparison import comparison_key
from compress.engine.runner import STORE
from compress.errors import (
    OUTCOME_EXIT_CODES,
    VERDICT_FAILED_EXIT_CODE,
    VERDICT_INCONCLUSIVE_EXIT_CODE,
    ArtifactError,
    BudgetUnreachable,
    ConfigError,
    ConfigValueError,
    InternalError,
    RuntimeUnavailable,
)
from compress.progress import Progress, SilentProgress
from compress.report.model import Report, read_report
from compress.report.sweep import LatencyComparison, Sweep, SweepRun, read_comparison, write_sweep
from compress.storage.digest import read_record
from compress.storage.lock import open_locks

_FIRST = (
    InternalError.exit_code,
    RuntimeUnavailable.exit_code,
    ArtifactError.exit_code,
    ConfigError.exit_code,
    BudgetUnreachable.exit_code,
    VERDICT_FAILED_EXIT_CODE,
    VERDICT_INCONCLUSIVE_EXIT_CODE,
)


@dataclass(frozen=True, slots=True)
class SweepOutcome:
    """Outcome of a sweep.

    Attributes:
        folder: Folder of `sweep.json` and `sweep.html`.
        sweep: Results, the content of `sweep.json`.
        exit_code: That of a failed run (70, 5, 4, 2 before 3), 3 if a budget could not be met, else 1 if a verdict
            failed, else 6 if a verdict was inconclusive, else 0.
        ran: Labels of the stages that were computed, for each run.
    """

    folder: Path
    sweep: Sweep
    exit_code: int
    ran: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Grid:
    """Budgets and seeds of a sweep.

    Attributes:
        budgets: Values for the first target of the first stage that has a target.
        seeds: Seeds; () for the seed of the pipeline file.
    """

    budgets: Sequence[float]
    seeds: Sequence[int] = ()


def sweep(
    path: Path,
    grid: Grid,
    runs_dir: Path,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    progress: Progress | None = None,
    store: str | None = None,
    executor: Executor | None = None,
) -> SweepOutcome:
    """Run a pipeline at each budget with each seed, the largest budget first.

    Args:
        path: The pipeline file.
        grid: Budgets and seeds.
        runs_dir: Parent folder of all run folders.
        overrides: Settings in the form of `--set`, such as "stages.prune.target.macs=0.5".
        seed: Seed that replaces the file's seed; None to keep it, or if the grid has seeds.
        progress: Receives progress by run.
        store: URL of a store of other hosts, as in `run`.
        executor: Executor of the runs, entered already; by default they run in this process, one after the other.

    Raises:
        ConfigError: The pipeline is invalid at one of the budgets; nothing has run then.
        RunLocked: Another process sweeps this pipeline into this folder.
    """
    progress = progress or SilentProgress()
    executor = executor or InProcess(progress)
    name = load_pipeline(path, overrides, seed).config.name
    planned = list(_plan(path, grid, overrides, seed))
    folder = runs_dir / f"{name}-sweep"
    quantity = planned[0].quantity
    jobs = {one.job(runs_dir, store): place for place, one in enumerate(planned)}
    runs = [SweepRun(one.budget, one.pipeline.config.name, None, None, "waiting", one.seed) for one in planned]
    ran: dict[str, tuple[str, ...]] = {}
    codes: set[int] = set()
    with open_locks(runs_dir / STORE, lambda text: None).hold(folder):  # the runs repeat the warning
        known = read_comparison(folder)
        progress.note(f"{len(runs)} run{'s' * (len(runs) > 1)} of {name}, {executor.words}.")
        with counted(progress, executor, len(runs)) as task:
            for done, result in run_all(executor, iter(jobs)):
                place = jobs[done]
                runs[place], code = finish(runs[place], result, runs_dir, progress)
                codes.add(code)
                ran[done.name] = result.ran
                task.advance(failed=str(sum(run.error is not None for run in runs)))
                whole = Sweep(name, quantity, tuple(runs))
                write_sweep(whole, folder)
        job = CompareJob.of(planned[0].pipeline, runs_dir, folder.name, whole)
        whole = replace(whole, comparison=compare(job, known, executor, progress))
        write_sweep(whole, folder)
    return SweepOutcome(folder, whole, next((code for code in _FIRST if code in codes), 0), ran)


@dataclass(frozen=True, slots=True)
class _Planned:
    """A run of the sweep."""

    budget: float
    quantity: str
    seed: int | None
    pipeline: Pipeline

    def job(self, runs_dir: Path, store: str | None) -> RunJob:
        return RunJob.of(self.pipeline, runs_dir, store)


def finish(run: SweepRun, result: JobResult, runs_dir: Path, progress: Progress) -> tuple[SweepRun, int]:
    """Return a run with the result of its job, and its exit code; the result is reported.

    Args:
        run: The run.
        result: Result of its job.
        runs_dir: Parent folder of all run folders.
        progress: Receives the outcome in a sentence.
    """
    failure = result.failure
    if failure is None:
        try:
            report = read_run(runs_dir, run.run)
        except ArtifactError as error:  # another process has removed or damaged it
            failure = Failure("failed", error.message, error.hint, error.exit_code)
        else:
            progress.note(f"{run.run}: {report.verdict.outcome}")
            return replace(run, report=report, state="done"), OUTCOME_EXIT_CODES[report.verdict.outcome]
    hint = f" Hint: {failure.hint}" if failure.hint else ""
    progress.warn(f"{run.run}: {failure.kind}: {failure.message}{hint}")
    return replace(run, error=failure.message, state=failure.kind), failure.exit_code


def read_run(runs_dir: Path, name: str) -> Report:
    """Return the report of a finished run.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    path = runs_dir / name / "report.json"
    return read_report(read_record(path), f"'{path}'")


def compare(
    job: CompareJob, known: LatencyComparison | None, executor: Executor, progress: Progress
) -> LatencyComparison | None:
    """Return the latency of all networks, timed in turn; None if there are fewer than two.

    Args:
        job: The measurement.
        known: Earlier result, which is returned if it is for the same files.
        executor: Executor of the measurement.
        progress: Receives progress, and a warning if the measurement fails.
    """
    key = comparison_key(job.pipeline(), job.names, Path(job.runs_dir))
    if key is None or (known is not None and known.key == key):
        return None if key is None else known
    result = executor.submit(job).result()
    if result.failure is not None or result.values is None:
        reason = "no values" if result.failure is None else result.failure.message
        progress.warn(f"The latencies could not be measured in turn: {reason}")
        return None
    return LatencyComparison.from_plain({"key": key, **result.values})


def swept_target(pipeline: Pipeline) -> tuple[int, str, float]:
    """Return the index of the first stage with a target, and the name and value of the target's first quantity.

    Raises:
        ConfigValueError: No stage has a target.
    """
    for index, stage in enumerate(pipeline.config.stages):
        if (target := getattr(stage, "target", None)) is not None:
            quantity, value = next(iter(target.given().items()))
            return index, quantity, float(value)
    raise ConfigValueError(
        f"'{pipeline.path}' must have a stage with a target to be swept, it has none.",
        hint="--set stages.prune.target.macs=0.5",
    )


def at_budget(
    path: Path, budget: float, overrides: Sequence[str], seed: int | None, suffix: str = ""
) -> tuple[str, Pipeline]:
    """Return the quantity that a budget limits, and the pipeline with that budget and a name of its own.

    Args:
        path: The pipeline file.
        budget: The budget.
        overrides: Settings in the form of `--set`.
        seed: Seed that replaces the file's seed; None to keep it.
        suffix: End of the run's name.

    Raises:
        ConfigError: The pipeline is invalid with this budget.
    """
    pipeline = load_pipeline(path, overrides, seed)
    index, quantity, _ = swept_target(pipeline)
    changes = [f"stages.{index}.target.{quantity}={budget:.12g}", f"name={pipeline.config.name}-{budget:.12g}{suffix}"]
    return quantity, load_pipeline(path, [*overrides, *changes], seed)


def _plan(path: Path, grid: Grid, overrides: Sequence[str], seed: int | None) -> Iterator[_Planned]:
    """Yield the runs, the largest budget first."""
    for budget in sorted(set(grid.budgets), reverse=True):
        for one in dict.fromkeys(grid.seeds) or (None,):
            suffix = "" if one is None else f"-seed{one}"
            quantity, pipeline = at_budget(path, budget, overrides, seed if one is None else one, suffix)
            yield _Planned(budget, quantity, one, pipeline)
