"""Masks, boxes, numbers, no labels at all and data sets of the user's own are read as they are, or refused in words."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import taskworld
import torch
from PIL import Image

from compress.config.schema.data import DataConfig
from compress.config.schema.task import TaskConfig
from compress.config.schema.verify import GatesFile
from compress.data.from_config import Splits
from compress.data.preprocessing import GREY, Preprocessing
from compress.data.sources.annotated import AnnotatedSource, read_masks, read_target_arrays, read_unlabelled
from compress.data.sources.boxes import read_coco, read_yolo
from compress.data.sources.user import as_image, read_own
from compress.engine.verify_file import verify_file
from compress.errors import ArtifactError, ConfigValueError, DataError, ModelError
from compress.progress import SilentProgress
from compress.storage.digest import digest_data
from compress.tasks.from_config import open_task
from compress.tasks.imitation import Imitation
from compress.tasks.segmentation import Segmentation

ALL = np.arange(3)


def _pictures(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for place, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{place}.png")
    return folder


@pytest.mark.parametrize(
    "geometry", [{}, {"resize": 8}, {"crop": (10, 8)}, {"crop": (20, 22)}, {"resize": 20, "crop": (12, 12)}]
)
def test_masks_go_where_their_pictures_go(tmp_path: Path, geometry: dict) -> None:
    _, masks, *_ = taskworld.squares(3, 0)
    masks = masks[:, :, :12] * 40
    images = _pictures(tmp_path / "images", masks.astype(np.uint8))
    folder = _pictures(tmp_path / "masks", masks.astype(np.uint8))
    source = read_masks(images, folder, Preprocessing(**geometry), grey=True, fill=255)
    pictures, read = source.read(ALL)[..., 0], source.read_targets(ALL)
    assert read.dtype == np.int64
    assert read.shape == pictures.shape
    counted = read != 255
    far = np.abs(pictures.astype(int) - read)[counted]
    assert (far > 20).mean() < 0.1  # nearest and bilinear differ at edges only
    if not geometry:
        assert np.array_equal(read, masks)


def test_each_picture_needs_a_mask_of_its_size(tmp_path: Path) -> None:
    images, masks, *_ = taskworld.squares(3, 0)
    there = _pictures(tmp_path / "images", images)
    few = _pictures(tmp_path / "few", masks[:2].astype(np.uint8))
    with pytest.raises(DataError, match=r"1 have none: 2\.png"):
        read_masks(there, few, Preprocessing(), False, 255)
    small = _pictures(tmp_path / "small", masks[:, :8].astype(np.uint8))
    with pytest.raises(DataError, match=r"size of its picture \(16 x 16\), got \(8, 16\)"):
        read_masks(there, small, Preprocessing(), False, 255).read_targets(ALL)
    with pytest.raises(ArtifactError, match="does not exist"):
        read_masks(there, tmp_path / "nowhere", Preprocessing(), False, 255)


def test_arrays_hold_masks_or_numbers(tmp_path: Path) -> None:
    images, masks, *_ = taskworld.squares(3, 0)
    np.savez(tmp_path / "a.npz", x=images, y=masks, numbers=np.linspace(0, 1, 3))
    keys = (tmp_path / "a.npz", None, "x")
    source = read_target_arrays(*keys, "y", Preprocessing(crop=(8, 8)), 255)
    assert np.array_equal(source.read_targets(ALL), masks[:, 4:12, 4:12])
    assert read_target_arrays(*keys, "numbers", Preprocessing()).read_targets(ALL).dtype == np.float32
    with pytest.raises(DataError, match=r"Masks for .* must be integers \(N, H, W\)"):
        read_target_arrays(*keys, "numbers", Preprocessing(), 255)


def test_images_without_labels(tmp_path: Path) -> None:
    images, *_ = taskworld.squares(3, 0)
    np.save(tmp_path / "x.npy", images)
    _pictures(tmp_path / "photos" / "inner", images)
    for path in (tmp_path / "x.npy", tmp_path / "photos"):
        source = read_unlabelled(path, "x", Preprocessing(), False)
        assert np.array_equal(source.read(ALL), images)
        assert not source.has_targets
        with pytest.raises(DataError, match="have no targets"):
            source.read_targets(ALL)


def _annotations(folder: Path) -> Path:
    content = {
        "images": [{"id": 7, "file_name": "0.png"}, {"id": 9, "file_name": "1.png"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "bbox": [2, 4, 6, 8], "category_id": 3},
            {"image_id": 7, "bbox": [0, 0, 1, 1], "category_id": 1, "iscrowd": 1},
        ],
    }
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def test_coco_and_yolo_say_the_same(tmp_path: Path) -> None:
    images = _pictures(tmp_path / "images", np.zeros((2, 16, 32, 3), np.uint8))
    (images / "0.txt").write_text("3 0.15625 0.5 0.1875 0.5\n")
    coco = read_coco(_annotations(tmp_path), images, Preprocessing(), False, None)
    yolo = read_yolo(images, images, Preprocessing(), False, None)
    assert coco.classes == ("0", "cat", "2", "dog")
    for source in (coco, yolo):
        one, none = source.read_targets(np.arange(2))
        assert one["boxes"].tolist() == [[2, 4, 8, 12]]
        assert one["labels"].tolist() == [3]
        assert none["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("preprocessing", "letterbox", "box"),
    [
        (Preprocessing(), (64, 64), [4, 24, 16, 40]),
        (Preprocessing(resize=8), None, [1, 2, 4, 6]),
        (Preprocessing(crop=(16, 16)), None, [0, 4, 2, 12]),  # 8 columns are cut off on the left of the dog
        (Preprocessing(crop=(24, 32)), None, [2, 8, 8, 16]),
    ],
)
def test_boxes_go_where_their_pictures_go(tmp_path: Path, preprocessing, letterbox, box) -> None:
    picture = np.zeros((2, 16, 32, 3), np.uint8)
    picture[:, 4:12, 2:8] = 255
    if preprocessing.crop == (16, 16):
        picture = np.roll(picture, 2, axis=2)
        content = "3 0.21875 0.5 0.1875 0.5\n"
    else:
        content = "3 0.15625 0.5 0.1875 0.5\n"
    images = _pictures(tmp_path / "images", picture)
    (images / "0.txt").write_text(content)
    source = read_yolo(images, images, preprocessing, False, letterbox)
    (target,) = source.read_targets(np.arange(1))
    assert target["boxes"].tolist() == [box]
    image = source.read(np.arange(1))[0, ..., 0]
    rows, columns = np.nonzero(image > 127)
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box
    if letterbox is not None:
        assert image.shape == letterbox
        assert (image[:16] == GREY).all()


def test_broken_annotations_are_named(tmp_path: Path) -> None:
    images = _pictures(tmp_path / "images", np.zeros((1, 16, 16, 3), np.uint8))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ArtifactError, match="must be JSON of the COCO form"):
        read_coco(broken, images, Preprocessing(), False, None)
    with pytest.raises(ArtifactError, match=r"it lacks 1\.png"):
        read_coco(_annotations(tmp_path), images, Preprocessing(), False, None)
    (images / "0.txt").write_text("cat 1 2\n")
    with pytest.raises(DataError, match=r"line 1 must be a class \(0 to 65535\) and four shares, got 'cat 1 2'"):
        read_yolo(images, images, Preprocessing(), False, None).read_targets(np.arange(1))
    with pytest.raises(DataError, match="letterbox must be given without"):
        read_yolo(images, images, Preprocessing(resize=8), False, (8, 8))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"0 0.5 nan 0.1 0.1", r"line 1 must be a class \(0 to 65535\) and four shares, got '0 0.5 nan 0.1 0.1'"),
        (b"\n1.5 0.5 0.5 0.1 0.1", r"line 2 must be a class \(0 to 65535\) and four shares"),
        (b"inf 0.5 0.5 0.1 0.1", r"line 1 must be a class \(0 to 65535\) and four shares"),
        (b"\xff\xfe", "must be a readable text of boxes, got UnicodeDecodeError"),
    ],
)
def test_boxes_that_are_no_numbers_are_refused_and_not_left_out(tmp_path: Path, content: bytes, match: str) -> None:
    images = _pictures(tmp_path / "images", np.zeros((1, 16, 16, 3), np.uint8))
    (images / "0.txt").write_bytes(content)
    with pytest.raises(DataError, match=match):
        read_yolo(images, images, Preprocessing(), False, None).read_targets(np.arange(1))


def test_images_of_every_kind_become_rows_of_pixels() -> None:
    pixels = taskworld.squares(1, 0)[0][0]
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
    for image in (pixels, channels_first, Image.fromarray(pixels)):
        assert np.array_equal(as_image(image), pixels)
    assert np.allclose(as_image(channels_first / 255), pixels / 255)
    assert as_image(pixels[..., 0]).shape == (16, 16, 1)
    with pytest.raises(DataError, match=r"uint8 \(H, W, C\) or floating-point \(C, H, W\), got int64"):
        as_image(np.zeros((16, 16, 3), np.int64))


DATA_SET = """
import numpy as np
class Fine:
    targets = [0, 1, 2, 0]
    def __len__(self): return 4
    def __getitem__(self, place):
        if place >= 4: raise IndexError(place)
        return np.full((4, 4, 3), place, np.uint8), self.targets[place]
class Alone(Fine):
    def __getitem__(self, place): return np.zeros((4, 4, 3), np.uint8)
class Empty(Fine):
    def __len__(self): return 0
class Broken(Fine):
    def __init__(self, root): raise FileNotFoundError(root)
class Uneven(Fine):
    def __getitem__(self, place): return np.zeros((4 + place, 4, 3), np.uint8), 0
class Odd(Fine):
    def __getitem__(self, place): return (1, 2) if place == 0 else (1, 2, 3)
"""


def test_a_data_set_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "my_data.py"
    file.write_text(DATA_SET)
    source = read_own(f"{file}:Fine", {})
    assert source.labels.tolist() == [0, 1, 2, 0]
    assert source.read(np.asarray([2]))[0, 0, 0, 0] == 2
    assert not read_own(f"{file}:Alone", {}).has_targets
    for name, kwargs, match in (
        ("Empty", {}, "at least one image"),
        ("Broken", {"root": "there"}, "must open and give its first entry, got FileNotFoundError: there"),
        ("Fine", {"size": 3}, "must open .* got TypeError"),
    ):
        with pytest.raises(DataError, match=match):
            read_own(f"{file}:{name}", kwargs)
    with pytest.raises(DataError, match=r"must have one shape(.|\n)*in the data set's __getitem__"):
        read_own(f"{file}:Uneven", {}).read(np.arange(2))
    with pytest.raises(DataError, match="entry 1 is 3 values"):
        read_own(f"{file}:Odd", {}).read_targets(np.asarray([1]))
    with pytest.raises(ModelError, match=r"Data set file '.*nowhere\.py' does not exist"):
        read_own(f"{tmp_path}/nowhere.py:Set", {})


def _config(train: dict, **more: object) -> DataConfig:
    return DataConfig.model_validate({"train": train, "evaluation": train, "calibration": 8, "validation": 8, **more})


def test_prepared_images_go_in_as_they_are() -> None:
    own = {"own": f"{taskworld.HERE}:Squares", "kwargs": {"count": 40, "seed": 1}}
    task = open_task(TaskConfig(own=f"{taskworld.HERE}:Share"))
    splits = Splits(_config(own), task)
    assert splits.preprocessing == Preprocessing(scale=1.0)
    images = splits.evaluation.preprocessing.normalize(splits.evaluation.read(np.arange(1)))
    assert np.allclose(images[0], taskworld.Squares(40, 1)[0][0].numpy())
    with pytest.raises(DataError, match="leave preprocessing out"):
        _ = Splits(_config(own, preprocessing={"mean": [0.5]}), task).train
    with pytest.raises(DataError, match="leave resize and crop out"):
        _ = Splits(_config(own, preprocessing={"crop": [8, 8]}), task).train


def test_what_has_no_labels_is_imitated(tmp_path: Path) -> None:
    images, masks, *_ = taskworld.squares(40, 0)
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "a.npz", x=images, y=masks)
    config = _config({"unlabelled": str(tmp_path / "x.npy")})
    labelled = config.model_copy(update={"evaluation": _config({"arrays": str(tmp_path / "a.npz")}).train})
    splits = Splits(labelled, Segmentation())
    assert isinstance(splits.validation.task, Imitation)
    assert splits.validation.task.main.name == "agreement"
    assert splits.evaluation.task.main.name == "miou"
    assert splits.evaluation.original is None
    parts = [set(getattr(splits, name).indices.tolist()) for name in ("train", "calibration", "validation")]
    assert sum(map(len, parts)) == 40 == len(set().union(*parts))


def test_a_file_is_not_verified_without_labels_and_without_a_baseline(tmp_path: Path) -> None:
    value = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 3, 16, 16]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "one", value[:1], value[1:])
    onnx.save_model(onnx.helper.make_model(graph, ir_version=10), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", taskworld.squares(4, 0)[0])
    gates = GatesFile.model_validate(
        {"evaluation": {"unlabelled": str(tmp_path / "x.npy")}, "preprocessing": {}, "task": "segmentation"}
    )
    with pytest.raises(ConfigValueError, match="must be compared with the baseline"):
        verify_file(tmp_path / "m.onnx", gates, None, SilentProgress())


def test_a_digest_follows_what_a_data_set_reads(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a")
    source = {"own": "my_data.py:Set", "kwargs": {"root": str(tmp_path), "size": 3}}
    first = digest_data(source)
    assert digest_data({**source, "own": "elsewhere/my_data.py:Set"}) == first
    assert digest_data({**source, "kwargs": {**source["kwargs"], "size": 4}}) != first
    (tmp_path / "list.txt").write_text("ab")
    assert digest_data(source) != first
    _pictures(tmp_path / "images", np.zeros((1, 4, 4, 3), np.uint8))
    masks = {"masks": str(tmp_path / "images"), "images": str(tmp_path / "images")}
    assert digest_data(masks) != digest_data({"unlabelled": str(tmp_path / "images")})


def test_a_source_whose_images_differ_in_size_says_what_to_do() -> None:
    source = AnnotatedSource(2, lambda place: np.zeros((4 + place, 4, 3), np.uint8))
    with pytest.raises(DataError, match="must have one shape after preprocessing"):
        source.read(np.arange(2))
