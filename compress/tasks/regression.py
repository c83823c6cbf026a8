"""regression: numbers for each image. Outputs and targets (N,) or (N, D)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compress.errors import DataError, ModelError
from compress.tasks.base import Facts, Task
from compress.tasks.outputs import first

if TYPE_CHECKING:
    from torch import Tensor


class Regression(Task):
    """Regression task: squared error as the loss, root mean squared error as the primary metric."""

    name: ClassVar[str] = "regression"
    metric = "rmse"
    label = "RMSE"
    higher_is_better = False
    is_share = False
    resamples = 400

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean squared error."""
        return self.image_losses(outputs, targets).mean()

    def image_losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return (N,) the mean squared error of each image."""
        got: Tensor = first(outputs)
        errors: Tensor = (got - targets.reshape(got.shape)).square().reshape(len(got), -1).mean(1)
        return errors

    def check(self, outputs: Any, targets: Any) -> None:
        """Check that outputs and targets of an image have the same shape, apart from axes of size 1.

        Raises:
            ModelError: The shapes differ.
            DataError: Targets are no array.
        """
        got = first(outputs)
        if not hasattr(targets, "shape"):
            raise DataError(f"Targets must be one array of numbers, got {type(targets).__name__}.")
        sizes = [tuple(size for size in one.shape[1:] if size != 1) for one in (got, targets)]
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"A regression network must return as many numbers as there are targets, {_shown(targets)} an image, "
                f"got {_shown(got)}."
            )

    def facts(self, outputs: Any, targets: Any) -> Facts:
        """Return (N,) the mean squared and the mean absolute error of each image."""
        got = np.asarray(first(outputs), np.float64)
        errors = (got - np.asarray(targets, np.float64).reshape(got.shape)).reshape(len(got), -1)
        return {"squared": (errors**2).mean(1), "absolute": np.abs(errors).mean(1)}

    def aggregate(self, facts: Facts) -> dict[str, float]:
        """Return "rmse" and "mae"."""
        return {"rmse": float(np.sqrt(facts["squared"].mean())), "mae": float(facts["absolute"].mean())}


def _shown(values: Any) -> str:
    """Return the shape of the values of each image, as text.

    >>> _shown(np.zeros(5)), _shown(np.zeros((5, 2, 3)))
    ('1', '2 x 3')
    """
    return " x ".join(str(size) for size in values.shape[1:]) or "1"
