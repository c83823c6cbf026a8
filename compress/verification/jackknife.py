"""Intervals of any figure over images by the jackknife, which leaves some images out in turn.

Percentiles of figures over images drawn again (bootstrap) are too narrow for what is no plain mean (a mean over
classes, a root, a ratio). Pseudo-values (Tukey 1958) turn a figure into a mean of parts, to which Student's t applies.
Skewed parts make that too narrow in small samples; hence the most extreme part on either side counts twice, and the
widest interval is taken.
`benchmarks/interval_coverage.py` simulates the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from compress.verification.metrics import CONFIDENCE

Figures = dict[str, float]


def jackknife_intervals(
    figures: Callable[[np.ndarray], Figures], count: int, most_parts: int
) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each figure.

    Args:
        figures: Takes positions of images and returns the figures over them.
        count: Number N of images.
        most_parts: Images are left out in at most so many parts of equal size, always the same.

    Returns:
        Nothing for fewer than two images or parts, or for a figure that is no number without one of the parts.
    """
    parts = min(count, most_parts)
    if parts < 2:
        return {}
    order = np.random.default_rng(0).permutation(count)
    whole = figures(np.arange(count))
    rest = [figures(np.sort(np.delete(order, slice(start, None, parts)))) for start in range(parts)]
    found = {}
    for name, value in whole.items():
        without = np.array([one[name] for one in rest], np.float64)
        if np.isfinite(without).all():
            found[name] = mean_interval(value - (parts - 1) * (without - without.mean()))
    return found


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean, wide enough for skewed values.

    Args:
        values: (N,), at least two.
    """
    ends = [_student(np.append(values, extreme)) for extreme in (values.min(), values.max())]
    plain = _student(values)
    return min(plain[0], *(low for low, _ in ends)), max(plain[1], *(high for _, high in ends))


def _student(values: np.ndarray) -> tuple[float, float]:
    from scipy.stats import t  # scipy takes a second to import

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half
