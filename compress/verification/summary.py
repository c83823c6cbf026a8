"""What do predictions come to? Estimates for the gates, and plain values for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compress.data.splits import Split
from compress.errors import InternalError
from compress.tasks.classification import Classification
from compress.verification.metrics import Estimate, Predictions, class_accuracy, estimate_changes, estimate_quality
from compress.verification.misclassified import worst_images
from compress.verification.quality import Found
from compress.verification.task_metrics import Measured, changes_of_measured, estimate_measured

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


def estimate(found: Found, names: Sequence[str] = ()) -> Estimates:
    """Return how good a network is."""
    return estimate_quality(found, names) if isinstance(found, Predictions) else estimate_measured(found)


def changes_from(before: Found, after: Found, names: Sequence[str] = ()) -> Estimates:
    """Return what changed from one network to another."""
    if isinstance(before, Predictions) and isinstance(after, Predictions):
        return estimate_changes(before, after, names)
    if isinstance(before, Measured) and isinstance(after, Measured):
        return changes_of_measured(before, after)
    raise InternalError("Two networks were measured by different tasks.")


def summarize_quality(before: Found | None, after: Found | None, evaluation: Split) -> QualitySummary:
    """Put together what the baseline and the file come to on a split; None for one that could not."""
    if not isinstance(evaluation.task, Classification):
        return _summarize_measured(before, after, evaluation)
    assert not isinstance(before, Measured)
    assert not isinstance(after, Measured)
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


def _summarize_measured(before: Found | None, after: Found | None, evaluation: Split) -> QualitySummary:
    """Put together the same of another task than classification."""
    own = estimate(after) if after is not None else None
    whole = estimate(before) if before is not None else None
    changes = changes_from(before, after) if before is not None and after is not None else None
    metric = evaluation.task.main
    details = {
        "task": evaluation.task.name,
        "metric": metric.to_dict(),
        "is_labelled": evaluation.task.needs_targets,
        "classes": list(evaluation.source.classes),
        "slim": _plain(own),
        "baseline": _plain(whole),
        "changes": _plain(changes),
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
