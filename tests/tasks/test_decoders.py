"""Boxes of YOLO outputs, by hand and beside torchvision's suppression."""

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from compress.tasks.decoders import SCORE, PrototypeMasks, suppress, ultralytics


def test_anchors_become_boxes_best_first() -> None:
    columns = [  # centre x, centre y, width, height, two classes
        [10, 10, 8, 4, 0.1, 0.9],
        [10, 10, 8, 4, 0.2, 0.8],  # the same box of the same class, worse
        [10, 10, 8, 4, 0.95, 0.0],  # the same box of the other class
        [30, 6, 10, 20, 0.3, 0.1],  # beyond the upper edge
        [20, 20, 4, 4, SCORE / 2, 0.0],
    ]
    (found,) = ultralytics({"output_0": torch.tensor(columns).T[None]}, (32, 40))
    assert found["labels"].tolist() == [0, 1, 0]
    assert found["scores"].tolist() == pytest.approx([0.95, 0.9, 0.3])
    assert found["boxes"].tolist() == [[6, 8, 14, 12], [6, 8, 14, 12], [25, 0, 35, 16]]


def test_rows_of_a_detector_without_suppression_are_taken_as_they_are() -> None:
    rows = torch.tensor([[[1, 2, 3, 4, 0.2, 1], [0, 0, 9, 9, 0.7, 0], [0, 0, 9, 9, 0.69, 0], [5, 5, 6, 6, 0.0, 2]]
                         + [[0, 0, 0, 0, 0, 0]] * 6], dtype=torch.float32)  # fmt: skip
    (found,) = ultralytics({"output_0": rows}, (8, 8))
    assert found["scores"].tolist() == pytest.approx([0.7, 0.69, 0.2])
    assert found["labels"].tolist() == [0, 0, 1]
    assert found["boxes"][0].tolist() == [0, 0, 8, 8]


@pytest.mark.parametrize("seed", range(5))
def test_suppression_is_that_of_torchvision(seed: int) -> None:
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 60, (200, 2))
    boxes = np.concatenate([corners, corners + random.uniform(5, 40, (200, 2))], 1).astype(np.float32)
    scores, labels = random.permutation(200).astype(np.float32) / 200, random.integers(0, 3, 200)
    wanted = batched_nms(*(torch.from_numpy(one) for one in (boxes, scores, labels)), 0.5)
    assert suppress(boxes, scores, labels, 0.5).tolist() == wanted.tolist()
    assert suppress(boxes, scores, labels, 0.5, most=3).tolist() == wanted.tolist()[:3]


def test_no_boxes_are_no_fault() -> None:
    (found,) = ultralytics({"output_0": np.zeros((1, 7, 20), np.float32)}, (8, 8))
    assert [len(found[key]) for key in ("boxes", "scores", "labels")] == [0, 0, 0]


@pytest.mark.parametrize("size", [(32, 40), (30, 44), (8, 10)])
def test_masks_are_enlarged_sums_of_prototypes_inside_of_their_boxes(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    prototypes, weights = random.normal(size=(5, 8, 10)).astype(np.float32), random.normal(size=(40, 5))
    low = random.uniform(0, 0.5, (40, 2))
    boxes = np.concatenate([low, low + random.uniform(0.1, 0.5, (40, 2))], 1) * [*size[::-1], *size[::-1]]
    masks = PrototypeMasks(weights.astype(np.float32), prototypes, boxes, size)
    sums = torch.from_numpy(np.tensordot(weights.astype(np.float32), prototypes, 1))
    wanted = torch.nn.functional.interpolate(sums[None], size, mode="bilinear")[0].numpy()
    rows, columns = np.mgrid[: size[0], : size[1]]
    for place in (0, 17, 39):
        left, top, right, bottom = boxes[place]
        inside = (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
        clear = np.abs(wanted[place]) > 1e-4
        (mask,) = masks[place : place + 1]
        assert (mask == ((wanted[place] > 0) & inside))[clear].all()
    assert len(masks) == 40
    assert masks[3:7].shape == (4, *size)
    assert masks[5:5].shape == (0, *size)


def test_outputs_with_prototypes_have_masks_and_the_right_classes() -> None:
    columns = torch.tensor([[10.0, 10, 8, 4, 0.1, 0.9, 1, -1], [30, 6, 10, 20, 0.3, 0.1, -1, 2]]).T[None]
    prototypes = torch.stack([torch.ones(8, 10), torch.zeros(8, 10)])[None]
    (found,) = ultralytics({"output_0.0": columns, "output_0.1": prototypes}, (32, 40))
    assert found["labels"].tolist() == [1, 0]
    masks = found["masks"][0:2]
    assert masks[0].sum() == 8 * 4
    assert masks[1].sum() == 0


@pytest.mark.parametrize("is_end_to_end", [False, True])
def test_key_points_follow_their_boxes(is_end_to_end: bool) -> None:
    points = [1.0, 2, 0.5, 3, 4, 0.25]
    if is_end_to_end:
        rows = torch.zeros(1, 20, 12)
        rows[0, 3] = torch.tensor([6, 8, 14, 12, 0.9, 0, *points])
    else:
        rows = torch.tensor([[10, 10, 8, 4, 0.9, *points], [20, 20, 4, 4, 0.0, *points]]).T[None]
    (found,) = ultralytics({"output_0": rows}, (32, 40), keypoints=[2, 3])
    assert found["boxes"].tolist() == [[6, 8, 14, 12]]
    assert found["keypoints"].tolist() == [[[1, 2, 0.5], [3, 4, 0.25]]]
    (none,) = ultralytics({"output_0": torch.zeros(1, 11, 20)}, (8, 8), keypoints=[2, 3])
    assert none["keypoints"].shape == (0, 2, 3)
