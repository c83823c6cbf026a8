"""Verdict on an ONNX file: every check, on the file itself, in the runtime that ships it.

first_checks    structure, weights, MACs, then provider and fitness for the task
outputs         parity, quality, quality under perturbation     speed     latency, start, memory, throughput
gates           limits
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.errors import ModelError
from compress.model.artifacts import CheckResult, ModelMetrics, Verdict
from compress.onnx_file.counting import count_onnx
from compress.progress import Progress, SilentProgress
from compress.verification.checks import REPEATABLE, check_baseline
from compress.verification.first_checks import Opening, StaticChecks, check_statically, open_files
from compress.verification.gates import skipped
from compress.verification.job import PARITY, VerificationJob
from compress.verification.measurement import existing_bytes, torch_params
from compress.verification.metrics import Estimate
from compress.verification.other_runtimes import check_also, check_evaluator
from compress.verification.outputs import (
    Outputs,
    Perturbed,
    check_outputs,
    measure_baseline,
    measure_int8_baseline,
    measure_perturbed,
)
from compress.verification.quality import Found
from compress.verification.quantization_loss import AGREEMENT, INT8_ALONE, check_against_int8, drop_shares
from compress.verification.remedies import with_remedies
from compress.verification.resources import Resources
from compress.verification.robustness import summarize
from compress.verification.speed import Speed, measure_latencies, measure_use
from compress.verification.summary import estimate, summarize_quality, values_of


def verify_onnx(job: VerificationJob, progress: Progress | None = None) -> Verdict:
    """Check a file and compare it with its gates.

    A file that cannot be run, or that returns NaN, is a failed check and not an error. A gate that cannot be measured
    is skipped; every gate is required, so a skipped one fails the verdict.

    Args:
        job: The file, its baseline and its limits.
        progress: Receives progress by part.

    Raises:
        ArtifactError: The file or the baseline is missing or no ONNX model.
        RuntimeUnavailable: The provider is not available.
        DataError: The evaluation split is empty, or its targets do not fit.
        ConfigValueError: The batch size is not the file's fixed one.
    """
    progress = progress or SilentProgress()
    static, opening = check_statically(job), open_files(job)
    before, baseline = measure_baseline(job, progress), _baseline_metrics(job, progress)
    alone = measure_int8_baseline(job, progress)
    measured = _measure(job, progress) if opening.is_runnable else _Measured(_not_run(job))
    return _Judgement(job, static, opening, before, baseline, alone, measured).verdict()


@dataclass(frozen=True)
class _Measured:
    """Results of the parts that run the file."""

    outputs: Outputs
    perturbed: Perturbed = field(default_factory=Perturbed)
    latency: Speed = field(default_factory=Speed)
    use: Speed = field(default_factory=Speed)
    elsewhere: tuple[CheckResult, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def checks(self) -> tuple[CheckResult, ...]:
        """All checks, in the order of the report."""
        own = (self.outputs.checks, self.perturbed.checks, self.latency.checks, self.use.checks, self.elsewhere)
        return tuple(check for checks in own for check in checks)


def _measure(job: VerificationJob, progress: Progress) -> _Measured:
    outputs = check_outputs(job, progress)
    perturbed = Perturbed() if outputs.found is None else measure_perturbed(job, progress)
    latency, use = measure_latencies(job, progress), measure_use(job, progress)
    elsewhere, stated = _check_elsewhere(job, progress)
    also = {"also": stated} if stated else {}
    details = {**outputs.details, **perturbed.details, **latency.details, **use.details, **also}
    return _Measured(outputs, perturbed, latency, use, elsewhere, details)


def _not_run(job: VerificationJob) -> Outputs:
    """Return the checks that are skipped where the file cannot be run."""
    quantized = (AGREEMENT,) if job.float_onnx is not None else ()
    compared = PARITY if job.reference is not None else ()
    names = (*compared, "evaluation", REPEATABLE, *quantized, *job.scope.opinions)
    return Outputs(tuple(skipped(name, "the file cannot be run on these images") for name in names))


def _check_elsewhere(job: VerificationJob, progress: Progress) -> tuple[tuple[CheckResult, ...], list[dict[str, Any]]]:
    """Compare the file with the reference evaluator, and with itself in the other requested runtimes."""
    limit = job.gates.parity
    with job.open(all_cores=True) as session:
        checks = [check_evaluator(session, job.path, job.evaluation, limit, progress)]
    stated = []
    for one in job.scope.also:
        check, values = check_also(one, job.path, job.evaluation, job.conditions, limit, progress)
        checks.append(check)
        stated.append(values)
    return tuple(checks), stated


def _baseline_metrics(job: VerificationJob, progress: Progress) -> ModelMetrics | None:
    """Return the metrics of the baseline; without given ones, size and counts of its file, 0 where not countable."""
    path = job.baseline_onnx
    if job.baseline_metrics is not None or path is None:
        return job.baseline_metrics
    try:
        counts = count_onnx(path)
    except ModelError as error:
        progress.warn(f"MACs of '{path}' are not counted. {error.message}")
        return ModelMetrics(0, 0, existing_bytes(path), {}, {})
    return ModelMetrics(counts.macs, counts.params, existing_bytes(path), {}, {})


@dataclass(frozen=True)
class _Judgement:
    """Results of all parts, to be compared with the gates."""

    job: VerificationJob
    static: StaticChecks
    opening: Opening
    before: Found | None
    baseline: ModelMetrics | None
    alone: Found | None
    measured: _Measured

    def verdict(self) -> Verdict:
        """Apply the gates and return the verdict."""
        job, measured, outputs = self.job, self.measured, self.measured.outputs
        quality = summarize_quality(self.before, outputs.found, job.evaluation)
        own, changes = quality.own, quality.changes
        if measured.perturbed.standings:
            added, drops = summarize(measured.perturbed.standings)
            own, changes = {**(own or {}), **added}, {**(changes or {}), **drops}
        slim, baseline = self._slim_metrics(own), self._own_baseline()
        details = {
            **self.opening.details,
            **measured.details,
            "quality": quality.details,
            "shares": drop_shares(self.before, outputs.found_float, outputs.found),
        }
        checks = [
            *(*self.static.checks, *self.opening.checks, *measured.checks),
            *self._check_recorded(),
            *self._check_against_int8(),
            *job.gates.check_quality(own, changes, job.evaluation.task.main),
            *self._check_costs(slim, baseline),
        ]
        required = self._required()
        metric = job.evaluation.task.main
        return Verdict(with_remedies(checks, required), required, slim, baseline, details, metric)

    def _check_recorded(self) -> list[CheckResult]:
        """Compare the baseline's metric with the recorded one, where both are known."""
        metric = self.job.evaluation.task.main
        recorded = None if self.baseline is None else self.baseline.quality.get(metric.name)
        if recorded is None or self.before is None:
            return []
        return [check_baseline(recorded, self.before.value, len(self.before), metric)]

    def _check_against_int8(self) -> list[CheckResult]:
        """Compare the file with what quantisation alone gives, where that was measured."""
        found = self.measured.outputs.found
        if self.job.int8_baseline is None:
            return []
        if self.alone is None or found is None:
            return [skipped(INT8_ALONE, "quality of the file could not be measured")]
        return [check_against_int8(self.alone, found, self.measured.latency.ratio)]

    def _check_costs(self, slim: ModelMetrics, baseline: ModelMetrics | None) -> list[CheckResult]:
        gates, latency, resources = self.job.gates, self.measured.latency, self._resources
        return [
            *gates.check_speed(latency.samples.get("slim"), latency.ratio, str(self.job.conditions)),
            *gates.check_size(slim),
            *gates.check_ratios(slim, baseline, resources, latency.ratio),
            *gates.check_resources(resources, "slim"),
            *gates.check_fallback(self.opening.fell_back),
        ]

    @property
    def _resources(self) -> Resources | None:
        return self.measured.use.resources

    def _required(self) -> tuple[str, ...]:
        """Return the names of the checks that must not be skipped."""
        job = self.job
        always = ("structure", "denormals", "provider", job.fitness, "evaluation", REPEATABLE)
        compared = ("macs_agree", "weights_agree", *PARITY) if job.reference is not None else ()
        quantized = (AGREEMENT,) if job.float_onnx is not None else ()
        alone = (INT8_ALONE,) if job.int8_baseline is not None else ()
        return (*always, *compared, *quantized, *alone, *job.scope.required, *job.gates.asked)

    def _slim_metrics(self, own: Mapping[str, Estimate] | None) -> ModelMetrics:
        counts, samples = self.static.counts, self.measured.latency.samples
        macs, params = (0, 0) if counts is None else (counts.macs, counts.params)
        if self.job.reference is not None:
            params = torch_params(self.job.reference)
        latency = samples["slim"].to_metrics() if "slim" in samples else {}
        return ModelMetrics(macs, params, existing_bytes(self.job.path), values_of(own), latency)

    def _own_baseline(self) -> ModelMetrics | None:
        """Return the baseline's metrics with quality and latency of this run only."""
        given, samples = self.baseline, self.measured.latency.samples
        if given is None:
            return None
        latency = samples["baseline"].to_metrics() if "baseline" in samples else {}
        quality = values_of(estimate(self.before)) if self.before is not None else {}
        return ModelMetrics(given.macs, given.params, given.size_bytes, quality, latency)
