"""Run of a pipeline: the stages that must run, the reasons, caching, and the report.

For each stage: compute the cache key. If the store has it, restore the result (status "unchanged"); otherwise run the
stage, store its result and write the lock. Then lay out the run folder:

    runs/NAME/   pipeline.yaml (resolved)  model.onnx  slim/  lock  report.json  report.html
    runs/.store/ finished stages by key, and latency tables, shared by all runs

With a remote store (sharing.py), stages that other hosts have finished are downloaded.

Nothing here imports torch unless a stage has to run.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from compress.catalog import NOTHING, TORCH_MODEL, VERDICT
from compress.checkpoint.layout import VOLATILE, load_artifact, save_artifact
from compress.config.load import Pipeline
from compress.config.rules.gates import require_known_metrics
from compress.engine.cleaning import TEACHERS
from compress.engine.curves import require_tensorboard, written_curves
from compress.engine.keys import Step, build_steps, explain, needs_latency
from compress.engine.preflight import require_checkpoints, require_importances, require_packages_of, require_runtimes
from compress.engine.run_folder import publish, publish_slim
from compress.engine.sharing import Sharing, find_remote_entry
from compress.engine.timing_lock import Turns, measures_latency
from compress.engine.workers import Workers, workers
from compress.errors import ArtifactError, CompressError, ConfigValueError, InternalError, RunLocked
from compress.model.artifacts import FactorySpec, TorchModel, Verdict
from compress.progress import Progress, SilentProgress
from compress.report.build import StageRun, build_report, write_report
from compress.report.provenance import describe_environment, describe_provenance
from compress.storage.digest import digest_value
from compress.storage.files import write_atomic
from compress.storage.lock import NATIVE, Locks, open_locks
from compress.storage.store import Entry, Store
from compress.user_code import as_stage_error

if TYPE_CHECKING:  # imports torch
    from compress.search.context import StageContext
    from compress.storage.remote import Remote  # imports fsspec

LOCK_SCHEMA = 1
STORE = ".store"
WAIT_S = 0.2
PROFILED = ("prune", "slim")  # stages whose latency table can be saved and used elsewhere
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """Plan of one stage: run it, or take its stored result.

    Attributes:
        stage: Name of the stage.
        status: "unchanged" if its result is in the store, "download" if in the remote store, "run" if it must run.
        reasons: Reasons why it would run or be downloaded; empty if unchanged.
    """

    stage: str
    status: Literal["unchanged", "download", "run"]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """Outcome of a run."""

    verdict: Verdict
    folder: Path
    report: dict[str, Any]


def plan(pipeline: Pipeline, runs_dir: Path, remote: "Remote | None" = None) -> list[PlannedStage]:
    """Return the plan of each stage, without running any."""
    store = Store(runs_dir / STORE, warn=lambda text: None)
    previous = _read_lock(runs_dir / pipeline.config.name)
    planned: list[PlannedStage] = []
    digest: str | None = ""
    for step in build_steps(pipeline):
        if digest is None:
            planned.append(PlannedStage(step.entry.name, "run", (f"its input changes: '{planned[-1].stage}' runs",)))
            continue
        components = step.components(digest)
        key = digest_value(components)
        entry = store.get(key)
        if entry is not None:
            planned.append(PlannedStage(step.entry.name, "unchanged", ()))
            digest = entry.digest
        elif (digest := find_remote_entry(remote, step, key)) is not None:
            planned.append(PlannedStage(step.entry.name, "download", ("another host has finished it",)))
        else:
            planned.append(PlannedStage(step.entry.name, "run", explain(components, previous, step)))
    return planned


def run(
    pipeline: Pipeline,
    runs_dir: Path,
    progress: Progress | None = None,
    remote: "Remote | None" = None,
    turns: Turns | None = None,
) -> RunOutcome:
    """Run the stages of a pipeline that are not cached, and write its run folder.

    Args:
        pipeline: The pipeline, with validated settings.
        runs_dir: Parent folder of all run folders.
        progress: Receives the progress of long operations.
        remote: Store of other hosts, whose finished stages are taken, and which gets those of this run.
        turns: Turns of the stages among several runs on this machine; by default each stage begins at once.

    Raises:
        CompressError: A stage failed; the message names it. Results of finished stages stay cached.
        RunLocked: Another process runs in this folder.
    """
    return _run(pipeline, runs_dir, progress or SilentProgress(), Workers(), False, remote, turns)


def run_stages(
    pipeline: Pipeline,
    runs_dir: Path,
    count: int,
    progress: Progress | None = None,
    remote: "Remote | None" = None,
    turns: Turns | None = None,
) -> list[StageRun]:
    """Run the first stages of a pipeline, as far as they are not cached, and publish nothing.

    Args:
        pipeline: The pipeline, with validated settings.
        runs_dir: Parent folder of all run folders.
        count: Number of stages.
        progress: Receives the progress of long operations.
        remote: Store of other hosts, as in `run`.
        turns: As in `run`.

    Raises:
        CompressError: As `run`.
    """
    folder, progress = runs_dir / pipeline.config.name, progress or SilentProgress()
    locks = open_locks(runs_dir / STORE, progress.warn)
    with locks.hold(folder):
        part = _Run(pipeline, runs_dir, folder, progress, Workers(), remote=remote, locks=locks, turns=turns)
        return part.execute_first(count)


def run_until(
    pipeline: Pipeline,
    runs_dir: Path,
    until: str,
    progress: Progress | None = None,
    remote: "Remote | None" = None,
) -> Path:
    """Run the stages before the first stage named `until`, and write the slim network for a training elsewhere.

    Returns:
        The run folder: slim/ has the network, load_slim.py loads it.

    Raises:
        ConfigValueError: No stage of this name takes a torch network.
        CompressError: As `run`.
    """
    steps = build_steps(pipeline)
    index = next((step.index for step in steps if step.entry.name == until), 0)
    if index == 0 or steps[index].entry.consumes != TORCH_MODEL:
        names = ", ".join(dict.fromkeys(step.entry.name for step in steps[1:] if step.entry.consumes == TORCH_MODEL))
        raise ConfigValueError(
            f"--until must be a stage of '{pipeline.path}' that takes a torch network ({names}), got {until}."
        )
    folder, progress = runs_dir / pipeline.config.name, progress or SilentProgress()
    locks = open_locks(runs_dir / STORE, progress.warn)
    with locks.hold(folder):
        _Run(pipeline, runs_dir, folder, progress, Workers(), remote=remote, locks=locks).execute_before(steps, index)
    return folder


def run_with_others(
    pipeline: Pipeline,
    runs_dir: Path,
    progress: Progress | None = None,
    writes_curves: bool = False,
    remote: "Remote | None" = None,
) -> RunOutcome | None:
    """Run a pipeline as `run`, along with the other processes that `torchrun` has started, if there are any.

    Args:
        pipeline: The pipeline, with validated settings.
        runs_dir: Parent folder of all run folders.
        progress: Receives the progress of long operations.
        writes_curves: True writes training curves as event files, into the folder `tensorboard` of the run.
        remote: Store of other hosts, as in `run`; only the process of rank 0 uses it.

    Returns:
        Outcome of the run; None in a process of another rank than 0.

    Raises:
        As `run`.
        StageError: Curves are requested, but their package is missing.
    """
    if writes_curves:
        require_tensorboard()
    helper = _Run(pipeline, runs_dir, runs_dir / pipeline.config.name, SilentProgress(), Workers())
    with workers(helper.follow) as present:
        if present is None:
            return None
        return _run(pipeline, runs_dir, progress or SilentProgress(), present, writes_curves, remote)


def _run(
    pipeline: Pipeline,
    runs_dir: Path,
    progress: Progress,
    workers: Workers,
    writes_curves: bool,
    remote: "Remote | None",
    turns: Turns | None = None,
) -> RunOutcome:
    folder = runs_dir / pipeline.config.name
    locks = open_locks(runs_dir / STORE, progress.warn)
    with locks.hold(folder):
        return _Run(pipeline, runs_dir, folder, progress, workers, writes_curves, remote, locks, turns).execute()


def profile(
    pipeline: Pipeline, runs_dir: Path, progress: Progress | None = None, remote: "Remote | None" = None
) -> Any:
    """Time the variants for the first stage with a latency target; stages before it run as in `run`.

    Returns:
        The `TableFile`.

    Raises:
        ConfigValueError: No such stage has a latency target.
        CompressError: As `run`.
    """
    progress = progress or SilentProgress()
    steps = build_steps(pipeline)
    index = next((step.index for step in steps if step.entry.name in PROFILED and needs_latency(step.config)), None)
    if index is None:
        raise ConfigValueError(
            f"'{pipeline.path}' must have a {' or '.join(PROFILED)} stage with a target of latency or latency_ms to be "
            "profiled, it has none.",
            hint="--set stages.prune.target.latency=0.5",
        )
    folder = runs_dir / pipeline.config.name
    locks = open_locks(runs_dir / STORE, progress.warn)
    with locks.hold(folder):
        return _Run(pipeline, runs_dir, folder, progress, Workers(), remote=remote, locks=locks).profile(steps, index)


class _Run:
    """One execution of a pipeline."""

    def __init__(
        self,
        pipeline: Pipeline,
        runs_dir: Path,
        folder: Path,
        progress: Progress,
        workers: Workers,
        writes_curves: bool = False,
        remote: "Remote | None" = None,
        locks: Locks = NATIVE,
        turns: Turns | None = None,
    ) -> None:
        self.turns = turns or Turns()
        self.pipeline, self.folder, self.progress = pipeline, folder, progress
        self.workers, self.writes_curves = workers, writes_curves
        self.factory = FactorySpec.from_model(pipeline.resolved["stages"][0]["model"])
        self.locks = locks
        self.store = Store(runs_dir / STORE, progress.warn, locks)
        self.sharing = Sharing(remote, self.store, progress)
        self.previous = _read_lock(folder)
        self.stages: list[StageRun] = []
        self.entries: list[Entry] = []
        self.locked: list[dict[str, Any]] = []
        self.artifact: Any = None
        self.data: Any = None
        self.has_tried_runtimes = False

    def execute(self) -> RunOutcome:
        """Run or restore every stage, then publish."""
        self.store.sweep()
        _write_text(self.folder / "pipeline.yaml", self.pipeline.to_yaml())
        steps = build_steps(self.pipeline)
        data = steps[0].fixed["data"]
        if data["train"] == data["evaluation"] and "torchvision" not in self.pipeline.resolved["data"]["train"]:
            self.progress.warn("Training and evaluation are the same images: the verdict will say nothing.")
        if data["validation"] == data["evaluation"]:
            self.progress.warn(
                "Validation and evaluation are the same images: the verdict is on images that epochs, repairs and "
                "numbers of blocks were chosen by."
            )
        digest = ""
        for step in steps:
            digest = self._do(step, len(steps), digest)
        verdict = self._load(VERDICT, self.entries[-1])
        if not isinstance(verdict, Verdict):
            raise InternalError("The last stage yielded no verdict.")
        published = publish(self.folder, self.entries, [step.entry.produces for step in steps], self.factory)
        provenance = describe_provenance(self.pipeline, steps[0].fixed, published, self.progress.warn)
        report = build_report(
            self.pipeline.config.name, verdict, self.stages, self.pipeline.resolved, describe_environment(), provenance
        )
        is_same = [stage["key"] for stage in self.locked] == [stage.get("key") for stage in self.previous]
        nothing_ran = all(stage.status == "unchanged" for stage in self.stages)
        write_report(
            report, self.folder, page=not (is_same and nothing_ran and (self.folder / "report.html").is_file())
        )
        if nothing_ran:
            self.progress.note("Nothing to do: every stage is unchanged.")
        self.sharing.finish()
        return RunOutcome(verdict, self.folder, report)

    def execute_first(self, count: int) -> list[StageRun]:
        """Run or restore the first stages, and return their outcomes."""
        self.store.sweep()
        steps, digest = build_steps(self.pipeline), ""
        for step in steps[:count]:
            digest = self._do(step, len(steps), digest)
        self.sharing.finish()
        return self.stages

    def execute_before(self, steps: Sequence[Step], index: int) -> None:
        """Run or restore the stages before a position, and write their network into the run folder."""
        self.store.sweep()
        digest = ""
        for step in steps[:index]:
            digest = self._do(step, len(steps), digest)
        publish_slim(self.folder, self.entries[-1], self.factory)
        self.sharing.finish()

    def profile(self, steps: Sequence[Step], index: int) -> Any:
        """Run or restore the stages before one with a latency target, and time the variants for that stage."""
        digest = ""
        for step in steps[:index]:
            digest = self._do(step, len(steps), digest)
        key = digest_value([steps[index].components(digest), "profile"])
        work = self.store.work_folder(key)
        with self.locks.hold(self.store.lock_folder(key)):
            work.mkdir(parents=True, exist_ok=True)
            table = self._with_stage(steps[index], work, lambda stage, ctx: stage.profile(self.artifact, ctx))
            shutil.rmtree(work, ignore_errors=True)
        return table

    def _do(self, step: Step, count: int, input_digest: str) -> str:
        """Restore or run one stage and return the digest of its result."""
        components = step.components(input_digest)
        key = digest_value(components)
        label = f"[{step.index + 1}/{count}] {step.entry.name}"
        entry = self.store.get(key) or self._fetch(step, key, label)
        status: Literal["ran", "unchanged"] = "unchanged"
        if entry is None:
            reasons = explain(components, self.previous, step)
            self.progress.note(f"{label}: {'; '.join(reasons)}")
            self._withdraw_report()
            self._try_runtimes()
            with self._claim(key, label) as made_elsewhere:
                entry = made_elsewhere or self._make_in_turn(step, count, key, label)
                status = "unchanged" if made_elsewhere else "ran"
        if status == "ran":
            self.progress.note(f"{label}: done in {entry.meta['seconds']:.1f} s")
        else:
            self.artifact = None
            self.progress.note(f"{label}: unchanged")
        self.stages.append(StageRun(step.entry.name, status, entry.meta["seconds"], entry.meta["record"]))
        if step.entry.consumes == NOTHING:
            require_known_metrics(self.pipeline.config, entry.meta["record"])
            if status == "ran":
                require_checkpoints(self.pipeline, self.factory)
        self.entries.append(entry)
        self.locked.append({"stage": step.entry.name, "key": key, "components": components, "output": entry.digest})
        self._write_lock(count)
        self.sharing.share(step, key, label, is_new=status == "ran")
        return entry.digest

    def _fetch(self, step: Step, key: str, label: str) -> Entry | None:
        """Download the result of a stage, unless another run on this store makes or downloads it meanwhile."""
        if self.sharing.remote is None:
            return None
        with self._claim(key, label) as made_elsewhere:
            return made_elsewhere or self.sharing.fetch(step, key, label)

    def _try_runtimes(self) -> None:
        """Check once, before the first stage runs, that packages, user code and runtimes are available."""
        if not self.has_tried_runtimes:
            self.has_tried_runtimes = True
            for require in (require_packages_of, require_importances, require_runtimes):
                require(self.pipeline)

    def _withdraw_report(self) -> None:
        """Remove the last run's report, as its verdict does not belong to the present settings."""
        for name in ("report.json", "report.html"):
            (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def _claim(self, key: str, label: str) -> Iterator[Entry | None]:
        """Lock a result against other runs that share the store; yield the result if one of them has just stored it.

        The store is searched again even without waiting, since another run may have ended in between.
        """
        waited = False
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self.locks.hold(self.store.lock_folder(key)))
                    break
                except RunLocked:
                    if not waited:
                        self.progress.note(f"{label}: another run is making the same result, this one waits for it")
                    waited = True
                    time.sleep(WAIT_S)
            yield self.store.get(key, warns=waited)

    def _make_in_turn(self, step: Step, count: int, key: str, label: str) -> Entry:
        is_timing = measures_latency(self.pipeline.config, step.index)
        with self.turns.hold(is_timing, lambda text: self.progress.note(f"{label}: {text}")):
            return self._make(step, count, key)

    def _make(self, step: Step, count: int, key: str) -> Entry:
        """Run one stage and store its result."""
        started = time.perf_counter()
        work = self.store.work_folder(key)
        try:
            work.mkdir(parents=True, exist_ok=True)
            source = self.entries[-1].folder if self.entries else None
            with self.workers.call(step, key, source):
                joint = self.workers.call_within(step, key, source)
                artifact, record = self._with_stage(
                    step, work, lambda stage, ctx: stage.run(self.artifact, replace(ctx, joint=joint))
                )
            meta = {"record": record.to_dict(), "seconds": round(time.perf_counter() - started, 3)}
            entry = self.store.put(key, lambda folder: save_artifact(artifact, folder), meta, VOLATILE)
        except CompressError as error:
            error.message = f"Stage '{step.entry.name}' ({step.index + 1} of {count}): {error.message}"
            raise
        except BaseException as error:
            if (ours := as_stage_error(error)) is not None:
                ours.message = f"Stage '{step.entry.name}' ({step.index + 1} of {count}): {ours.message}"
                raise ours from error
            if not isinstance(error, OSError):
                raise
            raise ArtifactError(
                f"Stage '{step.entry.name}' ({step.index + 1} of {count}) could not read or write "
                f"'{error.filename or work}': {error.strerror or error}.",
                hint="Stages that are done stay; give the same command again.",
            ) from error
        self.artifact = self._load(step.entry.produces, entry)
        return entry

    def follow(self, index: int, key: str, source: Path, training: int | None = None) -> None:
        """Run one stage, or one training of it, along with the process of rank 0, and discard the result."""
        step = build_steps(self.pipeline)[index]
        self.artifact = load_artifact(step.entry.consumes, source, self.factory)

        def work(stage: Any, ctx: "StageContext") -> None:
            if training is None:
                stage.run(self.artifact, ctx)
            else:
                stage.train(self.artifact, training, ctx)

        self._with_stage(step, self.store.work_folder(key), work)

    def _load(self, kind: str, entry: Entry) -> Any:
        return load_artifact(kind, entry.folder, self.factory)

    def _with_stage(self, step: Step, work: Path, call: "Callable[[Any, StageContext], T]") -> T:
        """Build a stage and its context, load its input, and return the result of `call` with both."""
        import importlib  # torch is imported with the first stage that has to run, and only then

        import torch

        from compress.data.from_config import Splits
        from compress.search.context import StageContext
        from compress.search.teacher import BaselineTeacher
        from compress.tasks.from_config import open_task

        config = self.pipeline.config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.data = self.data or Splits(config.data, open_task(config.task))
        place, _, name = step.entry.place.partition(":")
        stage = getattr(importlib.import_module(place), name)(step.config)
        if self.artifact is None and step.entry.consumes != NOTHING:
            self.artifact = self._load(step.entry.consumes, self.entries[-1])
        teacher = BaselineTeacher(self.artifact) if isinstance(self.artifact, TorchModel) else None
        if teacher is not None:
            self.data.teacher = teacher
        tables = self.store.root / ".latency"
        with self._listener(step, work) as listener:
            ctx = StageContext(work, config.seed, self.data, listener, config.deploy, tables, teacher, config.quantize)
            return call(stage, replace(ctx, teacher_outputs=self.store.root / TEACHERS))

    def _listener(self, step: Step, work: Path) -> AbstractContextManager[Progress]:
        """Return the listener of a stage's progress; for a stage that starts anew, old curves are removed."""
        if not self.writes_curves:
            return nullcontext(self.progress)
        folder = self.folder / "tensorboard" / f"{step.index + 1}-{step.entry.name}"
        if not any(work.glob("*.pt")):
            shutil.rmtree(folder, ignore_errors=True)
        return written_curves(self.progress, folder)

    def _write_lock(self, count: int) -> None:
        """Write the lock; later stages keep their old entries, so that the next run can explain changes."""
        values = {"schema": LOCK_SCHEMA, "stages": self.locked + self.previous[len(self.locked) : count]}
        _write_text(self.folder / "lock", json.dumps(values, indent=1, sort_keys=True))


def _read_lock(folder: Path) -> list[dict[str, Any]]:
    """Return the stages in the lock of the last run; empty if it is unreadable."""
    try:
        values = json.loads((folder / "lock").read_text(encoding="utf-8"))
        stages: list[dict[str, Any]] = values["stages"] if values["schema"] == LOCK_SCHEMA else []
        return [stage for stage in stages if {"stage", "components"} <= set(stage)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write_text(path: Path, text: str) -> None:
    try:
        write_atomic(path, text)
    except OSError as error:
        raise ArtifactError(
            f"'{path}' must be writable: {error.strerror or error}.",
            hint="Stages that are done stay; make room and give the same command again.",
        ) from error
