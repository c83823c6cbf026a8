"""Search for the smallest budget whose network passes all gates, by bisection.

    runs/NAME-search/   search.json  search.html
    runs/NAME-0.43/     an ordinary run folder for each budget that was tried

Budgets are halved on a logarithmic scale. Every run is an ordinary one, so a killed search resumes, and results that
budgets share are made once. A verdict that is inconclusive does not pass.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from compress.catalog import VERDICT
from compress.checkpoint.layout import load_artifact
from compress.config.load import load_pipeline
from compress.engine.executors import Executor, InProcess, run_all
from compress.engine.jobs import RunJob, error_of
from compress.engine.latency_comparison import find_verdict_entry
from compress.engine.runner import STORE
from compress.engine.sweep import at_budget, finish, swept_target
from compress.errors import VERDICT_FAILED_EXIT_CODE, ConfigValueError
from compress.model.artifacts import Verdict
from compress.progress import Progress, SilentProgress
from compress.report.sweep import Sweep, SweepRun, write_sweep
from compress.storage.lock import open_locks

SHARES = ("latency", "macs", "params")
DEFAULT_RANGE = (0.1, 1.0)
_DIGITS = 3


@dataclass(frozen=True, slots=True)
class SearchLimits:
    """Range and effort of a search.

    Attributes:
        between: Smallest and largest budget to consider; the smallest is taken to fail, the largest is tried only if
            nothing below passes. None for shares from 0.1 to 1.
        runs: Largest number of runs.
        within: The search ends when the smallest passing budget is at most this share above a failing one.
    """

    between: tuple[float, float] | None = None
    runs: int = 7
    within: float = 0.05


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """Outcome of a search.

    Attributes:
        folder: Folder of `search.json` and `search.html`.
        tried: All runs, in order of their budgets, the largest first.
        best: Run of the smallest passing budget; None if none passed.
        verdict: Verdict of that run; of the largest budget that has one if none passed, None if none has.
        failing: Largest budget below it that did not pass; None if every tried one passed.
    """

    folder: Path
    tried: Sweep
    best: SweepRun | None
    verdict: Verdict | None
    failing: float | None

    @property
    def exit_code(self) -> int:
        """Exit code: 0 if a network passed, else 1."""
        return 0 if self.best is not None else VERDICT_FAILED_EXIT_CODE


def search_budget(
    path: Path,
    limits: SearchLimits,
    runs_dir: Path,
    overrides: tuple[str, ...] = (),
    seed: int | None = None,
    progress: Progress | None = None,
    store: str | None = None,
    executor: Executor | None = None,
) -> SearchOutcome:
    """Find the smallest budget at which a pipeline passes its gates.

    Args:
        path: The pipeline file. The first target of its first stage with one is searched; its value is tried first.
        limits: Range and effort.
        runs_dir: Parent folder of all run folders.
        overrides: Settings in the form of `--set`.
        seed: Seed that replaces the file's seed; None to keep it.
        progress: Receives progress by run.
        store: URL of a store of other hosts, as in `run`.
        executor: Executor of the runs, entered already. One that runs several at a time divides the range into more
            parts. By default they run in this process.

    Raises:
        ConfigError: The pipeline is invalid, or the range does not fit the target.
        CompressError: As `run`, except for budgets that cannot be met.
    """
    progress = progress or SilentProgress()
    executor = executor or InProcess(progress)
    pipeline = load_pipeline(path, overrides, seed)
    _, quantity, given = swept_target(pipeline)
    between = checked_range(limits.between, quantity)
    name = pipeline.config.name
    folder = runs_dir / f"{name}-search"
    bracket = _Bracket(between, limits, given)
    found: dict[float, SweepRun] = {}
    with open_locks(runs_dir / STORE, lambda text: None).hold(folder):  # the runs repeat the warning
        while budgets := bracket.next_several(executor.capacity):
            count = (
                f"run {len(found) + 1}"
                if len(budgets) == 1
                else f"runs {len(found) + 1} to {len(found) + len(budgets)}"
            )
            listed = ", ".join(f"{budget:g}" for budget in budgets)
            progress.note(f"== {quantity} {listed} ({count} of at most {limits.runs})")
            jobs = {at_budget_job(path, budget, runs_dir, overrides, seed, store): budget for budget in budgets}
            for job, result in run_all(executor, iter(jobs)):
                budget = jobs[job]
                found[budget], _ = finish(SweepRun(budget, job.name), result, runs_dir, progress)
                if result.failure is not None and result.failure.kind == "failed":
                    raise error_of(result.failure)
                report = found[budget].report
                passes = report is not None and report.verdict.passed
                bracket.add(budget, passes)
                progress.note(f"{quantity} {budget:g}: {'passes' if passes else 'does not pass'}")
            best = None if bracket.passing is None else found[bracket.passing]
            tried = tuple(found[one] for one in sorted(found, reverse=True))
            whole = Sweep(name, quantity, tried, "search", None if best is None else best.run)
            write_sweep(whole, folder)
    with_verdict = [one for one, run in found.items() if run.report is not None]
    shown = max(with_verdict, default=None) if bracket.passing is None else bracket.passing
    verdict = None if shown is None else load_verdict(runs_dir, found[shown].run)
    return SearchOutcome(folder, whole, best, verdict, bracket.failing)


def at_budget_job(
    path: Path, budget: float, runs_dir: Path, overrides: tuple[str, ...], seed: int | None, store: str | None
) -> RunJob:
    """Return the job of a pipeline at a budget.

    Raises:
        ConfigError: The pipeline is invalid with this budget.
    """
    return RunJob.of(at_budget(path, budget, overrides, seed)[1], runs_dir, store)


def load_verdict(runs_dir: Path, name: str) -> Verdict | None:
    """Return the verdict of a finished run; None if it has none."""
    entry = find_verdict_entry(runs_dir, name)
    verdict = None if entry is None else load_artifact(VERDICT, entry)
    return verdict if isinstance(verdict, Verdict) else None


class _Bracket:
    """Budgets known to pass and to fail, and the one to try next.

    Args:
        between: Smallest and largest budget.
        limits: Effort.
        first: Budget to try first, where it is inside the range.

    Attributes:
        passing: Smallest budget that passed; None before one did.
        failing: Largest budget below `passing` that failed; None before one did.
    """

    def __init__(self, between: tuple[float, float], limits: SearchLimits, first: float) -> None:
        self.passing: float | None = None
        self.failing: float | None = None
        self._low, self._high = between
        self._limits, self._first = limits, first
        self._tried: list[float] = []
        self._failed: list[float] = []

    def next(self) -> float | None:
        """Return the budget to try next; None when the search is over."""
        limits = self._limits
        if len(self._tried) >= limits.runs:
            return None
        if not self._tried and self._low < self._first <= self._high:
            return self._first
        low, high = self.failing or self._low, self.passing or self._high
        is_narrow = high <= low * (1 + limits.within)
        is_last = len(self._tried) == limits.runs - 1
        if self.passing is None and (is_narrow or is_last):  # the largest budget alone can still pass
            return None if self._high in self._tried else self._high
        if is_narrow:
            return None
        middle = _rounded(math.sqrt(low * high))
        return None if middle in self._tried or not low < middle < high else middle

    def next_several(self, count: int) -> list[float]:
        """Return up to `count` budgets to try at the same time, that of `next` first; [] when the search is over."""
        first = self.next()
        if first is None:
            return []
        count = min(count, self._limits.runs - len(self._tried))
        if count == 1 or first == self._high:
            return [first]
        low, high = self.failing or self._low, self.passing or self._high
        parts = [_rounded(low * (high / low) ** (place / (count + 1))) for place in range(1, count + 1)]
        nearest = min(parts, key=lambda one: abs(math.log(one / first)))
        others = [one for one in parts if one != nearest and one not in self._tried and low < one < high]
        return list(dict.fromkeys([first, *others]))

    def add(self, budget: float, passes: bool) -> None:
        """Add the result of a budget."""
        self._tried.append(budget)
        if passes:
            self.passing = budget if self.passing is None else min(budget, self.passing)
        else:
            self._failed.append(budget)
        below = [one for one in self._failed if self.passing is None or one < self.passing]
        self.failing = max(below, default=None)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def checked_range(between: tuple[float, float] | None, quantity: str) -> tuple[float, float]:
    """Return the range of a search.

    Args:
        between: Smallest and largest budget; None for the default of shares.
        quantity: Quantity that the budgets limit.

    Raises:
        ConfigValueError: The range does not fit the quantity.
    """
    if between is None:
        if quantity not in SHARES:
            raise ConfigValueError(
                f"--between must be given for a target of {quantity}, which has no range of its own.",
                hint=f"--between 1,10 for {quantity} from 1 to 10",
            )
        return DEFAULT_RANGE
    if quantity in SHARES and between[1] > 1:
        raise ConfigValueError(f"--between must be shares of at most 1 for a target of {quantity}, got {between[1]:g}.")
    return between
