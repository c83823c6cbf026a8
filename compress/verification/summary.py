"""Summary of predictions: estimates for the gates, values for the report, and misclassified images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compress.data.splits import Split
from compress.errors import InternalError
from compress.tasks.classification import Classification
from compress.verification.metrics import Estimate, Predictions, class_accuracy, estimate_changes, estimate_quality
from compress.verification.quality import Found
from compress.verification.task_metrics import Measured, changes_of_measured, estimate_measured

Estimates = dict[str, Estimate]


@dataclass(frozen=True, slots=True)
class QualitySummary:
    """Quality of the file, and its change against the baseline.

    Attributes:
        own: Metrics of the file, named as in `metrics.estimate_quality`; None where it could not be measured.
        changes: Changes against the baseline, named as in `metrics.estimate_changes`; None without a baseline.
        details: Plain values for the report.
    """

    own: Estimates | None
    changes: Estimates | None
    details: dict[str, Any]


def estimate(found: Found, names: Sequence[str] = ()) -> Estimates:
    """Return the metrics of a network with their intervals."""
    return estimate_quality(found, names) if isinstance(found, Predictions) else estimate_measured(found)


def changes_from(before: Found, after: Found, names: Sequence[str] = ()) -> Estimates:
    """Return the changes of the metrics from one network to another."""
    if isinstance(before, Predictions) and isinstance(after, Predictions):
        return estimate_changes(before, after, names)
    if isinstance(before, Measured) and isinstance(after, Measured):
        return changes_of_measured(before, after)
    raise InternalError("Two networks were measured by different tasks.")


def summarize_quality(before: Found | None, after: Found | None, evaluation: Split) -> QualitySummary:
    """Summarize the predictions of baseline and file on a split; None stands for one that could not be measured."""
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
    """Summarize the metrics of a task other than classification."""
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
    """Return the values of metrics without their intervals."""
    return {name: estimate.value for name, estimate in (estimates or {}).items()}


def _plain(estimates: Mapping[str, Estimate] | None) -> dict[str, Any] | None:
    return None if estimates is None else {name: asdict(one) for name, one in estimates.items()}


def _by_class(predictions: Predictions | None) -> list[float | None] | None:
    """Return top-1 of each class, None for one without images; None without predictions."""
    if predictions is None:
        return None
    return [None if math.isnan(share) else share for share in class_accuracy(predictions)[0].tolist()]


CLASSES, IMAGES = 4, 8
SIDE = 64  # pixels; larger images are scaled down


def worst_images(before: Predictions | None, after: Predictions | None, split: Split) -> list[dict[str, Any]]:
    """Return misclassified images of the classes that lost most against the baseline, or of the worst classes.

    With a baseline, the images are right in the baseline and wrong in the file, and a class without loss is left out.
    Without a baseline, the images are wrong in the file. In each class, the most confident errors come first.

    Args:
        before: Predictions of the baseline over `split`; None without one.
        after: Predictions of the file; None where it could not be run.
        split: Split with the images.

    Returns:
        For each of at most `CLASSES` x `IMAGES` images {"class": index of the class it stands for, which is its label,
        "label", "predicted": class indices, "index": position in the source, "image": PNG in base64, no side longer
        than `SIDE` pixels}; plain values.
    """
    if after is None:
        return []
    wrong = ~after.hits if before is None else before.hits & ~after.hits
    chosen = [place for label in _worst_classes(before, after) for place in _surest(after, wrong, label)]
    if not chosen or split.read(np.zeros(1, np.int64)).dtype != np.uint8:  # prepared ones are no pictures any more
        return []
    return [
        {
            "class": int(after.labels[place]),
            "label": int(after.labels[place]),
            "predicted": int(after.chosen[place]),
            "index": int(split.indices[place]),
            "image": to_png(image),
        }
        for place, image in zip(chosen, split.read(np.asarray(chosen)), strict=True)
    ]


def to_png(image: np.ndarray) -> str:
    """Return a uint8 (H, W, C) image, C = 1 or 3, as PNG in base64, scaled down to `SIDE` where it is larger."""
    from PIL import Image  # as matplotlib: nothing but a verification needs it

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _worst_classes(before: Predictions | None, after: Predictions) -> list[int]:
    """Return classes by loss of top-1, largest first; without a baseline, by their share of errors."""
    accuracy = class_accuracy(after)[0]
    losses = 1 - accuracy if before is None else class_accuracy(before)[0] - accuracy
    order = np.argsort(-np.nan_to_num(losses), kind="stable")
    return [int(label) for label in order[:CLASSES] if losses[label] > 0]


def _surest(after: Predictions, wrong: np.ndarray, label: int) -> list[int]:
    """Return positions of wrong images of a class, by the margin of the predicted class, largest first."""
    places = np.flatnonzero(wrong & (after.labels == label))
    outputs = after.outputs[places]
    margins = outputs.max(1) - outputs[:, label] if len(places) else np.empty(0)
    return [int(place) for place in places[np.argsort(-margins, kind="stable")[:IMAGES]]]
