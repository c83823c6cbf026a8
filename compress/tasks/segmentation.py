"""segmentation: one of K classes for each pixel. Outputs (N, K, H, W) logits, targets (N, H, W) class indices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compress.errors import DataError, ModelError
from compress.tasks.base import Facts, Task, require_targets
from compress.tasks.outputs import each, first

if TYPE_CHECKING:
    from torch import Tensor


class Segmentation(Task):
    """Segmentation task: pixel cross-entropy as the loss, mean intersection over union as the primary metric.

    For a network with several outputs, loss and metrics use the first one (torchvision's `out`).

    Args:
        ignore_index: Value of ignored mask pixels.
    """

    name: ClassVar[str] = "segmentation"
    metric = "miou"
    label = "mIoU"
    resamples = 400
    chooses = True
    is_spatial = True

    def __init__(self, ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean cross-entropy of all pixels that are not ignored, in nats."""
        return self.training_loss(outputs, targets, 0.0)

    def training_loss(self, outputs: Any, targets: Any, smoothing: float) -> Tensor:
        """Return the mean cross-entropy with smoothed labels, in nats; 0 if all pixels of the batch are ignored."""
        import torch.nn.functional as F

        counted = (targets != self.ignore_index).sum().clamp_min(1)
        try:
            total: Tensor = F.cross_entropy(
                first(outputs), targets, ignore_index=self.ignore_index, label_smoothing=smoothing, reduction="sum"
            )
        except IndexError:
            _require_classes(targets[targets != self.ignore_index], first(outputs).shape[1], self.ignore_index)
            raise
        mean: Tensor = total / counted
        return mean

    def image_losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return (N,) the mean cross-entropy of the pixels of each image, in nats."""
        import torch.nn.functional as F

        each: Tensor = F.cross_entropy(first(outputs), targets, ignore_index=self.ignore_index, reduction="none")
        counted: Tensor = (targets != self.ignore_index).flatten(1).sum(1).clamp_min(1)
        return each.flatten(1).sum(1) / counted

    def distances(self, outputs: Any, wanted: Any) -> Tensor:
        """Return (N,) the mean Kullback-Leibler divergence of pixels from the wanted probabilities, in nats."""
        return _divergences(outputs, wanted, 1.0)

    def distance(self, outputs: Any, wanted: Any, temperature: float = 1.0) -> Tensor:
        """Return the mean divergence of softened probabilities, times the squared temperature."""
        return _divergences(outputs, wanted, temperature).mean() * temperature**2

    def guess(self, outputs: Any) -> float:
        """Return the loss of equal probabilities for all classes, ln K."""
        return math.log(first(outputs).shape[1])

    def vary(self, targets: Any, variation: Any) -> Any:
        """Return masks with the augmentation of their images; padding is ignored."""
        return variation.of_maps(targets, self.ignore_index)

    def check(self, outputs: Any, targets: Any) -> None:
        """Check for (N, K, H, W) outputs of the masks' size and classes below K.

        Raises:
            ModelError: The first output has another shape.
            DataError: Targets are no masks, or have classes that the network does not have.
        """
        logits = first(outputs)
        if logits.ndim != 4 or logits.shape[1] < 2:
            raise ModelError(
                f"A segmentation network must return (N, classes, H, W), at least 2 classes, got {tuple(logits.shape)}."
            )
        require_targets(targets, "masks", 3)
        if tuple(logits.shape[2:]) != tuple(targets.shape[1:]):
            raise ModelError(
                f"Outputs must have the size of the masks ({targets.shape[1]} x {targets.shape[2]}), got "
                f"{logits.shape[2]} x {logits.shape[3]}.",
                hint="Let the network end with a resize to the size of its input, as torchvision's do.",
            )
        _require_classes(targets[targets != self.ignore_index], logits.shape[1], self.ignore_index)

    def facts(self, outputs: Any, targets: Any) -> Facts:
        """Return (N, K) numbers of correct, predicted and target pixels of each class."""
        logits = first(outputs)
        classes = logits.shape[1]
        predicted, counted = logits.argmax(1), targets != self.ignore_index
        _require_classes(targets[counted], classes, self.ignore_index)
        counts = np.zeros((3, len(logits), classes), np.int64)
        for place in range(len(logits)):
            got, want = predicted[place][counted[place]], targets[place][counted[place]]
            for row, values in enumerate((got[got == want], got, want)):
                counts[row, place] = np.bincount(values, minlength=classes)
        return dict(zip(("right", "predicted", "there"), counts, strict=True))

    def aggregate(self, facts: Facts) -> dict[str, float]:
        """Return "miou", the mean over classes with target or predicted pixels, and "pixel_accuracy".

        Both are NaN if all pixels are ignored.
        """
        right, predicted, there = (facts[name].sum(0) for name in ("right", "predicted", "there"))
        union = predicted + there - right
        seen, counted = union > 0, int(there.sum())
        iou = right[seen] / union[seen]
        return {
            "miou": float(iou.mean()) if counted else math.nan,
            "pixel_accuracy": float(right.sum() / counted) if counted else math.nan,
        }


def _divergences(outputs: Any, wanted: Any, temperature: float) -> Tensor:
    """Return (N,) the mean divergence of each image's pixels, of softened probabilities and over all outputs."""
    import torch
    import torch.nn.functional as F

    found = []
    for pair in zip(each(wanted), each(outputs), strict=True):  # distillation covers auxiliary heads, too
        want, got = (F.log_softmax(one / temperature, 1) for one in pair)
        found.append(F.kl_div(got, want, reduction="none", log_target=True).sum(1).flatten(1).mean(1))
    return torch.stack(found).mean(0)


def _require_classes(counted: Any, classes: int, ignore_index: int) -> None:
    """Refuse pixels of classes that the network does not have.

    Raises:
        DataError: There are such pixels.
    """
    if len(counted) and (int(counted.max()) >= classes or int(counted.min()) < 0):
        wrong = int(counted.max()) if int(counted.max()) >= classes else int(counted.min())
        raise DataError(
            f"Mask pixels must be from 0 to {classes - 1} (the network has {classes} classes), or {ignore_index}, "
            f"got {wrong}.",
            hint="task.ignore_index names the value that does not count.",
        )
