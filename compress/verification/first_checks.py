"""Checks of a file before any long work: static checks without a run, and checks at its first opening."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError, DataError, ModelError, NonFinite
from compress.model.artifacts import CheckResult
from compress.onnx_file.counting import OnnxCounts, count_onnx
from compress.onnx_file.io import at_sizes, load_onnx, read_signature, read_sizes
from compress.tasks.classification import Classification
from compress.verification.checks import (
    check_baseline_preprocessing,
    check_denormals,
    check_macs,
    check_preprocessing,
    check_provider,
    check_structure,
    check_weights,
    list_fell_back,
)
from compress.verification.gates import skipped
from compress.verification.job import VerificationJob
from compress.verification.measurement import check_batch_size, latency_inputs
from compress.verification.quality import (
    check_image_shape,
    check_labels,
    check_not_empty,
    check_task,
    classifier_width,
    image_input,
    named,
)
from compress.verification.quantization_loss import of_float
from compress.verification.runtimes.base import Runtime


@dataclass(frozen=True, slots=True)
class StaticChecks:
    """Result of the checks without a run.

    Attributes:
        checks: Checks in the order of the report.
        counts: MACs, params and weights of the graph; None where they cannot be counted.
    """

    checks: tuple[CheckResult, ...]
    counts: OnnxCounts | None


def check_statically(job: VerificationJob) -> StaticChecks:
    """Check a file without running it.

    Raises:
        DataError: The evaluation split is empty.
        ArtifactError: The file is missing or no ONNX model.
    """
    check_not_empty(job.evaluation)
    model = load_onnx(job.path)
    structure = check_structure(model, job.path, job.signature, job.opset)
    counts, failure = _count(job.path)
    is_valid = structure.status == "pass"
    denormals = check_denormals(job.path) if is_valid else skipped("denormals", "the file is not valid")
    checks = (structure, check_preprocessing(model, job.evaluation), denormals)
    if job.reference is None:
        why = failure or "no torch network to compare with"
        return StaticChecks((*checks, skipped("macs_agree", why), skipped("weights_agree", why)), counts)
    compared, wanted = counts, at_sizes(job.signature or read_signature(model), read_sizes(model))
    if job.float_onnx is not None:
        compared, failure = _count(job.float_onnx)
    macs = check_macs(compared.macs if compared else failure, job.reference, wanted)
    weights = check_weights(compared.layer_weights if compared else failure, job.reference, wanted)
    pair = (macs, weights) if job.float_onnx is None else (of_float(macs), of_float(weights))
    return StaticChecks((*checks, *pair), counts)


def _count(path: Path) -> tuple[OnnxCounts | None, str]:
    """Return the counts of a graph, or None and the reason why it cannot be counted."""
    try:
        return count_onnx(path), ""
    except (ArtifactError, ModelError) as error:  # weights that are missing fail the check of the structure
        return None, error.message


@dataclass(frozen=True, slots=True)
class Opening:
    """Result of the first opening.

    Attributes:
        checks: Checks in the order of the report.
        is_runnable: True where the file can be run on the evaluation images.
        fell_back: Nodes that another provider computes ("Conv conv1"); None where they are not known.
        details: Values for the report.
    """

    checks: tuple[CheckResult, ...]
    is_runnable: bool
    fell_back: list[str] | None = None
    details: dict[str, Any] = field(default_factory=dict)


def open_files(job: VerificationJob) -> Opening:
    """Open the file and its baseline once.

    Raises:
        DataError: The targets do not fit, or file and baseline have different numbers of classes.
        ModelError, NonFinite, ArtifactError: The baseline does not fit the task, or cannot be opened.
        RuntimeUnavailable: The provider is not available.
        ConfigValueError: The batch size is not the file's fixed one.
    """
    before: tuple[CheckResult, ...] = ()
    width = None
    if job.baseline_onnx is not None:
        before = tuple(check_baseline_preprocessing(load_onnx(job.baseline_onnx), job.evaluation))
        with job.open_baseline(job.baseline_onnx) as baseline, named(baseline):
            width = _check_fitness(baseline, job)
    try:
        with job.open() as session:
            try:
                own = _check_fitness(session, job)
            except (ModelError, NonFinite) as error:
                failed = CheckResult(job.fitness, "fail", None, None, "", _with_hint(error))
                return Opening((*before, check_provider(session), failed), is_runnable=False)
            opening = _open(session, job, before, own)
    except ArtifactError as error:
        remedy = "give a file that the runtime opens; the detail says what it did not take"
        failed = CheckResult("provider", "fail", None, None, "", error.message, remedy=remedy)
        return Opening((*before, failed, skipped(job.fitness, "the file cannot be opened")), is_runnable=False)
    if width is not None and own != width:
        raise DataError(
            f"File and baseline must tell apart the same classes, got {own} and {width}.",
            hint="--against takes a file with the classes of the one that is verified.",
        )
    return opening


def _open(session: Runtime, job: VerificationJob, before: tuple[CheckResult, ...], classes: int | None) -> Opening:
    """Check the provider of an open file that fits the task, and list the nodes that fell back to others."""
    session.check_work(len(job.evaluation) + job.conditions.timed_images)
    placements = None
    with suppress(ModelError):  # a file that fails on its input is reported by the checks of its outputs
        placements = session.placements(latency_inputs(session, job.evaluation, job.conditions.batch_size))
    images = f"images of {' x '.join(map(str, image_input(session).shape[1:]))}"
    detail = f"{job.evaluation.task.name}, {images}" if classes is None else f"{classes} classes, {images}"
    fitness = CheckResult(job.fitness, "pass", None, None, "", detail)
    checks = (*before, check_provider(session, placements), fitness)
    if placements is None:
        return Opening(checks, is_runnable=True)
    fell_back = list_fell_back(session.provider, placements)
    providers = {
        "asked": session.provider,
        "nodes": {provider: len(nodes) for provider, nodes in placements.items()},
        "fell_back": fell_back,
    }
    return Opening(checks, True, fell_back, {"providers": providers})


def _check_fitness(session: Runtime, job: VerificationJob) -> int | None:
    """Check that an open file fits the task and the images; return the number of classes of a classifier."""
    if not isinstance(job.evaluation.task, Classification):
        check_batch_size(session, job.conditions)
        check_task(session, job.evaluation)
        return None
    width = classifier_width(session)
    check_image_shape(session, job.evaluation)
    check_labels(job.evaluation, width)
    check_batch_size(session, job.conditions)
    return width


def _with_hint(error: ModelError | NonFinite) -> str:
    return error.message if error.hint is None else f"{error.message} Hint: {error.hint}."
