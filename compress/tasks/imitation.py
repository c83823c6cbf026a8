"""embedding, and any task without labels: distance of the outputs to those of the baseline.

Targets are the outputs of the baseline for the same images. For tasks that choose among classes, the primary metric is
the share of equal choices ("agreement"). For others it is the distance of the outputs ("distance"): the relative
distance of all outputs, or the distance that a user's task defines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compress.errors import ModelError
from compress.tasks.base import Facts, Task
from compress.tasks.outputs import changed, each, first, picked, singles

if TYPE_CHECKING:
    from torch import Tensor


class Imitation(Task):
    """A task whose targets are the outputs of the baseline.

    Args:
        of: Task of the network, which defines the comparison of outputs.
    """

    learns_from_original = True
    needs_targets = False
    resamples = 400

    def __init__(self, of: Task) -> None:
        self.of = of
        self.chooses = of.chooses
        self.own = None if self.chooses else _own_method(of)
        self.name = of.name  # type: ignore[misc]
        self.metric = "agreement" if self.chooses else "distance"
        self.label = "agreement with the original" if self.chooses else "distance to the original"
        self.higher_is_better = self.is_share = self.chooses

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean distance to the outputs of the baseline."""
        return self.of.distance(outputs, targets)

    def image_losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return (N,) the distance of each image's outputs to those of the baseline."""
        return self.distances(outputs, targets)

    def distances(self, outputs: Any, wanted: Any) -> Tensor:
        """Return (N,) distances by the imitated task, image by image if it defines only `distance` of a batch."""
        if self.own != "distance":
            return self.of.distances(outputs, wanted)
        import torch

        each_image = (self.of.distance(picked(outputs, one), picked(wanted, one)) for one in singles(outputs))
        return torch.stack(list(each_image))

    def distance(self, outputs: Any, wanted: Any, temperature: float = 1.0) -> Tensor:
        """Return the mean distance of a batch by the imitated task."""
        return self.of.distance(outputs, wanted, temperature)

    def guess(self, outputs: Any) -> float:
        """Return the loss of a guess by the imitated task."""
        return self.of.guess(outputs)

    def check(self, outputs: Any, targets: Any) -> None:
        """Check that both networks return the same kinds of outputs.

        Raises:
            ModelError: Number or shapes of the outputs differ.
        """
        shapes = [[tuple(one.shape[1:]) for one in each(values)] for values in (outputs, targets)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"Outputs must have the shapes of the baseline's, {shapes[1]} an image, got {shapes[0]}.")

    def facts(self, outputs: Any, targets: Any) -> Facts:
        """Return (N,) squared distance, squared norm and cosine of all outputs, and the share of equal choices if any.

        The distance that a user's task defines replaces the first two.
        """
        got, want = (_flat(values) for values in (outputs, targets))
        sizes = np.maximum(np.linalg.norm(want, axis=1), 1e-12)
        lengths = np.maximum(np.linalg.norm(got, axis=1), 1e-12)
        apart = ((got - want) ** 2).sum(1)
        facts = {"apart": apart, "size": sizes**2, "cosine": (got * want).sum(1) / sizes / lengths}
        if self.own is not None:
            facts = {"distance": self._own_distances(outputs, targets), "cosine": facts["cosine"]}
        if self.chooses:
            equal = first(outputs).argmax(1) == first(targets).argmax(1)
            facts["agreement"] = equal.reshape(len(equal), -1).mean(1)
        return facts

    def aggregate(self, facts: Facts) -> dict[str, float]:
        """Return "distance" (relative, over all images together), and the means of "cosine" and "agreement".

        For a user's task that defines a distance, "distance" is its mean.
        """
        means = {name: float(values.mean()) for name, values in facts.items() if name not in ("apart", "size")}
        return means if "distance" in means else {"distance": _relative(facts), **means}

    def _own_distances(self, outputs: Any, targets: Any) -> np.ndarray:
        """Return (N,) distances of arrays or tensors by the user's task."""
        import torch

        with torch.no_grad():
            found = self.distances(*(changed(values, torch.as_tensor) for values in (outputs, targets)))
        return found.detach().cpu().double().numpy()


def _own_method(task: Task) -> str | None:
    """Return the name of the distance method that a task overrides; None if it overrides neither."""
    for name in ("distances", "distance"):
        if getattr(getattr(task, name), "__func__", None) is not getattr(Task, name):
            return name
    return None


def _relative(facts: Facts) -> float:
    return float(np.sqrt(facts["apart"].sum() / facts["size"].sum()))


def _flat(outputs: Any) -> np.ndarray:
    """Return (N, M) float64 all floating-point outputs of each image in one row."""
    arrays = [np.asarray(one) for one in each(outputs)]
    rows = [one.reshape(len(one), -1).astype(np.float64) for one in arrays if np.issubdtype(one.dtype, np.floating)]
    return np.concatenate(rows, axis=1)


class Embedding(Imitation):
    """Embedding task: the outputs of the network should stay close to those of the baseline."""

    name: ClassVar[str] = "embedding"

    def __init__(self) -> None:
        super().__init__(Task())
        self.name = "embedding"  # type: ignore[misc]
