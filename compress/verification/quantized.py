"""What did rounding to INT8 cost, and what did slimming before it? The float file stands between baseline and INT8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compress.artifacts import CheckResult
from compress.verification.metrics import Predictions, estimate_changes

AGREEMENT = "quantized_agreement"
_OF_FLOAT = "of the float file it was quantised from"


def of_float(check: CheckResult) -> CheckResult:
    """Return a check that was made on the float file, saying so."""
    return replace(check, detail=f"{check.detail} ({_OF_FLOAT})")


def check_agreement(whole: Predictions, rounded: Predictions) -> CheckResult:
    """Observe how often the quantised file gives the class that the float file gives.

    Args:
        whole: Of the float file, over the whole evaluation split.
        rounded: Of the quantised file, on the same images.
    """
    changes = estimate_changes(whole, rounded)
    agreeing = 1 - changes["churn"].value
    detail = (
        f"top-1 agrees with the float file on {agreeing:.2%} of {len(whole):,} images, mean distance (l2) of the "
        f"probabilities {changes['softmax_distance'].value:.4g}"
    )
    return CheckResult(AGREEMENT, "pass", agreeing, None, "share", detail)


def drop_shares(
    before: Predictions | None, whole: Predictions | None, after: Predictions | None
) -> list[dict[str, Any]]:
    """Return what each part of the pipeline did to top-1 on the evaluation split, plain, in the order they were done.

    Args:
        before: Of the baseline; None where there is none.
        whole: Of the float file that a quantised one was made from; None where the file is float itself.
        after: Of the file; None where it could not be measured.

    Returns:
        {"stage": "slimming" or "quantize", "top1_before", "top1_after", "points"}: points above 0 are a gain.
    """
    slim = whole or after
    steps = [("slimming", before, slim)] + ([("quantize", whole, after)] if whole is not None else [])
    return [
        {
            "stage": stage,
            "top1_before": float(old.hits.mean()),
            "top1_after": float(new.hits.mean()),
            "points": 100 * float(new.hits.mean() - old.hits.mean()),
        }
        for stage, old, new in steps
        if old is not None and new is not None
    ]
