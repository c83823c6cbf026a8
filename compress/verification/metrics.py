"""Classification metrics with confidence intervals, and paired comparison of two networks.

Everything is computed from the outputs of networks over a split; nothing is run here. Shares lie in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from compress.errors import DataError
from compress.tasks.base import Metric
from compress.tasks.classification import CLASSIFICATION
from compress.verification.statistics import CONFIDENCE, Bounds, calibration_bounds, difference_bounds

_TOP = 5
_FARTHEST = math.sqrt(2)  # l2 distance of two vectors of probabilities
_ROWS_AT_ONCE = 4096
_OF_CALIBRATION = "root mean square of confidence - accuracy, without bias"


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Outputs of a classifier over a split.

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
        """Number K of classes."""
        return int(self.outputs.shape[1])

    @property
    def value(self) -> float:
        """Top-1, the value of the primary metric."""
        return float(self.hits.mean())

    @property
    def metric(self) -> Metric:
        """Primary metric."""
        return CLASSIFICATION.main

    @property
    def chosen(self) -> np.ndarray:
        """(N,) predicted classes: the class with the largest output, the first of equal ones."""
        chosen: np.ndarray = self.outputs.argmax(1)
        return chosen

    @property
    def hits(self) -> np.ndarray:
        """(N,) bool, whether the predicted class is the label."""
        hits: np.ndarray = self.chosen == self.labels
        return hits

    def among(self, count: int) -> np.ndarray:
        """Return (N,) bool, whether the label is among the `count` largest outputs; equal outputs rank by class."""
        right = []
        for start in range(0, len(self), _ROWS_AT_ONCE):
            outputs, labels = self.outputs[start : start + _ROWS_AT_ONCE], self.labels[start : start + _ROWS_AT_ONCE]
            own = np.take_along_axis(outputs, labels[:, None], axis=1)
            is_earlier = np.arange(self.classes)[None] < labels[:, None]
            rank = (outputs > own).sum(1) + ((outputs == own) & is_earlier).sum(1)
            right.append(rank < count)
        return np.concatenate(right)

    @property
    def probabilities(self) -> np.ndarray:
        """(N, K) float32 probabilities: the outputs where they are probabilities already, else their softmax."""
        outputs = self.outputs.astype(np.float32)
        if outputs.min() >= 0 and np.abs(outputs.sum(1) - 1).max() < 1e-3:
            return outputs
        outputs -= outputs.max(1, keepdims=True)
        np.exp(outputs, out=outputs)
        outputs /= outputs.sum(1, keepdims=True)
        return outputs


def share_interval(successes: int, count: int, comparisons: int = 1) -> tuple[float, float]:
    """Return the interval in which a share lies with 95 % confidence (Wilson 1927).

    Wilson's interval is too narrow for the worst of several shares, which gets Clopper and Pearson's.

    Args:
        successes: Number of successes among `count`.
        count: Number of trials, at least 1.
        comparisons: Number of shares among which this one is the worst. Each then gets its part of the 5 %
            (Bonferroni), so that all shares lie in their intervals with 95 % confidence.

    >>> [round(bound, 4) for bound in share_interval(95, 100)]
    [0.8882, 0.9785]
    """
    from scipy.stats import binomtest  # scipy takes a second to import

    level = 1 - (1 - CONFIDENCE) / comparisons
    interval = binomtest(successes, count).proportion_ci(level, method="wilson" if comparisons == 1 else "exact")
    return float(interval.low), float(interval.high)


def class_accuracy(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return (K,) top-1 of each class, NaN without images, and (K,) images of each class."""
    counts = np.bincount(predictions.labels, minlength=predictions.classes)
    right = np.bincount(predictions.labels[predictions.hits], minlength=predictions.classes)
    with np.errstate(invalid="ignore"):
        return right / counts, counts


def calibration_error(predictions: Predictions) -> Bounds:
    """Return the calibration error with its interval (`statistics.calibration_bounds`)."""
    return calibration_bounds(predictions.probabilities.max(1), predictions.hits)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Measured value with its confidence interval.

    Attributes:
        value: Measured value.
        low: Lower end of the 95 % confidence interval; None where no interval is known.
        high: Upper end of the interval; None where no interval is known.
        detail: Description in words.
        images: Number of images it was measured on; None where the images do not have equal weight.
    """

    value: float
    low: float | None = None
    high: float | None = None
    detail: str = ""
    images: int | None = None


@dataclass(frozen=True, slots=True)
class PairedDrop:
    """Drop of top-1 from one network to another on the same images.

    Attributes:
        drop: Top-1 of the first network - top-1 of the second.
        interval: 95 % confidence interval of `drop`.
        only_before: Images that only the first network gets right.
        only_after: Images that only the second network gets right.
        p_value: Probability of at least such a difference if both are as good (exact McNemar test, both sides; times
            the number of comparisons).
        images: Images compared.

    Sources: McNemar 1947, "Note on the sampling error of the difference between correlated proportions or
        percentages"; the interval: Agresti and Min 2005, "Simple improved confidence intervals for comparing matched
        proportions".
    """

    drop: float
    interval: tuple[float, float]
    only_before: int
    only_after: int
    p_value: float
    images: int


def paired_drop(before: np.ndarray, after: np.ndarray, comparisons: int = 1) -> PairedDrop:
    """Compare two networks image by image.

    Args:
        before: (N,) bool, whether the first network is right.
        after: (N,) bool, whether the second network is right.
        comparisons: Number of drops among which this one is the worst (Bonferroni).

    Raises:
        DataError: The arrays differ in shape or are empty.
    """
    if before.shape != after.shape or len(before) == 0:
        raise DataError(f"Networks must be compared on the same images, got {len(before)} and {len(after)}.")
    from scipy.stats import binomtest

    count = len(before)
    only_before, only_after = int((before & ~after).sum()), int((after & ~before).sum())
    apart = only_before + only_after
    p_value = float(binomtest(only_before, apart).pvalue) if apart else 1.0
    interval = mean_loss_interval(before.astype(np.float64) - after, comparisons)
    return PairedDrop(
        (only_before - only_after) / count, interval, only_before, only_after, min(1.0, comparisons * p_value), count
    )


def mean_loss_interval(losses: np.ndarray, comparisons: int = 1) -> tuple[float, float]:
    """Return the interval in which the mean of losses lies with 95 % confidence.

    For losses of -1, 0 and 1 it is Agresti and Min's: half an image is added to each of the four cells, half of it lost
    and half of it won in all. Means over several distributions are treated alike.

    Args:
        losses: (N,) losses in [-1, 1], one an image.
        comparisons: Number of means among which this one is the worst.
    """
    count, total = len(losses) + 2, float(losses.sum())
    middle = total / count
    variance = (float((losses**2).sum()) + 1 - total**2 / count) / count**2
    half = _quantile(comparisons) * math.sqrt(variance)
    return max(-1.0, middle - half), min(1.0, middle + half)


def mean_share_interval(shares: np.ndarray) -> tuple[float, float]:
    """Return the interval in which the mean of shares lies with 95 % confidence; adds two shares of 0 and two of 1.

    Args:
        shares: (N,) shares in [0, 1], one an image, such as its share of right answers over several distributions.

    Source, for shares of 0 and 1: Agresti and Coull 1998, "Approximate is better than exact".
    """
    count, total = len(shares) + 4, float(shares.sum()) + 2
    middle = total / count
    half = _quantile(1) * math.sqrt((float((shares**2).sum()) + 2 - total**2 / count) / count**2)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_distance_interval(distances: np.ndarray) -> tuple[float, float]:
    """Return the interval in which the mean of distances of probabilities lies with 95 % confidence.

    One added image at the largest possible distance stands for rare large distances that few images do not show.

    Args:
        distances: (N,) l2 distances in [0, sqrt 2].
    """
    more = np.append(np.asarray(distances, np.float64), _FARTHEST)
    half = _quantile(1) * float(more.std()) / math.sqrt(len(more))
    low = min(float(more.mean()) - half, float(distances.mean()))
    return max(0.0, low), min(_FARTHEST, float(more.mean()) + half)


def _quantile(comparisons: int) -> float:
    """Return the half width of an interval in standard errors."""
    return NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2 / comparisons)


def softmax_distance(before: Predictions, after: Predictions) -> float:
    """Return the mean over images of the l2 norm of the difference of the probabilities, in [0, sqrt 2].

    Source: Liebenwein et al. 2021, "Lost in Pruning", arXiv:2103.03014.
    """
    return float(_distances(before, after).mean())


def _distances(before: Predictions, after: Predictions) -> np.ndarray:
    distances: np.ndarray = np.linalg.norm(before.probabilities - after.probabilities, axis=1)
    return distances


def estimate_quality(predictions: Predictions, names: Sequence[str] = ()) -> dict[str, Estimate]:
    """Return the classification metrics of a network: "top1", "top5", "worst_class", "calibration_error".

    "top5" needs more than five classes, "worst_class" needs an image of every class.

    Args:
        predictions: Outputs over a split.
        names: Names of the classes, for the details.
    """
    count, right = len(predictions), int(predictions.hits.sum())
    found = {"top1": _share(right, count, "images")}
    if predictions.classes > _TOP:
        found["top5"] = _share(int(predictions.among(_TOP).sum()), count, "images")
    accuracy, counts = class_accuracy(predictions)
    if counts.all():
        found["worst_class"] = _worst_class(accuracy, counts, names)
    found["calibration_error"] = Estimate(*calibration_error(predictions), _OF_CALIBRATION, count)
    return found


def _share(successes: int, count: int, noun: str) -> Estimate:
    return Estimate(
        successes / count, *share_interval(successes, count), f"{successes:,} of {count:,} {noun}", images=count
    )


def _worst_class(accuracy: np.ndarray, counts: np.ndarray, names: Sequence[str]) -> Estimate:
    """Return the lowest top-1 of a class; its interval is formed by the lowest ends of all classes' intervals."""
    rights = np.rint(accuracy * counts).astype(np.int64)
    ends = [share_interval(int(right), int(of), len(counts)) for right, of in zip(rights, counts, strict=True)]
    worst = int(accuracy.argmin())
    detail = f"class {class_name(worst, names)} of {len(counts)}, {rights[worst]:,} of {counts[worst]:,} images"
    low, high = (min(side) for side in zip(*ends, strict=True))
    return Estimate(float(accuracy[worst]), low, high, detail, int(counts[worst]))


def worst_drop(drops: Sequence[PairedDrop]) -> tuple[int, Estimate]:
    """Return index and estimate of the largest drop; its interval is formed by the largest ends of all intervals.

    Args:
        drops: At least one drop; each computed with `comparisons` equal to the number of drops.
    """
    worst = max(range(len(drops)), key=lambda place: drops[place].drop)
    low, high = (max(side) for side in zip(*(drop.interval for drop in drops), strict=True))
    return worst, replace(as_estimate(drops[worst]), low=low, high=high)


def estimate_changes(before: Predictions, after: Predictions, names: Sequence[str] = ()) -> dict[str, Estimate]:
    """Return the changes of the metrics from one network to another on the same images.

    Args:
        before: Outputs of the network compared with, usually the baseline.
        after: Outputs of the network that is judged.
        names: Names of the classes, for the details.

    Returns:
        "drop.top1", "drop.top5", "drop.worst_class" (largest drop of a class, where every class has an image),
        "rise.calibration_error", "churn" and "softmax_distance".

    Raises:
        DataError: The outputs differ in shape, or the labels differ.
    """
    if before.outputs.shape != after.outputs.shape or not np.array_equal(before.labels, after.labels):
        raise DataError(
            f"Networks must be compared on the same images and classes, got outputs {before.outputs.shape} and "
            f"{after.outputs.shape}."
        )
    count = len(before)
    drop = paired_drop(before.hits, after.hits)
    found = {"drop.top1": as_estimate(drop)}
    if before.classes > _TOP:
        found["drop.top5"] = as_estimate(paired_drop(before.among(_TOP), after.among(_TOP)))
    if np.bincount(before.labels, minlength=before.classes).all():
        found["drop.worst_class"] = _worst_class_drop(before, after, names)
    rise = difference_bounds(calibration_error(after), calibration_error(before))
    found["rise.calibration_error"] = Estimate(*rise, _OF_CALIBRATION, count)
    found["churn"] = _share(int((before.chosen != after.chosen).sum()), count, "predictions are others")
    distances = _distances(before, after)
    interval = mean_distance_interval(distances)
    found["softmax_distance"] = Estimate(float(distances.mean()), *interval, "mean l2 norm over images", count)
    return found


def _worst_class_drop(before: Predictions, after: Predictions, names: Sequence[str]) -> Estimate:
    """Return the largest drop of top-1 of a class; every class must have an image."""
    places = [np.flatnonzero(before.labels == index) for index in range(before.classes)]
    worst, lost = worst_drop([paired_drop(before.hits[each], after.hits[each], len(places)) for each in places])
    return replace(lost, detail=f"class {class_name(worst, names)} of {len(places)}; {lost.detail}")


def class_name(index: int, names: Sequence[str]) -> str:
    """Return the name of a class with its index, or the index alone.

    >>> class_name(1, ("cat", "dog")), class_name(1, ())
    ("1 ('dog')", '1')
    """
    return f"{index} ('{names[index]}')" if names else str(index)


def as_estimate(drop: PairedDrop) -> Estimate:
    """Return a drop as an estimate, with McNemar's test in its detail."""
    detail = f"{drop.only_before:,} images lost, {drop.only_after:,} won; exact McNemar test p = {drop.p_value:.2g}"
    return Estimate(drop.drop, *drop.interval, detail, drop.images)
