"""How do the `data:` lines of a pipeline file become splits?"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from compress.config.schema import (
    ArraysSource,
    DataConfig,
    FolderSource,
    IdxSource,
    Source,
    TorchvisionSource,
)
from compress.data.preprocessing import Preprocessing
from compress.data.sources import ImageSource, read_arrays, read_folder, read_idx, read_torchvision
from compress.data.splits import Split, carve
from compress.errors import DataError


class Splits:
    """The train, calibration, validation and evaluation splits, read when first asked for.

    Args:
        config: Checked `data:` section with absolute paths.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.preprocessing = Preprocessing(**config.preprocessing.model_dump())

    @property
    def train(self) -> Split:
        """What fine-tuning learns from."""
        return self._part("train")

    @property
    def calibration(self) -> Split:
        """What scores, repairs and batch-norm re-estimation look at."""
        return self._part("calibration")

    @property
    def validation(self) -> Split:
        """What chooses the best epoch."""
        return self._part("validation")

    @cached_property
    def evaluation(self) -> Split:
        """What the verdict is measured on; nothing is chosen by it."""
        return open_split("evaluation", self.config.evaluation, self.preprocessing)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, or ()."""
        return self._train_source.classes

    def check_classes(self) -> None:
        """Raise DataError when training and evaluation name their classes and the names differ."""
        names = self.classes
        others = self.evaluation.source.classes
        if names and others and names != others:
            different = sorted(set(names) ^ set(others))
            raise DataError(
                f"Training and evaluation must have the same classes in the same order, got {len(names)} and "
                f"{len(others)}, different in {', '.join(different[:6]) or 'their order'}."
            )

    @cached_property
    def _train_source(self) -> ImageSource:
        return _open_source(self.config.train, self.preprocessing, train=True)

    @cached_property
    def _parts(self) -> dict[str, np.ndarray]:
        sizes = {"calibration": self.config.calibration, "validation": self.config.validation}
        return carve(self._train_source.labels, sizes, self.config.split_seed)

    def _part(self, name: str) -> Split:
        return Split(name, self._train_source, self._parts[name], self.preprocessing)


def open_split(name: str, source: Source, preprocessing: Preprocessing) -> Split:
    """Return all images of a source that nothing is trained on.

    Raises:
        DataError: The images or labels cannot be used.
        ArtifactError: A file is missing.
    """
    opened = _open_source(source, preprocessing, train=False)
    return Split(name, opened, np.arange(len(opened.labels)), preprocessing)


def open_shifted(sources: Mapping[str, Source], evaluation: Split) -> dict[str, Split]:
    """Return the user's data sets from elsewhere, prepared as the evaluation images are.

    Raises:
        DataError: As `open_split`, or one names other classes than the evaluation split.
        ArtifactError: A file is missing.
    """
    found = {name: open_split(name, source, evaluation.preprocessing) for name, source in sources.items()}
    for name, split in found.items():
        names, wanted = split.source.classes, evaluation.source.classes
        if names and wanted and names != wanted:
            raise DataError(
                f"Shifted data set '{name}' must have the classes of the evaluation split in their order "
                f"({', '.join(wanted[:6])}), got {', '.join(names[:6])}."
            )
    return found


def _open_source(source: Source, preprocessing: Preprocessing, train: bool) -> ImageSource:
    opened = _read_source(source, preprocessing, train)
    channels = opened.read(np.zeros(1, np.int64)).shape[-1]
    if preprocessing.channels == "L" and channels != 1:
        raise DataError(f"preprocessing.channels L needs images with one channel, got images with {channels}.")
    mean, std = len(preprocessing.mean), len(preprocessing.std)
    if not {mean, std} <= {1, channels}:
        raise DataError(
            f"preprocessing must have one value of mean and of std, or one for each channel of the images, got {mean} "
            f"of mean, {std} of std and images with {channels} channel{'' if channels == 1 else 's'}.",
            hint="the images must be of the kind that the network was trained on",
        )
    if int(opened.labels.min()) < 0:
        raise DataError(f"Labels must be 0 or more, got {int(opened.labels.min())}.")
    return opened


def _read_source(source: Source, preprocessing: Preprocessing, train: bool) -> ImageSource:
    geometric = preprocessing.resize is not None or preprocessing.crop is not None
    fit_image = preprocessing.fit_image if geometric else None
    grey = preprocessing.channels == "L"
    if isinstance(source, ArraysSource):
        labels = Path(source.labels) if source.labels else None
        return read_arrays(Path(source.arrays), labels, source.image_key, source.label_key, fit_image)
    if isinstance(source, IdxSource):
        return read_idx(Path(source.idx), Path(source.labels), fit_image)
    if isinstance(source, FolderSource):
        return read_folder(Path(source.folder), preprocessing.fit_image, grey)
    assert isinstance(source, TorchvisionSource)
    half = train if source.train is None else source.train
    return read_torchvision(source.torchvision, Path(source.root), half, source.download, preprocessing.fit_image, grey)
