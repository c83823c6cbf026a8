"""Polygons and key points of YOLO's text files and of COCO's JSON, moved with their pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from compress.config.schema.data import DataConfig, YoloSource
from compress.data.augmentation import Variation
from compress.data.from_config import Splits
from compress.data.preprocessing import Preprocessing
from compress.data.sources.boxes import read_coco, read_yolo
from compress.errors import ArtifactError, DataError
from compress.storage.digest import digest_data
from compress.tasks.average_precision import fill_polygons
from compress.tasks.detection import Detection

PLAIN = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)


def write(folder: Path, *lines: str) -> None:
    """Write one picture of 40 x 20 pixels (width, height), and its labels."""
    Image.new("RGB", (40, 20)).save(folder / "one.png")
    (folder / "one.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_polygons_are_moved_with_a_letterbox(tmp_path: Path) -> None:
    write(tmp_path, "2 0.25 0.2 0.75 0.2 0.5 0.8", "0 0 0 1 0 1 1 0 1")
    (target,) = read_yolo(tmp_path, tmp_path, PLAIN, False, (80, 80), polygons=True).read_targets(np.arange(1))
    assert target["labels"].tolist() == [2, 0]
    assert target["boxes"].tolist() == [[20, 28, 60, 52], [0, 20, 80, 60]]
    assert target["polygons"][0][0].tolist() == [[20, 28], [60, 28], [40, 52]]
    masks = fill_polygons(target["polygons"], (80, 80))
    assert masks[0].sum() == pytest.approx(480, abs=20)
    assert masks[1].sum() == 80 * 40


def test_polygons_and_points_are_moved_with_a_crop(tmp_path: Path) -> None:
    crop = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, crop=(20, 20))
    write(tmp_path, "0 0.0 0.0 0.2 0.0 0.1 0.5", "1 0.5 0.5 1.0 0.5 0.75 1.0")
    (target,) = read_yolo(tmp_path, tmp_path, crop, False, None, polygons=True).read_targets(np.arange(1))
    assert target["labels"].tolist() == [1]  # the other one lies outside
    assert target["boxes"].tolist() == [[10, 10, 20, 20]]
    assert target["polygons"][0][0].tolist() == [[10, 10], [30, 10], [20, 20]]
    write(tmp_path, "0 0.5 0.5 0.5 1.0 0.5 0.5 2 0.3 0.5 2 0.2 0.5 2 0 0 0")
    (target,) = read_yolo(tmp_path, tmp_path, crop, False, None, keypoints=4).read_targets(np.arange(1))
    assert target["keypoints"][0].tolist() == [[10, 10, 2], [2, 10, 2], [-2, 10, 0], [-10, 0, 0]]


def test_key_points_of_two_values_are_visible_unless_both_are_zero(tmp_path: Path) -> None:
    write(tmp_path, "0 0.5 0.5 0.5 1.0 0.5 0.5 0 0")
    (target,) = read_yolo(tmp_path, tmp_path, PLAIN, False, (40, 40), keypoints=2).read_targets(np.arange(1))
    assert target["keypoints"].dtype == np.float32
    assert target["keypoints"][0].tolist() == [[20, 20, 1], [0, 10, 0]]
    assert target["boxes"].tolist() == [[10, 10, 30, 30]]
    (tmp_path / "one.txt").unlink()
    write(tmp_path)
    (empty,) = read_yolo(tmp_path, tmp_path, PLAIN, False, (40, 40), keypoints=2).read_targets(np.arange(1))
    assert empty["keypoints"].shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("line", "settings", "wanted"),
    [
        ("0 0.1 0.1 0.2 0.2", {"polygons": True}, "x and y shares of at least three corners"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", {"polygons": True}, "x and y shares of at least three corners"),
        ("0 0.5 0.5 1 1 0.5", {"keypoints": 1}, "four shares, then 1 key points of 2 or 3 values"),
        ("0 0.5 0.5 1", {}, "four shares"),
    ],
)
def test_lines_of_another_form_are_refused(tmp_path: Path, line: str, settings: dict[str, int], wanted: str) -> None:
    write(tmp_path, line)
    source = read_yolo(tmp_path, tmp_path, PLAIN, False, None, **settings)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"line 1 must be a class .0 to 65535. and {wanted}, got"):
        source.read_targets(np.arange(1))


def test_settings_of_a_source(tmp_path: Path) -> None:
    write(tmp_path, "0 0 0 1 0 1 1 0 1")
    plain = {"yolo": str(tmp_path), "images": str(tmp_path)}
    half = plain | {"letterbox": [40, 40], "polygons": True}
    sizes = {"calibration": 1, "validation": 1}
    values = {"train": half, "evaluation": half, "preprocessing": {"mean": [0.5], "std": [0.5]}, **sizes}
    data = TypeAdapter(DataConfig).validate_python(values)
    splits = Splits(data, Detection(lambda outputs, size: []))
    assert "polygons" in splits.evaluation.read_targets(np.arange(1))[0]
    with pytest.raises(ValidationError, match="polygons must be left out beside keypoints"):
        YoloSource(**plain, polygons=True, keypoints=3)
    default = YoloSource(**plain).model_dump(mode="json")
    assert digest_data(default) == digest_data({k: v for k, v in default.items() if k not in ("polygons", "keypoints")})
    assert digest_data(default) != digest_data(default | {"polygons": True})


def test_polygons_and_points_are_cropped_and_mirrored_with_their_images() -> None:
    target = {
        "boxes": torch.tensor([[2.0, 3, 6, 9], [0, 0, 1, 1]]),
        "labels": torch.tensor([1, 0]),
        "polygons": [[torch.tensor([[2.0, 3], [6, 3], [4, 9]])], [torch.zeros(3, 2)]],
        "keypoints": torch.tensor([[[2.0, 3, 2], [9, 9, 2]], [[0, 0, 2], [1, 1, 2]]]),
    }
    shifted = Variation(2, torch.tensor([4]), torch.tensor([4]), torch.tensor([True]), (10, 10))
    (found,) = shifted.of_boxes([target])
    assert found["boxes"].tolist() == [[6, 1, 10, 7]]
    assert found["polygons"][0][0].tolist() == [[10, 1], [6, 1], [8, 7]]
    assert found["keypoints"].tolist() == [[[10, 1, 2], [3, 7, 2]]]
    assert found["labels"].tolist() == [1]


def coco(folder: Path, **changes: object) -> Path:
    """Write a picture of 40 x 20 pixels (width, height), and COCO's JSON with one object."""
    Image.new("RGB", (40, 20)).save(folder / "one.png")
    object_ = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 5, 20, 10], "iscrowd": 0} | changes
    crowd = {
        "id": 2,
        "image_id": 7,
        "category_id": 3,
        "bbox": [0, 0, 9, 9],
        "iscrowd": 1,
        "segmentation": {"counts": []},
    }
    content = {"images": [{"id": 7, "file_name": "one.png"}], "annotations": [object_, crowd], "categories": []}
    (folder / "it.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "it.json"


def test_polygons_and_points_of_coco(tmp_path: Path) -> None:
    path = coco(tmp_path, segmentation=[[10, 5, 30, 5, 20, 15], [0, 0, 4, 0, 4, 4]], keypoints=[10, 5, 2, 0, 0, 0])
    size = (80, 80)
    (target,) = read_coco(path, tmp_path, PLAIN, False, size, polygons=True).read_targets(np.arange(1))
    assert [one.tolist() for one in target["polygons"][0]] == [
        [[20, 30], [60, 30], [40, 50]],
        [[0, 20], [8, 20], [8, 28]],
    ]
    (target,) = read_coco(path, tmp_path, PLAIN, False, size, keypoints=2).read_targets(np.arange(1))
    assert target["keypoints"].tolist() == [[[20, 30, 2], [0, 20, 0]]]
    assert target["labels"].tolist() == [3]
    path = coco(tmp_path)
    (target,) = read_coco(path, tmp_path, PLAIN, False, size, keypoints=2).read_targets(np.arange(1))
    assert target["keypoints"][..., 2].tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("changes", "settings", "wanted"),
    [
        ({"segmentation": {"counts": [1, 2]}}, {"polygons": True}, "must be polygons, got run lengths"),
        ({"segmentation": [[1, 2, 3]]}, {"polygons": True}, "cannot reshape"),
        ({}, {"polygons": True}, "KeyError: 'segmentation'"),
        ({"keypoints": [1, 2, 2]}, {"keypoints": 2}, "keypoints must be 6 finite numbers, got 3"),
    ],
)
def test_other_forms_of_coco_are_refused(
    tmp_path: Path, changes: dict[str, object], settings: dict[str, int], wanted: str
) -> None:
    with pytest.raises(ArtifactError, match=f"must be JSON of the COCO form, got .*{wanted}"):
        read_coco(coco(tmp_path, **changes), tmp_path, PLAIN, False, None, **settings)  # type: ignore[arg-type]
