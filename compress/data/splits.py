"""Splits of a data set: training, calibration, validation, evaluation.

train        what fine-tuning learns from
calibration  what batch-norm re-estimation, scores and repairs look at
validation   what chooses the best epoch
evaluation   what the verdict is measured on; nothing is ever chosen by it

Calibration and validation are carved out of the training source once, by a seed of their own, so that no image is
ever in two splits and a change of the training seed does not move the borders. Validation may have a source of its own.
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
    """A network whose outputs are learned in place of targets."""

    def build(self) -> Any:
        """Return the network in eval mode, without gradients; a new one each time."""
        ...


@dataclass(frozen=True)
class Split:
    """Some images of a source, with the preprocessing the network needs.

    Attributes:
        name: "train", "calibration", "validation" or "evaluation".
        source: Where the images are.
        indices: Which of them belong here.
        preprocessing: What the network needs.
        task: What the targets are for, and what is measured.
        original: Returns the baseline, where its outputs are learned in place of the targets; else None.
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
        """(N,) int64 class indices; only where the task is to tell classes apart."""
        chosen: np.ndarray = self.source.labels[self.indices]
        return chosen

    @property
    def objective(self) -> Task:
        """Training objective: the task itself, or imitation of the baseline."""
        if self.original is None or isinstance(self.task, Imitation):
            return self.task
        return Imitation(self.task)

    def read_targets(self, positions: np.ndarray) -> Any:
        """Return what images are labelled with, by their positions in this split: an array of n entries, or a list."""
        return self.source.read_targets(self.indices[positions])

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Return uint8 (n, H, W, C) images by their positions in this split."""
        return self.source.read(self.indices[positions])

    def first(self, count: int) -> "Split":
        """Return a split of `count` images spread evenly over this one (all of it when it has fewer)."""
        if count >= len(self):
            return self
        chosen = np.linspace(0, len(self) - 1, count).astype(np.int64)
        return replace(self, indices=self.indices[chosen])

    def slice(self, start: int, stop: int) -> "Split":
        """Return the images from one position up to another, without it."""
        return replace(self, indices=self.indices[start:stop])

    def part(self, rank: int, size: int) -> "Split":
        """Return each size-th image, from the rank-th on."""
        return replace(self, indices=self.indices[rank::size])

    def interleaved(self, count: int) -> "Split":
        """Return the same images in another order: each count-th one, from the first on, from the second on, ..."""
        return replace(self, indices=np.concatenate([self.indices[start::count] for start in range(count)]))


class DataSplits(Protocol):
    """Splits of one data set, as the stages read them.

    Attributes:
        teacher: The baseline, once there is one; needed only where images have no labels, or the task learns from it.
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
        """Images by which the best epoch, repairs and numbers of blocks are chosen."""
        ...

    @property
    def evaluation(self) -> Split:
        """Images that the verdict is measured on; nothing is chosen by them."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, or ()."""
        ...

    def check_classes(self) -> None:
        """Raise DataError when splits name their classes and the names differ."""


def known_labels(split: Split) -> np.ndarray | None:
    """Return (N,) the class indices of a split where they are known without reading its images, else None."""
    if not isinstance(split.objective, Classification) or getattr(split.source, "known_labels", split.source) is None:
        return None
    return split.labels


def carve(labels: np.ndarray, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Split the indices of a source into disjoint, class-balanced parts.

    Args:
        labels: (N,) integer labels; all alike where images have no class.
        sizes: Images wanted for each named part; all others are returned as "train".
        seed: Decides which images go where.

    Returns:
        For each name, and "train", the sorted indices of its images.

    Raises:
        DataError: The parts together leave nothing to train on.

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
    """Return for each entry the relative position, in [0, 1), that it takes among the entries of its class."""
    rank = np.empty(len(labels), dtype=np.float64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members)) / len(members)
    return rank
