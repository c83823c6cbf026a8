"""Decoding of detector outputs into boxes, masks and key points, in NumPy.

task: {name: detection, postprocess: "compress.tasks.decoders:ultralytics"}
task: {name: detection, postprocess: "compress.tasks.decoders:ultralytics", kwargs: {keypoints: [17, 3]}}
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SCORE, OVERLAP, MOST = 0.001, 0.7, 300
_END_TO_END = 6  # x0, y0, x1, y1, score, label, before further values


def ultralytics(
    outputs: Mapping[str, Any], image_size: tuple[int, int], keypoints: Sequence[int] = (0, 0)
) -> list[dict[str, Any]]:
    """Return the objects in the decoded outputs of a YOLO detector of ultralytics: v5u, v8, 11 and 26.

    Args:
        outputs: Output name -> tensor. The first has shape (N, 4 + classes + extra, anchors) with centre, width and
            height in pixels, a probability for each class, and further values; or, without non-maximum suppression,
            (N, boxes, 6 + extra). Segmentation networks have the prototypes (N, C, h, w) of masks as their second
            output, and C mask coefficients as the further values.
        image_size: (height, width) of the network's input.
        keypoints: Number of key points and of values of each, 2 or 3, as `kpt_shape` of ultralytics; (0, 0) for none.

    Returns:
        For each image `boxes` (M, 4) [x0, y0, x1, y1] in pixels, `scores` (M,) and `labels` (M,), best first; `masks`
        (M, height, width) of a segmentation network, computed when they are read; `keypoints` (M, K, 2 or 3).
    """
    arrays = [np.asarray(one, np.float32) for one in outputs.values()]
    first, prototypes = arrays[0], next((one for one in arrays[1:] if one.ndim == 4), None)
    count = int(np.prod(keypoints)) + (0 if prototypes is None else prototypes.shape[1])
    is_end_to_end = first.ndim == 3 and first.shape[2] == _END_TO_END + count and first.shape[1] > first.shape[2]
    found: list[dict[str, Any]] = []
    for place, values in enumerate(first):
        kept, extra = (_of_rows if is_end_to_end else _of_anchors)(values, image_size, count)
        if prototypes is not None:
            kept["masks"] = PrototypeMasks(extra, prototypes[place], kept["boxes"], image_size)
        elif count:
            kept["keypoints"] = extra.reshape(len(extra), *keypoints)
        found.append(kept)
    return found


def _of_rows(rows: np.ndarray, image_size: tuple[int, int], extra: int) -> tuple[dict[str, Any], np.ndarray]:
    rows = rows[rows[:, 4] > SCORE]
    rows = rows[np.argsort(-rows[:, 4], kind="stable")][:MOST]
    boxes = {"boxes": _clipped(rows[:, :4], image_size), "scores": rows[:, 4], "labels": rows[:, 5].astype(np.int64)}
    return boxes, rows[:, _END_TO_END:]


def _of_anchors(values: np.ndarray, image_size: tuple[int, int], extra: int) -> tuple[dict[str, Any], np.ndarray]:
    end = len(values) - extra
    places, probabilities, further = values[:4].T, values[4:end].T, values[end:].T
    labels = probabilities.argmax(1)
    scores = probabilities[np.arange(len(labels)), labels]
    kept = scores > SCORE
    places, scores, labels, further = places[kept], scores[kept], labels[kept], further[kept]
    half = places[:, 2:] / 2
    boxes = _clipped(np.concatenate([places[:, :2] - half, places[:, :2] + half], 1), image_size)
    chosen = suppress(boxes, scores, labels)
    found = {"boxes": boxes[chosen], "scores": scores[chosen], "labels": labels[chosen].astype(np.int64)}
    return found, further[chosen]


class PrototypeMasks:
    """Masks of objects as sums of prototypes, enlarged to the image and cut at their boxes; computed when read.

    Source: Bolya et al. 2019, "YOLACT: Real-time Instance Segmentation", arXiv:1904.02689.

    Args:
        coefficients: (M, C) weight of each prototype in each mask.
        prototypes: (C, h, w).
        boxes: (M, 4) [x0, y0, x1, y1] in pixels of the image.
        image_size: (height, width) of the masks.
    """

    def __init__(
        self, coefficients: np.ndarray, prototypes: np.ndarray, boxes: np.ndarray, image_size: tuple[int, int]
    ) -> None:
        self.coefficients, self.prototypes, self.boxes, self.image_size = coefficients, prototypes, boxes, image_size

    def __len__(self) -> int:
        return len(self.coefficients)

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        """Return the (n, height, width) bool masks of the objects in a slice or at some positions."""
        coefficients, boxes = self.coefficients[part], np.ceil(self.boxes[part]).astype(np.int64)
        sums = np.tensordot(coefficients, self.prototypes, 1)
        masks = np.zeros((len(coefficients), *self.image_size), bool)
        rows, columns = (
            _enlarging(have, want) for have, want in zip(self.prototypes.shape[1:], self.image_size, strict=True)
        )
        for mask, logits, (left, top, right, bottom) in zip(masks, sums, boxes, strict=True):
            mask[top:bottom, left:right] = rows[top:bottom] @ logits @ columns[left:right].T > 0
        return masks


def _enlarging(have: int, want: int) -> np.ndarray:
    """Return the (want, have) matrix of linear interpolation between centres of pixels."""
    places = ((np.arange(want) + 0.5) * have / want - 0.5).clip(0, have - 1)
    low = np.floor(places).astype(np.int64)
    matrix = np.zeros((want, have), np.float32)
    matrix[np.arange(want), low] = 1 - (places - low)
    matrix[np.arange(want), np.minimum(low + 1, have - 1)] += (places - low).astype(np.float32)
    return matrix


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
