"""Single-stage detectors of torchvision as networks from images to tensors, and conversion of the tensors to boxes.

    torchvision    list of images ──resize, normalise──> backbone ──> head ──> anchors, decode, NMS ──> list of boxes
    here           (N, 3, H, W) prepared ──────────────> backbone ──> head ──> {cls_logits, bbox_regression, ...}
                   `Postprocess`: those tensors, (H, W) ──anchors, decode, score threshold, NMS──> list of boxes
                   `Loss`: those tensors, list of boxes ──anchors, matching, losses──> scalar

The detector keeps its modules and their names, so that published weights fit; only its `forward` is replaced. The steps
after the head have no weights: torchvision's own code runs on the tensors, whichever runtime computed them.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError

DETECTORS = (
    "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
_TWO_STAGES = ("fasterrcnn_", "keypointrcnn_", "maskrcnn_")


class _RawForward(nn.Module):
    """Mixin before the class of a detector, whose `forward` returns the tensors of the head."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the head for (N, 3, H, W) images that are already normalised and resized."""
        detector: Any = self
        features = detector.backbone(images)
        maps = [features] if isinstance(features, Tensor) else list(features.values())
        outputs: dict[str, Tensor] = detector.head(maps)
        return outputs


def why_not(name: str) -> str | None:
    """Return the reason why the torchvision network of this name cannot be used; None if it can."""
    if name.startswith(_TWO_STAGES):
        return (
            "a detector of two stages crops as many regions out of its feature maps as its first stage proposes, which "
            "differs from image to image, so that it is no fixed graph of tensors."
        )
    return None


def raw_detector(detector: nn.Module) -> nn.Module:
    """Return a detector that maps (N, 3, H, W) images to the outputs of its head by name.

    Args:
        detector: SSD, SSDlite, RetinaNet or FCOS of torchvision; the result shares its modules.
    """
    base = type(detector)
    kind = type(base.__name__, (_RawForward, base), {"__module__": base.__module__})
    raw: nn.Module = object.__new__(kind)
    raw.__dict__.update(detector.__dict__)
    return raw


class Postprocess:
    """Conversion of the tensors of a raw detector to boxes.

    Args:
        detector: Detector of torchvision, raw or not; only its anchors, thresholds and box coder are used.
    """

    def __init__(self, detector: nn.Module) -> None:
        self._detector: Any = _weightless(detector, "Postprocess")
        self._generator: Any = copy.deepcopy(detector.anchor_generator)
        self._sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def __call__(self, outputs: Mapping[str, Tensor], image_size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """Return the detected boxes of each image.

        Args:
            outputs: Name -> (N, anchors, ...) tensor, as the raw detector returns them.
            image_size: (H, W) in pixels of the input images.

        Returns:
            For each image {"boxes": (M, 4) x1, y1, x2, y2 in pixels, "scores": (M,), "labels": (M,) int64}.
        """
        tensors = {name: value.detach().float().cpu() for name, value in outputs.items()}
        count = len(next(iter(tensors.values())))
        maps = self._map_sizes(image_size)
        anchors = self._anchors(count, image_size, maps)
        shapes = [image_size] * count
        if type(self._detector).__name__ == "SSD":
            found = self._detector.postprocess_detections(tensors, anchors, shapes)
        else:
            per_level = self._per_level(tensors, maps)
            levels = [values.shape[1] for values in per_level["cls_logits"]]
            split = [list(torch.split(one, levels)) for one in anchors]
            found = self._detector.postprocess_detections(per_level, split, shapes)
        return [{key: one[key] for key in ("boxes", "scores", "labels")} for one in found]

    def _map_sizes(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (height, width) of each feature map for images of a size."""
        if image_size not in self._sizes:
            self._sizes[image_size] = _map_sizes(self._detector, image_size)
        return self._sizes[image_size]

    def _anchors(self, count: int, image_size: tuple[int, int], maps: list[tuple[int, int]]) -> list[Tensor]:
        from torchvision.models.detection.image_list import ImageList

        images = ImageList(torch.empty(count, 3, *image_size), [image_size] * count)
        anchors: list[Tensor] = self._generator(images, [torch.empty(1, 1, *size) for size in maps])
        return anchors

    @staticmethod
    def _per_level(tensors: Mapping[str, Tensor], maps: list[tuple[int, int]]) -> dict[str, list[Tensor]]:
        """Split tensors by feature map; all positions of a map have the same number of anchors."""
        places = [height * width for height, width in maps]
        each = next(iter(tensors.values())).shape[1] // sum(places)
        return {
            name: list(torch.split(value, [each * one for one in places], dim=1)) for name, value in tensors.items()
        }


class Loss:
    """Training loss of a torchvision detector, computed from the tensors of its raw form.

    Args:
        detector: Detector of torchvision, raw or not; only its anchors, matching and losses are used.
        image_size: (H, W) in pixels of the input images.
    """

    def __init__(self, detector: nn.Module, image_size: tuple[int, int]) -> None:
        own: Any = _weightless(detector, "Loss")
        sizes = _map_sizes(own, image_size)
        own.anchor_generator = copy.deepcopy(detector.anchor_generator)
        own.transform = _Unchanged()
        own.backbone = _Maps(sizes)
        own.head.forward = lambda features: self._outputs  # the heads of RetinaNet and FCOS compute losses
        own.training = True  # only of the detector itself, which then returns its losses
        self._detector, self._size = own, image_size
        self._outputs: dict[str, Tensor] = {}

    def __call__(self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the sum of the detector's losses for a batch, a scalar.

        Args:
            outputs: Name -> (N, anchors, ...) tensor, as the raw detector returns them.
            targets: For each image {"boxes": (M, 4) x1, y1, x2, y2 in pixels, "labels": (M,) int64}; SSD and
                SSDlite count objects from 1, 0 is their background.
        """
        self._outputs = dict(outputs)
        device = next(iter(outputs.values())).device
        images = torch.empty(len(targets), 3, *self._size, device=device)
        run = super(_RawForward, self._detector).forward if isinstance(self._detector, _RawForward) else self._detector
        losses: dict[str, Tensor] = run(images, [dict(one) for one in targets])
        self._outputs = {}
        return torch.stack(list(losses.values())).sum()


class _Unchanged(nn.Module):
    """Stand-in for torchvision's resizing and normalisation; images here are already prepared."""

    def forward(self, images: Tensor, targets: Any) -> tuple[Any, Any]:
        from torchvision.models.detection.image_list import ImageList

        return ImageList(images, [(int(images.shape[-2]), int(images.shape[-1]))] * len(images)), targets


class _Maps(nn.Module):
    """Stand-in for a backbone that returns feature maps without channels: anchors depend only on their sizes."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {str(place): images.new_empty(len(images), 0, *size) for place, size in enumerate(self.sizes)}


def _weightless(detector: nn.Module, what: str) -> nn.Module:
    """Return a copy without weight values, which suffices to compute the sizes of feature maps."""
    if not hasattr(detector, "anchor_generator") or not hasattr(detector, "postprocess_detections"):
        raise ModelError(
            f"{what} takes a single-stage detector of torchvision, got {type(detector).__name__}.",
            hint=f"Use {', '.join(DETECTORS)}.",
        )
    return copy.deepcopy(detector).to("meta").eval()


def _map_sizes(weightless: Any, image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (height, width) of each feature map for images of a size."""
    features = weightless.backbone(torch.empty(1, 3, *image_size, device="meta"))
    maps = [features] if isinstance(features, Tensor) else list(features.values())
    return [(int(one.shape[-2]), int(one.shape[-1])) for one in maps]
