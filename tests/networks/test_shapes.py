"""Pictures of shapes come with the masks and boxes that they say, and a pipeline's network can be trained on them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smallrun
import yaml
from PIL import Image

from compress.checkpoint.rebuild import build_module, load_strict, read_weights
from compress.config.load import load_pipeline
from compress.stages.load import factory_spec
from compress.user_code import import_callable

FOLDER = smallrun.ROOT / "models" / "shapes"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 26 pictures to train on and 8 to judge by."""
    folder = tmp_path_factory.mktemp("project") / "data" / "shapes"
    command = [sys.executable, str(FOLDER / "make_data.py"), str(folder), "--share", "0.04"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert str(folder) in said
    return folder


def _read(folder: Path, kind: str, number: int) -> np.ndarray:
    with Image.open(folder / kind / f"{number:04}.png") as picture:
        return np.asarray(picture)


def test_boxes_are_those_of_the_masks(pictures: Path):
    content = json.loads((pictures / "train" / "boxes.json").read_text("utf-8"))
    assert [one["name"] for one in content["categories"]] == ["disc", "square", "triangle", "ring"]
    assert len(content["images"]) == 26
    seen = set()
    for image in content["images"]:
        mask = _read(pictures / "train", "masks", image["id"])
        assert _read(pictures / "train", "images", image["id"]).shape == (*mask.shape, 3)
        boxes = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        assert boxes
        left_over = mask.copy()
        for one in boxes:
            x, y, width, height = one["bbox"]
            inside = mask[y : y + height, x : x + width] == one["category_id"]
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))  # the box is tight
            left_over[y : y + height, x : x + width][inside] = 0
            seen.add(one["category_id"])
        assert not left_over.any()
    assert seen == {1, 2, 3, 4}


def test_pictures_follow_from_their_seed_and_halves_differ(pictures: Path, tmp_path: Path):
    write: Any = import_callable(f"{FOLDER / 'make_data.py'}:write_split")
    write(tmp_path / "again", 2, 1)
    assert np.array_equal(_read(tmp_path / "again", "images", 1), _read(pictures / "train", "images", 1))
    assert not np.array_equal(_read(pictures / "test", "images", 1), _read(pictures / "train", "images", 1))


@pytest.mark.parametrize("name", ["segmentation_shapes", "detection_shapes"])
def test_the_network_of_a_pipeline_is_trained_and_its_weights_are_where_it_expects_them(name: str, pictures: Path):
    values = yaml.safe_load((smallrun.ROOT / "pipelines" / f"{name}.yaml").read_text("utf-8"))
    values["data"] |= {"calibration": 8, "validation": 2}
    values["stages"][0]["weights"] = "weights.safetensors"
    for key in ("postprocess", "loss") if name == "detection_shapes" else ():
        values["task"][key] = values["task"][key].replace("../models/shapes", str(FOLDER))
    folder = pictures.parent.parent / "pipelines"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, str(FOLDER / "train.py"), str(path), "--epochs", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "training on 16 images, choosing by 2" in said
    module = build_module(factory_spec(load_pipeline(path).config.stages[0].model))  # type: ignore[union-attr]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    load_strict(module, read_weights(folder / "weights.safetensors", module.state_dict()), "weights")
    assert any(not value.equal(before[key]) for key, value in module.state_dict().items() if "weight" in key)
