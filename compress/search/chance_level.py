"""Chance level: a baseline that is no better than always answering the most frequent class."""

import numpy as np

from compress.data.splits import Split, known_labels
from compress.tasks.classification import Classification

SIGNIFICANCE = 0.05


def chance_warning(quality: float, evaluation: Split) -> str | None:
    """Return a warning where a classifier's top-1 is not significantly above chance, else None.

    Chance is the share of the most frequent class; the test is the exact binomial one, one-sided, at 5 %.

    Args:
        quality: Top-1 in [0, 1].
        evaluation: What it was measured on.
    """
    if not isinstance(evaluation.task, Classification):
        return None
    labels = known_labels(evaluation)
    labels = evaluation.labels if labels is None else labels
    counts = np.bincount(labels)
    most, images = int(counts.max()), len(labels)
    from scipy.stats import binomtest  # scipy takes a second to import

    right = round(quality * images)
    if len(counts) < 2 or binomtest(right, images, most / images, alternative="greater").pvalue <= SIGNIFICANCE:
        return None
    return (
        f"The baseline is at chance level: {right} of {images} evaluation images are right, and {most} would be with "
        "the same answer for all of them. Check weights, data.preprocessing (mean, std, scale, channels) and the order "
        "of the classes: every change of quality below is relative to this."
    )
