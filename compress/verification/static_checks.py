"""Checks of a file that need no run of it: structure, preprocessing, denormal weights, MACs and weights."""

from dataclasses import dataclass
from pathlib import Path

from compress.errors import ArtifactError, ModelError
from compress.model.artifacts import CheckResult
from compress.onnx_file.counting import OnnxCounts, count_onnx
from compress.onnx_file.io import at_sizes, load_onnx, read_signature, read_sizes
from compress.verification.checks import (
    check_denormals,
    check_macs,
    check_preprocessing,
    check_structure,
    check_weights,
)
from compress.verification.gates import skipped
from compress.verification.job import VerificationJob
from compress.verification.quality import check_not_empty
from compress.verification.quantization_loss import of_float


@dataclass(frozen=True, slots=True)
class StaticChecks:
    """Result of the checks without a run.

    Attributes:
        checks: In the order of the report.
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
