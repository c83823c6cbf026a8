"""Times of a layer at sizes that were never timed, fitted to those that were.

    own(outputs) * (base + slope * inputs)

Every number of outputs that was timed has a factor of its own, so that nothing is interpolated across a stair there;
along the inputs a convolution adds up one block after the other. Behind a concatenation, where groups add up to
numbers of outputs that no variant had, the factor lies on the line between its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares


@dataclass(frozen=True, slots=True)
class Fill:
    """own(outputs) * (base + slope * inputs).

    Attributes:
        own: Number of outputs -> its factor, in ms; ascending.
        base: At least 0.
        slope: For one input, at least 0.

    >>> fill = Fill({8: 1.0, 16: 3.0}, 0.5, 0.25)
    >>> fill.at(np.array([8, 12, 99]), np.array([2, 2, 2])).tolist()
    [1.0, 2.0, 3.0]
    """

    own: Mapping[int, float]
    base: float
    slope: float

    def at(self, out: np.ndarray | int, inp: np.ndarray | int) -> np.ndarray:
        """Return milliseconds, for arrays of the same shape."""
        own = np.interp(out, list(self.own), list(self.own.values()))
        return np.asarray(own * (self.base + self.slope * np.asarray(inp)))


def fit_fill(times: Mapping[tuple[int, int], float]) -> Fill:
    """Fit the times of sites of one kind by least squares of the relative error.

    Args:
        times: (outputs, inputs) -> milliseconds; at least one.
    """
    outs = sorted({out for out, _ in times})
    position = {out: index for index, out in enumerate(outs)}
    rows = np.asarray([position[out] for out, _ in times])
    inputs = np.asarray([inp for _, inp in times], dtype=np.float64)
    wanted = np.asarray([max(milliseconds, 1e-6) for milliseconds in times.values()])
    most = float(inputs.max())
    own = np.asarray(
        [np.mean(wanted[rows == row] / (0.1 + 0.9 * inputs[rows == row] / most)) for row in range(len(outs))]
    )

    def error(values: np.ndarray) -> np.ndarray:
        share = values[-1]
        return np.asarray(np.exp(values[:-1])[rows] * (share + (1 - share) * inputs / most) / wanted - 1)

    low, high = np.full(len(outs) + 1, -np.inf), np.full(len(outs) + 1, np.inf)
    low[-1], high[-1] = 0.0, 1.0
    found = least_squares(error, np.append(np.log(own), 0.1), bounds=(low, high)).x
    share = float(found[-1])
    return Fill(dict(zip(outs, np.exp(found[:-1]).tolist(), strict=True)), share, (1 - share) / most)
