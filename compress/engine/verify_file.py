"""Verification of an ONNX file that no run made: `compress verify FILE.onnx`."""

from dataclasses import dataclass
from pathlib import Path

from compress.config.load import Pipeline
from compress.config.schema.verify import DeployConfig, GatesFile, VerifyConfig
from compress.data.from_config import Splits, open_split
from compress.data.preprocessing import Preprocessing
from compress.data.splits import Split
from compress.errors import ArtifactError, ConfigValueError, InternalError
from compress.model.artifacts import Verdict
from compress.onnx_file.io import load_onnx, read_metadata
from compress.progress import Progress
from compress.stages.verify import conditions_of, gates_of, scope_of
from compress.tasks.from_config import open_task
from compress.verification.job import VerificationJob
from compress.verification.verdict import verify_onnx


@dataclass(frozen=True, slots=True)
class _Terms:
    """Images, conditions and limits of a verification.

    Attributes:
        evaluation: Images and labels.
        config: Conditions, robustness and gates.
        seed: Seed of noise and corruptions.
        deploy: Deployment of the pipeline, whose command times the file; None without one.
    """

    evaluation: Split
    config: VerifyConfig
    seed: int
    deploy: DeployConfig | None = None


def verify_file(path: Path, settings: Pipeline | GatesFile, against: Path | None, progress: Progress) -> Verdict:
    """Check an ONNX file against gates, on given images and under given conditions.

    Args:
        path: The ONNX file.
        settings: A pipeline, of which the data section and the `verify` stage are used, or a file of gates.
        against: The baseline's .onnx file, for gates that compare with it; without it these gates fail as not measured.
        progress: Receives progress by part.

    Raises:
        ArtifactError: A file is missing or no ONNX model.
        RuntimeUnavailable: The provider is not available.
        ConfigValueError: Neither the gates nor the file state the preprocessing of images.
        DataError: Images or labels cannot be used, or do not fit the file.
    """
    for file in (path, against):
        if file is not None and not file.is_file():
            raise ArtifactError(f"ONNX file '{file}' does not exist.")
    terms = _terms_of_gates(settings, path) if isinstance(settings, GatesFile) else _terms_of_pipeline(settings)
    config = terms.config
    job = VerificationJob(
        path,
        evaluation=terms.evaluation,
        conditions=conditions_of(config, terms.deploy),
        gates=gates_of(config),
        scope=scope_of(config, terms.evaluation, terms.seed),
        baseline_onnx=against,
    )
    return verify_onnx(job, progress)


def _terms_of_pipeline(pipeline: Pipeline) -> _Terms:
    config = pipeline.config.stages[-1]
    if not isinstance(config, VerifyConfig):
        raise InternalError("A pipeline passed validation without ending in verify.")
    data = Splits(pipeline.config.data, open_task(pipeline.config.task))
    return _Terms(data.evaluation, config, pipeline.config.seed, pipeline.config.deploy)


def _terms_of_gates(gates: GatesFile, path: Path) -> _Terms:
    """Return the terms of a file of gates; preprocessing that it lacks is read from the ONNX file."""
    if gates.preprocessing is not None:
        preprocessing = Preprocessing(**gates.preprocessing.model_dump())
    else:
        said = read_metadata(load_onnx(path)).preprocessing
        if said is None:
            raise ConfigValueError(
                f"preprocessing must be given: '{path}' does not say how images are prepared for it.",
                hint="in the file of gates, such as preprocessing: {mean: [0.485, 0.456, 0.406], "
                "std: [0.229, 0.224, 0.225]}, or --set preprocessing.mean=[0.5]",
            )
        preprocessing = said
    if gates.evaluation is None:
        raise InternalError("Gates passed validation without evaluation images.")
    evaluation = open_split("evaluation", gates.evaluation, preprocessing, open_task(gates.task))
    return _Terms(evaluation, gates, gates.seed)
