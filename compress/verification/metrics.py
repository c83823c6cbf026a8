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
    def value(self) -> float:
        """Top-1, which decides."""
        return float(self.hits.mean())

    @property
    def metric(self) -> Metric:
        """Name of the metric."""
        return CLASSIFICATION.main

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

    def among(self, count: int) -> np.ndarray:
        """Return (N,) whether the label is among the `count` largest outputs; equal ones rank by class."""
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
        """(N, K) float32: the outputs where they are probabilities already, else their softmax."""
        outputs = self.outputs.astype(np.float32)
        if outputs.min() >= 0 and np.abs(outputs.sum(1) - 1).max() < 1e-3:
            return outputs
        outputs -= outputs.max(1, keepdims=True)
        np.exp(outputs, out=outputs)
        outputs /= outputs.sum(1, keepdims=True)
        return outputs


def share_interval(successes: int, count: int, comparisons: int = 1) -> tuple[float, float]:
    """Return the interval in which a share lies with 95 % confidence (Wilson 1927).

    The worst of several is rare by itself, and Wilson's interval too narrow for that: it has Clopper and Pearson's.

    Args:
        successes: Of `count`.
        count: At least 1.
        comparisons: How many shares this one was chosen from as the worst; each then has its part of the 5 %
            (Bonferroni), so that all of them lie in theirs with 95 % confidence.

    >>> [round(bound, 4) for bound in share_interval(95, 100)]
    [0.8882, 0.9785]
    """
    from scipy.stats import binomtest  # scipy takes a second to import

    level = 1 - (1 - CONFIDENCE) / comparisons
    interval = binomtest(successes, count).proportion_ci(level, method="wilson" if comparisons == 1 else "exact")
    return float(interval.low), float(interval.high)


def class_accuracy(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return (K,) top-1 of the images of each class, NaN without images, and (K,) their number."""
    counts = np.bincount(predictions.labels, minlength=predictions.classes)
    right = np.bincount(predictions.labels[predictions.hits], minlength=predictions.classes)
    with np.errstate(invalid="ignore"):
        return right / counts, counts


def calibration_error(predictions: Predictions) -> Bounds:
    """Return by how much confidence and accuracy differ, with its interval (`statistics.calibration_bounds`)."""
    return calibration_bounds(predictions.probabilities.max(1), predictions.hits)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric, and how sure it is.

    Attributes:
        value: As measured.
        low: Lower end of the interval in which it lies with 95 % confidence; None where no interval is known.
        high: Upper end.
        detail: What it is, in words.
        images: Images that it was measured on, all of equal weight; None where that is not so.
    """

    value: float
    low: float | None = None
    high: float | None = None
    detail: str = ""
    images: int | None = None


@dataclass(frozen=True, slots=True)
class PairedDrop:
    """By how much top-1 is lower than that of another network on the same images.

    Attributes:
        drop: Top-1 of the other network - top-1.
        interval: In which it lies with 95 % confidence.
        only_before: Images that only the other network gets right.
        only_after: Images that only this one gets right.
        p_value: How likely at least such a difference is if both are as good (exact McNemar test, both sides; times
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
        before: (N,) bool, whether the other network is right.
        after: (N,) bool, whether this one is.
        comparisons: How many such drops this one was chosen from as the worst (Bonferroni).

    Raises:
        DataError: They are not of the same images, or of no images.
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

    For losses of -1, 0 and 1 it is Agresti and Min's: half an image more in each of the four cells, that is one more
    that is lost and one that is won; the same is done for means over several distributions.

    Args:
        losses: (N,) in [-1, 1], one an image.
        comparisons: How many such means this one was chosen from as the worst.
    """
    count, total = len(losses) + 2, float(losses.sum())
    middle = total / count
    variance = (float((losses**2).sum()) + 1 - total**2 / count) / count**2
    half = _quantile(comparisons) * math.sqrt(variance)
    return max(-1.0, middle - half), min(1.0, middle + half)


def mean_share_interval(shares: np.ndarray) -> tuple[float, float]:
    """Return the interval in which the mean of shares lies with 95 % confidence, after two more of 0 and two of 1.

    Args:
        shares: (N,) in [0, 1], one an image, such as its share of right answers over several distributions.

    Source, for shares of 0 and 1: Agresti and Coull 1998, "Approximate is better than exact".
    """
    count, total = len(shares) + 4, float(shares.sum()) + 2
    middle = total / count
    half = _quantile(1) * math.sqrt((float((shares**2).sum()) + 2 - total**2 / count) / count**2)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_distance_interval(distances: np.ndarray) -> tuple[float, float]:
    """Return the interval in which the mean of distances of probabilities lies with 95 % confidence.

    One image more, at the largest distance there is, stands for the rare large ones that few images do not show.

    Args:
        distances: (N,) in [0, sqrt 2].
    """
    more = np.append(np.asarray(distances, np.float64), _FARTHEST)
    half = _quantile(1) * float(more.std()) / math.sqrt(len(more))
    low = min(float(more.mean()) - half, float(distances.mean()))
    return max(0.0, low), min(_FARTHEST, float(more.mean()) + half)


def _quantile(comparisons: int) -> float:
    """Return by how many standard errors an interval reaches to either side."""
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
    """Return how good a network is: "top1", "top5", "worst_class", "calibration_error".

    There is a "top5" of more than five classes only, and a "worst_class" only where every class has an image.

    Args:
        predictions: Over a split.
        names: Of the classes, for the details.
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
    """Return the least top-1 of a class; it lies between the least ends of the intervals of all classes together."""
    rights = np.rint(accuracy * counts).astype(np.int64)
    ends = [share_interval(int(right), int(of), len(counts)) for right, of in zip(rights, counts, strict=True)]
    worst = int(accuracy.argmin())
    detail = f"class {class_name(worst, names)} of {len(counts)}, {rights[worst]:,} of {counts[worst]:,} images"
    low, high = (min(side) for side in zip(*ends, strict=True))
    return Estimate(float(accuracy[worst]), low, high, detail, int(counts[worst]))


def worst_drop(drops: Sequence[PairedDrop]) -> tuple[int, Estimate]:
    """Return which of several drops is the largest, and that; it lies between the largest ends of all their intervals.

    Args:
        drops: At least one; each for as many comparisons as there are drops.
    """
    worst = max(range(len(drops)), key=lambda place: drops[place].drop)
    low, high = (max(side) for side in zip(*(drop.interval for drop in drops), strict=True))
    return worst, replace(as_estimate(drops[worst]), low=low, high=high)


def estimate_changes(before: Predictions, after: Predictions, names: Sequence[str] = ()) -> dict[str, Estimate]:
    """Return what changed from one network to another on the same images.

    Args:
        before: Of the network that is compared with.
        after: Of the network in question.
        names: Of the classes, for the details.

    Returns:
        "drop.top1", "drop.top5", "drop.worst_class" (of the class that lost most, where every class has an image),
        "rise.calibration_error", "churn" and "softmax_distance".

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
    """Return the largest drop of top-1 of a class; every class has an image."""
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
    """Return a drop as a metric of its own."""
    detail = f"{drop.only_before:,} images lost, {drop.only_after:,} won; exact McNemar test p = {drop.p_value:.2g}"
    return Estimate(drop.drop, *drop.interval, detail, drop.images)
