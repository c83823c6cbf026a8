"""Decoding of detector outputs into boxes, in NumPy: for `task: {name: detection, postprocess: ...}`.

task: {name: detection, postprocess: "compress.tasks.decoders:ultralytics"}
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SCORE, OVERLAP, MOST = 0.001, 0.7, 300
_END_TO_END = 6  # x0, y0, x1, y1, score, label


def ultralytics(outputs: Mapping[str, Any], image_size: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    """Return the boxes of the decoded output of a YOLO detector of ultralytics: v5u, v8, 11 and 26.

    Args:
        outputs: Output name -> tensor. The first has shape (N, 4 + classes, anchors) with centre, width and height in
            pixels and a probability for each class; or, without non-maximum suppression, (N, boxes, 6).
        image_size: (height, width) of the network's input.

    Returns:
        For each image `boxes` (M, 4) [x0, y0, x1, y1] in pixels, `scores` (M,) and `labels` (M,), best first.
    """
    first = np.asarray(next(iter(outputs.values())), np.float32)
    if first.ndim == 3 and first.shape[2] == _END_TO_END and first.shape[1] > _END_TO_END:
        return [_of_rows(rows, image_size) for rows in first]
    return [_of_anchors(values, image_size) for values in first]


def _of_rows(rows: np.ndarray, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    rows = rows[rows[:, 4] > SCORE]
    rows = rows[np.argsort(-rows[:, 4], kind="stable")][:MOST]
    return {"boxes": _clipped(rows[:, :4], image_size), "scores": rows[:, 4], "labels": rows[:, 5].astype(np.int64)}


def _of_anchors(values: np.ndarray, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    places, probabilities = values[:4].T, values[4:].T
    labels = probabilities.argmax(1)
    scores = probabilities[np.arange(len(labels)), labels]
    kept = scores > SCORE
    places, scores, labels = places[kept], scores[kept], labels[kept]
    half = places[:, 2:] / 2
    boxes = _clipped(np.concatenate([places[:, :2] - half, places[:, :2] + half], 1), image_size)
    chosen = suppress(boxes, scores, labels)
    return {"boxes": boxes[chosen], "scores": scores[chosen], "labels": labels[chosen].astype(np.int64)}


def suppress(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, overlap: float = OVERLAP, most: int = MOST
) -> np.ndarray:
    """Return the positions of the boxes that non-maximum suppression within each class keeps.

    Args:
        boxes: (M, 4) [x0, y0, x1, y1].
        scores: (M,).
        labels: (M,) class indices.
        overlap: Largest intersection over union of two boxes that are both kept.
        most: Largest number of boxes kept.

    Returns:
        Positions, best first.
    """
    order = np.argsort(-scores, kind="stable")
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    kept: list[int] = []
    while len(order) and len(kept) < most:
        best, rest = order[0], order[1:]
        kept.append(int(best))
        corners = np.concatenate(
            [np.maximum(boxes[best, :2], boxes[rest, :2]), np.minimum(boxes[best, 2:], boxes[rest, 2:])], 1
        )
        shared = np.prod(np.maximum(corners[:, 2:] - corners[:, :2], 0), axis=1)
        union = np.maximum(areas[best] + areas[rest] - shared, 1e-9)
        order = rest[(shared / union <= overlap) | (labels[rest] != labels[best])]
    return np.asarray(kept, np.int64)


def _clipped(boxes: np.ndarray, image_size: Sequence[int]) -> np.ndarray:
    height, width = image_size
    limits = np.asarray([width, height, width, height], np.float32)
    clipped: np.ndarray = np.clip(boxes, 0, limits)
    return clipped
