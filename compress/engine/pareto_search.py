"""Pareto search over the budget and other settings of a pipeline, by Optuna.

    runs/NAME-pareto/              search.json  search.html  trials.journal
    runs/NAME-0.43-1f3a9c/         an ordinary run folder for each trial, named after its budget and a digest

Each trial is an ordinary run. It ends as soon as its finished stages show that it cannot pass. Cost and primary metric
are the two objectives, and a network that fails its gates counts as infeasible. A killed search resumes from its
storage and from the store of finished stages. Trials that were under way are given again.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from compress.config.load import Pipeline, load_pipeline
from compress.engine.budget_search import checked_range, load_verdict
from compress.engine.executors import Executor, InProcess, counted, run_all
from compress.engine.jobs import CompareJob, JobResult, RunJob
from compress.engine.runner import STORE
from compress.engine.search_space import Choice, Space
from compress.engine.sweep import at_budget, compare, finish, read_run, swept_target
from compress.errors import VERDICT_FAILED_EXIT_CODE, ArtifactError, CompressError, ConfigError, first_line
from compress.model.artifacts import Verdict
from compress.progress import Progress, SilentProgress
from compress.report.model import Report
from compress.report.plots import Point, list_front
from compress.report.sweep import Sweep, SweepRun, read_comparison, write_sweep
from compress.storage.digest import digest_value
from compress.storage.lock import open_locks

BUDGET, PIPELINE = "budget", "pipeline"
STARTUP = 10  # trials at random before Optuna's model is used, at most half of all
JOURNAL = "trials.journal"
_RUN, _ERROR, _STATE, _LOST = "run", "error", "state", "lost"
_STORAGE_HINT = "--storage FILE for a journal, or the URL of a database, as in sqlite:///trials.db"
_OF_STORAGES = ("optuna", "sqlalchemy", "sqlite3")  # packages whose errors are of the storage
_PASSWORD = re.compile(r"//[^@/]*@")


@dataclass(frozen=True, slots=True)
class ParetoOutcome:
    """Outcome of a Pareto search.

    Attributes:
        folder: Folder of `search.json` and `search.html`.
        tried: All runs, in order of their budgets, the largest first.
        front: Passing runs that no other passing run betters in both cost and primary metric, the cheapest first.
        verdict: Verdict of the cheapest passing run; of the first finished run if none passed, None if none has any.
    """

    folder: Path
    tried: Sweep
    front: tuple[SweepRun, ...]
    verdict: Verdict | None

    @property
    def exit_code(self) -> int:
        """Exit code: 0 if a network passed, else 1."""
        return 0 if self.front else VERDICT_FAILED_EXIT_CODE


def search_pareto(
    path: Path,
    space: Space,
    trials: int,
    runs_dir: Path,
    overrides: tuple[str, ...] = (),
    seed: int | None = None,
    progress: Progress | None = None,
    store: str | None = None,
    executor: Executor | None = None,
) -> ParetoOutcome:
    """Search the Pareto front of cost and primary metric.

    Args:
        path: The pipeline file. The first target of its first stage with one is searched.
        space: Range of the budget, varied settings, and storage of the trials.
        trials: Number of trials, those of an interrupted search included.
        runs_dir: Parent folder of all run folders.
        overrides: Settings in the form of `--set`.
        seed: Seed that replaces the file's seed; None to keep it.
        progress: Receives progress by run.
        store: URL of a store of other hosts, as in `run`.
        executor: Executor of the runs, entered already; by default they run in this process.

    Raises:
        ConfigError: The pipeline is invalid, also with one of the varied values.
        ArtifactError: The storage cannot be used.
        RunLocked: Another process searches this pipeline in this folder.
    """
    progress = progress or SilentProgress()
    executor = executor or InProcess(progress)
    plan = _Plan(path, space, overrides, seed)
    folder = runs_dir / f"{plan.name}-pareto"
    with open_locks(runs_dir / STORE, lambda text: None).hold(folder), _named(space.storage):
        study = _open_study(plan, trials, folder)
        search = _Search(plan, study, trials, runs_dir, folder, store, progress)
        progress.note(f"{trials} trials of {plan.name}, {executor.words}.")
        with counted(progress, executor, trials) as task:
            for job, result in run_all(executor, search.jobs()):
                search.end(job, result)
                task.advance()
        return search.outcome(executor)


class _Plan:
    """Pipelines of the search space."""

    def __init__(self, path: Path, space: Space, overrides: tuple[str, ...], seed: int | None) -> None:
        self.overrides, self.seed = overrides, seed
        self.storage = space.storage
        given = (path, *space.also)
        has_names = len({one.name for one in given}) == len(given)
        self.paths = {one.name if has_names else str(one): one for one in given}
        self.first = load_pipeline(path, overrides, seed)
        self.name = self.first.config.name
        _, self.quantity, self.given = swept_target(self.first)
        self.between = checked_range(space.between, self.quantity)
        self.choices = {choice.key: choice for choice in space.choices}
        for one in self.paths.values():  # refuse a wrong value before any trial
            quantity = swept_target(load_pipeline(one, overrides, seed))[1]
            if quantity != self.quantity:
                raise ConfigError(
                    f"'{one}' must have a target of {self.quantity} as '{path}' has, got a target of {quantity}."
                )
            for choice in space.choices:
                for text in choice.ends:
                    at_budget(one, self.between[1], (*overrides, f"{choice.key}={text}"), seed)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions by name."""
        found: dict[str, BaseDistribution] = {BUDGET: FloatDistribution(*self.between, log=True)}
        if len(self.paths) > 1:
            found[PIPELINE] = CategoricalDistribution(list(self.paths))
        return found | {key: _distribution(choice) for key, choice in self.choices.items()}

    @property
    def study_name(self) -> str:
        """Name of the study: another pipeline or space is another study."""
        described = {key: str(one) for key, one in self.distributions.items()}
        return f"{self.name}-{digest_value([self.first.to_yaml(), described])[:8]}"

    def read(self, params: Mapping[str, Any]) -> tuple[float, dict[str, str]]:
        """Return budget and settings of a trial."""
        settings = {key: _as_text(value) for key, value in params.items() if key != BUDGET}
        return float(f"{params[BUDGET]:.3g}"), settings

    def pipeline(self, budget: float, settings: Mapping[str, str]) -> Pipeline:
        """Return the pipeline of a trial.

        Raises:
            ConfigError: The settings exclude each other.
        """
        path = self.paths[settings.get(PIPELINE, next(iter(self.paths)))]
        changes = [f"{key}={text}" for key, text in settings.items() if key != PIPELINE]
        suffix = f"-{digest_value(dict(settings))[:6]}" if settings else ""
        return at_budget(path, budget, (*self.overrides, *changes), self.seed, suffix)[1]


class _Search:
    """State of a search between its trials."""

    def __init__(
        self,
        plan: _Plan,
        study: optuna.Study,
        trials: int,
        runs_dir: Path,
        folder: Path,
        store: str | None,
        progress: Progress,
    ) -> None:
        self.plan, self.study, self.trials = plan, study, trials
        self.runs_dir, self.folder, self.store, self.progress = runs_dir, folder, store, progress
        self.known = read_comparison(folder, "search")
        self.running: dict[str, list[Trial]] = {}
        self.runs: dict[str, SweepRun] = {}
        for trial in study.get_trials(deepcopy=False):
            self._recall(trial)

    def jobs(self) -> Iterator[RunJob]:
        """Yield the jobs of new trials, each when there is room for it."""
        while self._count < self.trials:
            trial = self.study.ask(self.plan.distributions)
            budget, settings = self.plan.read(trial.params)
            try:
                pipeline = self.plan.pipeline(budget, settings)
            except ConfigError as error:
                run = SweepRun(budget, f"trial {trial.number}", None, error.message, "failed", settings=settings)
                self.runs[run.run] = run
                self._note(trial, run)
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            name = pipeline.config.name
            if name in self.running:  # its result counts for both trials
                self.running[name].append(trial)
                continue
            known = self.runs.get(name)
            if known is not None and known.state in _FINAL:
                self._note(trial, known)
                self._tell(trial, known)
                continue
            self.runs[name] = SweepRun(budget, name, None, None, "waiting", settings=settings)
            self.running[name] = [trial]
            self._note(trial, self.runs[name])
            yield RunJob.of(pipeline, self.runs_dir, self.store, is_judged=True)

    def end(self, job: RunJob, result: JobResult) -> None:
        """Report the result of a trial to Optuna, and write the page."""
        run, _ = finish(self.runs[job.name], result, self.runs_dir, self.progress)
        self.runs[job.name] = run
        for trial in self.running.pop(job.name):
            self._note(trial, run)
            self._tell(trial, run)
        write_sweep(self._whole(), self.folder)

    def outcome(self, executor: Executor) -> ParetoOutcome:
        """Return the outcome, with the latency of the front's networks timed in turn."""
        whole = self._whole()
        front = tuple(self.runs[name] for name in whole.front)
        job = CompareJob.of(self.plan.first, self.runs_dir, self.folder.name, replace(whole, runs=front))
        timed = compare(job, self.known, executor, self.progress)
        whole = replace(whole, comparison=timed)
        write_sweep(whole, self.folder)
        finished = [run.run for run in whole.runs if run.report is not None]
        shown = next(iter([*whole.front, *finished]), None)
        verdict = None if shown is None else load_verdict(self.runs_dir, shown)
        return ParetoOutcome(self.folder, whole, front, verdict)

    @property
    def _count(self) -> int:
        begun = self.study.get_trials(deepcopy=False, states=_BEGUN)
        return sum(_LOST not in trial.user_attrs for trial in begun)

    def _recall(self, trial: FrozenTrial) -> None:
        """Take over a trial of an earlier process; one that was under way is given again."""
        if trial.state == TrialState.RUNNING:
            Trial(self.study, trial._trial_id).set_user_attr(_LOST, True)
            self.study.tell(trial.number, state=TrialState.FAIL)
            if trial.params:
                self.study.enqueue_trial(trial.params)
            return
        if _RUN not in trial.user_attrs or _LOST in trial.user_attrs or trial.state == TrialState.WAITING:
            return
        budget, settings = self.plan.read(trial.params)
        name, error = trial.user_attrs[_RUN], trial.user_attrs.get(_ERROR)
        state = trial.user_attrs.get(_STATE, "failed")
        run = SweepRun(budget, name, None, error or "its report is gone", state, settings=settings)
        if trial.state == TrialState.COMPLETE:
            try:
                run = replace(run, report=read_run(self.runs_dir, name), error=None, state="done")
            except ArtifactError as failure:
                self.progress.warn(f"{name}: {failure.message}")
        self.runs[name] = run

    def _note(self, trial: Trial, run: SweepRun) -> None:
        trial.set_user_attr(_RUN, run.run)
        trial.set_user_attr(_STATE, run.state)
        if run.error is not None:
            trial.set_user_attr(_ERROR, run.error)

    def _tell(self, trial: Trial, run: SweepRun) -> None:
        report = run.report
        values = None if report is None else _objectives(report, self.plan.quantity)
        if report is None or values is None:
            self.study.tell(trial, state=TrialState.PRUNED if run.state == "stopped" else TrialState.FAIL)
            return
        trial.set_constraint("open checks", float(len(report.verdict.open_checks)))
        self.study.tell(trial, values)

    def _whole(self) -> Sweep:
        runs = tuple(sorted(self.runs.values(), key=lambda run: (-run.budget, run.run)))
        front = _front(runs, self.plan.quantity)
        best = front[0] if front else None
        return Sweep(self.plan.name, self.plan.quantity, runs, "search", best, None, front)


_FINAL = ("done", "not met", "stopped")  # states that a repetition would not change
_BEGUN = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def _front(runs: Sequence[SweepRun], quantity: str) -> tuple[str, ...]:
    """Return the names of the passing runs on the Pareto front, the cheapest first."""
    points, metric = [], None
    for run in runs:
        if run.report is not None and run.report.verdict.passed:
            values, metric = _objectives(run.report, quantity), run.report.metric
            quality = run.report.quality().after
            if values is not None and quality is not None:
                points.append(Point(values[0], quality, run.run))
    return () if metric is None else tuple(point.label for point in list_front(points, metric))


def _objectives(report: Report, quantity: str) -> tuple[float, float] | None:
    """Return cost (smaller is better) and primary metric (larger is better); None if one is not known.

    The cost is a share of the baseline's: of latency, measured in turn, of MACs, params or bytes.
    """
    if quantity.startswith("latency"):
        cost = None if report.speedup is None else 1 / report.speedup
    else:
        change = report.change(quantity if quantity in ("macs", "params") else "size_bytes")
        cost = change.after / change.before if change.after is not None and change.before else None
    quality = report.quality().after
    if cost is None or quality is None:
        return None
    return cost, quality if report.metric.higher_is_better else -quality


def _distribution(choice: Choice) -> BaseDistribution:
    if choice.values:
        return CategoricalDistribution(list(choice.values))
    low, high = choice.between
    if choice.is_whole:
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=low > 0)


def _as_text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _open_study(plan: _Plan, trials: int, folder: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _open_storage(plan, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            storage=storage,
            study_name=plan.study_name,
            directions=["minimize", "maximize"],
            load_if_exists=True,
        )
        known = len(study.get_trials(deepcopy=False))
        study.sampler = TPESampler(
            seed=plan.first.config.seed + known,
            n_startup_trials=min(STARTUP, max(1, trials // 2)),
            multivariate=True,
            constant_liar=True,
        )
    low, high = plan.between
    if known == 0 and low <= plan.given <= high:
        study.enqueue_trial({BUDGET: plan.given})
    return study


def _open_storage(plan: _Plan, folder: Path) -> BaseStorage:
    place = plan.storage
    if place is not None and "://" in place:
        return RDBStorage(place)
    return JournalStorage(JournalFileBackend(str(folder / JOURNAL) if place is None else place))


@contextmanager
def _named(storage: str | None) -> Iterator[None]:
    """Name the storage in errors of Optuna and its database within this context."""
    name = _PASSWORD.sub("//***@", storage or JOURNAL)

    try:
        yield
    except Exception as error:
        origin = type(error).__module__.partition(".")[0]
        if isinstance(error, CompressError) or not (origin in _OF_STORAGES or isinstance(error, OSError)):
            raise
        text = f"The storage of trials '{name}' cannot be used: {first_line(error)}."
        raise ArtifactError(text, hint=_STORAGE_HINT) from error
