"""Which limits must the file keep, and does it? Pure comparisons of figures; nothing is measured here."""

from __future__ import annotations

from dataclasses import dataclass

from compress.artifacts import CheckResult, Figures

_SLACK = 1e-9  # 0.9173 - 0.9073 is 0.010000000000000009 in floating point and must keep a limit of 0.01


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits; None is not checked.

    Attributes:
        parity: Largest absolute difference to torch on real samples.
        max_drop_top1: Largest loss of top-1 against the baseline, as a share (0.01 is one point).
        min_speedup: Baseline latency / slim latency, medians.
        max_latency_ms: Median latency.
        max_size_mb: All files of the model, in 10^6 bytes.
    """

    parity: float = 1e-3
    max_drop_top1: float | None = None
    min_speedup: float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the checks that the limits ask for, without parity."""
        limits = {
            "max_drop.top1": self.max_drop_top1,
            "min_speedup": self.min_speedup,
            "max_latency_ms": self.max_latency_ms,
            "max_size_mb": self.max_size_mb,
        }
        return tuple(name for name, limit in limits.items() if limit is not None)


def check_gates(gates: Gates, slim: Figures, baseline: Figures | None, conditions: str) -> list[CheckResult]:
    """Return one check for each limit given; one that cannot be measured is "skipped" and says why.

    Args:
        gates: The limits.
        slim: Figures of the file; quality and latency may be missing.
        baseline: Figures of the untouched network, None when there is none.
        conditions: How latency was measured, for the sentences: "onnxruntime, 1 thread, batch 1".
    """
    checks = []
    if gates.max_drop_top1 is not None:
        checks.append(_drop(gates.max_drop_top1, slim, baseline))
    if gates.min_speedup is not None:
        checks.append(_speedup(gates.min_speedup, slim, baseline, conditions))
    if gates.max_latency_ms is not None:
        checks.append(_latency(gates.max_latency_ms, slim, conditions))
    if gates.max_size_mb is not None:
        megabytes = slim.size_bytes / 1e6
        detail = f"{slim.size_bytes:,} bytes in all files"
        checks.append(_at_most("max_size_mb", megabytes, gates.max_size_mb, "MB", detail))
    return checks


def skipped(name: str, detail: str, limit: float | None = None, unit: str = "") -> CheckResult:
    """Return a check that could not be made."""
    return CheckResult(name, "skipped", None, limit, unit, detail)


def _drop(limit: float, slim: Figures, baseline: Figures | None) -> CheckResult:
    name = "max_drop.top1"
    if baseline is None or "top1" not in baseline.quality:
        return skipped(name, "no baseline top-1 to compare with", limit, "share")
    if "top1" not in slim.quality:
        return skipped(name, "top-1 of the file could not be measured", limit, "share")
    before, after = baseline.quality["top1"], slim.quality["top1"]
    detail = f"top-1 {before:.2%} -> {after:.2%}, both on ONNX files; {(before - after) * 100:.2f} points lost"
    return _at_most(name, before - after, limit, "share", detail)


def _speedup(limit: float, slim: Figures, baseline: Figures | None, conditions: str) -> CheckResult:
    if baseline is None or "p50" not in baseline.latency_ms:
        return skipped("min_speedup", "no baseline file to measure against", limit, "x")
    if "p50" not in slim.latency_ms:
        return skipped("min_speedup", "latency of the file could not be measured", limit, "x")
    before, after = baseline.latency_ms["p50"], slim.latency_ms["p50"]
    detail = f"median {before:.3f} ms -> {after:.3f} ms, interleaved ({conditions})"
    speedup = before / after
    status = "pass" if speedup >= limit - _SLACK else "fail"
    return CheckResult("min_speedup", status, speedup, limit, "x", detail)  # type: ignore[arg-type]


def _latency(limit: float, slim: Figures, conditions: str) -> CheckResult:
    if "p50" not in slim.latency_ms:
        return skipped("max_latency_ms", "latency of the file could not be measured", limit, "ms")
    median = slim.latency_ms["p50"]
    return _at_most("max_latency_ms", median, limit, "ms", f"median {median:.3f} ms ({conditions})")


def _at_most(name: str, value: float, limit: float, unit: str, detail: str) -> CheckResult:
    return CheckResult(name, "pass" if value <= limit + _SLACK else "fail", value, limit, unit, detail)
