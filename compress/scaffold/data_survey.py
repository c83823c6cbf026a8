"""Survey of a data set for a new pipeline file: kind of source, number of images, classes, sizes."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np

from compress.catalog import closest
from compress.data.sources.classification import IMAGE_SUFFIXES
from compress.data.sources.image_files import open_picture
from compress.errors import ConfigError, DataError
from compress.scaffold.array_survey import survey_array_file, survey_array_folder
from compress.scaffold.data_contents import OTHER_TARGETS, DataSurvey

_LOOKED_AT = 50
_TRAIN = ("train", "training")
_VALIDATIONS = ("val", "valid", "validation")
_TESTS = ("test", "testing", "eval", "evaluation", *_VALIDATIONS)
_PICTURES = ("images", "image", "imgs", "img")
_MASKS = ("masks", "mask", "segmentations", "labels", "annotations")
_BOXES = ("labels/*.txt", "labels/*/*.txt", "*/labels/*.txt", "instances_*.json", "annotations/*.json", "*coco*.json",
          "*annotations*.json")  # fmt: skip
_TABLES = (".csv", ".tsv", ".xlsx", ".parquet")
_TORCHVISION = re.compile(r"[A-Z][A-Za-z0-9]*")
_FEWEST = 4  # images of a class, one for each split
_IGNORED = 255
FORMS = """DATA is one of these:
  a folder with train/ and test/ (or val/), each with one folder of images for every class
  a folder of such class folders
  a folder of images without classes
  folders images/ and masks/ of equal names, with or without train/ and val/ above or below
  an .npz with images and labels, a folder with train.npz and test.npz, or the four files of MNIST
  the name of a torchvision data set, such as CIFAR10"""


def survey_data(text: str) -> DataSurvey:
    """Look at a data set: list its files, open some images.

    Args:
        text: Path of a folder or .npz file, or name of a torchvision data set.

    Raises:
        ConfigError: It does not exist, or has none of the known forms.
        DataError, ArtifactError: An image or array cannot be read, or targets are of a kind that needs code.
    """
    path = Path(text).expanduser()
    if not path.exists():
        return _survey_torchvision(text)
    if path.is_file():
        if path.suffix.lower() in _TABLES:
            raise _table_error(path)
        if path.suffix.lower() in (".yaml", ".yml", ".json"):
            raise _boxes_error(path, path)
        if path.suffix != ".npz":
            raise ConfigError(f"DATA must be a folder or an .npz file, got the file '{text}'.", hint=FORMS)
        return survey_array_file(path)
    found = survey_array_folder(path)
    if found is None:
        _require_no_boxes(path)
        found = _survey_masks(path) or _survey_directory(path)
    return found


def _survey_torchvision(text: str) -> DataSurvey:
    missing = f"DATA '{text}' does not exist."
    if not text.isalnum():
        raise ConfigError(missing, hint=FORMS)
    from torchvision import datasets  # heavy

    names = [name for name in datasets.__all__ if _TORCHVISION.fullmatch(name)]
    if text in names:
        half = {"torchvision": text, "download": True}
        return DataSurvey(half, dict(half))
    same = [name for name in names if name.lower() == text.lower()]
    known = closest(text, names) if _TORCHVISION.fullmatch(text) else None
    raise ConfigError(missing, hint=f"did you mean '{same[0]}'?" if same else known or FORMS)


def _require_no_boxes(path: Path) -> None:
    """Refuse boxes of YOLO's and COCO's formats, which need functions of the user."""
    for file in chain.from_iterable(path.glob(pattern) for pattern in _BOXES):
        raise _boxes_error(path, file)


def _boxes_error(path: Path, file: Path) -> DataError:
    fact = f"'{path}' describes boxes." if file == path else f"'{path}' holds boxes, such as '{file}'."
    return DataError(
        f"{fact} No pipeline can be written for a detector without its postprocess function.",
        hint="Start from the pipeline in docs/yolo.md (ultralytics) or in docs/tasks.md, section Detection.",
    )


def _table_error(path: Path) -> DataError:
    return DataError(
        f"'{path}' is a table of labels, which is no source of data.",
        hint=f"Sort the images into one folder for each class. {OTHER_TARGETS}",
    )


def _survey_directory(path: Path) -> DataSurvey:
    halves = [name for name in _image_folders(path) if name.lower() in (*_TRAIN, *_TESTS)]
    train = _named(path, _TRAIN)
    if train is None or not (_image_folders(train) or len(halves) == len(_image_folders(path))):
        if halves and train is None and len(halves) == len(_image_folders(path)):
            raise DataError(f"'{path}' must have a folder train/, it has {', '.join(halves)}.", hint=FORMS)
        return _survey_folder(path)
    survey = _survey_folder(train)
    test = _named(path, _TESTS)
    if test is None:
        return survey
    other = _survey_folder(test)
    _require_same_classes(train, test, survey, other)
    found = replace(survey, evaluation=other.train, evaluation_images=other.images or 0)
    own = _named(path, _VALIDATIONS)
    return found if own in (None, test) else replace(found, validation=_survey_folder(own).train)


def _require_same_classes(train: Path, test: Path, survey: DataSurvey, other: DataSurvey) -> None:
    if other.is_labelled != survey.is_labelled:
        raise DataError(f"'{train}' and '{test}' must both have class folders, or both none.")
    names, others = _image_folders(train), _image_folders(test)
    if survey.is_labelled and names != others:
        different = [
            f"only '{place}' has {', '.join(sorted(own)[:4])}"
            for place, own in ((train, set(names) - set(others)), (test, set(others) - set(names)))
            if own
        ]
        raise DataError(f"'{train}' and '{test}' must have the same classes, {'; '.join(different)}.")


def _survey_folder(path: Path) -> DataSurvey:
    names = _image_folders(path)
    if len(names) < 2 and (table := next((file for file in _files(path) if file.suffix.lower() in _TABLES), None)):
        raise _table_error(table)
    if len(names) == 1:
        raise DataError(
            f"'{path}' must have a folder for each class, it has one folder with images: '{names[0]}'.",
            hint=f"Images without classes are given by their own folder: {path / names[0]}. {FORMS}",
        )
    empty = sorted({entry.name for entry in _folders(path)} - set(names)) if names else []
    if empty:
        raise DataError(
            f"Every class folder in '{path}' must hold an image, none in {', '.join(empty[:6])}.",
            hint="Move folders that are no classes out of it.",
        )
    by_class = {name: sorted(_images(path / name)) for name in names}
    files = [file for members in by_class.values() for file in members] if names else sorted(_images(path))
    if not files:
        raise ConfigError(f"'{path}' holds no images and no class folders of images.", hint=FORMS)
    sizes, channels = _look(files)
    key, notes = ("folder" if names else "unlabelled"), _note_on_classes(by_class)
    return DataSurvey(
        {key: str(path)}, images=len(files), classes=len(names) or None, sizes=sizes, channels=channels, notes=notes
    )


def _note_on_classes(by_class: dict[str, list[Path]]) -> tuple[str, ...]:
    few = [f"{name} ({len(files)})" for name, files in by_class.items() if len(files) < _FEWEST]
    return (f"Classes with fewer than {_FEWEST} images are missing in some splits: {', '.join(few)}",) if few else ()


def _survey_masks(path: Path) -> DataSurvey | None:
    """Return the survey of images with masks, or None if `path` has no folders images/ and masks/ of pictures."""
    train = _mask_pair(path, _TRAIN)
    whole = _pair(path)
    if train is None and whole is None:
        return None
    if train is None:
        return _survey_pair(*whole) if whole is not None else None
    survey, test = _survey_pair(*train), _mask_pair(path, _TESTS)
    if test is None:
        return survey
    other, own = _survey_pair(*test), _mask_pair(path, _VALIDATIONS)
    validation = None if own in (None, test) else _survey_pair(*own).train
    return replace(survey, evaluation=other.train, evaluation_images=other.images or 0, validation=validation)


def _mask_pair(path: Path, half: Sequence[str]) -> tuple[Path, Path] | None:
    """Return images and masks of one half: half/images and half/masks, or images/half and masks/half."""
    above = _named(path, half)
    if above is not None and (pair := _pair(above)) is not None:
        return pair
    whole = _pair(path)
    inside = (None, None) if whole is None else (_named(whole[0], half), _named(whole[1], half))
    return (inside[0], inside[1]) if inside[0] is not None and inside[1] is not None else None


def _pair(path: Path) -> tuple[Path, Path] | None:
    images, masks = _named(path, _PICTURES), _named(path, _MASKS)
    return (images, masks) if images is not None and masks is not None and _has_images(masks) else None


def _survey_pair(images: Path, masks: Path) -> DataSurvey:
    files, targets = (sorted(file for file in _files(place) if _is_image(file)) for place in (images, masks))
    if not files or not targets:
        raise DataError(f"'{images}' and '{masks}' must hold images and masks, got {len(files)} and {len(targets)}.")
    values = np.unique(np.concatenate([np.unique(np.asarray(open_picture(file))) for file in targets[:_LOOKED_AT]]))
    if set(values.tolist()) == {0, _IGNORED}:
        raise DataError(
            f"Masks in '{masks}' must hold class indices, the first {len(targets[:_LOOKED_AT])} hold 0 and 255.",
            hint="Write 1 in place of 255, which stands for pixels that do not count.",
        )
    sizes, channels = _look(files)
    classes = int(values[values != _IGNORED].max(initial=0)) + 1
    source = {"images": str(images), "masks": str(masks)}
    return DataSurvey(source, images=len(files), classes=classes, sizes=sizes, channels=channels, task="segmentation")


def _named(path: Path, names: Sequence[str]) -> Path | None:
    """Return the sub-folder with the first of some names, in upper or lower case."""
    found = {entry.name.lower(): entry for entry in sorted(_folders(path), reverse=True)}
    return next((found[name] for name in names if name in found), None)


def _folders(path: Path) -> Iterator[Path]:
    return (entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_file())


def _image_folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in _folders(path) if _has_images(entry))


def _has_images(path: Path) -> bool:
    return next(_images(path), None) is not None


def _images(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if _is_image(file) and file.is_file())


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _look(files: Sequence[Path]) -> tuple[tuple[tuple[int, int], ...], int]:
    """Return sizes of some images spread over all, and 1 for grey ones, else 3."""
    step = max(1, len(files) // _LOOKED_AT)
    pictures = [open_picture(file) for file in islice(files, 0, None, step)]
    sizes = tuple(dict.fromkeys((picture.height, picture.width) for picture in pictures))
    return sizes, 1 if all(picture.mode in ("1", "L", "LA", "I;16") for picture in pictures) else 3
