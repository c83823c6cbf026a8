"""Random augmentation of a training batch: the same crop and mirroring for images, masks and boxes."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.data.transforms import DrawnTransforms


@dataclass(frozen=True)
class Variation:
    """Random augmentation drawn for one batch.

    Attributes:
        padding: Pixels of padding on each side before the crop; 0 without crop.
        top: (N, 1) first row of each crop in the padded image; None without crop.
        left: (N, 1) first column of each crop; None without crop.
        mirrored: (N,) whether each image is mirrored left to right; None without mirroring.
        size: (height, width) of the images.
        transforms: Transforms of each image after crop and mirroring, or None.
    """

    padding: int
    top: Tensor | None
    left: Tensor | None
    mirrored: Tensor | None
    size: tuple[int, int] = (0, 0)
    transforms: DrawnTransforms | None = None

    def of_images(self, images: Tensor) -> Tensor:
        """Return augmented (N, H, W, C) images of the same shape, padded with zeros."""
        moved = self._varied(images, 0)
        return moved if self.transforms is None else self.transforms.of_images(moved)

    def of_maps(self, maps: Tensor, fill: int) -> Tensor:
        """Return (N, H, W) label maps with the crop, mirroring and transforms of the images, padded with `fill`."""
        moved = self._varied(maps[..., None], fill)[..., 0]
        return moved if self.transforms is None else self.transforms.of_maps(moved)

    def of_boxes(self, targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return boxes with the crop, mirroring and transforms of the images; boxes outside of the image are dropped.

        Args:
            targets: For each image `boxes` (M, 4) [x0, y0, x1, y1], `labels` (M,), and any `polygons` or `keypoints`.
                Mirrored key points keep their order: left is not exchanged with right.
        """
        moved = [self._boxes(target, place) for place, target in enumerate(targets)]
        return moved if self.transforms is None else self.transforms.of_boxes(moved)

    def _boxes(self, target: dict[str, Any], place: int) -> dict[str, Any]:
        height, width = self.size
        corners = self._points(target["boxes"].reshape(-1, 2, 2), place)
        boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
        boxes = boxes.clamp(min=boxes.new_zeros(4), max=boxes.new_tensor([width, height, width, height]))
        seen = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        result = {**target, "boxes": boxes[seen], "labels": target["labels"][seen]}
        if "polygons" in target:
            kept = [parts for parts, is_seen in zip(target["polygons"], seen.tolist(), strict=True) if is_seen]
            result["polygons"] = [[self._points(one, place) for one in parts] for parts in kept]
        if "keypoints" in target:
            points = target["keypoints"][seen]
            places = self._points(points[..., :2], place)
            is_inside = ((places >= 0) & (places <= places.new_tensor([width, height]))).all(-1, keepdim=True)
            result["keypoints"] = torch.cat([places, points[..., 2:] * is_inside], -1)
        return result

    def _points(self, points: Tensor, place: int) -> Tensor:
        """Return (..., 2) points x, y of an image with its crop and mirroring."""
        if self.top is not None and self.left is not None:
            shift = [self.padding - int(self.left[place]), self.padding - int(self.top[place])]
            points = points + points.new_tensor(shift)
        if self.mirrored is not None and bool(self.mirrored[place]):
            points = torch.stack([self.size[1] - points[..., 0], points[..., 1]], -1)
        return points

    def _varied(self, values: Tensor, fill: int) -> Tensor:
        if self.top is None and self.mirrored is None:
            return values
        count, height, width, _ = values.shape
        device = values.device
        if self.top is not None and self.left is not None:
            pad = self.padding
            padded = F.pad(values, (0, 0, pad, pad, pad, pad), value=fill)
            rows = (self.top + torch.arange(height))[:, :, None].to(device, non_blocking=True)
            columns = (self.left + torch.arange(width))[:, None, :].to(device, non_blocking=True)
            values = padded[torch.arange(count, device=device)[:, None, None], rows, columns]
        if self.mirrored is not None:
            mirrored = self.mirrored.to(device, non_blocking=True)
            values = torch.where(mirrored[:, None, None, None], values.flip(2), values)
        return values


def drawn(
    crop_padding: int,
    flip: bool,
    generator: torch.Generator,
    size: tuple[int, int],
    whole: int,
    part: slice = slice(None),
) -> Variation:
    """Draw the crop and mirroring of a batch.

    Args:
        crop_padding: As in `Augmentation`.
        flip: As in `Augmentation`.
        generator: Random generator on the CPU; draws for the complete batch.
        size: (height, width) of the images.
        whole: Number of images in the complete batch.
        part: Images of the batch that this process augments.
    """
    top = left = mirrored = None
    if crop_padding:
        top, left = (
            torch.randint(0, 2 * crop_padding + 1, (whole, 1), generator=generator)[part] for _ in ("top", "left")
        )
    if flip:
        mirrored = torch.rand(whole, generator=generator)[part] < 0.5
    return Variation(crop_padding, top, left, mirrored, size)
