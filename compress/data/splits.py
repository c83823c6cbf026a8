"""Splits of a data set: training, calibration, validation, evaluation.

train        images for fine-tuning
calibration  images for batch-norm re-estimation, scores and repairs
validation   images for choices such as the best epoch
evaluation   images for the measurements of the verdict; they influence no choice

Calibration and validation images are taken from the training source once, with a seed of their own. So no image is in
two splits, and another training seed does not change the splits. Validation may have a source of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ImageSource
from compress.errors import DataError
from compress.tasks.base import Task
from compress.tasks.classification import CLASSIFICATION, Classification
from compress.tasks.imitation import Imitation


class Teacher(Protocol):
    """A network whose outputs are the training targets instead of labels."""

    def build(self) -> Any:
        """Return a new copy of the network in eval mode, without gradients."""
        ...


@dataclass(frozen=True)
class Split:
    """Some images of a source, with the preprocessing the network needs.

    Attributes:
        name: "train", "calibration", "validation" or "evaluation".
        source: Source of the images.
        indices: Indices in the source of the images of this split.
        preprocessing: Preprocessing that the network needs.
        task: Task of the targets, which defines the metrics.
        original: Function that returns the baseline if its outputs are the training targets; else None.
    """

    name: str
    source: ImageSource
    indices: np.ndarray
    preprocessing: Preprocessing
    task: Task = CLASSIFICATION
    original: Callable[[], Any] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 class indices; only for classification."""
        chosen: np.ndarray = self.source.labels[self.indices]
        return chosen

    @property
    def objective(self) -> Task:
        """Training objective: the task itself, or imitation of the baseline."""
        if self.original is None or isinstance(self.task, Imitation):
            return self.task
        return Imitation(self.task)

    def read_targets(self, positions: np.ndarray) -> Any:
        """Return the targets at positions in this split: an array of n entries, or a list."""
        return self.source.read_targets(self.indices[positions])

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Return the images at positions in this split, uint8 (n, H, W, C)."""
        return self.source.read(self.indices[positions])

    def first(self, count: int) -> "Split":
        """Return a split of `count` images spread evenly over this one; all images of a smaller split."""
        if count >= len(self):
            return self
        chosen = np.linspace(0, len(self) - 1, count).astype(np.int64)
        return replace(self, indices=self.indices[chosen])

    def slice(self, start: int, stop: int) -> "Split":
        """Return the images from position `start` up to, but not including, `stop`."""
        return replace(self, indices=self.indices[start:stop])

    def part(self, rank: int, size: int) -> "Split":
        """Return every size-th image, from the rank-th on."""
        return replace(self, indices=self.indices[rank::size])

    def interleaved(self, count: int) -> "Split":
        """Return all images in another order: every count-th one from the first on, then from the second on, ..."""
        return replace(self, indices=np.concatenate([self.indices[start::count] for start in range(count)]))


class DataSplits(Protocol):
    """Splits of one data set, as the stages read them.

    Attributes:
        teacher: The baseline, set by `load`; needed only for images without labels, or tasks that learn from it.
    """

    teacher: Teacher | None

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of images."""
        ...

    @property
    def train(self) -> Split:
        """Images for fine-tuning."""
        ...

    @property
    def calibration(self) -> Split:
        """Images for scores, repairs and batch-norm re-estimation."""
        ...

    @property
    def validation(self) -> Split:
        """Images for choosing the best epoch, repairs and numbers of blocks."""
        ...

    @property
    def evaluation(self) -> Split:
        """Images for the measurements of the verdict; they influence no choice."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, or ()."""
        ...

    def check_classes(self) -> None:
        """Raise DataError when splits name their classes and the names differ."""


def known_labels(split: Split) -> np.ndarray | None:
    """Return (N,) class indices of a split if they are known without reading its images, else None."""
    if not isinstance(split.objective, Classification) or getattr(split.source, "known_labels", split.source) is None:
        return None
    return split.labels


def carve(labels: np.ndarray, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Split the indices of a source into disjoint, class-balanced parts.

    Args:
        labels: (N,) integer labels; all equal for images without classes.
        sizes: Number of images of each named part; all other images are in "train".
        seed: Seed of the random assignment of images to parts.

    Returns:
        For each name, and "train", the sorted indices of its images.

    Raises:
        DataError: No images remain for training.

    >>> parts = carve(np.array([0, 0, 0, 1, 1, 1]), {"validation": 2}, seed=0)
    >>> [len(parts[name]) for name in ("train", "validation")]
    [4, 2]
    """
    wanted = sum(sizes.values())
    if wanted >= len(labels):
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(
            f"The training source must hold more images than are taken out of it: it has {len(labels)}, asked: {asked}."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(_rank_within_class(labels[order]), kind="stable")]
    parts: dict[str, np.ndarray] = {}
    start = 0
    for name, size in sizes.items():
        parts[name] = np.sort(by_class[start : start + size])
        start += size
    parts["train"] = np.sort(by_class[start:])
    return parts


def _rank_within_class(labels: np.ndarray) -> np.ndarray:
    """Return for each entry its relative position, in [0, 1), among the entries of its class."""
    rank = np.empty(len(labels), dtype=np.float64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members)) / len(members)
    return rank
