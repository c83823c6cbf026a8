"""Interface of tasks: loss, facts of each image, metrics, and the primary metric.

    outputs, targets --loss--> scalar to minimise              torch, any device
    outputs, targets --facts--> small arrays for each image    numpy, the same code for torch and ONNX
    facts of all images --aggregate--> {"miou": 0.71, ...}

`outputs` is the tensor (or array) of a network with one output, else a mapping from output names to tensors. `targets`
is one tensor (or array) for the batch, or a list with an entry for each image if their shapes differ.

Only training imports torch: an ONNX file is verified without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compress.catalog import PERTURBED, SHARES
from compress.errors import DataError, ModelError, NonFinite
from compress.tasks.outputs import each, picked, singles

if TYPE_CHECKING:
    from torch import Tensor


Facts = dict[str, np.ndarray]


_WORDS = {
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "map": "mAP",
    "map50": "mAP at 0.5",
    "map75": "mAP at 0.75",
    "mask_map": "mask mAP",
    "mask_map50": "mask mAP at 0.5",
    "mask_map75": "mask mAP at 0.75",
    "keypoint_map": "key point mAP",
    "keypoint_map50": "key point mAP at 0.5",
    "keypoint_map75": "key point mAP at 0.75",
    "rmse": "RMSE",
    "mae": "MAE",
}
_LOWER_IS_BETTER = ("rmse", "mae", "distance", "calibration_error", "excess_error", "churn", "softmax_distance")


@dataclass(frozen=True, slots=True)
class Metric:
    """A quality metric: its name, unit and direction.

    Attributes:
        name: Name in gates and reports, such as "miou".
        higher_is_better: Whether larger values are better.
        is_share: Whether values lie in [0, 1] and are shown in percent.
        label: Name in sentences.
    """

    name: str
    higher_is_better: bool = True
    is_share: bool = True
    label: str = ""

    @property
    def words(self) -> str:
        """Name of the metric in sentences."""
        return self.label or self.name

    @property
    def title(self) -> str:
        """Name at the beginning of a sentence.

        >>> Metric("top1", label="top-1").title, Metric("miou", label="mIoU").title
        ('Top-1', 'mIoU')
        """
        start = self.words[:2]
        return self.words if start != start.lower() else self.words[:1].upper() + self.words[1:]

    @property
    def unit(self) -> str:
        """Unit that values are shown in: "%" for a share, else ""."""
        return "%" if self.is_share else ""

    @property
    def scale(self) -> float:
        """Factor from a value to its unit."""
        return 100.0 if self.is_share else 1.0

    @property
    def worse_word(self) -> str:
        """Word for a change for the worse: "drop" or "rise"."""
        return "drop" if self.higher_is_better else "rise"

    @property
    def worsening(self) -> str:
        """Name of the change for the worse, positive where quality is lost: "drop.top1", "rise.rmse"."""
        return f"{self.worse_word}.{self.name}"

    def other(self, name: str) -> Metric:
        """Return the metric of a name, measured beside this primary metric.

        Robustness is the primary metric on other images. Metrics with an unknown name are plain numbers.

        >>> Metric("top1").other("worst_class").title, Metric("rmse", is_share=False).other("noise").is_share
        ('Worst class', False)
        """
        if name == self.name:
            return self
        if name in PERTURBED:
            return replace(self, name=name, label=name)
        words = _WORDS.get(name, name.replace("_", " "))
        return Metric(name, name not in _LOWER_IS_BETTER, name in SHARES, words)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a report."""
        return {**asdict(self), "label": self.words}

    def show(self, value: float) -> str:
        """Return a value in its unit.

        >>> Metric("miou").show(0.5), Metric("rmse", is_share=False).show(0.25)
        ('50.00%', '0.25')
        """
        return f"{value:.2%}" if self.is_share else f"{value:.4g}"

    def is_better(self, one: float, other: float) -> bool:
        """Return whether one value is better than another; NaN is never better, and every number is better than NaN."""
        if np.isnan(one) or np.isnan(other):
            return bool(np.isnan(other) and not np.isnan(one))
        return one > other if self.higher_is_better else one < other


_EARLIER_AGGREGATE = "figures"  # name in tasks of earlier revisions


class Task:
    """Base class of built-in and user-defined tasks; a subclass defines at least `loss`, `metrics` and `metric`.

    Attributes:
        name: Name in the pipeline file.
        metric: Name of the primary metric, a key of the mapping that `metrics` returns.
        higher_is_better: Whether larger values of the primary metric are better.
        is_share: Whether the primary metric lies in [0, 1] and is shown in percent.
        label: Name of the primary metric in sentences.
        resamples: Largest number of parts of the images that are omitted in turn for the interval of a metric
            (jackknife); 0 for no interval.
        chooses: Whether the network chooses among classes, so that a guess has a known loss.
        can_mix: Whether mixup and CutMix are possible: targets are class indices.
        is_spatial: Whether targets have positions in the image, so that they must move with its pixels.
        learns_from_original: Whether training targets are always the baseline's outputs, even with labels.
        needs_targets: Whether metrics need targets; otherwise they compare outputs with the baseline.
    """

    name: ClassVar[str] = "own"
    metric: str = ""
    higher_is_better: bool = True
    is_share: bool = True
    label: str = ""
    resamples: int = 0
    chooses: bool = False
    can_mix: bool = False
    is_spatial: bool = False
    learns_from_original: bool = False
    needs_targets: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Accept a task of an earlier revision, in which `aggregate` had another name."""
        super().__init_subclass__(**kwargs)
        if "aggregate" not in vars(cls) and _EARLIER_AGGREGATE in vars(cls):
            cls.aggregate = vars(cls)[_EARLIER_AGGREGATE]  # type: ignore[method-assign]

    @property
    def main(self) -> Metric:
        """The primary metric."""
        return Metric(self.metric, self.higher_is_better, self.is_share, self.label)

    def sized(self, height: int, width: int) -> Task:
        """Return the task for a size of the network's input images; the same object if the size does not matter."""
        return self

    # training: torch

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean loss of a batch, a scalar to be minimised."""
        raise NotImplementedError(f"{type(self).__name__} must have a method loss(outputs, targets).")

    def image_losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return (N,) the loss of each image; by default `loss` of one image after the other."""
        import torch

        return torch.stack([self.loss(picked(outputs, one), targets[one]) for one in singles(outputs)])

    def training_loss(self, outputs: Any, targets: Any, smoothing: float) -> Tensor:
        """Return the mean loss of a training batch; label smoothing is for tasks that choose among classes."""
        return self.loss(outputs, targets)

    def distances(self, outputs: Any, wanted: Any) -> Tensor:
        """Return (N,) distances of outputs to the wanted outputs of another network, 0 for equal outputs.

        By default, the squared difference over the mean square of the wanted outputs in the batch, averaged over
        floating-point outputs. Relative to its own size, an image with outputs near 0 would dominate.
        """
        import torch

        found = []
        for got, want in zip(each(outputs), each(wanted), strict=True):
            if want.is_floating_point():
                difference, size = (got - want).reshape(len(want), -1), want.reshape(len(want), -1)
                found.append(difference.square().sum(1) / size.square().sum(1).mean().clamp_min(1e-12))
        return torch.stack(found).mean(0)

    def distance(self, outputs: Any, wanted: Any, temperature: float = 1.0) -> Tensor:
        """Return the mean distance of a batch to the outputs of another network: the loss of distillation.

        Args:
            outputs: Outputs of the trained network.
            wanted: Outputs of the other network, of the same form.
            temperature: Divisor of logits, for outputs that are logits.
        """
        return self.distances(outputs, wanted).mean()

    def guess(self, outputs: Any) -> float:
        """Return the loss of a network with the same output for every image; infinite if it is unknown."""
        return float("inf")

    def vary(self, targets: Any, variation: Any) -> Any:
        """Return targets with the augmentation of their images (`data/augmentation.py`); by default unchanged."""
        return targets

    # metrics: numpy

    def check(self, outputs: Any, targets: Any) -> None:
        """Check that outputs and targets of a batch, tensors or arrays, fit the task.

        Raises:
            ModelError: The outputs do not fit.
            DataError: The targets do not fit.
        """

    def metrics(self, outputs: Any, targets: Any) -> dict[str, float]:
        """Return the metrics of a network over images, from arrays."""
        raise NotImplementedError(f"{type(self).__name__} must have a method metrics(outputs, targets).")

    def facts(self, outputs: Any, targets: Any) -> Facts:
        """Return the facts of each image of a batch, arrays of N entries; by default all outputs and targets."""
        named = outputs if isinstance(outputs, dict) else {"": outputs}
        return {**{f"output.{name}": value for name, value in named.items()}, "target": as_column(targets)}

    def aggregate(self, facts: Facts) -> dict[str, float]:
        """Return the metrics over all images from their facts; by default `metrics` of all outputs."""
        named = {name.partition(".")[2]: value for name, value in facts.items() if name.startswith("output.")}
        targets = facts["target"]
        outputs = named[""] if list(named) == [""] else named
        found = self.metrics(outputs, list(targets) if targets.dtype == object else targets)
        if not isinstance(found, Mapping):
            raise ModelError(f"metrics of task '{type(self).__name__}' must be a mapping, got {type(found).__name__}.")
        if self.metric not in found:
            raise ModelError(
                f"Task '{type(self).__name__}' must measure its metric '{self.metric}', its metrics are "
                f"{', '.join(found) or 'none'}."
            )
        return {name: float(value) for name, value in found.items()}


def require_finite(metrics: Mapping[str, float]) -> None:
    """Raise NonFinite if a metric is NaN or infinite, and so cannot be compared."""
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise NonFinite(
                f"Metric '{name}' of the task must be a finite number, got {value}.",
                hint="It is undefined on images without anything to find: no object, or no pixel that counts.",
            )


def as_column(values: Any) -> np.ndarray:
    """Return an array with one entry for each image; a list becomes an array of objects."""
    if isinstance(values, np.ndarray):
        return values
    column = np.empty(len(values), object)
    column[:] = list(values)
    return column


def joined(parts: list[Facts]) -> Facts:
    """Return the concatenated facts of several batches."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def chosen(facts: Facts, places: np.ndarray) -> Facts:
    """Return the facts of the images at some positions, which may repeat."""
    return {name: values[places] for name, values in facts.items()}


def require_targets(targets: Any, kind: str, axes: int) -> None:
    """Raise DataError unless targets are an array or tensor with a number of axes."""
    if not hasattr(targets, "ndim") or targets.ndim != axes:
        got = f"shape {tuple(targets.shape)}" if hasattr(targets, "shape") else type(targets).__name__
        raise DataError(f"Targets must be {kind}, an array of {axes} ax{'is' if axes == 1 else 'es'}, got {got}.")


LEVEL = 0.05


def is_shown_worse(before: np.ndarray, after: np.ndarray) -> bool:
    """Return whether significantly fewer images are correct after than before (exact McNemar test, 5 %, two-sided).

    Args:
        before: (N,) bool, whether each image was classified correctly before.
        after: (N,) bool, whether each image is classified correctly after.

    >>> lost = np.arange(256) >= 4
    >>> is_shown_worse(np.ones(256, bool), lost), is_shown_worse(np.ones(256, bool), np.arange(256) >= 6)
    (False, True)
    """
    from scipy.stats import binomtest  # scipy takes a second to import

    only_before, only_after = int((before & ~after).sum()), int((after & ~before).sum())
    if only_before <= only_after:
        return False
    return bool(binomtest(only_before, only_before + only_after).pvalue < LEVEL)
