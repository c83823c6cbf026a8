"""detection: boxes of objects. A function of the user's makes boxes of the outputs; targets are lists of boxes.

A box is [x0, y0, x1, y1] in pixels of the image that goes into the network. Targets of an image are a mapping of
`boxes` (M, 4) float32 and `labels` (M,) int64; what `postprocess` returns for an image has `scores` (M,), too.
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
    """Mean average precision to decide by; a loss of the user's to learn by, else the baseline's outputs.

    Args:
        postprocess: `postprocess(outputs, (height, width))` -> for each image `boxes`, `scores`, `labels`; outputs are
            torch tensors by their names.
        loss: `loss(outputs, targets)` -> scalar; None learns from the baseline.
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
        """Return what the user's loss says."""
        if self.own_loss is None:
            raise DataError("A detection task must name a loss to learn from boxes.", hint="task.loss: my_task.py:loss")
        return self.own_loss(outputs, targets)

    def vary(self, targets: Any, variation: Any) -> Any:
        """Return boxes as the images were varied; those that are out of the image are gone."""
        return variation.of_boxes(targets)

    def check(self, outputs: Any, targets: Any) -> None:
        """Check that targets are boxes, and that `postprocess` makes boxes of the first image's outputs.

        `facts` asks it for those of all images, and checks them again.

        Raises:
            ModelError: It does not.
            DataError: They are not.
        """
        for one in targets:
            if not isinstance(one, Mapping) or not {"boxes", "labels"} <= set(one):
                raise DataError("Targets of a detection task must be mappings with boxes and labels, one an image.")
        self._boxes(picked(outputs, slice(0, 1)), 1)

    def facts(self, outputs: Any, targets: Any) -> Facts:
        """Return the boxes found in each image and those that are there."""
        return {"found": as_column(self._boxes(outputs, len(targets))), "there": as_column(targets)}

    def _boxes(self, outputs: Any, count: int) -> list[dict[str, np.ndarray]]:
        """Return what the user's function makes of outputs, tensors or arrays."""
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

        They are NaN where no image has an object: there is nothing to be found.

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
        has_any = any(len(one["labels"]) for one in there)  # torchmetrics gives -1 without boxes
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
