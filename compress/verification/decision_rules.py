"""Decision rules of the gates: pass, fail or inconclusive, and the number of images that a limit needs.

Pure arithmetic on one estimate and its limit. "Shown" means: with 97.5 % confidence, by one end of the 95 % interval.
"""

from __future__ import annotations

import math
from typing import Literal

from compress.model.artifacts import Status
from compress.verification.metrics import Estimate

JudgeBy = Literal["estimate", "bound", "significant"]
SLACK = 1e-9  # 0.9173 - 0.9073 is 0.010000000000000009 in floating point and must keep a limit of 0.01
_MOST_IMAGES = 10**9


def judge(estimate: Estimate, limit: float, *, is_least: bool, judge_by: JudgeBy, is_coarse: bool = False) -> Status:
    """Return "pass", "fail" or "inconclusive".

    An estimate without an interval is judged by itself under every rule.

    Args:
        estimate: Measured value, with its interval where one is known.
        limit: Largest allowed value, or the smallest one with `is_least`.
        is_least: Whether the limit is the smallest allowed value.
        judge_by: "estimate": the value itself must keep the limit. "bound": the limit must be shown to be kept (pass)
            or broken (fail). "significant": the value itself must keep the limit, but only a limit that is shown to be
            broken fails.
        is_coarse: Whether one image alone weighs more than the limit; only a limit that is shown to be broken then
            fails.
    """
    sign = -1 if is_least else 1  # a least value is a largest one of the opposite
    kept = sign * estimate.value <= sign * limit + SLACK
    if estimate.low is None or estimate.high is None or math.isnan(estimate.value):
        return "pass" if kept else "fail"
    better, worse = sorted((sign * estimate.low, sign * estimate.high))
    if judge_by == "bound":
        kept = worse <= sign * limit + SLACK
    if kept:
        return "pass"
    is_shown = better > sign * limit + SLACK
    return "fail" if is_shown or (judge_by == "estimate" and not is_coarse) else "inconclusive"


def is_coarse(estimate: Estimate, limit: float) -> bool:
    """Return whether one image alone weighs more than a limit on a share of images.

    >>> is_coarse(Estimate(0.0, images=90), 0.01), is_coarse(Estimate(0.0, images=100), 0.01)
    (True, False)
    """
    return estimate.images is not None and 0 < limit * estimate.images < 1 - SLACK


def is_undecided(estimate: Estimate, limit: float) -> bool:
    """Return whether the limit lies inside the 95 % interval, so that noise may decide."""
    return estimate.low is not None and estimate.high is not None and estimate.low < limit < estimate.high


def images_needed(estimate: Estimate, limit: float, *, compares: bool, is_share: bool) -> int | None:
    """Return the least number of images with which the limit can be decided, rounded up to two digits.

    Half the width of the interval shrinks with the root of the number of images. It must not exceed the distance from
    the limit to the value. In a comparison, whose value is 0 between equal networks, it must not exceed the limit.

    Args:
        estimate: Measured value with its interval.
        limit: Limit inside the interval.
        compares: Whether the value is a change against the baseline.
        is_share: Whether the value is a share of images: one image must then not weigh more than the limit.

    Returns:
        None where the limit is decided already, where the interval or the number of images is unknown, or where no
        number of images suffices.
    """
    if estimate.images is None or not is_undecided(estimate, limit):
        return None
    assert estimate.low is not None
    assert estimate.high is not None
    half = (estimate.high - estimate.low) / 2
    margins = [limit] if compares and limit > 0 else []
    for margin in (*margins, abs(limit - estimate.value)):
        if margin <= SLACK:
            continue
        count = estimate.images * (half / margin) ** 2
        if compares and is_share and limit > 0:
            count = max(count, 1 / limit)
        if count > estimate.images:
            return _rounded_up(count) if count < _MOST_IMAGES else None
    return None


def _rounded_up(count: float) -> int:
    """Return a number rounded up to two digits.

    >>> _rounded_up(834.2), _rounded_up(7.0), _rounded_up(99.5)
    (840, 7, 100)
    """
    whole = math.ceil(count - SLACK)
    unit = int(10 ** max(0, len(str(whole)) - 2))
    return -(-whole // unit) * unit
