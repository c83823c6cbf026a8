"""Latency, start, memory and throughput of a file beside its baseline."""

from dataclasses import asdict, dataclass, field
from typing import Any

from compress.errors import ModelError
from compress.model.artifacts import CheckResult
from compress.progress import Progress
from compress.verification.job import VerificationJob
from compress.verification.latency import Comparison, LatencyRatio, LatencySample
from compress.verification.measurement import time_files
from compress.verification.resources import Resources, measure_resources


@dataclass(frozen=True, slots=True)
class Speed:
    """Latency and resources of a file and its baseline.

    Attributes:
        checks: One failed check for a measurement that failed; () otherwise.
        samples: Timed calls by label: "slim", "baseline".
        ratio: Latency of the file / latency of the baseline; None without a baseline.
        resources: Start, memory and throughput; None where they are not requested.
        details: Values for the report.
    """

    checks: tuple[CheckResult, ...] = ()
    samples: dict[str, LatencySample] = field(default_factory=dict)
    ratio: LatencyRatio | None = None
    resources: Resources | None = None
    details: dict[str, Any] = field(default_factory=dict)


def measure_latencies(job: VerificationJob, progress: Progress) -> Speed:
    """Measure the latency of the file side by side with the baseline, and the baseline against itself."""
    conditions, close = job.conditions, job.gates.is_close_to_speed
    try:
        found = time_files(job.files, job.evaluation, conditions, progress, has_control=True, is_close=close)
    except ModelError as error:
        return Speed((CheckResult("latency", "fail", None, None, "ms", error.message),))
    if found.ratio is not None and found.ratio.control is not None:
        progress.note(f"latency / baseline's: {found.ratio}; the baseline against itself: {found.ratio.control}")
    series = {f"{label}_ms": list(sample.milliseconds) for label, sample in found.samples.items()}
    ratio = None if found.ratio is None else asdict(found.ratio)
    timed = {"baseline_file": "int8"} if job.int8_baseline is not None else {}
    details = {"latency": {"baseline_ms": [], **series, "ratio": ratio, **_describe(job, found), **timed}}
    return Speed((), found.samples, found.ratio, None, details)


def _describe(job: VerificationJob, found: Comparison) -> dict[str, Any]:
    """Return the conditions of the latency measurement, for the report."""
    conditions, device = job.conditions, job.conditions.device
    same = {"threads": conditions.threads, "batch_size": conditions.batch_size}
    if device is not None:
        place = {"runtime": found.runtime or None, "device": device.device, "command": str(device)}
        return {**place, **same, "io_binding": False}
    place = {"runtime": conditions.runtime, "provider": conditions.provider}
    return {**place, **same, "warmup": conditions.warmup, "io_binding": job.open().io_binding}


def measure_use(job: VerificationJob, progress: Progress) -> Speed:
    """Measure start, memory and throughput of the file and of the baseline, where they are requested."""
    sizes = job.scope.batch_sizes
    if not sizes:
        return Speed()
    try:
        found = measure_resources(job.files, job.evaluation, job.conditions.here, sizes, progress)
    except ModelError as error:
        return Speed((CheckResult("resources", "fail", None, None, "", error.message),))
    return Speed(resources=found, details={"runtime": asdict(found)})
