"""Splits of a pipeline, from the `data` section of its file."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compress.config.schema.data import (
    ArraysSource,
    CocoSource,
    DataConfig,
    FolderSource,
    IdxSource,
    MasksSource,
    OwnSource,
    PreprocessingConfig,
    Source,
    TorchvisionSource,
    UnlabelledSource,
    YoloSource,
)
from compress.data.preprocessing import Preprocessing
from compress.data.sources.annotated import AnnotatedSource, read_masks, read_target_arrays, read_unlabelled
from compress.data.sources.boxes import read_coco, read_yolo
from compress.data.sources.classification import ImageSource, read_arrays, read_folder, read_idx, read_torchvision
from compress.data.sources.user import read_own
from compress.data.splits import Split, Teacher, carve
from compress.errors import DataError, InternalError
from compress.tasks.base import Task
from compress.tasks.classification import CLASSIFICATION, Classification
from compress.tasks.imitation import Embedding, Imitation
from compress.tasks.segmentation import Segmentation

AS_IT_IS = Preprocessing(scale=1.0)


class Splits:
    """Train, calibration, validation and evaluation splits, each read at its first use.

    Args:
        config: Checked `data:` section with absolute paths.
        task: Task of the network.

    Attributes:
        teacher: The baseline, set by `load`; needed only for images without labels, or tasks that learn from it.
    """

    def __init__(self, config: DataConfig, task: Task = CLASSIFICATION) -> None:
        self.config, self.task = config, task
        self.teacher: Teacher | None = None

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of images; the identity for images that the user's data set has already prepared."""
        given, train = self.config.preprocessing, self.config.train
        if isinstance(train, OwnSource) and given == PreprocessingConfig():
            first = read_own(train.own, train.kwargs).read(np.zeros(1, np.int64))
            return AS_IT_IS if np.issubdtype(first.dtype, np.floating) else Preprocessing()
        return Preprocessing(**given.model_dump())

    @cached_property
    def _original(self) -> Any:
        if self.teacher is None:
            raise InternalError("The baseline was asked for before there is one.")
        return self.teacher.build()

    @property
    def train(self) -> Split:
        """Images for fine-tuning."""
        return self._with_baseline(self._training.part("train"))

    @property
    def calibration(self) -> Split:
        """Images for scores, repairs and batch-norm re-estimation."""
        return self._with_baseline(self._training.part("calibration"))

    @cached_property
    def validation(self) -> Split:
        """Images for choosing the best epoch, repairs and numbers of blocks."""
        source = self.config.validation
        if isinstance(source, int):
            return self._with_baseline(self._training.part("validation"))
        return self._with_baseline(open_split("validation", source, self.preprocessing, self.task))

    @cached_property
    def evaluation(self) -> Split:
        """Images for the measurements of the verdict; they influence no choice."""
        source = self.config.evaluation
        if isinstance(source, int):
            return self._training.part("evaluation")
        return open_split("evaluation", source, self.preprocessing, self.task)

    @property
    def learns_from_original(self) -> bool:
        """Return whether training targets are the outputs of the baseline instead of labels."""
        return self.task.learns_from_original or not has_targets(self._training.source)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, or ()."""
        return self._training.source.classes

    def check_classes(self) -> None:
        """Raise DataError when training and evaluation, or validation, name their classes and the names differ."""
        names = self.classes
        for split in (self.evaluation, self.validation):
            others = split.source.classes
            if names and others and names != others:
                different = sorted(set(names) ^ set(others))
                raise DataError(
                    f"Training and {split.name} must have the same classes in the same order, got {len(names)} and "
                    f"{len(others)}, different in {', '.join(different[:6]) or 'their order'}."
                )

    @cached_property
    def _training(self) -> "_TrainingImages":
        return _TrainingImages(self.config, self.preprocessing, self.task)

    def _with_baseline(self, split: Split) -> Split:
        """Return a split with the baseline as the teacher if its outputs are the training targets."""
        return replace(split, original=(lambda: self._original) if self.learns_from_original else None)


class _TrainingImages:
    """Images of the training source, which calibration and validation images may be taken from.

    Args:
        config: The `data:` section.
        preprocessing: Preprocessing of the images.
        task: Task of the network.
    """

    def __init__(self, config: DataConfig, preprocessing: Preprocessing, task: Task) -> None:
        self._config, self._preprocessing, self._task = config, preprocessing, task
        self.source = _open_source(config.train, preprocessing, task, train=True)

    def part(self, name: str) -> Split:
        """Return the split of a name, such as "train"."""
        return replace(self._whole, name=name, indices=self._indices[name])

    @cached_property
    def _whole(self) -> Split:
        return build_split("train", self.source, self._preprocessing, self._task)

    @cached_property
    def _indices(self) -> dict[str, np.ndarray]:
        sizes = {"calibration": self._config.calibration}
        for name in ("validation", "evaluation"):  # in this order, so that the others do not move
            if isinstance(count := getattr(self._config, name), int):
                sizes[name] = count
        return carve(classes_of(self.source, self._task), sizes, self._config.split_seed)


def open_split(name: str, source: Source, preprocessing: Preprocessing, task: Task = CLASSIFICATION) -> Split:
    """Return all images of a source as a split that is not used for training.

    Raises:
        DataError: The images or labels cannot be used.
        ArtifactError: A file is missing.
    """
    return build_split(name, _open_source(source, preprocessing, task, train=False), preprocessing, task)


def build_split(name: str, source: ImageSource, preprocessing: Preprocessing, task: Task) -> Split:
    """Return all images of a source as a split, with a task that fits their targets.

    Args:
        name: Name of the split.
        source: Source of the images.
        preprocessing: Preprocessing that the network needs.
        task: Task of the network; for images without targets, imitation of the baseline replaces it.
    """
    size = source.read(np.zeros(1, np.int64)).shape[1:-1]
    if task.needs_targets and not has_targets(source):
        task = Imitation(task)
    return Split(name, source, np.arange(len(source)), preprocessing, task.sized(*size) if size else task)


def has_targets(source: ImageSource) -> bool:
    """Return whether images are labelled."""
    return bool(getattr(source, "has_targets", True))


def classes_of(source: ImageSource, task: Task) -> np.ndarray:
    """Return (N,) class indices if they are known without reading the images, else zeros."""
    labels = source.known_labels if isinstance(source, AnnotatedSource) else getattr(source, "labels", None)
    return np.zeros(len(source), np.int64) if labels is None or not isinstance(task, Classification) else labels


def open_shifted(sources: Mapping[str, Source], evaluation: Split) -> dict[str, Split]:
    """Return the user's shifted data sets, with the preprocessing of the evaluation images.

    Raises:
        DataError: As in `open_split`, or a data set has other classes than the evaluation split.
        ArtifactError: A file is missing.
    """
    task, preprocessing = evaluation.task, evaluation.preprocessing
    found = {name: open_split(name, source, preprocessing, task) for name, source in sources.items()}
    for name, split in found.items():
        names, wanted = split.source.classes, evaluation.source.classes
        if names and wanted and names != wanted:
            raise DataError(
                f"Shifted data set '{name}' must have the classes of the evaluation split in their order "
                f"({', '.join(wanted[:6])}), got {', '.join(names[:6])}."
            )
    return found


def _open_source(source: Source, preprocessing: Preprocessing, task: Task, train: bool) -> ImageSource:
    opened = _read_source(source, preprocessing, task, train)
    first = opened.read(np.zeros(1, np.int64))
    _check_own(source, first, preprocessing)
    channels = first.shape[-1]
    if preprocessing.channels == "L" and channels != 1:
        raise DataError(f"preprocessing.channels L needs images with one channel, got images with {channels}.")
    mean, std = len(preprocessing.mean), len(preprocessing.std)
    if not {mean, std} <= {1, channels}:
        raise DataError(
            f"preprocessing must have one value of mean and of std, or one for each channel of the images, got {mean} "
            f"of mean, {std} of std and images with {channels} channel{'' if channels == 1 else 's'}.",
            hint="the images must be of the kind that the network was trained on",
        )
    labels = None if isinstance(opened, AnnotatedSource) else opened.labels
    if labels is not None and int(labels.min()) < 0:
        raise DataError(f"Labels must be 0 or more, got {int(labels.min())}.")
    return opened


def _check_own(source: Source, images: np.ndarray, preprocessing: Preprocessing) -> None:
    """Raise DataError if preprocessing is set that the user's own data set must do itself."""
    if not isinstance(source, OwnSource):
        return
    if preprocessing.resize is not None or preprocessing.crop is not None:
        raise DataError("A data set of your own must give images of their final size: leave resize and crop out.")
    if np.issubdtype(images.dtype, np.floating) and preprocessing != AS_IT_IS:
        raise DataError(
            "Floating-point images of a data set of your own must be prepared already: leave preprocessing out.",
            hint="give uint8 images to have them prepared",
        )


def _read_source(source: Source, preprocessing: Preprocessing, task: Task, train: bool) -> ImageSource:
    geometric = preprocessing.resize is not None or preprocessing.crop is not None
    fit_image = preprocessing.fit_image if geometric else None
    grey = preprocessing.channels == "L"
    if isinstance(source, ArraysSource):
        labels = Path(source.labels) if source.labels else None
        keys = (source.image_key, source.label_key)
        if isinstance(_judged(task), Classification):
            return read_arrays(Path(source.arrays), labels, *keys, fit_image)
        return read_target_arrays(Path(source.arrays), labels, *keys, preprocessing, _mask_fill(task))
    if isinstance(source, IdxSource):
        return read_idx(Path(source.idx), Path(source.labels), fit_image)
    if isinstance(source, FolderSource):
        return read_folder(Path(source.folder), preprocessing.fit_image, grey, source.classes)
    if isinstance(source, TorchvisionSource):
        half = train if source.train is None else source.train
        root = Path(source.root)
        return read_torchvision(source.torchvision, root, half, source.download, preprocessing.fit_image, grey)
    return _read_annotated(source, preprocessing, task, grey)


def _read_annotated(source: Source, preprocessing: Preprocessing, task: Task, grey: bool) -> ImageSource:
    """Return a source with targets other than class indices, or without targets."""
    if isinstance(source, MasksSource):
        fill = _mask_fill(task)
        return read_masks(Path(source.images), Path(source.masks), preprocessing, grey, 0 if fill is None else fill)
    if isinstance(source, CocoSource):
        places = Path(source.coco), Path(source.images)
        return read_coco(*places, preprocessing, grey, source.letterbox, source.polygons, source.keypoints or 0)
    if isinstance(source, YoloSource):
        places = Path(source.yolo), Path(source.images)
        return read_yolo(*places, preprocessing, grey, source.letterbox, source.polygons, source.keypoints or 0)
    if isinstance(source, UnlabelledSource):
        return read_unlabelled(Path(source.unlabelled), source.image_key, preprocessing, grey)
    assert isinstance(source, OwnSource)
    return read_own(source.own, source.kwargs)


def _judged(task: Task) -> Task:
    """Return the task that defines the targets of a source: an imitation's imitated task, except for embedding."""
    return task.of if isinstance(task, Imitation) and not isinstance(task, Embedding) else task


def _mask_fill(task: Task) -> int | None:
    """Return the fill value of masks where images are padded; None for targets other than masks."""
    judged = _judged(task)
    return judged.ignore_index if isinstance(judged, Segmentation) else None
