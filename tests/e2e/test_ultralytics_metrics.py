"""Precision of masks and key points beside the validator of ultralytics, where it is installed.

A network whose outputs are known stands in for a trained one: each picture has one brightness, which is its number, and
the outputs are its objects, moved at random.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from compress.data.preprocessing import Preprocessing
from compress.data.sources.boxes import read_yolo
from compress.tasks.average_precision import fill_polygons
from compress.tasks.decoders import ultralytics
from compress.tasks.detection import Detection

ROOT = Path(__file__).parents[2]
SIDE, COUNT, STEP, PROTOTYPES, ANCHORS = 128, 36, 7, 32, 336
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
pytest.importorskip("ultralytics", reason="ultralytics is not installed")
pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")


def make_pictures(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Write labelled pictures of one brightness each; return their targets."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import yolo_shapes
    finally:
        sys.path.pop(0)
    yolo_shapes.write_labelled(folder, kind, SIDE, share=COUNT / 150)
    images = sorted((folder / "val" / "images").iterdir())
    assert len(images) == COUNT
    for number, path in enumerate(images):
        Image.new("RGB", (SIDE, SIDE), (STEP * number,) * 3).save(path)
    settings = {"polygons": kind == "segment", "keypoints": 4 if kind == "pose" else 0}
    plain = Preprocessing(mean=(0.0,), std=(1.0,))
    source = read_yolo(folder / "val" / "labels", folder / "val" / "images", plain, False, (SIDE, SIDE), **settings)
    targets: list[dict[str, Any]] = source.read_targets(np.arange(COUNT))
    return targets


def outputs_for(targets: list[dict[str, Any]], classes: int) -> tuple[Tensor, Tensor]:
    """Return decoded outputs (N, 4 + classes + extra, ANCHORS) and prototypes: each object twice, moved at random."""
    random = np.random.default_rng(0)
    extra = 12 if "keypoints" in targets[0] else PROTOTYPES
    found = np.zeros((len(targets), ANCHORS, 4 + classes + extra), np.float32)
    prototypes = random.normal(0, 0.4, (len(targets), PROTOTYPES, SIDE // 4, SIDE // 4)).astype(np.float32)
    for rows, sums, target in zip(found, prototypes, targets, strict=True):
        for place, box in enumerate(np.repeat(target["boxes"], 2, 0)):
            number = place // 2
            size = box[2:] - box[:2]
            moved = box + np.tile(size, 2) * random.normal(0, 0.07, 4)
            row = rows[place * 7]
            row[:4] = [*(moved[:2] + moved[2:]) / 2, *(moved[2:] - moved[:2])]
            row[4 + int(target["labels"][number])] = random.uniform(0.3, 0.9)
            if "keypoints" in target:
                points = target["keypoints"][number].copy()
                points[:, :2] += random.normal(0, random.uniform(0, 0.3), (4, 2)) * size
                row[4 + classes :] = points.reshape(-1)
            else:
                row[4 + classes + number] = 1
        for number, parts in enumerate(target.get("polygons", ())):
            (mask,) = fill_polygons([[corners / 4 + random.normal(0, 0.5) for corners in parts]], sums.shape[1:])
            sums[number] += np.where(mask, 1, -1)
    return torch.from_numpy(found.transpose(0, 2, 1).copy()), torch.from_numpy(prototypes)


@pytest.mark.parametrize(("kind", "cfg"), [("segment", "yolov8n-seg.yaml"), ("pose", "yolov8n-pose.yaml")])
def test_precisions_are_close_to_those_of_the_validator(
    kind: str, cfg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics import YOLO
    from ultralytics.nn.tasks import BaseModel, PoseModel, SegmentationModel

    targets = make_pictures(tmp_path, kind)
    classes = 3 if kind == "segment" else 1
    found, prototypes = outputs_for(targets, classes)

    def forward(self: Any, images: Tensor, *arguments: Any, **settings: Any) -> Any:
        places = (images.mean((1, 2, 3)) * 255 / STEP).round().long()
        return ((found[places], prototypes[places]) if kind == "segment" else found[places]), {}

    monkeypatch.chdir(tmp_path)
    yolo = YOLO(cfg)
    yolo.model = (
        SegmentationModel(cfg, nc=3, verbose=False)
        if kind == "segment"
        else PoseModel(cfg, nc=1, data_kpt_shape=[4, 3], verbose=False)
    )
    monkeypatch.setattr(BaseModel, "forward", forward)
    settings = {"plots": False, "workers": 0, "device": "cpu", "verbose": False, "project": str(tmp_path / "runs")}
    data = str(tmp_path / "data.yaml")
    theirs = yolo.val(data=data, imgsz=SIDE, batch=9, rect=False, save_txt=True, **settings).results_dict

    decode = partial(ultralytics, keypoints=(4, 3)) if kind == "pose" else ultralytics
    task = Detection(decode).sized(SIDE, SIDE)
    outputs = {"output_0.0": found, "output_0.1": prototypes} if kind == "segment" else {"output_0": found}
    ours = task.aggregate(task.facts(outputs, targets))
    letter, name = ("M", "mask") if kind == "segment" else ("P", "keypoint")
    pairs = {
        f"{ours_name}{suffix}": (ours[f"{ours_name}{suffix}"], theirs[f"metrics/{their_name}({kind_letter})"])
        for ours_name, kind_letter in (("map", "B"), (f"{name}_map", letter))
        for suffix, their_name in (("50", "mAP50"), ("", "mAP50-95"))
    }
    for one, (value, wanted) in pairs.items():  # they interpolate precisions in another way
        assert value == pytest.approx(wanted, abs=0.015), (one, pairs)
    assert 0.2 < ours[f"{name}_map"] < 0.95
