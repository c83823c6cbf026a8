"""Average precision of scored objects as COCO defines it, from overlaps of masks or similarities of key points.

    overlaps (M, G) of one image --match--> (M, 10) right, wrong or ignored at each threshold
    matches of all images --average_precisions--> {"map": 0.41, "map50": 0.63, "map75": 0.44}

Source: Lin et al. 2014, "Microsoft COCO: Common Objects in Context", arXiv:1405.0312.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RIGHT, WRONG, IGNORED = 1, 0, -1
MOST = 100  # objects counted of each class in an image
_RECALLS = np.linspace(0, 1, 101)
_MASKS_AT_ONCE = 16
_BOX_SHARE = 0.53  # area of an object with key points, relative to its box
# spread of each key point of a person, relative to the root of the area
_PERSON = (0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087,
           0.089, 0.089)  # fmt: skip


def match(
    overlaps: np.ndarray, scores: np.ndarray, labels: np.ndarray, there: np.ndarray, ignored: np.ndarray | None = None
) -> np.ndarray:
    """Match the found objects of an image to the objects that are there, best score first, within each class.

    Args:
        overlaps: (M, G) overlap of each found object with each one that is there, in [0, 1].
        scores: (M,).
        labels: (M,) classes of the found objects.
        there: (G,) classes of the objects that are there.
        ignored: (G,) bool, objects that count neither way; None for no such object.

    Returns:
        (M, 10) int8, RIGHT, WRONG or IGNORED at each threshold from 0.5 to 0.95.
    """
    matches = np.full((len(scores), len(THRESHOLDS)), WRONG, np.int8)
    unseen = np.zeros(len(there), bool) if ignored is None else ignored
    taken = np.zeros((len(there), len(THRESHOLDS)), bool)
    counted: dict[int, int] = {}
    for place in np.argsort(-scores, kind="stable"):
        label = int(labels[place])
        counted[label] = counted.get(label, 0) + 1
        if counted[label] > MOST:
            matches[place] = IGNORED
            continue
        near = np.flatnonzero((there == label) & (overlaps[place] >= THRESHOLDS[0]))
        for is_ignored in (False, True):
            those = near[unseen[near] == is_ignored]
            if len(those) == 0:
                continue
            free = np.where(taken[those], -1.0, overlaps[place, those, None])
            best = free.argmax(0)
            hit = (free.max(0) >= THRESHOLDS) & (matches[place] == WRONG)
            taken[those[best[hit]], np.flatnonzero(hit)] = True
            matches[place, hit] = IGNORED if is_ignored else RIGHT
    return matches


def average_precisions(
    matches: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    there: Sequence[np.ndarray],
) -> dict[str, float]:
    """Return "map" (mean over thresholds from 0.5 to 0.95), "map50" and "map75", means over classes that are there.

    Args:
        matches: For each image, as `match` returns them.
        scores: For each image (M,).
        labels: For each image (M,) classes of the found objects.
        there: For each image (G,) classes of the objects that count.

    Returns:
        Shares; NaN if no image has an object.
    """
    wanted = np.concatenate(there) if there else np.zeros(0, np.int64)
    found, score, kind = np.concatenate(matches), np.concatenate(scores), np.concatenate(labels)
    classes, counts = np.unique(wanted, return_counts=True)
    if len(classes) == 0:
        return dict.fromkeys(("map", "map50", "map75"), math.nan)
    order = np.argsort(-score, kind="stable")
    found, kind = found[order], kind[order]
    by_class = np.stack(
        [_precisions(found[kind == label], count) for label, count in zip(classes, counts, strict=True)]
    )
    mean = by_class.mean(0)
    return {"map": float(mean.mean()), "map50": float(mean[0]), "map75": float(mean[5])}


def _precisions(found: np.ndarray, count: int) -> np.ndarray:
    """Return (10,) the mean precision over 101 recalls at each threshold, of one class with `count` objects."""
    values = np.zeros(len(THRESHOLDS))
    for place, column in enumerate(found.T):
        is_right = column[column != IGNORED] == RIGHT
        right = np.cumsum(is_right)
        precision = right / np.arange(1, len(right) + 1)
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        values[place] = envelope[np.searchsorted(right / count, _RECALLS)].mean()
    return values


def mask_overlaps(found: Any, there: np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
    """Return (M, G) the intersection over union of masks; few found masks are in memory at once.

    Args:
        found: M masks of (H, W) bool: an array, or an object that returns arrays for arrays of positions.
        there: (G, H, W) bool.
        places: Positions of the found masks that are compared, the others overlap with none; None for all.
    """
    overlaps = np.zeros((len(found), len(there)), np.float32)
    if overlaps.size == 0:
        return overlaps
    wanted = there.reshape(len(there), -1).astype(np.float32)
    areas = wanted.sum(1)
    places = np.arange(len(found)) if places is None else places
    for start in range(0, len(places), _MASKS_AT_ONCE):
        part = places[start : start + _MASKS_AT_ONCE]
        masks = np.asarray(found[part])
        got = masks.reshape(len(masks), -1).astype(np.float32)
        shared = got @ wanted.T
        overlaps[part] = shared / np.maximum(got.sum(1)[:, None] + areas - shared, 1)
    return overlaps


def keypoint_similarities(found: np.ndarray, there: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return (M, G) the object key point similarity (OKS), 0 for objects without a visible point.

    The spreads of 17 points are those of COCO's persons; of another number K, each is 1 / K. The area of an object is
    0.53 of its box.

    Args:
        found: (M, K, 2 or 3) x, y of the found points.
        there: (G, K, 3) x, y and visibility, 0 for points that are not labelled.
        boxes: (G, 4) [x0, y0, x1, y1] of the objects that are there.
    """
    count = there.shape[1]
    spreads = np.asarray(_PERSON if count == len(_PERSON) else np.full(count, 1 / count))
    areas = _BOX_SHARE * np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).astype(np.float64)
    distances = np.square(found[:, None, :, :2].astype(np.float64) - there[None, :, :, :2]).sum(-1)
    scale = 2 * np.square(2 * spreads) * np.maximum(areas, 1e-9)[:, None]
    is_seen = there[..., 2] > 0
    near = np.exp(-distances / scale) * is_seen
    similarities: np.ndarray = near.sum(-1) / np.maximum(is_seen.sum(-1), 1)
    return similarities


def fill_polygons(polygons: Sequence[Sequence[np.ndarray]], size: tuple[int, int]) -> np.ndarray:
    """Return (G, H, W) bool masks of objects, each the union of its polygons; a pixel counts by its centre.

    Args:
        polygons: For each object its polygons, (P, 2) corners x, y in pixels.
        size: (height, width).
    """
    masks = np.zeros((len(polygons), *size), bool)
    for mask, parts in zip(masks, polygons, strict=True):
        for corners in parts:
            mask |= _filled(np.asarray(corners, np.float64), size)
    return masks


def _filled(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the (H, W) pixels whose centres an odd number of edges has on its left."""
    height, width = size
    rows = np.arange(height) + 0.5
    (x0, y0), (x1, y1) = corners.T, np.roll(corners, -1, 0).T
    row, edge = np.nonzero((y0 <= rows[:, None]) != (y1 <= rows[:, None]))
    x = x0[edge] + (rows[row] - y0[edge]) / (y1 - y0)[edge] * (x1 - x0)[edge]
    crossings = np.zeros((height, width + 1), np.int64)
    np.add.at(crossings, (row, np.ceil(x - 0.5).clip(0, width).astype(np.int64)), 1)
    filled: np.ndarray = np.cumsum(crossings, 1)[:, :width] % 2 == 1
    return filled
