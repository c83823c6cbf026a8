"""Preprocessing of images, as data that travels with the model.

uint8 (H, W, C) --resize (shorter side, or both)--> --centre crop--> --scale, mean, std--> float32 (C, H, W)

The geometric half runs when images are read, so that batches have one shape. The arithmetic half runs on complete
batches, in torch during training and in numpy without torch.

This file needs NumPy and Pillow only: bundles carry a copy of it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

GREY = 114  # padding value of YOLO's networks


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Conversion of uint8 images into the network's input.

    Attributes:
        mean: Mean of each channel, subtracted after scaling.
        std: Standard deviation of each channel, divided by after the subtraction.
        scale: Factor of the uint8 values, applied first; 1/255 by default.
        resize: Shorter side in pixels before the crop, or (height, width), which may change the aspect ratio; None
            keeps the size.
        crop: (height, width) in pixels of the centre crop; None for no crop.
        layout: "NCHW" or "NHWC", the axis order of the network's input.
        channels: "RGB", "BGR" or "L", the channel order of the network's input.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    layout: str = "NCHW"
    channels: str = "RGB"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Rebuild from `to_dict` values; lists become tuples."""
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**plain)

    def fit_image(self, image: np.ndarray) -> np.ndarray:
        """Apply the geometric half to one uint8 (H, W, C) image."""
        size = self._resized(image.shape[0], image.shape[1])
        if image.shape[:2] != size:
            image = _resize(image, size)
        if self.crop is not None and image.shape[:2] != self.crop:
            image = _centre_crop(image, self.crop)
        return image

    def fit_mask(self, mask: np.ndarray, fill: int) -> np.ndarray:
        """Apply the geometric half to one (H, W) map of class indices; padding has the value `fill`."""
        size = self._resized(mask.shape[0], mask.shape[1])
        if mask.shape != size:
            rows, columns = ((np.arange(new) + 0.5) * old / new for new, old in zip(size, mask.shape, strict=True))
            mask = mask[rows.astype(np.int64)[:, None], columns.astype(np.int64)]
        if self.crop is not None and mask.shape != self.crop:
            mask = _centre_crop(mask, self.crop, fill)
        return mask

    def geometry(self, height: int, width: int) -> tuple[tuple[float, float], tuple[float, float], tuple[int, int]]:
        """Return scale, shift and output size of the geometric half for an input size.

        Returns:
            Scale factors of (rows, columns), their shifts in pixels after scaling, and the (height, width) of the
            result.
        """
        new = self._resized(height, width)
        scale = (new[0] / height, new[1] / width)
        if self.crop is None or new == self.crop:
            return scale, (0.0, 0.0), new
        shift = tuple(_offset(have, want) for have, want in zip(new, self.crop, strict=True))
        return scale, (shift[0], shift[1]), self.crop

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of an image after resizing, before the crop."""
        if isinstance(self.resize, tuple):
            return self.resize
        if self.resize is None or min(height, width) == self.resize:
            return height, width
        return _shorter_side(height, width, self.resize)

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Apply the arithmetic half.

        Args:
            images: (N, H, W, C) uint8, RGB or grey; (N, K) rows of several inputs are unchanged.

        Returns:
            float32 in the network's layout, (N, C, H, W) or (N, H, W, C), contiguous.
        """
        if images.ndim == 2:
            return images
        if self.channels == "BGR":
            images = images[..., ::-1]
        x = images.astype(np.float32) * np.float32(self.scale)
        x -= np.asarray(self.mean, np.float32)
        x /= np.asarray(self.std, np.float32)
        return x.transpose(0, 3, 1, 2).copy() if self.layout == "NCHW" else x


def _shorter_side(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Return the size of an image after resizing its shorter side, rounded as by torchvision."""
    return int(shorter * height / min(height, width)), int(shorter * width / min(height, width))


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize as torchvision does, so that the inputs of published networks are those of their training."""
    height, width = size
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    return resized[..., None] if resized.ndim == 2 else resized


def _offset(have: int, want: int) -> float:
    """Return the offset of an image in its centre crop: negative if it is cropped, positive if it is padded."""
    return (want - have) // 2 if have < want else -round((have - want) / 2)


def _centre_crop(image: np.ndarray, crop: tuple[int, int], fill: int = 0) -> np.ndarray:
    """Return the centre crop as torchvision computes it; an image smaller than the crop is padded first."""
    missing = [max(0, want - have) for want, have in zip(crop, image.shape[:2], strict=True)]
    if any(missing):
        pads = [(m // 2, m - m // 2) for m in missing] + [(0, 0)] * (image.ndim - 2)
        image = np.pad(image, pads, constant_values=fill)
    top, left = (round((have - want) / 2) for want, have in zip(crop, image.shape[:2], strict=True))
    return image[top : top + crop[0], left : left + crop[1]]


def fit_letterbox(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a uint8 (H, W, C) image scaled to fit into a size, centred, with grey padding."""
    scale, top, left = place_letterbox(image.shape[:2], size)
    height, width = (round(side * scale) for side in image.shape[:2])
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    whole = np.full((*size, image.shape[-1]), GREY, np.uint8)
    whole[top : top + height, left : left + width] = resized[..., None] if resized.ndim == 2 else resized
    return whole


def place_letterbox(image_size: tuple[int, ...], size: tuple[int, int]) -> tuple[float, int, int]:
    """Return the scale of an image, and the rows and columns of grey padding before it."""
    scale = min(want / have for want, have in zip(size, image_size, strict=True))
    top, left = ((want - round(have * scale)) // 2 for want, have in zip(size, image_size, strict=True))
    return scale, top, left
