"""First opening of a file and of its baseline, before any long work: provider, and fitness for the task."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from compress.errors import ArtifactError, DataError, ModelError, NonFinite
from compress.model.artifacts import CheckResult
from compress.onnx_file.io import load_onnx
from compress.tasks.classification import Classification
from compress.verification.checks import check_baseline_preprocessing, check_provider, list_fell_back
from compress.verification.gates import skipped
from compress.verification.job import VerificationJob
from compress.verification.measurement import check_batch_size, latency_inputs
from compress.verification.quality import (
    check_image_shape,
    check_labels,
    check_task,
    classifier_width,
    image_input,
    named,
)
from compress.verification.runtimes.base import Runtime


@dataclass(frozen=True, slots=True)
class Opening:
    """Result of the first opening.

    Attributes:
        checks: In the order of the report.
        is_runnable: True where the file can be run on the evaluation images.
        fell_back: Operators that the provider left to another one; None where that is not known.
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
        ModelError, NonFinite, ArtifactError: The baseline is not for the task, or cannot be opened.
        RuntimeUnavailable: The provider is not there.
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
    """Check the provider of an open file that is fit for the task, and list the nodes it left to others."""
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
    """Check that an open file is for the task and takes the images; return the number of a classifier's classes."""
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
