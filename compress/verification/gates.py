"""Gates: limits of the verdict, compared with measured values. Nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from compress.model.artifacts import CheckResult, ModelMetrics
from compress.tasks.base import Metric
from compress.tasks.classification import CLASSIFICATION
from compress.verification.decision_rules import JudgeBy, images_needed, is_coarse, is_undecided, judge
from compress.verification.latency import LatencyRatio, LatencySample
from compress.verification.metrics import Estimate
from compress.verification.resources import Resources

_WHY = {
    "top5": "the network has no more than five classes",
    "worst_class": "the evaluation split has no image of some classes",
    "noise": "no noise is asked for",
    "corruptions": "no corruptions are asked for",
    "shifted": "no shifted data sets are named",
    "worst_distribution": "no robustness is asked for",
    "excess_error": "no corruptions are asked for",
}
_CLOSE = 0.15
_NO_BASELINE = "no baseline file to compare with"
_MISSING = {"max_cold_start_ms": "start", "max_memory_mb": "memory", "min_images_per_second": "throughput"}
_OF_SIZE = {"max_size_mb": "MB", "max_macs": "MACs", "max_params": "params"}
_OF_RESOURCES = {"max_cold_start_ms": "ms", "max_memory_mb": "MB", "min_images_per_second": "images/s"}
_NONE: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits of the verdict; a limit of None, or a name missing in a mapping, is not checked.

    Attributes:
        parity: Largest absolute difference to torch on real samples.
        max_drop: "top1", "top5", "worst_class", "noise", "corruptions", "shifted", "worst_distribution", or the metrics
            of another task -> largest loss against the baseline, as a share (0.01 is one percentage point).
        max_rise: "calibration_error", "excess_error" -> largest gain against the baseline.
        minimum: "top1", "top5", "worst_class", "noise", "corruptions", "shifted" -> smallest share.
        maximum: "calibration_error", "churn", "softmax_distance" -> largest value.
        max_drop_on: Name of a distribution -> largest loss of top-1 on it.
        max_ratio: "macs", "params", "size", "p50", "p90", "p95", "p99", "cold_start", "memory", "energy" -> largest
            ratio to the baseline's value.
        max_quantile_ms: "p90", "p95", "p99" -> largest latency.
        max_macs: Largest number of MACs for one image.
        max_params: Largest number of scalars in parameters.
        judge_by: Whether the estimate or its interval must keep a limit (`decision_rules.judge`).
        min_speedup: Smallest ratio of baseline latency to slim latency, medians.
        max_latency_ms: Largest median latency.
        max_size_mb: Largest size of all files of the model, in 10^6 bytes.
        max_cold_start_ms: Longest time until a session is ready in a new process.
        max_memory_mb: Largest growth of memory with the session, in 10^6 bytes.
        min_images_per_second: Smallest throughput, at the batch size with the highest.
        max_fallback_nodes: Largest number of nodes that another provider than the requested one computes.
    """

    parity: float = 1e-3
    max_drop: Mapping[str, float] = field(default_factory=lambda: _NONE)
    max_rise: Mapping[str, float] = field(default_factory=lambda: _NONE)
    minimum: Mapping[str, float] = field(default_factory=lambda: _NONE)
    maximum: Mapping[str, float] = field(default_factory=lambda: _NONE)
    max_drop_on: Mapping[str, float] = field(default_factory=lambda: _NONE)
    max_ratio: Mapping[str, float] = field(default_factory=lambda: _NONE)
    max_quantile_ms: Mapping[str, float] = field(default_factory=lambda: _NONE)
    max_macs: int | None = None
    max_params: int | None = None
    judge_by: JudgeBy = "estimate"
    min_speedup: float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    max_cold_start_ms: float | None = None
    max_memory_mb: float | None = None
    min_images_per_second: float | None = None
    max_fallback_nodes: int | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the checks of all limits that are set, without parity."""
        single = ("min_speedup", "max_latency_ms", *_OF_SIZE, *_OF_RESOURCES, "max_fallback_nodes")
        several = {**self._of_quality, "max_ratio": self.max_ratio, "max_quantile_ms": self.max_quantile_ms}
        return (
            *(f"{kind}.{name}" for kind, wanted in several.items() for name in wanted),
            *(name for name in single if getattr(self, name) is not None),
        )

    @property
    def _of_quality(self) -> dict[str, Mapping[str, float]]:
        return {
            "max_drop": self.max_drop,
            "max_drop_on": self.max_drop_on,
            "max_rise": self.max_rise,
            "min": self.minimum,
            "max": self.maximum,
        }

    def check_quality(
        self,
        own: Mapping[str, Estimate] | None,
        changes: Mapping[str, Estimate] | None,
        metric: Metric = CLASSIFICATION.main,
    ) -> list[CheckResult]:
        """Return one check for each limit of quality; "skipped" with the reason for an unknown metric.

        Args:
            own: Metrics of the file, named as in `metrics.estimate_quality`; None where it could not be measured.
            changes: Changes against the baseline, named as in `metrics.estimate_changes`; None without a baseline.
            metric: Primary metric; noise and corruptions are judged by it, too.
        """
        found = {**(own or {}), **(changes or {})}
        checks = []
        for kind, wanted in self._of_quality.items():
            prefix = {"max_drop": "drop.", "max_drop_on": "on.", "max_rise": "rise."}.get(kind, "")
            for name, limit in wanted.items():
                unit = "share" if metric.other(name).is_share or kind == "max_drop_on" else ""
                estimate = found.get(prefix + name)
                if estimate is None:
                    compares = bool(prefix) or name in ("churn", "softmax_distance")
                    why = _why_missing(kind, name, own, None if compares and changes is None else found)
                    checks.append(skipped(f"{kind}.{name}", why, limit, unit))
                else:
                    checks.append(self._check(f"{kind}.{name}", estimate, limit, is_least=kind == "min", unit=unit))
        return checks

    def is_close_to_speed(self, ratio: LatencyRatio) -> bool:
        """Return whether a speed-up is so close to its limit that the state of the machine may decide."""
        return self.min_speedup is not None and abs(1 / ratio.value / self.min_speedup - 1) < _CLOSE

    def check_speed(
        self, sample: LatencySample | None, ratio: LatencyRatio | None, conditions: str
    ) -> list[CheckResult]:
        """Return one check for each limit of speed; "skipped" with the reason for an unknown latency.

        Args:
            sample: Timed calls of the file; None where it could not be timed.
            ratio: Latency of the file / latency of the baseline; None without a baseline.
            conditions: Conditions of the measurement for the details: "onnxruntime, 1 thread, batch 1".
        """
        checks = []
        if self.min_speedup is not None:
            if ratio is None:
                why = "latency of the file could not be measured" if sample is None else "no baseline file to time"
                checks.append(skipped("min_speedup", why, self.min_speedup, "x"))
            else:
                low = 1 / ratio.high
                high = 1 / ratio.low if ratio.low > 0 else math.inf
                speedup = Estimate(1 / ratio.value, low, high, _describe(ratio, conditions))
                checks.append(self._check("min_speedup", speedup, self.min_speedup, is_least=True, unit="x"))
        if self.max_latency_ms is not None:
            if sample is None:
                why = "latency of the file could not be measured"
                checks.append(skipped("max_latency_ms", why, self.max_latency_ms, "ms"))
            else:
                said = f"median of {_sittings(len(sample.sittings))} ({conditions})"
                median = Estimate(sample.p50, *sample.p50_interval, said)
                checks.append(self._check("max_latency_ms", median, self.max_latency_ms, is_least=False, unit="ms"))
        quantiles = {} if sample is None else sample.to_metrics()
        for name, limit in self.max_quantile_ms.items():
            if name in quantiles:
                estimate = Estimate(quantiles[name], detail=conditions)
                checks.append(self._check(f"max_quantile_ms.{name}", estimate, limit, is_least=False, unit="ms"))
            else:
                checks.append(skipped(f"max_quantile_ms.{name}", "there were too few calls to know it", limit, "ms"))
        return checks

    def check_size(self, slim: ModelMetrics) -> list[CheckResult]:
        """Return one check for each limit of size; "skipped" where MACs or params are not known."""
        checks = []
        metrics = {"max_size_mb": slim.size_bytes / 1e6, "max_macs": slim.macs, "max_params": slim.params}
        for name, unit in _OF_SIZE.items():
            limit = getattr(self, name)
            if limit is None:
                continue
            if not metrics[name]:
                checks.append(skipped(name, "it could not be counted", limit, unit))
                continue
            detail = f"{slim.size_bytes:,} bytes in all files" if name == "max_size_mb" else f"{metrics[name]:,}"
            estimate = Estimate(metrics[name], metrics[name], metrics[name], detail)
            checks.append(self._check(name, estimate, limit, is_least=False, unit=unit))
        return checks

    def check_ratios(
        self,
        slim: ModelMetrics,
        baseline: ModelMetrics | None,
        found: Resources | None,
        speed: LatencyRatio | None = None,
    ) -> list[CheckResult]:
        """Return one check for each limit on a ratio to the baseline; "skipped" where one of the values is not known.

        Args:
            slim: Metrics of the file.
            baseline: Metrics of the baseline.
            found: Measured resources; None where they were not measured.
            speed: Latency of the file / latency of the baseline, used for `p50`.
        """
        checks = []
        for name, limit in self.max_ratio.items():
            own, other = (
                _metric_of(name, one, found, label) for one, label in ((slim, "slim"), (baseline, "baseline"))
            )
            if not own or not other:
                why = _NO_BASELINE if baseline is None else "it is not known of both files"
                checks.append(skipped(f"max_ratio.{name}", why, limit, "x"))
            else:
                estimate = Estimate(own / other, detail=f"{own:,.4g} against {other:,.4g}")
                if name in ("macs", "params", "size"):
                    estimate = replace(estimate, low=own / other, high=own / other)
                elif name == "p50" and speed is not None:
                    estimate = Estimate(speed.value, speed.low, speed.high, _describe(speed, estimate.detail + " ms"))
                checks.append(self._check(f"max_ratio.{name}", estimate, limit, is_least=False, unit="x"))
        return checks

    def check_resources(self, found: Resources | None, label: str) -> list[CheckResult]:
        """Return one check for each limit of start, memory and throughput; "skipped" where that was not measured.

        Args:
            found: Measured resources; None where they were not measured.
            label: Label of the file in them.
        """
        checks = []
        for name, unit in _OF_RESOURCES.items():
            limit: float | None = getattr(self, name)
            if limit is None:
                continue
            estimate = None if found is None else _of_resource(found, name, label)
            if estimate is None:
                missing = {} if found is None else found.missing
                why = missing.get(_MISSING[name], "it could not be measured")
                checks.append(skipped(name, "resources are not looked at" if found is None else why, limit, unit))
            else:
                checks.append(self._check(name, estimate, limit, is_least=name.startswith("min"), unit=unit))
        return checks

    def check_fallback(self, fell_back: Sequence[str] | None) -> list[CheckResult]:
        """Return the check of the number of nodes that fell back, if there is a limit.

        Args:
            fell_back: Nodes that another provider computes; None where they are not known.
        """
        limit = self.max_fallback_nodes
        if limit is None:
            return []
        if fell_back is None:
            return [skipped("max_fallback_nodes", "the runtime does not say where nodes are computed", limit, "nodes")]
        said = ", ".join(fell_back) or "every node is computed where it was asked for"
        count = Estimate(len(fell_back), len(fell_back), len(fell_back), said)
        return [self._check("max_fallback_nodes", count, limit, is_least=False, unit="nodes")]

    def _check(
        self, name: str, estimate: Estimate, limit: float, *, is_least: bool, unit: str = "share"
    ) -> CheckResult:
        """Compare an estimate with its limit; where noise decides, the detail states the number of images needed."""
        is_share, compares = unit == "share", name.startswith(("max_drop", "max_rise"))
        coarse = is_share and not is_least and is_coarse(estimate, limit)
        status = judge(estimate, limit, is_least=is_least, judge_by=self.judge_by, is_coarse=coarse)
        detail, remedy = estimate.detail, ""
        if estimate.low is None or estimate.high is None:
            detail += "; no interval is known, so it is judged by itself" if self.judge_by != "estimate" else ""
        elif estimate.low < estimate.high:
            detail += f"; with 95 % confidence from {estimate.low:.4f} to {estimate.high:.4f}"
            if is_undecided(estimate, limit):
                detail += ", on both sides of the limit"
                detail += ": noise may have decided" if self.judge_by == "estimate" and not coarse else ""
        count = images_needed(estimate, limit, compares=compares, is_share=is_share)
        if count is not None:
            noun = "images of each class" if name.endswith("worst_class") else "images"
            detail += f"; this limit needs at least {count:,} {noun}, there are {estimate.images:,}"
            if status == "inconclusive":
                remedy = f"evaluate on at least {count:,} {noun}, or allow for more than {limit:g}"
        return CheckResult(name, status, estimate.value, limit, unit, detail, remedy)


def _why_missing(kind: str, name: str, own: Mapping[str, Estimate] | None, found: Mapping[str, Estimate] | None) -> str:
    """Return the reason why a metric is not known; `found` is None for a comparison without a baseline."""
    if own is None:
        return "quality of the file could not be measured"
    if found is None:
        return _NO_BASELINE
    if kind == "max_drop_on":
        names = ", ".join(one.removeprefix("on.") for one in found if one.startswith("on."))
        return f"no such distribution was looked at, only {names}" if names else "no robustness is asked for"
    if name in _WHY:
        return _WHY[name]
    return f"the task has no such metric, only {', '.join(own)}" if own else "it could not be measured"


def _metric_of(name: str, metrics: ModelMetrics | None, found: Resources | None, label: str) -> float | None:
    """Return one metric of a file by its name in `max_ratio`; None where it is not known."""
    if metrics is None:
        return None
    if name in ("macs", "params", "size"):
        return {"macs": metrics.macs, "params": metrics.params, "size": metrics.size_bytes}[name]
    if found is not None and name in ("cold_start", "memory", "energy"):
        of: Mapping[str, Mapping[str, float]] = {
            "cold_start": found.cold_start_ms,
            "memory": found.peak_memory_bytes,
            "energy": found.energy_joules,
        }
        return of[name].get(label)
    return metrics.latency_ms.get(name)


def _describe(ratio: LatencyRatio, where: str) -> str:
    """Return the conditions of a ratio of latencies, and the ratio of the baseline to itself."""
    said = f"{_sittings(ratio.sittings)} side by side ({where})"
    if ratio.sittings == 1:
        said += "; opening takes too long for more, so the interval is a wide guess"
    return said if ratio.control is None else f"{said}; the baseline against itself in the same run: {ratio.control}"


def _sittings(count: int) -> str:
    return f"{max(1, count)} sitting{'' if count <= 1 else 's'}"


def _of_resource(found: Resources, name: str, label: str) -> Estimate | None:
    """Return the measured value for a limit of resources; None where it was not measured."""
    if name == "max_cold_start_ms" and label in found.cold_start_ms:
        return Estimate(found.cold_start_ms[label], detail="until a session is there, in a new process, median")
    if name == "max_memory_mb" and label in found.peak_memory_bytes:
        grown = found.peak_memory_bytes[label]
        return Estimate(grown / 1e6, detail=f"a new process grew by {grown:,} bytes with the session")
    best = found.best_throughput(label) if name == "min_images_per_second" else None
    return None if best is None else Estimate(best, detail="at the batch size where they are most")


def skipped(name: str, detail: str, limit: float | None = None, unit: str = "") -> CheckResult:
    """Return a check that could not be made."""
    return CheckResult(name, "skipped", None, limit, unit, detail)
