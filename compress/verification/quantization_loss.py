"""Shares of quality loss: by slimming (baseline to float file) and by INT8 (float file to INT8 file)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compress.model.artifacts import CheckResult
from compress.verification.latency import LatencyRatio
from compress.verification.metrics import Predictions, estimate_changes
from compress.verification.quality import Found
from compress.verification.summary import changes_from

AGREEMENT, INT8_ALONE = "quantized_agreement", "int8_alone"
_OF_FLOAT = "of the float file it was quantised from"


def of_float(check: CheckResult) -> CheckResult:
    """Return a check with a note in its detail that it was made on the float file."""
    return replace(check, detail=f"{check.detail} ({_OF_FLOAT})")


def check_agreement(whole: Found, rounded: Found) -> CheckResult:
    """Record the share of images with equal predictions of both files; in other tasks the difference of the metric.

    Args:
        whole: Predictions of the float file over the complete evaluation split.
        rounded: Predictions of the quantised file on the same images.
    """
    if not isinstance(whole, Predictions) or not isinstance(rounded, Predictions):
        metric = rounded.metric
        detail = f"{metric.words} {metric.show(rounded.value)}, of the float file {metric.show(whole.value)}"
        unit = "share" if metric.is_share else ""
        return CheckResult(AGREEMENT, "pass", abs(rounded.value - whole.value), None, unit, detail)
    changes = estimate_changes(whole, rounded)
    agreeing = 1 - changes["churn"].value
    detail = (
        f"top-1 agrees with the float file on {agreeing:.2%} of {len(whole):,} images, mean distance (l2) of the "
        f"probabilities {changes['softmax_distance'].value:.4g}"
    )
    return CheckResult(AGREEMENT, "pass", agreeing, None, "share", detail)


def check_against_int8(alone: Found, found: Found, latency: LatencyRatio | None) -> CheckResult:
    """Record the difference of the primary metric between the baseline in INT8 and the file.

    Args:
        alone: Metrics of the baseline's INT8 file, over the complete evaluation split.
        found: Metrics of the file on the same images.
        latency: Latency of the file / latency of the baseline's INT8 file; None where it was not measured.
    """
    metric, drop = found.metric, changes_from(alone, found)[f"drop.{found.metric.name}"]
    spread = "" if drop.low is None or drop.high is None else f" ({-100 * drop.high:+.2f} to {-100 * drop.low:+.2f})"
    change = f"{-100 * drop.value:+.2f}{spread} points" if metric.is_share else f"{-drop.value:+.4g}"
    speed = "" if latency is None else f", at {latency} of its latency"
    detail = (
        f"the baseline in INT8 alone has {metric.words} {metric.show(alone.value)}; this file has "
        f"{metric.show(found.value)}, {change}{speed}"
    )
    return CheckResult(INT8_ALONE, "pass", -drop.value, None, "share" if metric.is_share else "", detail)


def drop_shares(before: Found | None, whole: Found | None, after: Found | None) -> list[dict[str, Any]]:
    """Return the change of quality by each part of the pipeline on the evaluation split, as plain values in order.

    Args:
        before: Metrics of the baseline, or None.
        whole: Metrics of the float file that a quantised one was made from; None where the file is float itself.
        after: Metrics of the file; None where it could not be measured.

    Returns:
        {"stage": "slimming" or "quantize", "top1_before", "top1_after", "points"}: points above 0 are a gain. Other
        tasks use their primary metric's name; points are always 100 times the difference.
    """
    slim = whole or after
    steps = [("slimming", before, slim)] + ([("quantize", whole, after)] if whole is not None else [])
    return [
        {
            "stage": stage,
            f"{new.metric.name}_before": old.value,
            f"{new.metric.name}_after": new.value,
            "points": 100 * (new.value - old.value),
        }
        for stage, old, new in steps
        if old is not None and new is not None
    ]
