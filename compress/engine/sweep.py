"""Sweep: one pipeline at several budgets, results side by side.

    runs/NAME-sweep/   sweep.json  sweep.html
    runs/NAME-0.5/     an ordinary run folder for each budget

Every run is an ordinary one. Results that the budgets share (the loaded network, latency tables) are made once, and a
killed sweep resumes. A budget that cannot be met is a row with that reason.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.config.load import Pipeline, load_pipeline
from compress.engine.runner import STORE, RunOutcome, run
from compress.errors import (
    OUTCOME_EXIT_CODES,
    VERDICT_FAILED_EXIT_CODE,
    VERDICT_INCONCLUSIVE_EXIT_CODE,
    BudgetUnreachable,
    ConfigValueError,
)
from compress.progress import Progress, SilentProgress
from compress.report.model import read_report
from compress.report.sweep import Sweep, SweepRun, write_sweep
from compress.storage.lock import open_locks

if TYPE_CHECKING:
    from compress.storage.remote import Remote  # imports fsspec

_FIRST = (BudgetUnreachable.exit_code, VERDICT_FAILED_EXIT_CODE, VERDICT_INCONCLUSIVE_EXIT_CODE)


@dataclass(frozen=True, slots=True)
class SweepOutcome:
    """Outcome of a sweep.

    Attributes:
        folder: Folder of `sweep.json` and `sweep.html`.
        sweep: Results, the content of `sweep.json`.
        exit_code: 3 if a budget could not be met, else 1 if a verdict failed, else 6 if a verdict was inconclusive,
            else 0.
    """

    folder: Path
    sweep: Sweep
    exit_code: int


def sweep(
    path: Path,
    budgets: Sequence[float],
    runs_dir: Path,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    progress: Progress | None = None,
    remote: "Remote | None" = None,
) -> SweepOutcome:
    """Run a pipeline at each budget, the largest first.

    Args:
        path: The pipeline file.
        budgets: Values for the first target of the first stage that has a target.
        runs_dir: Parent folder of all run folders.
        overrides: Settings in the form of `--set`, such as "stages.prune.target.macs=0.5".
        seed: Seed that replaces the file's seed; None to keep it.
        progress: Receives progress by run.
        remote: Store of other hosts, as in `run`.

    Raises:
        ConfigError: The pipeline is invalid at one of the budgets; nothing has run then.
        RunLocked: Another process sweeps this pipeline into this folder.
        CompressError: As `run`, except for budgets that cannot be met.
    """
    progress = progress or SilentProgress()
    name = load_pipeline(path, overrides, seed).config.name
    pipelines = list(_at_budgets(path, budgets, overrides, seed))
    folder = runs_dir / f"{name}-sweep"
    results: list[SweepRun] = []
    codes: set[int] = set()
    with open_locks(runs_dir / STORE, lambda text: None).hold(folder):  # the runs repeat the warning
        for budget, quantity, pipeline in pipelines:
            progress.note(f"== {quantity} {budget:g} ({len(results) + 1} of {len(pipelines)})")
            result, outcome = run_at(pipeline, budget, runs_dir, progress, remote)
            codes.add(BudgetUnreachable.exit_code if outcome is None else OUTCOME_EXIT_CODES[outcome.verdict.outcome])
            results.append(result)
            whole = Sweep(name, quantity, tuple(results))
            write_sweep(whole, folder)
    return SweepOutcome(folder, whole, next((code for code in _FIRST if code in codes), 0))


def run_at(
    pipeline: Pipeline, budget: float, runs_dir: Path, progress: Progress, remote: "Remote | None" = None
) -> tuple[SweepRun, RunOutcome | None]:
    """Run a pipeline at one budget; the outcome is None if the budget cannot be met."""
    result = SweepRun(budget, pipeline.config.name)
    try:
        outcome = run(pipeline, runs_dir, progress, remote)
    except BudgetUnreachable as error:
        progress.warn(error.message)
        return replace(result, error=error.message), None
    return replace(result, report=read_report(outcome.report)), outcome


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


def _at_budgets(
    path: Path, budgets: Sequence[float], overrides: Sequence[str], seed: int | None
) -> Iterator[tuple[float, str, Pipeline]]:
    """Yield each budget, the quantity that it limits and its pipeline, the largest budget first."""
    pipeline = load_pipeline(path, overrides, seed)
    index, quantity, _ = swept_target(pipeline)
    for budget in sorted(set(budgets), reverse=True):
        changes = [f"stages.{index}.target.{quantity}={budget:.12g}", f"name={pipeline.config.name}-{budget:.12g}"]
        yield budget, quantity, load_pipeline(path, [*overrides, *changes], seed)
