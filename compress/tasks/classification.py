"""classification: one of K classes for each image. Outputs (N, K) logits, targets (N,) class indices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compress.errors import DataError, ModelError
from compress.tasks.base import Facts, Task

if TYPE_CHECKING:
    from torch import Tensor


class Classification(Task):
    """Classification task: cross-entropy as the loss, top-1 as the primary metric."""

    name: ClassVar[str] = "classification"
    metric = "top1"
    label = "top-1"
    chooses = True
    can_mix = True

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean cross-entropy in nats."""
        return self.training_loss(outputs, targets, 0.0)

    def training_loss(self, outputs: Any, targets: Any, smoothing: float) -> Tensor:
        """Return the mean cross-entropy in nats with smoothed labels."""
        import torch.nn.functional as F

        return F.cross_entropy(outputs, targets, label_smoothing=smoothing)

    def image_losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return (N,) the cross-entropy of each image in nats."""
        import torch.nn.functional as F

        return F.cross_entropy(outputs, targets, reduction="none")

    def distances(self, outputs: Any, wanted: Any) -> Tensor:
        """Return (N,) the Kullback-Leibler divergence from the wanted probabilities, in nats."""
        import torch.nn.functional as F

        divergence = F.kl_div(F.log_softmax(outputs, 1), F.log_softmax(wanted, 1), reduction="none", log_target=True)
        return divergence.sum(1)

    def distance(self, outputs: Any, wanted: Any, temperature: float = 1.0) -> Tensor:
        """Return the mean divergence of softened probabilities, times the squared temperature.

        Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
        """
        import torch.nn.functional as F

        want, got = F.log_softmax(wanted / temperature, 1), F.log_softmax(outputs / temperature, 1)
        return F.kl_div(got, want, reduction="batchmean", log_target=True) * temperature**2

    def guess(self, outputs: Any) -> float:
        """Return the loss of equal probabilities for all classes, ln K."""
        return math.log(outputs.shape[1])

    def check(self, outputs: Any, targets: Any) -> None:
        """Check for (N, K) outputs and labels below K.

        Raises:
            ModelError: The output is no (N, K) tensor.
            DataError: A label is K or more.
        """
        if getattr(outputs, "ndim", None) != 2:
            got = tuple(outputs.shape) if hasattr(outputs, "shape") else type(outputs).__name__
            raise ModelError(f"A classifier must return one (N, classes) tensor, got {got}.")
        self.check_largest(outputs, int(targets.max()))

    def check_largest(self, outputs: Any, largest_label: int) -> None:
        """Raise DataError when a label is K or more."""
        if largest_label >= outputs.shape[1]:
            raise DataError(
                f"Labels must be below the number of classes the network has ({outputs.shape[1]}), "
                f"got label {largest_label}."
            )

    def facts(self, outputs: Any, targets: Any) -> Facts:
        """Return (N,) whether each image is classified correctly."""
        return {"right": np.asarray(outputs).argmax(1) == targets}

    def aggregate(self, facts: Facts) -> dict[str, float]:
        """Return the share of correctly classified images."""
        return {"top1": float(facts["right"].sum()) / len(facts["right"])}


CLASSIFICATION = Classification()
