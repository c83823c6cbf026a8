"""Boxes of YOLO outputs, by hand and beside torchvision's suppression."""

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from compress.tasks.decoders import SCORE, suppress, ultralytics


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
