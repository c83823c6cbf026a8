"""detection: boxes of objects, with masks or key points. A user function decodes outputs; targets are lists of objects.

A box is [x0, y0, x1, y1] in pixels of the network's input image. The targets of an image are a mapping with `boxes`
(M, 4) float32 and `labels` (M,) int64; the mappings that `postprocess` returns also have `scores` (M,).

Where targets and decoded objects both have masks or key points, their precision is measured beside that of the boxes:

    masks      targets: `polygons`, for each object a list of (P, 2) corners, or `masks` (M, H, W)
               decoded: `masks` (M, H, W), or an object that returns such arrays for arrays of positions
    keypoints  targets: (M, K, 3) x, y, visibility      decoded: (M, K, 2 or 3) x, y
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
from compress.tasks.average_precision import (
    average_precisions,
    fill_polygons,
    keypoint_similarities,
    mask_overlaps,
    match,
)
from compress.tasks.base import Facts, Task, as_column
from compress.tasks.outputs import named, picked
from compress.user_code import raise_as

if TYPE_CHECKING:
    from torch import Tensor

Postprocess = Callable[[dict[str, Any], tuple[int, int]], Sequence[Mapping[str, Any]]]
_BOX_KEYS = ("boxes", "scores", "labels")
_BESIDE_BOXES = {"masks": "mask", "keypoints": "keypoint"}  # key of decoded objects -> beginning of metric names


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
        self._decode(picked(outputs, slice(0, 1)), 1)

    def facts(self, outputs: Any, targets: Any) -> Facts:
        """Return the detected boxes and the target boxes of each image, and the matches of masks and key points."""
        decoded = self._decode(outputs, len(targets))
        found = [{key: np.asarray(one[key]) for key in _BOX_KEYS} for one in decoded]
        facts = {"found": as_column(found), "there": as_column([_boxes_of(one) for one in targets])}
        for key in _BESIDE_BOXES:
            if all(key in one for one in decoded) and all(_has(one, key) for one in targets):
                matched = [self._match(key, *pair) for pair in zip(decoded, targets, strict=True)]
                facts[key] = as_column([one[0] for one in matched])
                facts[f"{key} there"] = as_column([one[1] for one in matched])
        return facts

    def _match(self, key: str, decoded: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return the matches of an image's masks or key points, and the (G,) classes of the objects that count."""
        scores, labels, there = (np.asarray(one) for one in (decoded["scores"], decoded["labels"], target["labels"]))
        overlaps = np.zeros((len(labels), len(there)), np.float32)
        possible = np.flatnonzero(np.isin(labels, there))
        if key == "masks":
            masks = decoded["masks"]
            if len(masks) != len(labels):
                raise ModelError(
                    f"task.postprocess must return a mask for each of {len(labels)} boxes, got {len(masks)}."
                )
            if len(possible):
                overlaps = mask_overlaps(masks, _masks_of(target, self.image_size), possible)
            return match(overlaps, scores, labels, there), there
        points, boxes = np.asarray(target["keypoints"], np.float32), np.asarray(target["boxes"])
        is_unseen = points[..., 2].max(-1) <= 0
        if len(possible):
            got = np.asarray(decoded["keypoints"], np.float32)
            if got.ndim != 3 or got.shape[:2] != (len(labels), points.shape[1]):
                wanted = f"({len(labels)}, {points.shape[1]}, 2 or 3)"
                raise ModelError(f"task.postprocess must return keypoints of shape {wanted}, got {got.shape}.")
            overlaps[possible] = keypoint_similarities(got[possible], points, boxes)
        return match(overlaps, scores, labels, there, is_unseen), there[~is_unseen]

    def _decode(self, outputs: Any, count: int) -> list[Mapping[str, Any]]:
        """Return the objects that the user's function decodes from outputs, tensors or arrays."""
        import torch

        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(one)) if isinstance(one, np.ndarray) else one.detach().cpu()
            for name, one in named(outputs).items()
        }
        with raise_as(ModelError, f"task.postprocess must make boxes of outputs {', '.join(tensors)}"):
            found = list(self.postprocess(tensors, self.image_size))
        if len(found) != count or not all(isinstance(one, Mapping) and set(_BOX_KEYS) <= set(one) for one in found):
            raise ModelError(
                f"task.postprocess must return a mapping with boxes, scores and labels for each of {count} images, got "
                f"{len(found)} of {type(found[0]).__name__ if found else 'nothing'}."
            )
        return found

    def aggregate(self, facts: Facts) -> dict[str, float]:
        """Return "map" (mean over overlaps from 0.5 to 0.95), "map50" and "map75", as COCO defines them.

        With masks also "mask_map" and so on, with key points "keypoint_map" and so on. They are NaN if no image has an
        object.

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
        precisions = {name: float(values[key]) if has_any else math.nan for name, key in keys.items()}
        return precisions | _beside_boxes(facts)


def _beside_boxes(facts: Facts) -> dict[str, float]:
    """Return the precisions of masks and key points, where facts have them."""
    scores, labels = ([np.asarray(one[key]) for one in facts["found"]] for key in ("scores", "labels"))
    return {
        f"{beginning}_{name}": value
        for key, beginning in _BESIDE_BOXES.items()
        if key in facts
        for name, value in average_precisions(list(facts[key]), scores, labels, list(facts[f"{key} there"])).items()
    }


def _boxes_of(target: Mapping[str, Any]) -> dict[str, Any]:
    """Return the boxes of a target, without its masks and key points."""
    return {"boxes": target["boxes"], "labels": target["labels"]}


def _has(target: Mapping[str, Any], key: str) -> bool:
    return key in target or (key == "masks" and "polygons" in target)


def _masks_of(target: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Return the (G, H, W) bool masks of a target."""
    if "masks" in target:
        masks: np.ndarray = np.asarray(target["masks"]) != 0
        return masks
    return fill_polygons([[np.asarray(part) for part in parts] for parts in target["polygons"]], size)


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
