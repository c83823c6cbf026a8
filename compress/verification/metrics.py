"""How good are predictions, how sure is that, and what changed from one network to another on the same images?

Everything is computed from the outputs of networks over a split; nothing is run here. Shares lie in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from compress.errors import DataError

CONFIDENCE = 0.95
_Z = 1.959963984540054  # of the normal distribution, for both sides together
_BINS, _TOP = 15, 5
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """The outputs of a classifier over a split.

    Attributes:
        outputs: (N, K) float, logits or probabilities.
        labels: (N,) int64, in [0, K).
    """

    outputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """Classes that the network tells apart, K."""
        return int(self.outputs.shape[1])

    @property
    def chosen(self) -> np.ndarray:
        """(N,) the class with the largest output, the first of equal ones."""
        chosen: np.ndarray = self.outputs.argmax(1)
        return chosen

    @property
    def hits(self) -> np.ndarray:
        """(N,) whether that is the label."""
        hits: np.ndarray = self.chosen == self.labels
        return hits

    def top(self, count: int) -> float:
        """Return the share of images whose label is among the `count` largest outputs; equal ones rank by class."""
        right = 0
        for start in range(0, len(self), _ROWS_AT_ONCE):
            outputs, labels = self.outputs[start : start + _ROWS_AT_ONCE], self.labels[start : start + _ROWS_AT_ONCE]
            own = np.take_along_axis(outputs, labels[:, None], axis=1)
            is_earlier = np.arange(self.classes)[None] < labels[:, None]
            rank = (outputs > own).sum(1) + ((outputs == own) & is_earlier).sum(1)
            right += int((rank < count).sum())
        return right / len(self)

    @property
    def probabilities(self) -> np.ndarray:
        """(N, K) float32: the outputs where they are probabilities already, else their softmax."""
        outputs = self.outputs.astype(np.float32)
        if outputs.min() >= 0 and np.abs(outputs.sum(1) - 1).max() < 1e-3:
            return outputs
        outputs -= outputs.max(1, keepdims=True)
        np.exp(outputs, out=outputs)
        outputs /= outputs.sum(1, keepdims=True)
        return outputs


def share_interval(successes: int, count: int) -> tuple[float, float]:
    """Return the interval in which a share lies with 95 % confidence (Wilson 1927).

    >>> [round(bound, 4) for bound in share_interval(95, 100)]
    [0.8882, 0.9785]
    """
    from scipy.stats import binomtest  # scipy takes a second to import

    interval = binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def class_accuracy(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return (K,) top-1 of the images of each class, NaN where there is none, and (K,) how many there are."""
    counts = np.bincount(predictions.labels, minlength=predictions.classes)
    right = np.bincount(predictions.labels[predictions.hits], minlength=predictions.classes)
    with np.errstate(invalid="ignore"):
        return right / counts, counts


def calibration_error(predictions: Predictions) -> float:
    """Return the expected calibration error: by how much confidence and accuracy differ, over 15 bins of confidence.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599.
    """
    confidence = predictions.probabilities.max(1).astype(np.float64)
    bins = np.clip(np.ceil(confidence * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    gaps = np.bincount(bins, weights=predictions.hits - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(predictions))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, and how sure it is.

    Attributes:
        value: As measured.
        low: Lower end of the interval in which it lies with 95 % confidence; None where no interval is known.
        high: Upper end.
        detail: What it is, in words.
    """

    value: float
    low: float | None = None
    high: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PairedDrop:
    """By how much top-1 is lower than that of another network on the same images.

    Attributes:
        drop: Top-1 of the other network - top-1.
        interval: In which it lies with 95 % confidence.
        only_before: Images that only the other network gets right.
        only_after: Images that only this one gets right.
        p_value: How likely at least such a difference is if both are as good (exact McNemar test, both sides).

    Sources: McNemar 1947, "Note on the sampling error of the difference between correlated proportions or
        percentages"; the interval: Agresti and Min 2005, "Simple improved confidence intervals for comparing matched
        proportions".
    """

    drop: float
    interval: tuple[float, float]
    only_before: int
    only_after: int
    p_value: float


def paired_drop(before: np.ndarray, after: np.ndarray) -> PairedDrop:
    """Compare two networks image by image.

    Args:
        before: (N,) bool, whether the other network is right.
        after: (N,) bool, whether this one is.

    Raises:
        DataError: They are not of the same images, or there is none.
    """
    if before.shape != after.shape or len(before) == 0:
        raise DataError(f"Networks must be compared on the same images, got {len(before)} and {len(after)}.")
    from scipy.stats import binomtest

    count = len(before)
    only_before, only_after = int((before & ~after).sum()), int((after & ~before).sum())
    apart = only_before + only_after
    p_value = float(binomtest(only_before, apart).pvalue) if apart else 1.0
    # half an image more in each of the four cells
    middle = (only_before - only_after) / (count + 2)
    variance = (apart + 1 - (only_before - only_after) ** 2 / (count + 2)) / (count + 2) ** 2
    half = _Z * math.sqrt(variance)
    return PairedDrop(
        (only_before - only_after) / count,
        (max(-1.0, middle - half), min(1.0, middle + half)),
        only_before,
        only_after,
        p_value,
    )


def softmax_distance(before: Predictions, after: Predictions) -> float:
    """Return the mean over images of the l2 norm of the difference of the probabilities, in [0, sqrt 2].

    Source: Liebenwein et al. 2021, "Lost in Pruning", arXiv:2103.03014.
    """
    return float(np.linalg.norm(before.probabilities - after.probabilities, axis=1).mean())


def estimate_quality(predictions: Predictions, names: Sequence[str] = ()) -> dict[str, Estimate]:
    """Return how good a network is: "top1", "top5" of more than five classes, "worst_class", "calibration_error".

    Args:
        predictions: Over a split.
        names: Of the classes, for the details.
    """
    count, right = len(predictions), int(predictions.hits.sum())
    found = {"top1": Estimate(right / count, *share_interval(right, count), f"{right:,} of {count:,} images")}
    if predictions.classes > _TOP:
        among = round(predictions.top(_TOP) * count)
        found["top5"] = Estimate(among / count, *share_interval(among, count), f"{among:,} of {count:,} images")
    accuracy, counts = class_accuracy(predictions)
    worst = int(np.nanargmin(accuracy))
    right = round(accuracy[worst] * counts[worst])
    found["worst_class"] = Estimate(
        float(accuracy[worst]),
        *share_interval(right, int(counts[worst])),
        f"class {class_name(worst, names)}, {right:,} of {counts[worst]:,} images",
    )
    found["calibration_error"] = Estimate(calibration_error(predictions), detail=f"{_BINS} bins of confidence")
    return found


def estimate_changes(before: Predictions, after: Predictions, names: Sequence[str] = ()) -> dict[str, Estimate]:
    """Return what changed from one network to another on the same images.

    Args:
        before: Of the network that is compared with.
        after: Of the network in question.
        names: Of the classes, for the details.

    Returns:
        "drop.top1", "drop.top5", "drop.worst_class" (of the class that lost most), "rise.calibration_error", "churn"
        and "softmax_distance".

    Raises:
        DataError: They are not of the same images and classes.
    """
    if before.outputs.shape != after.outputs.shape or not np.array_equal(before.labels, after.labels):
        raise DataError(
            f"Networks must be compared on the same images and classes, got outputs {before.outputs.shape} and "
            f"{after.outputs.shape}."
        )
    count = len(before)
    drop = paired_drop(before.hits, after.hits)
    found = {"drop.top1": _as_estimate(drop)}
    if before.classes > _TOP:
        found["drop.top5"] = Estimate(before.top(_TOP) - after.top(_TOP))
    losses = class_accuracy(before)[0] - class_accuracy(after)[0]
    worst = int(np.nanargmax(losses))
    of_class = before.labels == worst
    lost = _as_estimate(paired_drop(before.hits[of_class], after.hits[of_class]))
    found["drop.worst_class"] = replace(lost, detail=f"class {class_name(worst, names)}; {lost.detail}")
    rise = calibration_error(after) - calibration_error(before)
    found["rise.calibration_error"] = Estimate(rise, detail=f"{_BINS} bins of confidence")
    changed = int((before.chosen != after.chosen).sum())
    found["churn"] = Estimate(
        changed / count, *share_interval(changed, count), f"{changed:,} of {count:,} predictions are others"
    )
    found["softmax_distance"] = Estimate(softmax_distance(before, after), detail="mean l2 norm over images")
    return found


def class_name(index: int, names: Sequence[str]) -> str:
    """Return the name of a class with its index, or the index alone.

    >>> class_name(1, ("cat", "dog")), class_name(1, ())
    ("1 ('dog')", '1')
    """
    return f"{index} ('{names[index]}')" if names else str(index)


def _as_estimate(drop: PairedDrop) -> Estimate:
    detail = f"{drop.only_before:,} images lost, {drop.only_after:,} won; p = {drop.p_value:.2g} that both are as good"
    return Estimate(drop.drop, *drop.interval, detail)
