"""Which limits must the file keep, and does it? Pure comparisons of figures; nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from compress.artifacts import CheckResult, Figures, Status
from compress.verification.metrics import Estimate

_SLACK = 1e-9  # 0.9173 - 0.9073 is 0.010000000000000009 in floating point and must keep a limit of 0.01
_NONE: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits; None, or a name that is not there, is not checked.

    Attributes:
        parity: Largest absolute difference to torch on real samples.
        max_drop: "top1", "top5", "worst_class" -> largest loss against the baseline, as a share (0.01 is one point).
        max_rise: "calibration_error" -> largest gain against the baseline.
        minimum: "top1", "top5", "worst_class" -> smallest share.
        maximum: "calibration_error", "churn", "softmax_distance" -> largest value.
        by_bound: Whether a figure with an interval keeps a limit only when the worse end of the interval does.
        min_speedup: Baseline latency / slim latency, medians.
        max_latency_ms: Median latency.
        max_size_mb: All files of the model, in 10^6 bytes.
    """

    parity: float = 1e-3
    max_drop: Mapping[str, float] = field(default_factory=lambda: _NONE)
    max_rise: Mapping[str, float] = field(default_factory=lambda: _NONE)
    minimum: Mapping[str, float] = field(default_factory=lambda: _NONE)
    maximum: Mapping[str, float] = field(default_factory=lambda: _NONE)
    by_bound: bool = False
    min_speedup: float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the checks that the limits ask for, without parity."""
        limits = {
            "min_speedup": self.min_speedup,
            "max_latency_ms": self.max_latency_ms,
            "max_size_mb": self.max_size_mb,
        }
        return (
            *(f"{kind}.{name}" for kind, wanted in self._of_quality.items() for name in wanted),
            *(name for name, limit in limits.items() if limit is not None),
        )

    @property
    def _of_quality(self) -> dict[str, Mapping[str, float]]:
        return {"max_drop": self.max_drop, "max_rise": self.max_rise, "min": self.minimum, "max": self.maximum}

    def check_quality(
        self, own: Mapping[str, Estimate] | None, changes: Mapping[str, Estimate] | None
    ) -> list[CheckResult]:
        """Return one check for each limit of quality; one that cannot be measured is "skipped" and says why.

        Args:
            own: Of the file, as `metrics.estimate_quality` calls them; None where it could not be measured.
            changes: Against the baseline, as `metrics.estimate_changes` calls them; None without a baseline.
        """
        why = "quality of the file could not be measured" if own is None else "no baseline file to compare with"
        found = {**(own or {}), **(changes or {})}
        checks = []
        for kind, wanted in self._of_quality.items():
            prefix = {"max_drop": "drop.", "max_rise": "rise."}.get(kind, "")
            for name, limit in wanted.items():
                estimate = found.get(prefix + name)
                if estimate is None:
                    few = "the network has no more than five classes"
                    checks.append(skipped(f"{kind}.{name}", few if name == "top5" and own else why, limit, "share"))
                else:
                    checks.append(self._check(f"{kind}.{name}", estimate, limit, is_least=kind == "min"))
        return checks

    def _check(self, name: str, estimate: Estimate, limit: float, *, is_least: bool) -> CheckResult:
        """Hold an estimate to its limit, and say so where noise may have decided."""
        sign = -1 if is_least else 1  # a least value is a largest one of the opposite
        worse = estimate.low if is_least else estimate.high
        judged = worse if self.by_bound and worse is not None else estimate.value
        is_kept = sign * judged <= sign * limit + _SLACK
        detail = estimate.detail
        if estimate.low is not None and estimate.high is not None:
            detail += f"; with 95 % confidence from {estimate.low:.4f} to {estimate.high:.4f}"
            if estimate.low < limit < estimate.high:
                detail += ", on both sides of the limit" + ("" if self.by_bound else ": noise may have decided")
        return CheckResult(name, "pass" if is_kept else "fail", estimate.value, limit, "share", detail)


def check_gates(gates: Gates, slim: Figures, baseline: Figures | None, conditions: str) -> list[CheckResult]:
    """Return one check for each limit of speed and size; one that cannot be measured is "skipped" and says why.

    Args:
        gates: The limits.
        slim: Figures of the file; latency may be missing.
        baseline: Figures of the untouched network, None when there is none.
        conditions: How latency was measured, for the sentences: "onnxruntime, 1 thread, batch 1".
    """
    checks = []
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


def _speedup(limit: float, slim: Figures, baseline: Figures | None, conditions: str) -> CheckResult:
    if baseline is None or "p50" not in baseline.latency_ms:
        return skipped("min_speedup", "no baseline file to measure against", limit, "x")
    if "p50" not in slim.latency_ms:
        return skipped("min_speedup", "latency of the file could not be measured", limit, "x")
    before, after = baseline.latency_ms["p50"], slim.latency_ms["p50"]
    detail = f"median {before:.3f} ms -> {after:.3f} ms, interleaved ({conditions})"
    speedup = before / after
    status: Status = "pass" if speedup >= limit - _SLACK else "fail"
    return CheckResult("min_speedup", status, speedup, limit, "x", detail)


def _latency(limit: float, slim: Figures, conditions: str) -> CheckResult:
    if "p50" not in slim.latency_ms:
        return skipped("max_latency_ms", "latency of the file could not be measured", limit, "ms")
    median = slim.latency_ms["p50"]
    return _at_most("max_latency_ms", median, limit, "ms", f"median {median:.3f} ms ({conditions})")


def _at_most(name: str, value: float, limit: float, unit: str, detail: str) -> CheckResult:
    return CheckResult(name, "pass" if value <= limit + _SLACK else "fail", value, limit, unit, detail)
