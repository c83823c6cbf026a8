"""Outputs of a file: parity with the torch network, quality on the evaluation split, quality under perturbation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import ModelError, NonFinite
from compress.model.artifacts import CheckResult, Signature
from compress.progress import Progress
from compress.tasks.outputs import each
from compress.verification.batching import check_batch, quality_batch
from compress.verification.checks import (
    REPEATABLE,
    check_edges,
    check_evaluation,
    check_parity,
    check_repeatable,
)
from compress.verification.gates import skipped
from compress.verification.job import PARITY, VerificationJob
from compress.verification.measurement import evaluation_batch
from compress.verification.parity import edge_parity, parity
from compress.verification.quality import Found, batch_size_of, first_images, image_input, predict, respond
from compress.verification.quantization_loss import AGREEMENT, check_agreement, of_float
from compress.verification.robustness import Standing, fitting, standings, stated
from compress.verification.runtimes.base import Runtime


@dataclass(frozen=True, slots=True)
class Outputs:
    """Result of running a file on the evaluation images.

    Attributes:
        checks: Checks in the order of the report.
        found: Metrics of the file; None where it cannot be measured.
        found_float: Metrics of the float file that it was quantised from; None without one.
        details: Values for the report.
    """

    checks: tuple[CheckResult, ...]
    found: Found | None = None
    found_float: Found | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Perturbed:
    """Result of running a file and its baseline on perturbed and shifted images.

    Attributes:
        checks: One failed check where the files cannot be run.
        standings: Metrics on each distribution.
        details: Values for the report.
    """

    checks: tuple[CheckResult, ...] = ()
    standings: tuple[Standing, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


def measure_baseline(job: VerificationJob, progress: Progress) -> Found | None:
    """Return the metrics of the baseline on all cores; None without one.

    Raises:
        ModelError, NonFinite, ArtifactError: The baseline cannot be run; the message names it.
    """
    path = job.baseline_onnx
    if path is None:
        return None
    with job.open_baseline(path, all_cores=True) as session:
        batch = quality_batch(session, path, job.evaluation, job.conditions)
        return predict(session, job.evaluation, batch, progress)


def measure_int8_baseline(job: VerificationJob, progress: Progress) -> Found | None:
    """Return the metrics of the baseline's INT8 file on all cores; None without one.

    Raises:
        ModelError, NonFinite, ArtifactError: The file cannot be run; the message names it.
    """
    if job.int8_baseline is None:
        return None
    with job.open_baseline(job.int8_baseline, all_cores=True) as session:
        return _predict(session, job.int8_baseline, job, progress)


def check_outputs(job: VerificationJob, progress: Progress) -> Outputs:
    """Check parity, metrics, repeatability and independence of the other images of a batch, on all cores."""
    with job.open(all_cores=True) as session:
        checks, details = _check_parity(session, job, progress)
        found = None
        try:
            found = _predict(session, job.path, job, progress)
        except (ModelError, NonFinite) as error:
            checks.append(CheckResult("evaluation", "fail", None, None, "images", error.message))
        else:
            details["evaluation"] = {"images": len(job.evaluation)}
            checks.append(check_evaluation(len(found), found.value, found.metric))
        checks.append(_check_repeatable(session, job))
        checks.append(_check_batch(session, job, progress))
    found_float = None
    if job.float_onnx is not None:
        check, found_float = _compare_with_float(job.float_onnx, found, job, progress)
        checks.append(check)
    return Outputs(tuple(checks), found, found_float, details)


def measure_perturbed(job: VerificationJob, progress: Progress) -> Perturbed:
    """Measure file and baseline under the requested noise, corruptions and distribution shift, on all cores."""
    wanted = job.scope.robustness
    if wanted is None:
        return Perturbed()
    with ExitStack() as stack:
        session = stack.enter_context(job.open(all_cores=True))
        batch, baseline = quality_batch(session, job.path, job.evaluation, job.conditions), None
        if job.baseline_onnx is not None:
            baseline = stack.enter_context(job.open_baseline(job.baseline_onnx, all_cores=True))
            batch = min(batch, quality_batch(baseline, job.baseline_onnx, job.evaluation, job.conditions))
        try:
            found = standings(session, baseline, job.evaluation, wanted, batch, progress, job.scope.shifted)
        except (ModelError, NonFinite) as error:
            return Perturbed((CheckResult("robustness", "fail", None, None, "", error.message),))
    details = {"wanted": asdict(fitting(wanted, job.evaluation)), "distributions": stated(found)}
    return Perturbed((), tuple(found), {"robustness": details})


def _check_parity(
    session: Runtime, job: VerificationJob, progress: Progress
) -> tuple[list[CheckResult], dict[str, Any]]:
    """Compare the file, or the float file behind a quantised one, with the torch network."""
    if job.reference is None:
        return [skipped(name, "no torch network to compare with") for name in PARITY], {}
    with _float_in_place(session, job) as compared:
        checks, details = _parity_of(compared, job, job.signature or compared.signature, progress)
    return checks if job.float_onnx is None else [of_float(check) for check in checks], details


@contextmanager
def _float_in_place(session: Runtime, job: VerificationJob) -> Iterator[Runtime]:
    """Open and yield the float file behind a quantised one; yield `session` itself where it is not quantised."""
    if job.float_onnx is None:
        yield session
        return
    with job.conditions.open(job.float_onnx, all_cores=True) as whole:
        yield whole


def _parity_of(
    session: Runtime, job: VerificationJob, signature: Signature, progress: Progress
) -> tuple[list[CheckResult], dict[str, Any]]:
    from compress.verification.runtimes.torch_eager import TorchEager  # torch, only where there is a reference

    limit, samples = job.gates.parity, job.scope.parity_samples
    assert job.reference is not None
    try:
        with TorchEager(job.reference, signature) as torch_runtime:
            result = parity(session, torch_runtime, job.evaluation, samples, progress=progress)
            edges = edge_parity(session, torch_runtime, job.evaluation, evaluation_batch(image_input(session)))
    except (ModelError, NonFinite) as error:
        return [CheckResult(name, "fail", None, limit, "", error.message) for name in PARITY], {}
    agreement = None if math.isnan(result.top1_agreement) else result.top1_agreement
    details = {"parity": {**asdict(result), "top1_agreement": agreement}}
    return [check_parity(result, samples, limit), check_edges(edges, limit)], details


def _predict(session: Runtime, path: Path, job: VerificationJob, progress: Progress) -> Found:
    """Measure an open file on the evaluation split; without labels, against the outputs of the baseline."""
    batch = quality_batch(session, path, job.evaluation, job.conditions)
    with ExitStack() as stack:
        baseline = None
        if not job.evaluation.task.needs_targets and job.baseline_onnx is not None:
            baseline = stack.enter_context(job.open_baseline(job.baseline_onnx, all_cores=True))
        return predict(session, job.evaluation, batch, progress, original=baseline)


def _check_repeatable(session: Runtime, job: VerificationJob) -> CheckResult:
    """Compare two runs on the first images: a network with random numbers gets a different verdict each time."""
    images = first_images(job.evaluation, batch_size_of(session, evaluation_batch(image_input(session))))
    try:
        return check_repeatable(_flat(session, images), _flat(session, images), job.gates.parity)
    except (ModelError, NonFinite) as error:
        return skipped(REPEATABLE, error.message, job.gates.parity)


def _flat(session: Runtime, images: np.ndarray) -> np.ndarray:
    """Return (N, M) outputs: all outputs of an image in one row."""
    rows = [np.asarray(one, np.float64).reshape(len(images), -1) for one in each(respond(session, images))]
    return np.concatenate(rows, axis=1)


def _check_batch(session: Runtime, job: VerificationJob, progress: Progress) -> CheckResult:
    check = check_batch(session, job.path, job.evaluation, job.conditions)
    if check.value is not None and check.limit is not None and check.value > check.limit:
        progress.warn(f"Outputs for an image depend on the other images of its batch: {check.detail}.")
    return check


def _compare_with_float(
    path: Path, found: Found | None, job: VerificationJob, progress: Progress
) -> tuple[CheckResult, Found | None]:
    """Measure the float file behind a quantised one, and compare the predictions of both."""
    if found is None:
        return skipped(AGREEMENT, "quality of the file could not be measured"), None
    try:
        with job.conditions.open(path, all_cores=True) as whole:
            found_float = _predict(whole, path, job, progress)
    except (ModelError, NonFinite) as error:
        return CheckResult(AGREEMENT, "fail", None, None, "share", error.message), None
    return check_agreement(found_float, found), found_float
