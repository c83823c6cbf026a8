"""Agreement of other runtimes with the one that ships the file."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from compress.data.splits import Split
from compress.errors import ArtifactError, ConfigValueError, ModelError, NonFinite, NoSuchPlace, RuntimeUnavailable
from compress.model.artifacts import CheckResult
from compress.onnx_file.counting import count_onnx
from compress.onnx_file.io import is_half, is_quantized, load_onnx
from compress.progress import Progress
from compress.verification.checks import say_agreement
from compress.verification.first_difference import find_first_difference
from compress.verification.gates import skipped
from compress.verification.latency import compare_latency
from compress.verification.measurement import Conditions, latency_inputs
from compress.verification.parity import ParityResult, parity
from compress.verification.runtimes.base import Runtime
from compress.verification.samples import fixed_batch

EVALUATOR = "reference_evaluator"
ROUNDED_WITHIN = 0.05  # of the largest output: where values are rounded, each runtime rounds its own way
_IMAGES = 8
_EVALUATOR_WORK = 1_000_000_000  # MACs x images, a few seconds
_EVALUATOR = Conditions("onnx_reference", "CPU")


@dataclass(frozen=True, slots=True)
class Also:
    """One more runtime to open the file in.

    Attributes:
        label: Name of the runtime in the names of checks.
        runtime: Name in `catalog.RUNTIMES`.
        provider: Execution provider.
        threads: Intra-op threads; None takes the number of the shipping runtime.
        is_required: Whether the verdict fails where the runtime is not available.
    """

    label: str
    runtime: str
    provider: str
    threads: int | None = None
    is_required: bool = False

    @property
    def check(self) -> str:
        """Name of the check in this runtime."""
        return f"also.{self.label}"


def check_evaluator(session: Runtime, path: Path, split: Split, limit: float, progress: Progress) -> CheckResult:
    """Compare a file with the ONNX reference evaluator on a few images; skipped where that takes too long.

    Args:
        session: Open runtime that ships the file.
        path: The .onnx file.
        split: Split of at least one image.
        limit: Largest absolute difference of an output that passes.
        progress: Receives progress by batch.
    """
    if session.name == _EVALUATOR.runtime:
        return skipped(EVALUATOR, "it is the runtime that ships the file, and would be compared with itself")
    try:
        macs = count_onnx(path).macs
        images = min(_IMAGES, len(split), _EVALUATOR_WORK // max(1, macs))
        if images < (fixed_batch(session) or 1):
            why = f"the network has {macs:,} MACs an image, the evaluator is asked for up to {_EVALUATOR_WORK:,}"
            return skipped(EVALUATOR, why)
        with _EVALUATOR.open(path) as evaluator:
            result = parity(session, evaluator, split, images, progress=progress)
    except (ArtifactError, ModelError, NonFinite) as error:
        return skipped(EVALUATOR, f"it cannot be had: {error.message}")
    return _judge(EVALUATOR, result, _limit(path, limit, result), "the ONNX reference evaluator")


def check_also(
    wanted: Also, path: Path, split: Split, conditions: Conditions, limit: float, progress: Progress
) -> tuple[CheckResult, dict[str, Any]]:
    """Open a file in one more runtime, compare its outputs with the runtime that ships it, and time both side by side.

    Args:
        wanted: The other runtime.
        path: The .onnx file.
        split: Split of at least one image.
        conditions: Conditions of the runtime that ships the file; on this machine, also where a device is timed.
        limit: Largest absolute difference of an output that passes.
        progress: Receives progress by part.

    Returns:
        The check and plain values for the report. The check is skipped where the runtime is not installed, and fails
        where no machine has it.
    """
    conditions = conditions.here
    threads = wanted.threads or conditions.threads
    there = replace(conditions, runtime=wanted.runtime, provider=wanted.provider, threads=threads)
    stated: dict[str, Any] = {
        "label": wanted.label,
        "runtime": wanted.runtime,
        "provider": wanted.provider,
        "threads": threads,
        "is_required": wanted.is_required,
    }
    try:
        with ExitStack() as stack:
            sessions = {
                name: stack.enter_context(one.open(path)) for name, one in (("there", there), ("shipping", conditions))
            }
            for session in sessions.values():
                session.check_work(min(_IMAGES, len(split)) + conditions.timed_images)
            result = parity(sessions["there"], sessions["shipping"], split, _IMAGES, progress=progress)
        times = compare_latency(
            {name: partial(one.open, path) for name, one in (("there", there), ("shipping", conditions))},
            lambda session: latency_inputs(session, split, conditions.batch_size),
            conditions.calls,
            progress,
        ).samples
    except (NoSuchPlace, ArtifactError, ModelError, NonFinite) as error:
        check = CheckResult(wanted.check, "fail", None, None, "", error.message)
        return check, {**stated, "status": "fail", "reason": error.message}
    except (RuntimeUnavailable, ConfigValueError) as error:
        return skipped(wanted.check, error.message), {**stated, "status": "skipped", "reason": error.message}
    allowed = _limit(path, limit, result)
    check = _judge(wanted.check, result, allowed, str(conditions))
    begins = None
    if check.status == "fail":
        progress.note(f"{wanted.label}: outputs differ, looking for the first node that does")
        relative = min(allowed, 0.5 * result.max_abs) / max(result.largest_output, 1e-12)
        begins = find_first_difference(path, there.open, conditions.open, split, relative)
    median, beside = times["there"].p50, times["shipping"].p50
    since = f"; it begins at {begins}" if begins else ""
    detail = f"{there}: p50 {median:.3f} ms beside {beside:.3f} ms; {check.detail}{since}"
    stated |= {"status": check.status, "max_abs": result.max_abs, "p50_ms": median, "shipping_p50_ms": beside}
    stated |= {"first_difference": begins} if begins else {}
    return replace(check, detail=detail), stated


def _limit(path: Path, limit: float, result: ParityResult) -> float:
    """Return the limit, wider for a file in half precision or INT8."""
    model = load_onnx(path)
    return max(limit, ROUNDED_WITHIN * result.largest_output) if is_half(model) or is_quantized(model) else limit


def _judge(name: str, result: ParityResult, limit: float, other: str) -> CheckResult:
    detail = (
        f"{result.samples} images compared with {other}{say_agreement(result)}; the smallest "
        f"limit that passes is {result.smallest_tolerance:g}"
    )
    return CheckResult(name, "pass" if result.max_abs <= limit else "fail", result.max_abs, limit, "", detail)
