"""Verification job: a file, everything it is compared with, and its limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compress.data.splits import Split
from compress.errors import ConfigValueError
from compress.model.artifacts import ModelMetrics, Signature
from compress.tasks.classification import Classification
from compress.verification.gates import Gates
from compress.verification.measurement import Conditions
from compress.verification.runtimes.base import Runtime
from compress.verification.scope import Scope

if TYPE_CHECKING:  # a file alone is verified without torch
    from torch import nn

PARITY = ("parity", "parity_edges")


@dataclass(frozen=True, slots=True)
class VerificationJob:
    """A file to verify.

    Attributes:
        path: The .onnx file.
        evaluation: Split that the metrics are measured on, with all its images.
        conditions: Runtime, provider, threads and batch size.
        gates: The limits.
        scope: Optional measurements.
        signature: Required inputs and outputs of the file; None accepts any.
        opset: Required operator set of the file; None accepts any.
        reference: Torch network that the file must equal; without one, parity and the comparison of MACs are skipped
            and not required.
        baseline_onnx: The baseline's export; it runs on the same images, and its latency is measured side by side with
            the file's.
        baseline_metrics: The baseline's size and MACs; counted in `baseline_onnx` when None.
        float_onnx: Float file that a quantised one was made from. Instead of the quantised file it must equal
            `reference`, and the two files are compared.
        int8_baseline: The baseline's file, quantised as the file was. Latency, start, memory and throughput are then
            compared with it instead of `baseline_onnx`, and its metrics are measured.

    Raises:
        ConfigValueError: There are neither labels nor a baseline.
    """

    path: Path
    evaluation: Split
    conditions: Conditions
    gates: Gates
    scope: Scope = field(default_factory=Scope)
    signature: Signature | None = None
    opset: int | None = None
    reference: nn.Module | None = None
    baseline_onnx: Path | None = None
    baseline_metrics: ModelMetrics | None = None
    float_onnx: Path | None = None
    int8_baseline: Path | None = None

    def __post_init__(self) -> None:
        if not self.evaluation.task.needs_targets and self.baseline_onnx is None:
            raise ConfigValueError(
                f"Images without labels ({self.evaluation.task.name}) must be compared with the baseline, its "
                "file is not given.",
                hint="--against takes it.",
            )

    @property
    def files(self) -> dict[str, Path]:
        """The files that are timed, by label: "slim", and "baseline" where there is one."""
        baseline = self.int8_baseline or self.baseline_onnx
        return {"slim": self.path} if baseline is None else {"slim": self.path, "baseline": baseline}

    @property
    def fitness(self) -> str:
        """Name of the check that the file fits the task."""
        return "classifier" if isinstance(self.evaluation.task, Classification) else "task"

    def open(self, *, all_cores: bool = False) -> Runtime:
        """Return the runtime of the file, to be opened by `with`."""
        return self.conditions.open(self.path, all_cores=all_cores)

    def open_baseline(self, path: Path, *, all_cores: bool = False) -> Runtime:
        """Return the runtime of the baseline, to be opened by `with`; its errors name the baseline."""
        runtime = self.conditions.open(path, all_cores=all_cores)
        runtime.owner = f"Baseline '{path}'"
        return runtime
