"""Checks of a pipeline before its first stage runs: packages, runtimes, data, weights, gates."""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.catalog import DETECTION, require_packages
from compress.config.load import Pipeline
from compress.config.paths import PRETRAINED, UNTRAINED
from compress.config.rules.gates import require_known_metrics
from compress.errors import CompressError, InternalError, NoSuchPlace
from compress.model.artifacts import FactorySpec
from compress.progress import Progress, SilentProgress
from compress.user_code import as_stage_error, import_callable

if TYPE_CHECKING:  # imports torch
    from compress.data.from_config import Splits
    from compress.data.splits import Split
    from compress.stages.load import Opened

_DISAGREEMENT = 0.1  # share of images that two networks judge differently, for the resolution of a gate


def require_packages_of(pipeline: Pipeline) -> None:
    """Refuse a pipeline whose network or task needs a package that is not installed.

    Raises:
        PackageMissing: The package is not installed.
    """
    model = pipeline.resolved["stages"][0]["model"]
    if "timm" in model:
        require_packages(["timm"], f"model.timm: {model['timm']}")
    if pipeline.config.task.name == "detection":
        require_packages(DETECTION, "The task detection")


def require_importances(pipeline: Pipeline) -> None:
    """Refuse importances and training loops of the user that cannot be imported.

    Raises:
        ModelError: An importance or training loop cannot be imported.
    """
    for index, stage in enumerate(pipeline.resolved["stages"]):
        named = {"own": stage.get("own")} if stage["stage"] == "finetune" else {}
        if isinstance(stage.get("criterion"), dict):
            named["criterion.torch_pruning"] = stage["criterion"]["torch_pruning"]
        for key, reference in named.items():
            if reference is not None:
                with _located(f"stages[{index}].{key}"):
                    import_callable(reference, "Importance" if "criterion" in key else "Training")


def require_runtimes(pipeline: Pipeline) -> None:
    """Refuse runtimes and providers that are not available, and a program of the device that is not there.

    Raises:
        RuntimeUnavailable: A required runtime, provider or program is missing.
    """
    from compress.verification.device_command import device_of
    from compress.verification.measurement import Conditions, require_conditions  # imports ONNX Runtime

    config, device = pipeline.config, device_of(pipeline.config.deploy)
    verify: Any = config.stages[-1]
    sections: list[tuple[str, Any]] = [("verify", verify)]
    if device is not None:
        device.require_program()
    elif config.deploy is not None and not config.deploy.accept_foreign_table:
        sections.append(("deploy", config.deploy))
    wanted = {
        name: (Conditions(one.runtime, one.provider, one.threads, one.batch_size, device=device), True)
        for name, one in sections
    }
    for number, one in enumerate(verify.also):
        threads = one.threads or (verify.threads if device is None else 1)
        conditions = Conditions(one.runtime, one.provider, threads, verify.batch_size)
        wanted[f"verify.also[{number}]"] = conditions, one.required
    for export in config.stages:
        for format_name in getattr(export, "also", ()) if export.stage == "export" else ():
            wanted[f"export.also: {format_name}"] = Conditions(format_name, "CPU"), True
    for name, (conditions, is_required) in wanted.items():
        try:
            require_conditions(conditions)
        except CompressError as error:
            if is_required or isinstance(error, NoSuchPlace):
                error.message = f"Section '{name}': {error.message}"
                raise


def require_checkpoints(pipeline: Pipeline, factory: FactorySpec) -> None:
    """Refuse checkpoints to rewind to that do not fit the network.

    Raises:
        ArtifactError: A checkpoint cannot be read or does not fit.
    """
    for stage in pipeline.resolved["stages"]:
        if stage.get("rewind_to") is not None:
            from compress.checkpoint.rebuild import load_checkpoint  # imports torch

            load_checkpoint(factory, Path(stage["rewind_to"]))


def require_metrics(pipeline: Pipeline, evaluation: "Split") -> None:
    """Refuse gates on metrics that images without labels do not have.

    Raises:
        ConfigError: A gate names such a metric.
    """
    from compress.tasks.imitation import Imitation

    task = evaluation.task
    if isinstance(task, Imitation):
        known = ["distance", "cosine", *(("agreement",) if task.chooses else ())]
        require_known_metrics(pipeline.config, {"metrics": known})


@contextmanager
def _located(place: str) -> Iterator[None]:
    """Put a key path before the message of an error."""
    try:
        yield
    except CompressError as error:
        error.message = f"{place}: {error.message}"
        raise


@dataclass(frozen=True)
class Finding:
    """A problem of a pipeline.

    Attributes:
        section: Key path of the section at fault.
        kind: "error" would stop a run; "warning" would not.
        text: The problem, as a sentence.
        hint: Remedy, or None.
        exit_code: Exit code of the error; 0 for a warning.
        error: The error itself; None for a warning.
    """

    section: str
    kind: Literal["error", "warning"]
    text: str
    hint: str | None = None
    exit_code: int = 0
    error: CompressError | None = None


def find_problems(pipeline: Pipeline, progress: Progress | None = None) -> list[Finding]:
    """Open data, network, weights and runtimes of a pipeline, and return all problems found.

    Nothing is trained, exported or stored. The check takes seconds, plus the download of a data set.

    Args:
        pipeline: The pipeline, with validated settings.
        progress: Receives progress by part.
    """
    return _Inspection(pipeline, progress or SilentProgress()).run()


class _Warnings(SilentProgress):
    """Progress listener that collects warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


@dataclass
class _Inspection:
    pipeline: Pipeline
    progress: Progress
    findings: list[Finding] = field(default_factory=list)

    def run(self) -> list[Finding]:
        steps: list[tuple[str, Callable[[], object]]] = [
            ("packages", lambda: require_packages_of(self.pipeline)),
            ("code of your own", lambda: require_importances(self.pipeline)),
            ("runtimes", lambda: require_runtimes(self.pipeline)),
        ]
        with self.progress.task("open data, network and runtimes", len(steps) + 4) as task:
            for section, step in steps:
                self._try(section, step)
                task.advance()
            data = self._try("task", self._open_data)
            task.advance()
            counts = {} if data is None else self._count(data)
            task.advance()
            has_weights = self._has_weights()
            task.advance()
            if data is not None and len(counts) == 4:
                self._try("stages (verify)", lambda: require_metrics(self.pipeline, data.evaluation))
                if has_weights:
                    self._open_network(data)
            task.advance()
        if evaluation := counts.get("evaluation"):
            self._judge_gates(evaluation)
        return self.findings

    def _try(self, section: str, call: Callable[[], Any]) -> Any:
        """Return the result of a step, or add its error to the findings and return None."""
        try:
            return call()
        except CompressError as error:
            ours: CompressError | None = error
        except Exception as error:  # the user's code may raise anything
            ours = as_stage_error(error)
            if ours is None:
                raise
        assert ours is not None
        self._add(Finding(section, "error", ours.message, ours.hint, ours.exit_code, ours))
        return None

    def _add(self, finding: Finding) -> None:
        """Add a finding, or its section to that of the same problem of another split."""
        for place, one in enumerate(self.findings):
            if (one.text, one.hint) == (finding.text, finding.hint):
                self.findings[place] = replace(one, section=_joined(one.section, finding.section))
                return
        self.findings.append(finding)

    def _open_data(self) -> "Splits":
        from compress.data.from_config import Splits
        from compress.tasks.from_config import open_task

        return Splits(self.pipeline.config.data, open_task(self.pipeline.config.task))

    def _count(self, data: "Splits") -> dict[str, int]:
        """Return the number of images of each split that can be read."""
        import numpy as np

        def size(name: str) -> int:
            split = getattr(data, name)
            split.read(np.zeros(1, np.int64))
            return len(split)

        names = ("train", "calibration", "validation", "evaluation")
        from compress.search.teacher import LoadedTeacher

        data.teacher = LoadedTeacher(None)  # type: ignore[arg-type]  # only used when a batch is learned
        counts = {name: found for name in names if (found := self._try(f"data ({name})", partial(size, name)))}
        if len(counts) == len(names):
            self._try("data", data.check_classes)
        return counts

    def _has_weights(self) -> bool:
        """Return False if building the network or loading its weights fails; tried only if it needs no data."""
        from compress.stages.load import factory_spec, load_network

        config: Any = self.pipeline.config.stages[0]
        before = len(self.findings)
        spec = factory_spec(config.model)
        if spec.kind != "onnx" and not config.narrow and config.weights not in (PRETRAINED, UNTRAINED):
            self._try("stages[0] (load)", lambda: load_network(spec, config.weights))
            self._try("stages (rewind_to)", lambda: require_checkpoints(self.pipeline, spec))
        return len(self.findings) == before

    def _open_network(self, data: "Splits") -> None:
        """Run the network on images, and look for the layers that the stages name."""
        from compress.search.context import StageContext
        from compress.stages.load import LoadStage

        listener = _Warnings()
        config: Any = self.pipeline.config.stages[0]
        with tempfile.TemporaryDirectory() as folder:
            ctx = StageContext(Path(folder), self.pipeline.config.seed, data, listener, self.pipeline.config.deploy)
            opened = self._try("stages[0] (load)", lambda: LoadStage(config).open(ctx))
        self.findings += [Finding("stages[0] (load)", "warning", text) for text in listener.texts]
        if opened is not None:
            self._judge_baseline(opened, data)
            self._find_groups(opened)

    def _judge_baseline(self, opened: "Opened", data: "Splits") -> None:
        """Warn about a classifier at chance level on some evaluation images, or with another order of classes."""
        from compress.search.diagnosis import IMAGES, describe_baseline

        config: Any = self.pipeline.config.stages[0]
        if config.weights != UNTRAINED:
            section, split = "stages[0] (load)", data.evaluation.first(IMAGES)
            for text in self._try(section, lambda: describe_baseline(opened.module, split)) or ():
                self._add(Finding(section, "warning", text))

    def _find_groups(self, opened: "Opened") -> None:
        from compress.checkpoint.rebuild import example_input
        from compress.config.schema.prune import CutConfig
        from compress.search.survey import find_groups

        for index, stage in enumerate(self.pipeline.config.stages):
            if not isinstance(stage, CutConfig):
                continue
            example, listener = example_input(opened.signature), _Warnings()
            section = f"stages[{index}] ({stage.stage})"  # type: ignore[attr-defined]
            found = self._try(section, partial(find_groups, opened.module, example, stage, listener, None))
            if found is not None and not found[0]:
                self.findings.append(Finding(section, "error", "No prunable channel group found.", None, 3))
            self.findings += [Finding(section, "warning", text) for text in listener.texts]

    def _judge_gates(self, images: int) -> None:
        """Warn about gates on drops too small to be shown with this number of images."""
        verify: Any = self.pipeline.config.stages[-1]
        if self.pipeline.config.task.own is not None or self.pipeline.config.task.name != "classification":
            return
        least = 1.96 * math.sqrt(_DISAGREEMENT / images)
        for name, limit in verify.gates.max_drop.items():
            if name == "top1" and limit < least:
                text = (
                    f"gates.max_drop.top1 {limit:g} may end inconclusive: {images:,} evaluation images tell drops of "
                    f"about {least:.1%} and more from none, if the networks disagree on {_DISAGREEMENT:.0%} of them."
                )
                hint = f"Use {images_for(limit):,} images or more, or a limit of {math.ceil(100 * least) / 100:g}."
                self.findings.append(Finding("stages (verify)", "warning", text, hint))


def _joined(section: str, other: str) -> str:
    """Return the names of two sections as one.

    >>> _joined("data (train)", "data (validation)"), _joined("data (train)", "stages[0] (load)")
    ('data (train, validation)', 'data (train), stages[0] (load)')
    """
    start, _, rest = section.rpartition(" (")
    if start and other.startswith(f"{start} ("):
        return f"{start} ({rest[:-1]}, {other[len(start) + 2 :]}"
    return f"{section}, {other}"


def images_for(limit: float) -> int:
    """Return the number of evaluation images needed to show a drop of this size.

    >>> images_for(0.02)
    961
    """
    if limit <= 0:
        raise InternalError(f"No number of images shows a drop of {limit}.")
    return math.ceil(_DISAGREEMENT * (1.96 / limit) ** 2)
