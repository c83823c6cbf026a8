"""embedding, and any task without labels: distance of the outputs to those of the baseline.

Targets are what that network returns for the same images. Where the task chooses among classes, the share of equal
choices decides ("agreement"), else the distance of the outputs ("distance"): relative, of all of them, unless the task
is one of the user's that says by itself how far outputs are from others.
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
        of: The task that the network is for; says how outputs are compared.
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
        """Return the mean distance to what the baseline returns."""
        return self.of.distance(outputs, targets)

    def image_losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return (N,) the distance of each image's outputs."""
        return self.distances(outputs, targets)

    def distances(self, outputs: Any, wanted: Any) -> Tensor:
        """Return what the task itself says, of one image after the other where it says it of a batch only."""
        if self.own != "distance":
            return self.of.distances(outputs, wanted)
        import torch

        each_image = (self.of.distance(picked(outputs, one), picked(wanted, one)) for one in singles(outputs))
        return torch.stack(list(each_image))

    def distance(self, outputs: Any, wanted: Any, temperature: float = 1.0) -> Tensor:
        """Return what the task itself says."""
        return self.of.distance(outputs, wanted, temperature)

    def guess(self, outputs: Any) -> float:
        """Return what the task itself says."""
        return self.of.guess(outputs)

    def check(self, outputs: Any, targets: Any) -> None:
        """Check that both networks return the same kinds of outputs.

        Raises:
            ModelError: They do not.
        """
        shapes = [[tuple(one.shape[1:]) for one in each(values)] for values in (outputs, targets)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"Outputs must have the shapes of the baseline's, {shapes[1]} an image, got {shapes[0]}.")

    def facts(self, outputs: Any, targets: Any) -> Facts:
        """Return (N,) squared distance and size of all outputs, their cosine, and the share of equal choices if any.

        Where the user's task says how far outputs are from others, that takes the place of the first two.
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
        """Return "distance" (of all images together, relative), and the means of "cosine" and "agreement".

        Where the user's task says how far outputs are from others, "distance" is the mean of that.
        """
        means = {name: float(values.mean()) for name, values in facts.items() if name not in ("apart", "size")}
        return means if "distance" in means else {"distance": _relative(facts), **means}

    def _own_distances(self, outputs: Any, targets: Any) -> np.ndarray:
        """Return (N,) what the user's task says of arrays or tensors."""
        import torch

        with torch.no_grad():
            found = self.distances(*(changed(values, torch.as_tensor) for values in (outputs, targets)))
        return found.detach().cpu().double().numpy()


def _own_method(task: Task) -> str | None:
    """Return the name of the method by which a task says how far outputs are from others, None where it has none."""
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
    """Outputs that only mean something beside each other: what counts is that they stay where they were."""

    name: ClassVar[str] = "embedding"

    def __init__(self) -> None:
        super().__init__(Task())
        self.name = "embedding"  # type: ignore[misc]
