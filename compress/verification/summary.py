"""What do predictions come to? Estimates for the gates, and plain values for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compress.data.splits import Split
from compress.verification.metrics import Estimate, Predictions, class_accuracy, estimate_changes, estimate_quality
from compress.verification.pictures import worst_images

Estimates = dict[str, Estimate]


@dataclass(frozen=True, slots=True)
class QualitySummary:
    """How good the file is, and what changed.

    Attributes:
        own: Of the file, as `metrics.estimate_quality` calls them; None where it could not be measured.
        changes: Against the baseline, as `metrics.estimate_changes` calls them; None without a baseline.
        details: Plain values for the report.
    """

    own: Estimates | None
    changes: Estimates | None
    details: dict[str, Any]


def summarize_quality(before: Predictions | None, after: Predictions | None, evaluation: Split) -> QualitySummary:
    """Put together what the baseline and the file predict on a split; None for one that could not."""
    names = evaluation.source.classes
    own = estimate_quality(after, names) if after is not None else None
    changes = estimate_changes(before, after, names) if before is not None and after is not None else None
    whole = estimate_quality(before, names) if before is not None else None
    classes = max(len(names), *(one.classes for one in (before, after) if one is not None), 0)
    details = {
        "classes": list(names),
        "images_by_class": np.bincount(evaluation.labels, minlength=classes).tolist(),
        "slim": _plain(own),
        "slim_by_class": _by_class(after),
        "baseline": _plain(whole),
        "baseline_by_class": _by_class(before),
        "changes": _plain(changes),
        "worst_images": worst_images(before, after, evaluation),
    }
    return QualitySummary(own, changes, details)


def values_of(estimates: Mapping[str, Estimate] | None) -> dict[str, float]:
    """Return the figures without how sure they are."""
    return {name: estimate.value for name, estimate in (estimates or {}).items()}


def _plain(estimates: Mapping[str, Estimate] | None) -> dict[str, Any] | None:
    return None if estimates is None else {name: asdict(one) for name, one in estimates.items()}


def _by_class(predictions: Predictions | None) -> list[float | None] | None:
    """Return top-1 of each class, None for one without images; None without predictions."""
    if predictions is None:
        return None
    return [None if math.isnan(share) else share for share in class_accuracy(predictions)[0].tolist()]
