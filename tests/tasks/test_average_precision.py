"""Precision of masks and key points, by hand and beside pycocotools."""

import math
from typing import Any

import numpy as np
import pytest

from compress.errors import ModelError
from compress.tasks.average_precision import (
    IGNORED,
    RIGHT,
    WRONG,
    average_precisions,
    fill_polygons,
    keypoint_similarities,
    mask_overlaps,
    match,
)
from compress.tasks.detection import Detection

SIDE = 40
PERSON = 17  # key points for which pycocotools has spreads


def test_each_object_is_matched_once_and_by_the_best_score() -> None:
    overlaps = np.asarray([[0.6, 0.0], [0.9, 0.0], [0.0, 0.8], [0.0, 0.8]])
    scores, labels = np.asarray([0.9, 0.8, 0.7, 0.6]), np.asarray([0, 0, 1, 0])
    found = match(overlaps, scores, labels, np.asarray([0, 1]))
    assert found[:, 0].tolist() == [RIGHT, WRONG, RIGHT, WRONG]  # the last one has another class
    assert found[1].tolist() == [WRONG] * 3 + [RIGHT] * 6 + [WRONG]  # from 0.65 on, the first one does not reach it
    assert found[0].tolist() == [RIGHT] * 3 + [WRONG] * 7


def test_objects_that_do_not_count_are_no_mistakes() -> None:
    overlaps, ones = np.asarray([[0.9, 0.7], [0.2, 0.9]]), np.zeros(2, np.int64)
    found = match(overlaps, np.asarray([0.9, 0.8]), ones, ones, np.asarray([True, False]))
    assert found[:, 0].tolist() == [RIGHT, WRONG]  # an object that counts comes first
    assert found[:, 5].tolist() == [IGNORED, RIGHT]


def test_objects_of_a_class_beyond_the_hundredth_do_not_count() -> None:
    scores = np.linspace(1, 0.5, 102)
    found = match(np.ones((102, 1)), scores, np.zeros(102, np.int64), np.zeros(1, np.int64))
    assert (found[:, 0] == IGNORED).sum() == 2
    assert found[0, 0] == RIGHT


def test_precision_by_hand() -> None:
    hits = np.asarray([[RIGHT] * 10, [WRONG] * 10, [RIGHT] * 10], np.int8)
    there = np.zeros(2, np.int64)
    found = average_precisions([hits], [np.asarray([0.9, 0.8, 0.7])], [np.zeros(3, np.int64)], [there])
    assert found["map50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found["map"] == pytest.approx(found["map50"])
    nothing = average_precisions([hits], [np.ones(3)], [np.zeros(3, np.int64)], [np.zeros(0, np.int64)])
    assert all(math.isnan(value) for value in nothing.values())


def test_polygons_are_filled_by_the_centres_of_pixels() -> None:
    square = [[np.asarray([[1.6, 2.4], [4.6, 2.4], [4.6, 5.4], [1.6, 5.4]])]]
    (mask,) = fill_polygons(square, (8, 7))
    assert np.argwhere(mask).min(0).tolist() == [2, 2]
    assert np.argwhere(mask).max(0).tolist() == [4, 4]
    assert mask.sum() == 9
    (outside,) = fill_polygons([[np.asarray([[-5.0, -5], [20, -5], [20, 20], [-5, 20]])]], (8, 7))
    assert outside.all()
    random = np.random.default_rng(0)
    (triangle,) = fill_polygons([[random.uniform(0, 400, (3, 2))]], (400, 400))
    points = np.random.default_rng(0).uniform(0, 400, (3, 2))
    area = abs(np.cross(np.append(points[1] - points[0], 0), np.append(points[2] - points[0], 0))[2]) / 2
    assert triangle.sum() == pytest.approx(area, rel=0.01)


def test_overlaps_of_many_masks() -> None:
    random = np.random.default_rng(1)
    found, there = random.random((40, 9, 7)) > 0.5, random.random((3, 9, 7)) > 0.5
    wanted = [[(one & other).sum() / (one | other).sum() for other in there] for one in found]
    assert mask_overlaps(found, there) == pytest.approx(np.asarray(wanted), abs=1e-6)
    some = mask_overlaps(found, there, np.asarray([3, 30]))
    assert some[[3, 30]] == pytest.approx(np.asarray(wanted)[[3, 30]], abs=1e-6)
    assert (some != 0).any(1).nonzero()[0].tolist() == [3, 30]
    assert mask_overlaps(found, there[:0]).shape == (40, 0)


def _scene(seed: int, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the objects of an image, and objects that a network might find there."""
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 25, (count, 2))
    boxes = np.concatenate([corners, corners + random.uniform(5, 14, (count, 2))], 1).astype(np.float32)
    labels = random.integers(0, 2, count)
    points = boxes[:, None, :2] + random.uniform(0, 1, (count, PERSON, 2)) * (boxes[:, None, 2:] - boxes[:, None, :2])
    seen = random.integers(0, 3, (count, PERSON, 1))
    there = {
        "boxes": boxes,
        "labels": labels,
        "masks": _filled(boxes),
        "keypoints": np.concatenate([points, seen], 2).astype(np.float32),
    }
    more = np.repeat(np.arange(count), 3)
    shifted = boxes[more] + random.normal(0, 1.2, (len(more), 4)).astype(np.float32)
    found = {
        "boxes": shifted,
        "scores": random.permutation(len(more)).astype(np.float32) / len(more),
        "labels": np.where(random.random(len(more)) < 0.8, labels[more], 1 - labels[more]),
        "masks": _filled(shifted),
        "keypoints": (points[more] + random.normal(0, 0.5, (len(more), PERSON, 2))).astype(np.float32),
    }
    return there, found


def _filled(boxes: np.ndarray) -> np.ndarray:
    masks = np.zeros((len(boxes), SIDE, SIDE), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().astype(int).clip(0, SIDE), strict=True):
        mask[top:bottom, left:right] = True
    return masks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["segm", "keypoints"])
def test_precisions_are_those_of_pycocotools(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    encode = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed").encode
    evaluator = pytest.importorskip("pycocotools.cocoeval", reason="pycocotools is not installed").COCOeval
    scenes = [_scene(seed, count) for seed, count in enumerate((3, 5, 1, 4))]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image, (there, found) in enumerate(scenes):
        for objects, listed in ((there, annotations), (found, results)):
            for place, (left, top, right, bottom) in enumerate(objects["boxes"].tolist()):
                points = objects["keypoints"][place]
                visible = points[:, 2:] if points.shape[1] > 2 else np.ones((PERSON, 1))
                one = {
                    "id": len(listed) + 1, "image_id": image, "category_id": int(objects["labels"][place]),
                    "bbox": [left, top, right - left, bottom - top], "iscrowd": 0,
                    "area": 0.53 * (right - left) * (bottom - top),
                    "keypoints": np.concatenate([points[:, :2], visible], 1).reshape(-1).tolist(),
                    "num_keypoints": int((visible > 0).sum()),
                    "segmentation": encode(np.asfortranarray(objects["masks"][place].astype(np.uint8))),
                }  # fmt: skip
                listed.append(one | ({"score": float(objects["scores"][place])} if "scores" in objects else {}))
    truth = coco.COCO()
    images = [{"id": image, "height": SIDE, "width": SIDE} for image in range(len(scenes))]
    truth.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 0}, {"id": 1}]}
    truth.createIndex()
    drop = ("segmentation",) if kind == "keypoints" else ("keypoints", "bbox")
    wanted = evaluator(truth, truth.loadRes([{k: v for k, v in one.items() if k not in drop} for one in results]), kind)
    wanted.params.maxDets = [100] if kind == "segm" else [20]
    wanted.params.areaRng, wanted.params.areaRngLbl = [[0, 1e10]], ["all"]
    wanted.evaluate()
    wanted.accumulate()
    precisions = wanted.eval["precision"][:, :, :, 0, 0].mean((1, 2))

    task = Detection(lambda outputs, size: [found for _, found in scenes]).sized(SIDE, SIDE)
    measured = task.aggregate(task.facts(np.zeros((len(scenes), 1)), [there for there, _ in scenes]))
    name = {"segm": "mask", "keypoints": "keypoint"}[kind]
    assert measured[f"{name}_map"] == pytest.approx(precisions.mean(), abs=1e-6)
    assert measured[f"{name}_map50"] == pytest.approx(precisions[0], abs=1e-6)
    assert measured[f"{name}_map75"] == pytest.approx(precisions[5], abs=1e-6)
    assert 0.2 < precisions.mean() < 0.95


def test_points_without_visibility_count_neither_way() -> None:
    there = np.zeros((2, 3, 3), np.float32)
    there[0, :, 2] = 1
    boxes = np.asarray([[0, 0, 10, 10]] * 2, np.float32)
    found = np.zeros((1, 3, 2), np.float32)
    assert keypoint_similarities(found, there, boxes).tolist() == [[1, 0]]


def test_decoded_masks_and_points_must_fit_their_boxes() -> None:
    there, found = _scene(0, 2)
    for change, message in (
        ({"masks": found["masks"][:-1]}, "must return a mask for each of 6 boxes, got 5"),
        (
            {"keypoints": found["keypoints"][:, :5]},
            r"must return keypoints of shape \(6, 17, 2 or 3\), got \(6, 5, 2\)",
        ),
    ):
        decoded = found | change
        task = Detection(lambda outputs, size, decoded=decoded: [decoded]).sized(SIDE, SIDE)
        with pytest.raises(ModelError, match=message):
            task.facts(np.zeros((1, 1)), [there])


def test_only_what_both_sides_have_is_measured() -> None:
    there, found = _scene(0, 2)
    for key in ("masks", "keypoints"):
        without = {name: value for name, value in found.items() if name != key}
        task = Detection(lambda outputs, size, without=without: [without]).sized(SIDE, SIDE)
        measured = task.aggregate(task.facts(np.zeros((1, 1)), [there]))
        others = {"masks": "keypoint_map", "keypoints": "mask_map"}
        assert set(measured) == {"map", "map50", "map75"} | {f"{others[key]}{end}" for end in ("", "50", "75")}


def test_an_image_without_objects_counts_its_mistakes() -> None:
    there, found = _scene(0, 2)
    nothing = {key: value[:0] for key, value in there.items()}
    task = Detection(lambda outputs, size: [found, found]).sized(SIDE, SIDE)
    alone = task.aggregate(task.facts(np.zeros((2, 1)), [there, there]))
    beside = task.aggregate(task.facts(np.zeros((2, 1)), [there, nothing]))
    assert beside["mask_map50"] < alone["mask_map50"]
    assert beside["keypoint_map50"] < alone["keypoint_map50"]
