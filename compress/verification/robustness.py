"""Robustness: metrics under noise, corruptions and distribution shift, compared with the baseline.

The same noise and the same corrupted images go into both networks. Top-1 alone does not show the difference:
Liebenwein et al. 2021, "Lost in Pruning", arXiv:2103.03014.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from compress.catalog import CORRUPTIONS, NOMINAL
from compress.data.splits import Split
from compress.errors import DataError, InternalError
from compress.progress import Progress, SilentProgress
from compress.tasks.base import Metric
from compress.tasks.classification import CLASSIFICATION
from compress.verification.corruptions import add_noise, corrupt
from compress.verification.metrics import (
    Estimate,
    Predictions,
    estimate_changes,
    mean_loss_interval,
    mean_share_interval,
    paired_drop,
    worst_drop,
)
from compress.verification.quality import Change, Found, predict_each
from compress.verification.runtimes.base import Runtime
from compress.verification.task_metrics import Measured, changes_of_measured, loss_of

MOVING = ("elastic",)  # corruptions that move pixels


@dataclass(frozen=True, slots=True)
class Robustness:
    """Settings of a robustness measurement.

    Attributes:
        images: Number of images, spread evenly over the evaluation split; a smaller split is used completely.
        noise: "uniform" or "gaussian".
        noise_levels: Strengths of the noise, in units of the network's input, after normalisation.
        corruptions: Names in `catalog.CORRUPTIONS`.
        severities: Severities of each corruption, 1 to 5.
        seed: Seed of all random numbers.
    """

    images: int = 1000
    noise: str = "uniform"
    noise_levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    corruptions: tuple[str, ...] = CORRUPTIONS
    severities: tuple[int, ...] = (3,)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Distribution:
    """Distribution of images that networks are measured on.

    Attributes:
        name: Name such as "uniform noise 0.1" or "jpeg 3".
        kind: "nominal", "noise", "corruption" or "shifted".
        corrupt: Function that changes uint8 images, given the position of the first one in the split, or None.
        perturb: Function that changes network inputs, with the same arguments, or None.
        split: Split with the images; None for the evaluation split.
    """

    name: str
    kind: str
    corrupt: Change | None = None
    perturb: Change | None = None
    split: Split | None = None


def distributions(wanted: Robustness, shifted: Mapping[str, Split] | None = None) -> list[Distribution]:
    """Return all distributions: nominal images, noise, corruptions, then the user's own data sets.

    Raises:
        DataError: A data set has the name of a distribution.
    """
    found = [Distribution(NOMINAL, NOMINAL)]
    for level in wanted.noise_levels:
        perturb = partial(_perturb, wanted.noise, level, wanted.seed)
        found.append(Distribution(f"{wanted.noise} noise {level:g}", "noise", perturb=perturb))
    for name in wanted.corruptions:
        for severity in wanted.severities:
            corrupt = partial(_corrupt, name, severity, wanted.seed)
            found.append(Distribution(f"{name} {severity}", "corruption", corrupt=corrupt))
    names = {one.name for one in found}
    for name, split in (shifted or {}).items():
        if name in names:
            raise DataError(f"Shifted data set '{name}' must have a name of its own, one of the distributions has it.")
        found.append(Distribution(name, "shifted", split=split))
    return found


def _perturb(kind: str, level: float, seed: int, inputs: np.ndarray, start: int) -> np.ndarray:
    """Add noise that depends only on the position of each image, not on the batch size."""
    each = [add_noise(one[None], kind, level, (seed, start + place)) for place, one in enumerate(inputs)]
    return np.concatenate(each)


def _corrupt(name: str, severity: int, seed: int, images: np.ndarray, start: int) -> np.ndarray:
    """Corrupt each image with random numbers that depend only on its position."""
    each = [corrupt(name, one[None], severity, (seed, start + place)) for place, one in enumerate(images)]
    return np.concatenate(each)


@dataclass(frozen=True, slots=True)
class Standing:
    """Metrics of a file and its baseline on one distribution.

    Attributes:
        name: Name of the distribution.
        kind: Kind of the distribution.
        value: Primary metric of the file.
        baseline_value: Primary metric of the baseline; None without one.
        changes: "drop.top1", "churn" and "softmax_distance" against the baseline on this distribution; in other tasks
            the loss of the primary metric. Empty without a baseline.
        hits: (N,) bool, whether the file is right; images come in the same order on every distribution of noise and
            corruptions. Empty in other tasks than classification.
        baseline_hits: (N,) bool, whether the baseline is right; None without one.
        metric: Primary metric of the task.
    """

    name: str
    kind: str
    value: float
    baseline_value: float | None = None
    changes: Mapping[str, Estimate] = field(default_factory=dict)
    hits: np.ndarray = field(default_factory=lambda: np.zeros(0, bool), repr=False, compare=False)
    baseline_hits: np.ndarray | None = field(default=None, repr=False, compare=False)
    metric: Metric = CLASSIFICATION.main

    @property
    def loss(self) -> Estimate:
        """Loss of the primary metric against the baseline on this distribution."""
        return loss_of(self.changes, self.metric)

    @property
    def losses(self) -> np.ndarray:
        """(N,) float: 1 for an image that only the baseline gets right, -1 where only the file does, else 0."""
        if self.baseline_hits is None:
            raise InternalError("Losses were asked for where there is no baseline.")
        losses: np.ndarray = self.baseline_hits.astype(np.float64) - self.hits
        return losses


def standings(
    session: Runtime,
    baseline: Runtime | None,
    split: Split,
    wanted: Robustness,
    batch_size: int,
    progress: Progress | None = None,
    shifted: Mapping[str, Split] | None = None,
) -> list[Standing]:
    """Measure a file and its baseline on every distribution.

    Args:
        session: Open runtime of the file.
        baseline: Open runtime of the baseline, or None.
        split: Evaluation split of at least one image.
        wanted: Settings: noise, corruptions and number of images.
        batch_size: Images at once where the batch axis is open.
        progress: Receives progress by distribution.
        shifted: Name -> split of a shifted data set.

    Raises:
        As `compress.verification.quality.predict`.
    """
    wanted = fitting(wanted, split)
    found, every = [], distributions(wanted, shifted)
    with (progress or SilentProgress()).task("robustness", len(every)) as task:
        for one in every:
            chosen = (one.split or split).first(wanted.images)
            sessions = (session,) if baseline is None else (session, baseline)
            after, *before = predict_each(sessions, chosen, batch_size, corrupt=one.corrupt, perturb=one.perturb)
            found.append(_standing(one, before[0] if before else None, after))
            task.advance()
    return found


def fitting(wanted: Robustness, split: Split) -> Robustness:
    """Return settings that fit the task of a split: without corruptions that move pixels away from masks or boxes.

    Raises:
        DataError: Corruptions are requested for images that are not uint8.
    """
    if wanted.corruptions and split.read(np.zeros(1, np.int64)).dtype != np.uint8:
        raise DataError(
            "Corruptions need uint8 images, those of the evaluation split are prepared already.",
            hint="corruptions: [] looks at noise alone",
        )
    if not split.task.is_spatial:
        return wanted
    return replace(wanted, corruptions=tuple(name for name in wanted.corruptions if name not in MOVING))


def _standing(one: Distribution, before: Found | None, after: Found) -> Standing:
    if isinstance(after, Measured):
        if not isinstance(before, Measured):
            return Standing(one.name, one.kind, after.value, metric=after.metric)
        worse = after.metric.worsening
        kept = {worse: changes_of_measured(before, after)[worse]}
        return Standing(one.name, one.kind, after.value, before.value, kept, metric=after.metric)
    if not isinstance(before, Predictions):
        return Standing(one.name, one.kind, after.value, hits=after.hits)
    changes = estimate_changes(before, after)
    kept = {name: changes[name] for name in ("drop.top1", "churn", "softmax_distance")}
    return Standing(one.name, one.kind, after.value, before.value, kept, after.hits, before.hits)


def summarize(found: Sequence[Standing]) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Return the estimates for the gates: metrics of the file alone, and changes against the baseline.

    Returns:
        Metrics: "noise", "corruptions" and "shifted", the mean top-1 over the distributions of each kind. Changes:
        "drop.noise" and so on, the mean loss of top-1; "drop.worst_distribution", the largest loss; "on.NAME", the loss
        on each distribution; "rise.excess_error", the loss of the file from nominal to corrupted images minus the loss
        of the baseline. Other tasks have the same of their primary metric, without intervals of means and without
        "rise.excess_error"; a metric that should be low has "rise.noise" and so on.
    """
    if found and not len(found[0].hits):
        return _summarize_measured(found)
    own, changes = {}, {}
    kinds = {"noise": "noise", "corruptions": "corruption", "shifted": "shifted"}
    for name, kind in kinds.items():
        those = [one for one in found if one.kind == kind]
        if not those:
            continue
        detail = f"mean over {len(those)} distribution{'' if len(those) == 1 else 's'}"
        images = None if kind == "shifted" else len(those[0].hits)
        own[name] = Estimate(float(np.mean([one.value for one in those])), *_share_interval(those), detail, images)
        if all(one.changes for one in those):
            drops = [one.changes["drop.top1"].value for one in those]
            changes[f"drop.{name}"] = Estimate(float(np.mean(drops)), *_loss_interval(those), detail, images)
    compared = [one for one in found if one.changes]
    if compared:
        changes["drop.worst_distribution"] = _worst(compared)
        changes |= {f"on.{one.name}": one.changes["drop.top1"] for one in compared}
        corrupted = [one for one in compared if one.kind == "corruption"]
        if corrupted:
            changes["rise.excess_error"] = _excess(corrupted, next(one for one in compared if one.kind == NOMINAL))
    return own, changes


def _summarize_measured(found: Sequence[Standing]) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Return the estimates of `summarize` for a task other than classification."""
    own, changes = {}, {}
    worse = "drop" if found[0].metric.higher_is_better else "rise"
    for name, kind in {"noise": "noise", "corruptions": "corruption", "shifted": "shifted"}.items():
        those = [one for one in found if one.kind == kind]
        if not those:
            continue
        detail = f"mean over {len(those)} distribution{'' if len(those) == 1 else 's'}"
        own[name] = Estimate(float(np.mean([one.value for one in those])), detail=detail)
        if all(one.changes for one in those):
            mean = float(np.mean([one.loss.value for one in those]))
            changes[f"{worse}.{name}"] = Estimate(mean, detail=detail)
    compared = [one for one in found if one.changes]
    if compared:
        worst = max(compared, key=lambda one: one.loss.value)
        detail = f"{worst.name}, of {len(compared)} distributions; {worst.loss.detail}"
        changes[f"{worse}.worst_distribution"] = replace(worst.loss, low=None, high=None, detail=detail)
        changes |= {f"on.{one.name}": one.loss for one in compared}
    return own, changes


def _share_interval(those: Sequence[Standing]) -> tuple[float, float]:
    """Return the interval of the mean top-1 over distributions; unless shifted, of each image's share of hits."""
    if those[0].kind == "shifted":
        return _of_independent([mean_share_interval(one.hits.astype(np.float64)) for one in those])
    return mean_share_interval(np.mean([one.hits for one in those], axis=0))


def _loss_interval(those: Sequence[Standing]) -> tuple[float, float]:
    """Return the interval of the mean loss over distributions."""
    if those[0].kind == "shifted":
        return _of_independent([mean_loss_interval(one.losses) for one in those])
    return mean_loss_interval(np.mean([one.losses for one in those], axis=0))


def _of_independent(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the interval of the mean of metrics that were measured on different images."""
    middles, halves = np.mean(intervals, axis=1), np.ptp(intervals, axis=1) / 2
    middle, half = float(middles.mean()), float(np.sqrt((halves**2).sum()) / len(intervals))
    return middle - half, middle + half


def _worst(compared: Sequence[Standing]) -> Estimate:
    """Return the largest loss on any distribution, with an interval for the largest of several."""
    drops = []
    for one in compared:
        if one.baseline_hits is None:
            raise InternalError("A file was compared without a baseline.")
        drops.append(paired_drop(one.baseline_hits, one.hits, len(compared)))
    worst, drop = worst_drop(drops)
    return replace(drop, detail=f"{compared[worst].name}, of {len(compared)} distributions; {drop.detail}")


def _excess(corrupted: Sequence[Standing], nominal: Standing) -> Estimate:
    """Return the loss of a file against the baseline on corrupted images minus the loss on nominal images."""
    each = np.mean([one.losses for one in corrupted], axis=0) - nominal.losses
    low, high = (2 * end for end in mean_loss_interval(each / 2))  # a difference of losses reaches from -2 to 2
    return Estimate(float(each.mean()), low, high, f"mean over {len(corrupted)} distributions", len(each))


def stated(found: Sequence[Standing]) -> list[dict[str, Any]]:
    """Return the metrics on each distribution as plain values for the report."""
    return [
        {
            "name": one.name,
            "kind": one.kind,
            one.metric.name: one.value,
            f"baseline_{one.metric.name}": one.baseline_value,
            "changes": {name: asdict(estimate) for name, estimate in one.changes.items()},
        }
        for one in found
    ]
