"""Images and labels come out as they were written, and every broken file is named in one sentence."""

import gzip
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from torchvision import datasets

from compress.config.schema.data import DataConfig
from compress.data.from_config import Splits
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import (
    ArraySource,
    LazySource,
    read_arrays,
    read_folder,
    read_idx,
    read_torchvision,
)
from compress.errors import ArtifactError, CompressError, DataError

SAME = Preprocessing().fit_image


def _images(count: int = 6, height: int = 5, width: int = 7, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8)


def _labels(count: int = 6) -> np.ndarray:
    return np.arange(count) % 3


def _write_idx(path: Path, array: np.ndarray) -> Path:
    raw = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def test_npz_gives_images_labels_and_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=_images(), y=_labels().astype(np.uint8), classes=["cat", "dog", "owl"])
    source = read_arrays(tmp_path / "a.npz", None)
    assert np.array_equal(source.read(np.asarray([4, 0])), _images()[[4, 0]])
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.classes == ("cat", "dog", "owl")


def test_npz_keys_and_separate_labels_can_be_named(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", pictures=_images(), answers=_labels())
    np.save(tmp_path / "y.npy", _labels()[::-1].reshape(-1, 1))
    assert read_arrays(tmp_path / "a.npz", None, "pictures", "answers").labels.tolist() == [0, 1, 2, 0, 1, 2]
    separate = read_arrays(tmp_path / "a.npz", tmp_path / "y.npy", "pictures")
    assert separate.labels.tolist() == [2, 1, 0, 2, 1, 0]


def test_npy_pair_of_grey_images_gets_a_channel_axis(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", _images(channels=1)[..., 0])
    np.save(tmp_path / "y.npy", _labels())
    source = read_arrays(tmp_path / "x.npy", tmp_path / "y.npy")
    assert np.array_equal(source.read(np.arange(6)), _images(channels=1))


def test_geometry_is_applied_when_arrays_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=_images(), y=_labels())
    source = read_arrays(tmp_path / "a.npz", None, fit_image=Preprocessing(crop=(3, 3)).fit_image)
    assert np.array_equal(source.read(np.asarray([1])), _images()[[1], 1:4, 2:5])


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": _images().astype(np.float32), "y": _labels()}, r"must be uint8 \(N, H, W, C\) .* got float32"),
        ({"x": _images().transpose(0, 3, 1, 2), "y": _labels()}, r"got uint8 \(6, 3, 5, 7\)"),
        ({"x": _images()[0, 0], "y": _labels()}, r"got uint8 \(7, 3\)"),
        ({"x": _images(), "y": _labels()[:4]}, "one label for each image, got 6 images, 4 labels"),
        ({"x": _images(), "y": _labels().astype(np.float64)}, r"must be integers \(N,\), got float64"),
        ({"x": _images(), "y": np.eye(6, dtype=np.int64)}, r"must be integers \(N,\), got int64 \(6, 6\)"),
        ({"x": _images(0), "y": _labels(0)}, "must hold at least one image"),
        ({"x": _images()}, r"must hold an array named 'y', it holds x\.\nHint: image_key and"),
        ({"images": _images(), "y": _labels()}, r"must hold an array named 'x', it holds images, y\."),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], match: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CompressError, match=match):
        read_arrays(tmp_path / "a.npz", None)


def test_pickled_arrays_are_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (marker,)

    np.savez(tmp_path / "a.npz", x=_images(), y=np.asarray([Malicious()], dtype=object))
    np.save(tmp_path / "y.npy", np.asarray([Malicious()], dtype=object), allow_pickle=True)
    with pytest.raises(ArtifactError, match=r"must be a readable .* without pickled objects"):
        read_arrays(tmp_path / "a.npz", None)
    with pytest.raises(ArtifactError, match="without pickled objects"):
        read_arrays(tmp_path / "y.npy", tmp_path / "y.npy")
    assert not marker.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_truncated_npz_is_an_artifact_error(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=_images(60), y=_labels(60))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ArtifactError, match=r"a\.npz' must be a readable"):
        read_arrays(path, None)


def test_damaged_bytes_inside_an_npz_are_an_artifact_error(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=_images(60), y=_labels(60))
    raw = bytearray(path.read_bytes())
    raw[400:440] = bytes(40)
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match="must be a readable"):
        read_arrays(path, None)


def test_missing_files_and_missing_labels_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", _images())
    np.savez(tmp_path / "a.npz", x=_images(), y=_labels())
    with pytest.raises(ArtifactError, match=r"nowhere\.npz' does not exist"):
        read_arrays(tmp_path / "nowhere.npz", None)
    with pytest.raises(ArtifactError, match="does not exist"):
        read_arrays(tmp_path, None)
    with pytest.raises(ArtifactError, match="labels must be given in a file of their own"):
        read_arrays(tmp_path / "x.npy", None)
    with pytest.raises(ArtifactError, match=r"must be a single \.npy array"):
        read_arrays(tmp_path / "x.npy", tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_pair_is_read_plain_and_gzipped(tmp_path: Path, suffix: str) -> None:
    images = _write_idx(tmp_path / f"images{suffix}", _images(channels=1)[..., 0])
    labels = _write_idx(tmp_path / f"labels{suffix}", _labels().astype(np.uint8))
    source = read_idx(images, labels)
    assert np.array_equal(source.read(np.arange(6)), _images(channels=1))
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0",
        b"\0\0\x08\x03\0\0",
        b"\0\0\x77\x01\0\0\0\1\5",
        b"\0\0\x08\x01\0\0\0\2\5",
        b"\1\0\x08\x01\0\0\0\1\5",
    ],
    ids=["empty", "short", "cut header", "unknown type", "too few values", "wrong magic"],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_broken_idx_is_an_artifact_error(tmp_path: Path, raw: bytes, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    with pytest.raises(ArtifactError, match=r"bad.*must be an IDX file"):
        read_idx(path, path)


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_damaged_gzip_is_an_artifact_error(tmp_path: Path, keep: float) -> None:
    path = _write_idx(tmp_path / "images.gz", _images(50, channels=1)[..., 0])
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(ArtifactError, match="must be an IDX file"):
        read_idx(path, path)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(ArtifactError, match="must be an IDX file"):
        read_idx(path, path)


def test_idx_images_and_labels_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    images = _write_idx(tmp_path / "images", _images(channels=1)[..., 0])
    labels = _write_idx(tmp_path / "labels", _labels().astype(np.uint8))
    with pytest.raises(DataError, match=r"must be uint8 \(N, H, W, C\)"):
        read_idx(labels, images)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, image in enumerate(_images()):
        place = tmp_path / "set" / ("zebra", "ant", "cow")[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{index}.PNG")
        (place / "notes.txt").write_text("no image")
    return tmp_path / "set"


def test_folder_classes_follow_the_sorted_names(folder: Path) -> None:
    source = read_folder(folder, SAME, grey=False)
    assert source.classes == ("ant", "cow", "zebra")
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(source.read(np.arange(6)), _images()[[1, 4, 2, 5, 0, 3]])


def test_pictures_of_a_folder_are_decoded_by_threads_in_order(folder: Path) -> None:
    seen: list[str] = []

    def fit_image(image: np.ndarray) -> np.ndarray:
        seen.append(threading.current_thread().name)
        return image

    read = read_folder(folder, fit_image, grey=False).read(np.tile(np.arange(6), 20))
    assert np.array_equal(read, np.tile(_images()[[1, 4, 2, 5, 0, 3]], (20, 1, 1, 1)))
    assert len(seen) == 120
    assert all(name.startswith("pictures") for name in seen)


def test_folder_can_be_read_grey(folder: Path) -> None:
    read = read_folder(folder, SAME, grey=True).read(np.asarray([0]))
    assert read.shape == (1, 5, 7, 1)
    assert np.array_equal(read[0, ..., 0], np.asarray(Image.fromarray(_images()[1]).convert("L")))


def test_folder_images_of_many_shapes_need_a_crop(folder: Path) -> None:
    Image.fromarray(_images(height=9)[0]).save(folder / "ant" / "tall.png")
    with pytest.raises(DataError, match=r"must have one shape after preprocessing(.|\n)*Hint: Set preprocessing"):
        read_folder(folder, SAME, grey=False).read(np.arange(7))
    fitted = read_folder(folder, Preprocessing(resize=6, crop=(6, 6)).fit_image, grey=False)
    assert fitted.read(np.arange(7)).shape == (7, 6, 6, 3)


@pytest.mark.parametrize("damage", ["cut", "text", "flipped"])
def test_damaged_picture_is_named(folder: Path, damage: str) -> None:
    path = folder / "ant" / "1.PNG"
    raw = bytearray(path.read_bytes())
    raw[-30:-20] = bytes(10)
    path.write_bytes({"cut": path.read_bytes()[:60], "text": b"hello", "flipped": bytes(raw)}[damage])
    with pytest.raises(DataError, match=r"1\.PNG' must be a readable image"):
        read_folder(folder, SAME, grey=False).read(np.arange(6))


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="must exist and hold one folder for each class"):
        read_folder(tmp_path / "nowhere", SAME, grey=False)
    (tmp_path / "class").mkdir()
    with pytest.raises(ArtifactError, match="found none"):
        read_folder(tmp_path, SAME, grey=False)
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    with pytest.raises(ArtifactError, match=r"lie in it without one(.|\n)*unlabelled: FOLDER"):
        read_folder(tmp_path, SAME, grey=False)


def _write_mnist(root: Path) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for half, count in (("train", 6), ("t10k", 3)):
        _write_idx(raw / f"{half}-images-idx3-ubyte", _images(count, 28, 28, 1)[..., 0])
        _write_idx(raw / f"{half}-labels-idx1-ubyte", _labels(count).astype(np.uint8))


def test_torchvision_set_is_read_by_name(tmp_path: Path) -> None:
    _write_mnist(tmp_path)
    train = read_torchvision("MNIST", tmp_path, True, False, SAME, grey=False)
    test = read_torchvision("MNIST", tmp_path, False, False, SAME, grey=True)
    assert isinstance(train, ArraySource)
    assert np.array_equal(train.read(np.arange(6)), _images(6, 28, 28, 1))
    assert (len(train.labels), len(test.labels)) == (6, 3)
    assert train.classes[3] == "3 - three"


def test_torchvision_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"could not open the data set(.|\n)*Hint: Set download: true"):
        read_torchvision("MNIST", tmp_path, True, False, SAME, grey=False)
    with pytest.raises(ArtifactError, match="could not open the data set"):
        read_torchvision("CIFAR10", tmp_path, True, False, SAME, grey=False)
    _write_mnist(tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(CompressError, match="could not open the data set"):
        read_torchvision("MNIST", tmp_path, True, False, SAME, grey=False)


@pytest.mark.parametrize("name", ["CIFAR11", "wrap_dataset_for_transforms_v2", "__all__"])
def test_torchvision_name_that_is_no_data_set(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"no data set named '{name}'(.|\n)*Hint: It has .*CIFAR10"):
        read_torchvision(name, tmp_path, True, False, SAME, grey=False)


class _Svhn:
    """Keeps its images channels first, and names its halves by `split`, as SVHN does."""

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        if split not in ("train", "test"):
            raise ValueError("Unknown split")
        self.data = _images().transpose(0, 3, 1, 2)
        self.labels = _labels()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index].transpose(1, 2, 0)), int(self.labels[index])


class _Pets:
    """Cannot download, calls its training half "trainval", and keeps (path, label) samples."""

    def __init__(self, root: str, split: str = "trainval") -> None:
        if split not in ("trainval", "test"):
            raise ValueError("Unknown split")
        self._samples = [("path", 1 if split == "test" else 0)] * 2

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(_images()[index]), 0


class _Captions:
    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        self.targets = ["a cat", "a dog"]


def test_torchvision_sets_in_other_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, factory in (("SVHN", _Svhn), ("OxfordIIITPet", _Pets), ("Flickr8k", _Captions)):
        monkeypatch.setattr(datasets, name, factory)
    svhn = read_torchvision("SVHN", tmp_path, True, False, SAME, grey=False)
    assert isinstance(svhn, LazySource)
    assert np.array_equal(svhn.read(np.arange(6)), _images())
    assert read_torchvision("OxfordIIITPet", tmp_path, True, False, SAME, grey=False).labels.tolist() == [0, 0]
    assert read_torchvision("OxfordIIITPet", tmp_path, False, False, SAME, grey=False).labels.tolist() == [1, 1]
    with pytest.raises(DataError, match="'Flickr8k' must have one class label for each image"):
        read_torchvision("Flickr8k", tmp_path, True, False, SAME, grey=False)


def test_coloured_torchvision_set_can_be_read_grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Coloured:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.data, self.targets = _images(), torch.from_numpy(_labels())

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.fromarray(self.data[index]), 0

    monkeypatch.setattr(datasets, "CIFAR10", Coloured)
    assert read_torchvision("CIFAR10", tmp_path, True, False, SAME, grey=True).read(np.arange(2)).shape[-1] == 1
    assert read_torchvision("CIFAR10", tmp_path, True, False, SAME, grey=False).read(np.arange(2)).shape[-1] == 3


def _config(folder: Path, **values: object) -> DataConfig:
    sources = {half: {"arrays": str(folder / f"{half}.npz")} for half in ("train", "evaluation")}
    return TypeAdapter(DataConfig).validate_python({**sources, "calibration": 4, "validation": 6, **values})


def test_splits_are_opened_from_a_config(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", x=_images(30), y=_labels(30), classes=["a", "b", "c"])
    np.savez(tmp_path / "evaluation.npz", x=_images(9), y=_labels(9))
    splits = Splits(_config(tmp_path, preprocessing={"crop": [4, 4], "mean": [0.5]}))
    sizes = {name: len(getattr(splits, name)) for name in ("train", "calibration", "validation", "evaluation")}
    assert sizes == {"train": 20, "calibration": 4, "validation": 6, "evaluation": 9}
    assert splits.classes == ("a", "b", "c")
    assert splits.train.read(np.arange(2)).shape == (2, 4, 4, 3)


def test_negative_labels_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", x=_images(30), y=_labels(30) - 1)
    np.savez(tmp_path / "evaluation.npz", x=_images(9), y=_labels(9))
    with pytest.raises(DataError, match="Labels must be 0 or more, got -1"):
        _ = Splits(_config(tmp_path)).train


def test_class_folders_that_are_hidden_do_not_count_and_empty_ones_are_refused(folder: Path) -> None:
    (folder / ".checkpoints").mkdir()
    assert read_folder(folder, SAME, grey=False).classes == ("ant", "cow", "zebra")
    (folder / "bee").mkdir()
    with pytest.raises(ArtifactError, match=r"Every class folder in .* must hold an image, none in bee"):
        read_folder(folder, SAME, grey=False)


def test_classes_of_training_and_evaluation_must_agree(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", x=_images(30), y=_labels(30), classes=["a", "b", "c"])
    np.savez(tmp_path / "evaluation.npz", x=_images(9), y=_labels(9), classes=["b", "c", "d"])
    with pytest.raises(DataError, match="same classes in the same order, got 3 and 3, different in a, d"):
        Splits(_config(tmp_path)).check_classes()


@pytest.mark.parametrize(
    ("channels", "values", "said"),
    [
        (1, {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}, "got 3 of mean, 3 of std and images with 1 channel"),
        (1, {"std": [0.2, 0.2, 0.2]}, "got 1 of mean, 3 of std and images with 1 channel"),
    ],
)
def test_a_mean_and_std_for_other_channels_are_refused(
    channels: int, values: dict[str, object], said: str, tmp_path: Path
) -> None:
    for half in ("train", "evaluation"):
        np.savez(tmp_path / f"{half}.npz", x=np.zeros((9, 8, 8, channels), np.uint8), y=_labels(9))
    with pytest.raises(DataError, match=said):
        _ = Splits(_config(tmp_path, preprocessing=values)).evaluation


def test_colour_images_for_a_grey_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", x=_images(30), y=_labels(30))
    np.savez(tmp_path / "evaluation.npz", x=_images(9), y=_labels(9))
    with pytest.raises(DataError, match="channels L needs images with one channel, got images with 3"):
        _ = Splits(_config(tmp_path, preprocessing={"channels": "L"})).evaluation
