"""Which images does the file get wrong, in the classes that suffered most? Small pictures for the report."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from compress.data.splits import Split
from compress.verification.metrics import Predictions, class_accuracy

CLASSES, IMAGES = 4, 8
SIDE = 64  # pixels; larger images are scaled down


def worst_images(before: Predictions | None, after: Predictions | None, split: Split) -> list[dict[str, Any]]:
    """Return images of the classes that lost most against the baseline, or that are worst where there is none.

    With a baseline they are images that it gets right and the file gets wrong, and a class that lost nothing has none.
    Without one they are images that the file gets wrong. In each class those come first that the file is surest of.

    Args:
        before: Of the baseline over `split`; None without one.
        after: Of the file; None where it could not be run.
        split: Where the images are.

    Returns:
        For each of at most `CLASSES` x `IMAGES` images {"class": index of the class it stands for, which is its label,
        "label", "predicted": class indices, "index": its place in the source, "image": PNG in base64, no side longer
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
    """Return classes by what they lost, the most first; by what they lack where there is nothing to lose from."""
    accuracy = class_accuracy(after)[0]
    losses = 1 - accuracy if before is None else class_accuracy(before)[0] - accuracy
    order = np.argsort(-np.nan_to_num(losses), kind="stable")
    return [int(label) for label in order[:CLASSES] if losses[label] > 0]


def _surest(after: Predictions, wrong: np.ndarray, label: int) -> list[int]:
    """Return places of wrong images of a class, those first whose class is furthest below what was chosen."""
    places = np.flatnonzero(wrong & (after.labels == label))
    outputs = after.outputs[places]
    margins = outputs.max(1) - outputs[:, label] if len(places) else np.empty(0)
    return [int(place) for place in places[np.argsort(-margins, kind="stable")[:IMAGES]]]
