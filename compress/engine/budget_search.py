"""Search for the smallest budget whose network passes all gates, by bisection.

    runs/NAME-search/   search.json  search.html
    runs/NAME-0.43/     an ordinary run folder for each budget that was tried

Budgets are halved on a logarithmic scale. Every run is an ordinary one, so a killed search resumes, and results that
budgets share are made once. A verdict that is inconclusive does not pass.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.config.load import load_pipeline
from compress.engine.runner import STORE, RunOutcome
from compress.engine.sweep import run_at, swept_target
from compress.errors import VERDICT_FAILED_EXIT_CODE, ConfigValueError
from compress.model.artifacts import Verdict
from compress.progress import Progress, SilentProgress
from compress.report.sweep import Sweep, SweepRun, write_sweep
from compress.storage.lock import open_locks

if TYPE_CHECKING:
    from compress.storage.remote import Remote  # imports fsspec

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
    remote: "Remote | None" = None,
) -> SearchOutcome:
    """Find the smallest budget at which a pipeline passes its gates.

    Args:
        path: The pipeline file. The first target of its first stage with one is searched; its value is tried first.
        limits: Range and effort.
        runs_dir: Parent folder of all run folders.
        overrides: Settings in the form of `--set`.
        seed: Seed that replaces the file's seed; None to keep it.
        progress: Receives progress by run.
        remote: Store of other hosts, as in `run`.

    Raises:
        ConfigError: The pipeline is invalid, or the range does not fit the target.
        CompressError: As `run`, except for budgets that cannot be met.
    """
    progress = progress or SilentProgress()
    pipeline = load_pipeline(path, overrides, seed)
    index, quantity, given = swept_target(pipeline)
    between = _checked_range(limits, quantity)
    name = pipeline.config.name
    folder = runs_dir / f"{name}-search"
    bracket = _Bracket(between, limits, given)
    found: dict[float, tuple[SweepRun, RunOutcome | None]] = {}
    with open_locks(runs_dir / STORE, lambda text: None).hold(folder):  # the runs repeat the warning
        while (budget := bracket.next()) is not None:
            progress.note(f"== {quantity} {budget:g} (run {len(found) + 1} of at most {limits.runs})")
            changes = [f"stages.{index}.target.{quantity}={budget:.12g}", f"name={name}-{budget:.12g}"]
            changed = load_pipeline(path, [*overrides, *changes], seed)
            result, outcome = run_at(changed, budget, runs_dir, progress, remote)
            found[budget] = result, outcome
            passes = outcome is not None and outcome.verdict.passed
            bracket.add(budget, passes)
            progress.note(f"{quantity} {budget:g}: {'passes' if passes else 'does not pass'}")
            best = None if bracket.passing is None else found[bracket.passing][0]
            tried = tuple(found[one][0] for one in sorted(found, reverse=True))
            whole = Sweep(name, quantity, tried, "search", None if best is None else best.run)
            write_sweep(whole, folder)
    verdicts = {one: outcome.verdict for one, (_, outcome) in found.items() if outcome is not None}
    shown = max(verdicts, default=None) if bracket.passing is None else bracket.passing
    return SearchOutcome(folder, whole, best, None if shown is None else verdicts[shown], bracket.failing)


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

    def add(self, budget: float, passes: bool) -> None:
        """Add the result of a budget."""
        self._tried.append(budget)
        if passes:
            self.passing = budget if self.passing is None else min(budget, self.passing)
        else:
            self.failing = budget if self.failing is None else max(budget, self.failing)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _checked_range(limits: SearchLimits, quantity: str) -> tuple[float, float]:
    """Return the range; raise ConfigValueError where it does not fit the quantity."""
    if limits.between is None:
        if quantity not in SHARES:
            raise ConfigValueError(
                f"--between must be given for a target of {quantity}, which has no range of its own.",
                hint=f"--between 1,10 for {quantity} from 1 to 10",
            )
        return DEFAULT_RANGE
    if quantity in SHARES and limits.between[1] > 1:
        raise ConfigValueError(
            f"--between must be shares of at most 1 for a target of {quantity}, got {limits.between[1]:g}."
        )
    return limits.between
