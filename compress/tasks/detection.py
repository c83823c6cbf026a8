"""detection: boxes of objects. A user function decodes outputs into boxes; targets are lists of boxes.

A box is [x0, y0, x1, y1] in pixels of the network's input image. The targets of an image are a mapping with `boxes`
(M, 4) float32 and `labels` (M,) int64; the mappings that `postprocess` returns also have `scores` (M,).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compress.catalog import DETECTION, missing_package, require_packages
from compress.errors import DataError, ModelError
from compress.tasks.base import Facts, Task, as_column
from compress.tasks.outputs import named, picked
from compress.user_code import raise_as

if TYPE_CHECKING:
    from torch import Tensor

Postprocess = Callable[[dict[str, Any], tuple[int, int]], Sequence[Mapping[str, Any]]]


class Detection(Task):
    """Detection task: mean average precision as the primary metric, the user's loss or imitation of the baseline.

    Args:
        postprocess: `postprocess(outputs, (height, width))` -> for each image `boxes`, `scores`, `labels`; outputs are
            torch tensors by name.
        loss: `loss(outputs, targets)` -> scalar; None to train on the outputs of the baseline.
    """

    name: ClassVar[str] = "detection"
    metric = "map"
    label = "mAP"
    is_spatial = True

    def __init__(self, postprocess: Postprocess, loss: Callable[[Any, Any], Tensor] | None = None) -> None:
        self.postprocess, self.own_loss = postprocess, loss
        self.learns_from_original = loss is None
        self.image_size: tuple[int, int] = (0, 0)

    def sized(self, height: int, width: int) -> Task:
        """Return the task for images of that size, which is passed to `postprocess`."""
        one = copy.copy(self)
        one.image_size = (height, width)
        return one

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the value of the user's loss."""
        if self.own_loss is None:
            raise DataError("A detection task must name a loss to learn from boxes.", hint="task.loss: my_task.py:loss")
        return self.own_loss(outputs, targets)

    def vary(self, targets: Any, variation: Any) -> Any:
        """Return boxes with the augmentation of their images; boxes outside of the image are dropped."""
        return variation.of_boxes(targets)

    def check(self, outputs: Any, targets: Any) -> None:
        """Check that targets are boxes, and that `postprocess` returns boxes for the first image.

        `facts` checks the boxes of all images.

        Raises:
            ModelError: `postprocess` does not return boxes.
            DataError: The targets are no boxes.
        """
        for one in targets:
            if not isinstance(one, Mapping) or not {"boxes", "labels"} <= set(one):
                raise DataError("Targets of a detection task must be mappings with boxes and labels, one an image.")
        self._boxes(picked(outputs, slice(0, 1)), 1)

    def facts(self, outputs: Any, targets: Any) -> Facts:
        """Return the detected boxes and the target boxes of each image."""
        return {"found": as_column(self._boxes(outputs, len(targets))), "there": as_column(targets)}

    def _boxes(self, outputs: Any, count: int) -> list[dict[str, np.ndarray]]:
        """Return the boxes that the user's function decodes from outputs, tensors or arrays."""
        import torch

        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(one)) if isinstance(one, np.ndarray) else one.detach().cpu()
            for name, one in named(outputs).items()
        }
        with raise_as(ModelError, f"task.postprocess must make boxes of outputs {', '.join(tensors)}"):
            found = list(self.postprocess(tensors, self.image_size))
        keys = {"boxes", "scores", "labels"}
        if len(found) != count or not all(isinstance(one, Mapping) and keys <= set(one) for one in found):
            raise ModelError(
                f"task.postprocess must return a mapping with boxes, scores and labels for each of {count} images, got "
                f"{len(found)} of {type(found[0]).__name__ if found else 'nothing'}."
            )
        return [{key: np.asarray(one[key]) for key in keys} for one in found]

    def aggregate(self, facts: Facts) -> dict[str, float]:
        """Return "map" (mean over overlaps from 0.5 to 0.95), "map50" and "map75", as COCO defines them.

        They are NaN if no image has an object.

        Source: Lin et al. 2014, "Microsoft COCO: Common Objects in Context", arXiv:1405.0312; computed by torchmetrics.

        Raises:
            PackageMissing: torchmetrics or pycocotools is missing.
        """
        import torch

        metric = _mean_average_precision()
        found = [{name: torch.as_tensor(value) for name, value in one.items()} for one in facts["found"]]
        there = [
            {"boxes": torch.as_tensor(one["boxes"]).reshape(-1, 4), "labels": torch.as_tensor(one["labels"])}
            for one in facts["there"]
        ]
        for one in found:
            one["boxes"] = one["boxes"].reshape(-1, 4).float()
        metric.update(found, there)
        values = metric.compute()
        keys = {"map": "map", "map50": "map_50", "map75": "map_75"}
        has_any = any(len(one["labels"]) for one in there)  # torchmetrics returns -1 without boxes
        return {name: float(values[key]) if has_any else math.nan for name, key in keys.items()}


def _mean_average_precision() -> Any:
    require_packages(DETECTION, "Mean average precision")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that torchmetrics imports
            from torchmetrics.detection import MeanAveragePrecision

            metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox", backend="pycocotools")
    except ImportError as error:
        raise missing_package(DETECTION, f"Mean average precision ({error})") from error
    metric.warn_on_many_detections = False
    return metric
