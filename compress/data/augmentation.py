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
            targets: For each image `boxes` (M, 4) [x0, y0, x1, y1] and `labels` (M,).
        """
        moved = [self._boxes(target, place) for place, target in enumerate(targets)]
        return moved if self.transforms is None else self.transforms.of_boxes(moved)

    def _boxes(self, target: dict[str, Any], place: int) -> dict[str, Any]:
        height, width = self.size
        boxes = target["boxes"].clone()
        if self.top is not None and self.left is not None:
            shift = [self.padding - int(self.left[place]), self.padding - int(self.top[place])]
            boxes = boxes + boxes.new_tensor(shift + shift)
        if self.mirrored is not None and bool(self.mirrored[place]):
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        boxes = boxes.clamp(min=boxes.new_zeros(4), max=boxes.new_tensor([width, height, width, height]))
        seen = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return {**target, "boxes": boxes[seen], "labels": target["labels"][seen]}

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
