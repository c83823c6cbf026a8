"""Finished run that a bundle is made of, checked against its digests.

The files in a bundle, and the images that its samples are taken from, must have the digests that the run recorded.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.config.schema.data import DataConfig
from compress.errors import ArtifactError, ConfigError
from compress.formats import FOLDER as FORMATS
from compress.formats.files import FORMATS as CONVERTERS
from compress.formats.files import SOURCE_FILE
from compress.report.build import REPORT_SCHEMA
from compress.report.details import Quality
from compress.report.model import Report, read_report
from compress.storage.digest import RecordDamaged, digest_evaluation, digest_file, read_json, read_record
from compress.tasks import decoders
from compress.tasks.classification import CLASSIFICATION
from compress.tasks.detection import Detection
from compress.tasks.regression import Regression
from compress.tasks.segmentation import Segmentation

TASKS = (CLASSIFICATION.name, Detection.name, Segmentation.name, Regression.name)
MODEL_FILE, RECIPE_FILE = "model.onnx", "slim/recipe.json"


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """Run folder whose files match the digests in its report.

    Attributes:
        folder: The run folder.
        report: Report of the run.
        model_files: Name -> path of the ONNX model and of its external weights.
        format_files: Format -> files that the model was converted into for another runtime.
        recipe: The edits, as plain values.
        data: Checked `data:` section of the pipeline.
    """

    folder: Path
    report: Report
    model_files: dict[str, Path]
    format_files: dict[str, tuple[Path, ...]]
    recipe: dict[str, Any]
    data: DataConfig

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.report.name

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.report.details.quality.task

    @property
    def is_classifier(self) -> bool:
        """Return whether the output has a value for each class."""
        return self.task == CLASSIFICATION.name

    @property
    def decoder(self) -> str | None:
        """Name of the function that decodes a detector's outputs, if it is one of this package; else None."""
        module, _, name = str(self._task_settings.get("postprocess") or "").partition(":")
        return name if module == decoders.__name__ else None

    @property
    def decoder_arguments(self) -> dict[str, Any]:
        """Further arguments of that function."""
        return dict(self._task_settings.get("kwargs") or {})

    @property
    def _task_settings(self) -> dict[str, Any]:
        settings: Any = self.report.config.get("task") or {}
        return settings if isinstance(settings, dict) else {}

    @property
    def has_passed(self) -> bool:
        """Return whether the verdict was passed."""
        return self.report.verdict.passed

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [check.name for check in self.report.verdict.checks if check.status == "fail"]

    @property
    def inconclusive(self) -> list[str]:
        """Names of the checks that are inconclusive."""
        return [check.name for check in self.report.verdict.checks if check.status == "inconclusive"]

    @property
    def unmet(self) -> str:
        """Reason why the verdict did not pass, in words."""
        named = [*self.failed, *(f"{name} (inconclusive)" for name in self.inconclusive)]
        return ", ".join(named) or "a required check was not made"

    @property
    def verify(self) -> dict[str, Any]:
        """Settings of the `verify` stage."""
        settings: Any = self.report.config["stages"]
        last: dict[str, Any] = settings[-1]
        return last


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        ArtifactError: The folder is no run, the run is not finished, or a file differs from the one that the run wrote.
        ConfigError: The task of the run is none of `TASKS`.
    """
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise ArtifactError(f"RUN must be a run folder such as runs/NAME, '{folder}' {kind}.")
    if not (folder / "pipeline.yaml").is_file():
        raise ArtifactError(
            f"RUN must be a run folder such as runs/NAME, '{folder}' has no pipeline.yaml.",
            hint="`compress run PIPELINE` makes one.",
        )
    again = f"`compress run {folder / 'pipeline.yaml'} --runs-dir {folder.parent}` finishes it."
    if not (folder / "report.json").is_file():
        raise ArtifactError(f"The run in '{folder}' must be finished, it has no report.json.", hint=again)
    report = _read_report(folder / "report.json", again)
    try:
        _require_task(report.details.quality)
        digests = _require_provenance(report, folder, again)
        model_files = {name: folder / name for name in digests if name.startswith(MODEL_FILE)}
        for name in digests:
            _require_digest(folder / name, digests[name], again)
        data = DataConfig.model_validate(report.config["data"])
        _require_data(report, data)
        run = FinishedRun(
            folder, report, model_files, _format_files(folder, digests), _read_json(folder / RECIPE_FILE), data
        )
        _ = run.name, run.has_passed, run.failed, run.verify["gates"]
    except (KeyError, TypeError, IndexError, AttributeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"'{folder / 'report.json'}' lacks a value, or holds one of another kind: {type(error).__name__}: {reason}",
            hint=again,
        ) from error
    return run


def _format_files(folder: Path, names: Iterable[str]) -> dict[str, tuple[Path, ...]]:
    found: dict[str, tuple[Path, ...]] = {}
    for name in sorted(names):
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == FORMATS and parts[1] in CONVERTERS and parts[2] != SOURCE_FILE:
            found[parts[1]] = (*found.get(parts[1], ()), folder / name)
    return found


def _require_task(quality: Quality) -> None:
    """Refuse a run of a user's own task, whose outputs have no known meaning."""
    if quality.task not in TASKS:
        labels = "" if quality.is_labelled else " without labels"
        raise ConfigError(
            f"A bundle must be of one of the tasks {', '.join(TASKS)} with labelled images, this run's task is "
            f"{quality.task}{labels}.",
            hint="model.onnx in the run folder is the complete network.",
        )


def _require_provenance(report: Report, folder: Path, again: str) -> dict[str, str]:
    """Return name -> digest of the files, as recorded by the run."""
    digests = {} if report.provenance is None else report.provenance.files
    if MODEL_FILE not in digests or RECIPE_FILE not in digests:
        raise ArtifactError(
            f"'{folder / 'report.json'}' must state the digest of {MODEL_FILE}; an older version wrote it.",
            hint=again,
        )
    return digests


def _require_digest(file: Path, wanted: str, again: str) -> None:
    if not file.is_file():
        raise ArtifactError(f"The run in '{file.parent}' must hold '{file.name}', it is missing.", hint=again)
    found = digest_file(file)
    if found != wanted:
        raise ArtifactError(
            f"'{file}' must be the file that the run verified, of sha256 {wanted[:16]}..., got {found[:16]}...",
            hint=again,
        )


def _require_data(report: Report, data: DataConfig) -> None:
    """Refuse evaluation images that differ from those of the run: the samples would be other images."""
    wanted = None if report.provenance is None else report.provenance.data.evaluation
    found = digest_evaluation(data.model_dump(mode="json"))
    if found != wanted:
        raise ArtifactError(
            "The evaluation images must be those that the run was verified on, they have changed since.",
            hint="Run the pipeline again: the verdict is of other images, too.",
        )


def _read_report(path: Path, again: str) -> Report:
    """Return a report that equals its own digest.

    Raises:
        ArtifactError: The report is damaged or edited, has another schema, or lacks a digest (older versions).
    """
    try:
        values = read_record(path)
    except RecordDamaged as error:
        raise ArtifactError(error.message, hint=again) from error
    if values.get("schema") != REPORT_SCHEMA:
        raise ArtifactError(f"'{path}' must have schema {REPORT_SCHEMA}, got {values.get('schema')}.")
    return read_report(values, f"'{path}'")


def _read_json(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise ArtifactError(f"'{path}' must hold a JSON object.")
    return values
