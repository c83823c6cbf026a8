"""Survey of a data set for a new pipeline file: kind of source, number of images, classes, sizes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.sources.classification import IMAGE_SUFFIXES, load_numpy, member
from compress.data.sources.image_files import open_picture
from compress.errors import ConfigError, DataError

_LOOKED_AT = 50
_TESTS, _VALIDATIONS = ("test", "val", "valid", "validation"), ("val", "valid", "validation")
_TORCHVISION = re.compile(r"[A-Z][A-Za-z0-9]*")
FORMS = (
    "a folder with train/ and test/ (or val/), each with a folder of images for every class; a folder of such class "
    "folders; a folder of images without classes; an .npz with x and y, or a folder with train.npz and test.npz; or "
    "the name of a torchvision data set, such as CIFAR10"
)


@dataclass(frozen=True)
class DataSurvey:
    """Contents of a data set.

    Attributes:
        train: Key of the source -> path or name, as in `data.train`.
        evaluation: The same for the evaluation images; None if they are to be taken from `train`.
        validation: The same for validation images of their own; None if they are to be taken from `train`.
        images: Training images; None if they are not known before a download.
        evaluation_images: Evaluation images of their own source; 0 without one.
        classes: Number of classes; None without labels, or if it is not known.
        sizes: (height, width) of some images, without repetition.
        channels: 1 if all of some images are grey, else 3.
    """

    train: dict[str, Any]
    evaluation: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    images: int | None = None
    evaluation_images: int = 0
    classes: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    channels: int = 3

    @property
    def is_labelled(self) -> bool:
        """True if images have class labels."""
        return "unlabelled" not in self.train


def survey_data(text: str) -> DataSurvey:
    """Look at a data set: list its files, open some images.

    Args:
        text: Path of a folder or .npz file, or name of a torchvision data set.

    Raises:
        ConfigError: It does not exist, or has none of the known forms.
        DataError, ArtifactError: An image or array cannot be read.
    """
    path = Path(text).expanduser()
    if not path.exists():
        if _TORCHVISION.fullmatch(text):
            half = {"torchvision": text, "download": True}
            return DataSurvey(half, dict(half))
        raise ConfigError(f"DATA '{text}' does not exist.", hint=f"DATA is {FORMS}.")
    if path.is_file():
        if path.suffix != ".npz":
            raise ConfigError(f"DATA must be a folder or an .npz file, got the file '{text}'.", hint=f"It is {FORMS}.")
        return _survey_arrays(path, None)
    if (path / "train.npz").is_file():
        test = path / "test.npz"
        return _survey_arrays(path / "train.npz", test if test.is_file() else None)
    if (path / "train").is_dir():
        return _survey_halves(path)
    return _survey_folder(path)


def _survey_arrays(train: Path, test: Path | None) -> DataSurvey:
    images, labels = _arrays(train)
    sizes = ((int(images.shape[1]), int(images.shape[2])),)
    survey = DataSurvey(
        {"arrays": str(train)},
        images=len(images),
        classes=int(labels.max()) + 1 if labels.size else None,
        sizes=sizes,
        channels=1 if images.ndim == 3 or images.shape[3] == 1 else 3,
    )
    if test is None:
        return survey
    others, _ = _arrays(test)
    return _with(survey, {"arrays": str(test)}, len(others))


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    loaded = load_numpy(path)
    if not isinstance(loaded, dict):
        raise DataError(f"'{path}' must be an .npz with the arrays x and y.")
    images, labels = member(loaded, "x", path), member(loaded, "y", path)
    if images.ndim not in (3, 4) or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"'{path}' must hold images x (N, H, W, C) and class indices y (N,), got x {images.shape} and y "
            f"{labels.dtype} {labels.shape}.",
            hint="docs/tasks.md describes other targets; write data: and task: by hand for those.",
        )
    return images, labels


def _survey_halves(path: Path) -> DataSurvey:
    survey = _survey_folder(path / "train")
    test = next((path / name for name in _TESTS if (path / name).is_dir()), None)
    if test is None:
        return survey
    other = _survey_folder(test)
    if other.is_labelled != survey.is_labelled:
        raise DataError(f"'{path / 'train'}' and '{test}' must both have class folders, or both none.")
    if survey.is_labelled and (names := _class_names(path / "train")) != (others := _class_names(test)):
        different = sorted(set(names) ^ set(others))
        raise DataError(
            f"'{path / 'train'}' and '{test}' must have the same classes, {', '.join(different[:5])} differ."
        )
    found = _with(survey, other.train, other.images or 0)
    own = next((path / name for name in _VALIDATIONS if (path / name).is_dir() and path / name != test), None)
    if own is None:
        return found
    return DataSurvey(**{**vars(found), "validation": _survey_folder(own).train})


def _survey_folder(path: Path) -> DataSurvey:
    names = _class_names(path)
    if len(names) == 1:
        raise DataError(
            f"'{path}' must have a folder for each class, it has one folder with images: '{names[0]}'.",
            hint=f"DATA is {FORMS}.",
        )
    files = [file for name in names for file in _images(path / name)] if names else list(_images(path))
    if not files:
        raise ConfigError(f"'{path}' holds no images and no class folders of images.", hint=f"DATA is {FORMS}.")
    sizes, channels = _look(files)
    key = "folder" if names else "unlabelled"
    return DataSurvey({key: str(path)}, images=len(files), classes=len(names) or None, sizes=sizes, channels=channels)


def _class_names(path: Path) -> list[str]:
    return sorted(
        entry.name for entry in path.iterdir() if entry.is_dir() and next(iter(_images(entry)), None) is not None
    )


def _images(path: Path) -> Sequence[Path]:
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


def _look(files: Sequence[Path]) -> tuple[tuple[tuple[int, int], ...], int]:
    """Return sizes of some images spread over all, and 1 for grey ones, else 3."""
    step = max(1, len(files) // _LOOKED_AT)
    pictures = [open_picture(file) for file in islice(files, 0, None, step)]
    sizes = tuple(dict.fromkeys((picture.height, picture.width) for picture in pictures))
    return sizes, 1 if all(picture.mode in ("1", "L", "I;16") for picture in pictures) else 3


def _with(survey: DataSurvey, evaluation: dict[str, Any], count: int) -> DataSurvey:
    return DataSurvey(**{**vars(survey), "evaluation": evaluation, "evaluation_images": count})
