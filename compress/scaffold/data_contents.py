"""Contents of a data set, as `compress init` found them."""

from dataclasses import dataclass
from typing import Any

OTHER_TARGETS = "Read other targets with a data set class: docs/tasks.md, data.train: {own: FILE.py:CLASS}."


@dataclass(frozen=True)
class DataSurvey:
    """Contents of a data set.

    Attributes:
        train: Keys of the source, as in `data.train`.
        evaluation: The same for the evaluation images; None if they are to be taken from `train`.
        validation: The same for validation images of their own; None if they are to be taken from `train`.
        images: Training images; None if they are not known before a download.
        evaluation_images: Evaluation images of their own source; 0 without one.
        classes: Number of classes; None without labels, or if it is not known.
        sizes: (height, width) of some images, without repetition.
        channels: 1 if all of some images are grey, else 3.
        task: "classification", "segmentation" or "regression".
        spread: Standard deviation of the targets of a regression.
        notes: Sentences for the user.
    """

    train: dict[str, Any]
    evaluation: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    images: int | None = None
    evaluation_images: int = 0
    classes: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    channels: int = 3
    task: str = "classification"
    spread: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def is_labelled(self) -> bool:
        """True if images have targets."""
        return "unlabelled" not in self.train
