"""Confidence intervals of metrics (jackknife), and the calibration error without bias.

Percentiles of bootstrap samples are too narrow for a metric that is no plain mean (a mean over classes, a root, a
ratio). Pseudo-values (Tukey 1958) turn a metric into a mean of parts, to which Student's t applies. In small samples,
Student's t is too narrow for skewed parts. Hence the most extreme part on either side counts twice, and the widest
interval is taken. `benchmarks/interval_coverage.py` simulates the coverage.

The expected calibration error of Guo et al. 2017 (mean absolute gap of bins) is never 0 on a sample, and the bootstrap
moves it further away from the truth. Here the mean squared gap is estimated without bias, as in Kumar et al. 2019,
"Verified Uncertainty Calibration", arXiv:1909.10155, over bins of equally many images, and its root is reported. The
interval solves |estimate - t| <= z sd(t) for the true value t, as Wilson's does for shares. sd(t) is the standard
deviation of a sum of squares of normal means. `benchmarks/calibration_interval.py` simulates the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
Metrics = dict[str, float]


def jackknife_intervals(
    metrics: Callable[[np.ndarray], Metrics], count: int, most_parts: int
) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each metric.

    Args:
        metrics: Function that takes positions of images and returns the metrics over them.
        count: Number N of images.
        most_parts: Largest number of equal parts that images are left out in; the parts are the same in each run.

    Returns:
        Name -> interval. Empty for fewer than two images or parts; a metric that is not finite without one of the parts
        is left out.
    """
    parts = min(count, most_parts)
    if parts < 2:
        return {}
    order = np.random.default_rng(0).permutation(count)
    whole = metrics(np.arange(count))
    rest = [metrics(np.sort(np.delete(order, slice(start, None, parts)))) for start in range(parts)]
    found = {}
    for name, value in whole.items():
        without = np.array([one[name] for one in rest], np.float64)
        if np.isfinite(without).all():
            found[name] = mean_interval(value - (parts - 1) * (without - without.mean()))
    return found


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean, wide enough for skewed values.

    Args:
        values: (N,) values, at least two.
    """
    ends = [_student(np.append(values, extreme)) for extreme in (values.min(), values.max())]
    plain = _student(values)
    return min(plain[0], *(low for low, _ in ends)), max(plain[1], *(high for _, high in ends))


def _student(values: np.ndarray) -> tuple[float, float]:
    from scipy.stats import t  # scipy takes a second to import

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half


BINS, IMAGES_PER_BIN = 15, 10
_Z = NormalDist().inv_cdf(0.975)


class Bounds(NamedTuple):
    """A value and its 95 % interval.

    Attributes:
        value: Estimate.
        low: Lower end; None where no interval is known.
        high: Upper end; None where no interval is known.
    """

    value: float
    low: float | None
    high: float | None


def calibration_bounds(confidence: np.ndarray, hits: np.ndarray) -> Bounds:
    """Return the root mean squared difference between confidence and accuracy, in [0, 1].

    Args:
        confidence: (N,) float, probability of the predicted class, in [0, 1].
        hits: (N,) bool, whether the predicted class is right.

    Returns:
        The root of the debiased mean of squares, 0 where that is negative. Without a bin of two images, the mean
        absolute difference without an interval.
    """
    gaps, weights, noise = _bins(np.asarray(confidence, np.float64), np.asarray(hits, np.float64))
    if not len(gaps):
        return Bounds(float(np.abs(hits - confidence).mean()), None, None)
    squares = weights * gaps**2
    total = float(squares.sum() - noise.unbiased.sum())
    low, high = _squared_interval(total, squares, noise.cautious)
    return Bounds(math.sqrt(max(total, 0.0)), math.sqrt(low), math.sqrt(high))


def difference_bounds(after: Bounds, before: Bounds) -> Bounds:
    """Return the difference of two values and its interval, from the least to the largest possible difference.

    Narrower intervals (root of the sum of squares) fail here: next to 0 a root is biased by as much as its noise.

    >>> difference_bounds(Bounds(0.5, 0.25, 1.0), Bounds(0.25, 0.0, 0.75))
    Bounds(value=0.25, low=-0.5, high=1.0)
    """
    if after.low is None or after.high is None or before.low is None or before.high is None:
        return Bounds(after.value - before.value, None, None)
    return Bounds(after.value - before.value, after.low - before.high, after.high - before.low)


class _Noise(NamedTuple):
    """(B,) Variance of each bin's mean gap, times the share of the bin.

    Attributes:
        unbiased: Sample variance.
        cautious: Sample variance, but at least the variance of a share of hits with one added hit and one added miss.
            A bin of hits alone has no sample variance.
    """

    unbiased: np.ndarray
    cautious: np.ndarray


def _bins(confidence: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray, _Noise]:
    """Return (B,) mean gaps of the bins with two images or more, (B,) shares of the images, and the noise."""
    total = len(confidence)
    wanted = max(1, min(BINS, total // IMAGES_PER_BIN))
    edges = np.unique(np.quantile(confidence, np.arange(1, wanted) / wanted))
    places = np.searchsorted(edges, confidence, side="left")  # equal confidences share a bin
    counts = np.bincount(places, minlength=len(edges) + 1)
    used = counts >= 2
    counts, gaps = counts[used], hits - confidence
    sums, squares, right = (np.bincount(places, values, minlength=len(used))[used] for values in (gaps, gaps**2, hits))
    means = sums / counts
    variances = np.maximum(squares - counts * means**2, 0.0) / (counts - 1)
    shares = (right + 1) / (counts + 2)
    cautious = np.maximum(variances, shares * (1 - shares))
    return means, counts / total, _Noise(variances / total, cautious / total)


def _squared_interval(total: float, squares: np.ndarray, noise: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean squared gap.

    The variance of the estimate at a true value t is 2 sum(noise^2) + 4 k t, where k is the mean of the noise over the
    bins, weighed by their squared gaps.

    Args:
        total: Unbiased estimate; may be negative.
        squares: (B,) squared gaps times the share of the bin.
        noise: (B,) variance of the mean gap times the share of the bin.
    """
    base = 2 * float((noise**2).sum())
    slope = float((noise * squares).sum() / squares.sum()) if squares.sum() > 0 else float(noise.max())
    middle = total + 2 * slope * _Z**2
    half = _Z * math.sqrt(max(base + 4 * slope * total + 4 * slope**2 * _Z**2, 0.0))
    low = max(middle - half, 0.0) if total > 0 else 0.0
    return low, max(middle + half, 0.0)
