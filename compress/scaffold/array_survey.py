"""Survey of arrays for a new pipeline file: .npz files, IDX files, pickled batches of CIFAR."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.sources.annotated import as_images
from compress.data.sources.classification import load_numpy, read_idx
from compress.errors import DataError
from compress.scaffold.data_contents import OTHER_TARGETS, DataSurvey

_PICKLED = {"cifar-10-batches-py": ("CIFAR10", 10), "cifar-100-python": ("CIFAR100", 100)}
_MOST_TARGETS = 1000  # entries of one target that are numbers, not a map


def survey_array_folder(path: Path) -> DataSurvey | None:
    """Return the survey of a folder of array files; None if it holds none of the known names.

    Raises:
        DataError, ArtifactError: An array cannot be read, or is no image.
    """
    if (path / "train.npz").is_file():
        test = path / "test.npz"
        survey = survey_array_file(path / "train.npz")
        if not test.is_file():
            return survey
        other = survey_array_file(test)
        return replace(survey, evaluation=other.train, evaluation_images=other.images or 0)
    for name, (dataset, classes) in _PICKLED.items():
        if path.name == name or (path / name).is_dir():
            half = {"torchvision": dataset, "root": str(path.parent if path.name == name else path)}
            return DataSurvey(half, dict(half), None, 50_000, 10_000, classes, ((32, 32),))
    return _survey_idx(path)


def survey_array_file(path: Path) -> DataSurvey:
    """Return the survey of an .npz file: one array of images and one of targets, or such a pair for each half.

    Raises:
        DataError, ArtifactError: The file cannot be read, or holds no such arrays.
    """
    arrays = load_numpy(path)
    if not isinstance(arrays, dict):
        raise DataError(f"'{path}' must be an .npz with the arrays x and y.")
    pairs = {half: pair for half in ("", "train", "test") if (pair := _find_pair(arrays, half)) is not None}
    train, test = pairs.get("") or pairs.get("train"), pairs.get("test")
    if train is None:
        images = [name for name, array in arrays.items() if array.ndim in (3, 4)]
        if len(images) == 1 and len(arrays) == 1:
            return _survey_unlabelled(path, images[0], arrays[images[0]])
        shown = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in list(arrays.items())[:6])
        raise DataError(
            f"'{path}' must hold one array of images (N, H, W, C) and one of N labels, got {shown}.",
            hint="Name them x and y, or x_train, y_train, x_test and y_test.",
        )
    survey = _survey_pair(path, arrays, train)
    if "" in pairs or test is None:
        return survey
    return replace(survey, evaluation=_source(path, test), evaluation_images=len(arrays[test[0]]))


def _find_pair(arrays: dict[str, np.ndarray], half: str) -> tuple[str, str] | None:
    """Return the names of images and targets of one half of the data, or None."""
    if half == "" and "x" in arrays and "y" in arrays:
        return "x", "y"
    names = [name for name in arrays if _half_of(name) == half and arrays[name].ndim > 0 and name != "classes"]
    images = sorted((name for name in names if arrays[name].ndim in (3, 4)), key=lambda name: -arrays[name].ndim)
    if not images:
        return None
    others = [name for name in names if name != images[0] and len(arrays[name]) == len(arrays[images[0]])]
    return (images[0], others[0]) if len(others) == 1 else None


def _half_of(name: str) -> str:
    found = re.search(r"train|test|val", name.lower())
    return "" if found is None else "train" if found[0] == "train" else "test"


def _source(path: Path, pair: tuple[str, str]) -> dict[str, Any]:
    image, label = pair
    keys = ({} if image == "x" else {"image_key": image}) | ({} if label == "y" else {"label_key": label})
    return {"arrays": str(path), **keys}


def _survey_pair(path: Path, arrays: dict[str, np.ndarray], pair: tuple[str, str]) -> DataSurvey:
    given, targets = (arrays[name] for name in pair)
    _require_rows(path, given)
    images = as_images(given, path)
    survey = DataSurvey(
        _source(path, pair), images=len(images), sizes=(images.shape[1:3],), channels=1 if images.shape[3] == 1 else 3
    )
    targets = targets.reshape(-1) if targets.ndim == 2 and targets.shape[1] == 1 else targets
    is_whole = np.issubdtype(targets.dtype, np.integer)
    if targets.ndim == 1 and is_whole:
        return replace(survey, classes=int(targets.max(initial=-1)) + 1 or None)
    if targets.shape == images.shape[:3] and is_whole:
        counted = targets[targets != 255]
        return replace(survey, classes=int(counted.max(initial=0)) + 1, task="segmentation")
    is_few = targets.ndim <= 2 and targets[0].size <= _MOST_TARGETS
    if is_few and np.issubdtype(targets.dtype, np.floating) and not _is_one_hot(targets):
        return replace(survey, task="regression", spread=float(targets.std()))
    what = "one row of classes for each image" if _is_one_hot(targets) else f"{targets.dtype} {targets.shape}"
    raise DataError(
        f"'{path}' must hold class indices (N,), masks (N, H, W) or numbers as '{pair[1]}', got {what}.",
        hint=f"Store {pair[1]}.argmax(1)." if _is_one_hot(targets) else OTHER_TARGETS,
    )


def _is_one_hot(targets: np.ndarray) -> bool:
    return (
        targets.ndim == 2
        and targets.shape[1] > 1
        and bool(((targets == 1).sum(1) == 1).all())
        and set(np.unique(targets).tolist()) <= {0, 1}
    )


def _require_rows(path: Path, images: np.ndarray) -> None:
    """Refuse images with the channels first, and floating-point ones, with the line that converts them."""
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        raise DataError(
            f"Images in '{path}' must be (N, H, W, C), got {images.dtype} {images.shape} with the channels first.",
            hint="Store x.transpose(0, 2, 3, 1).",
        )
    if np.issubdtype(images.dtype, np.floating):
        low, high = float(images.min(initial=0)), float(images.max(initial=0))
        stretch = "(255 * x).round().astype(np.uint8)" if low >= 0 and high <= 1 else "the pixels before normalisation"
        raise DataError(
            f"Images in '{path}' must be uint8 from 0 to 255, got {images.dtype} from {low:.3g} to {high:.3g}.",
            hint=f"Store {stretch}. data.preprocessing scales and normalises.",
        )


def _survey_unlabelled(path: Path, name: str, given: np.ndarray) -> DataSurvey:
    _require_rows(path, given)
    images = as_images(given, path)
    key = {} if name == "x" else {"image_key": name}
    channels = 1 if images.shape[3] == 1 else 3
    return DataSurvey(
        {"unlabelled": str(path), **key}, images=len(images), sizes=(images.shape[1:3],), channels=channels
    )


def _survey_idx(path: Path) -> DataSurvey | None:
    """Return the survey of the four files of MNIST and its relatives, or None."""
    for folder in (path, path / "raw", path / "MNIST" / "raw"):
        train, test = _idx_pair(folder, "train"), _idx_pair(folder, "t10k")
        if train is None:
            continue
        opened = read_idx(Path(train["idx"]), Path(train["labels"]))
        survey = DataSurvey(
            train,
            images=len(opened),
            classes=int(opened.labels.max()) + 1,
            sizes=(opened.images.shape[1:3],),
            channels=1,
        )
        if test is None:
            return survey
        count = len(read_idx(Path(test["idx"]), Path(test["labels"])))
        return replace(survey, evaluation=test, evaluation_images=count)
    return None


def _idx_pair(folder: Path, half: str) -> dict[str, Any] | None:
    found = {
        key: next(iter(sorted(folder.glob(f"{half}-{part}?idx*-ubyte*"))), None)
        for key, part in (("idx", "images"), ("labels", "labels"))
    }
    return {key: str(file) for key, file in found.items()} if all(found.values()) else None
