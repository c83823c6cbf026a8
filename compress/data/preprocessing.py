"""Preprocessing of images, as data that travels with the model.

uint8 (H, W, C) --resize (shorter side, or both)--> --centre crop--> --scale, mean, std--> float32 (C, H, W)

The geometric half is done where images are read, so that batches have one shape; the arithmetic half is done on
whole batches, in torch while training and in numpy where there is no torch.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Conversion of uint8 images into the network's input.

    Attributes:
        mean: Per channel, subtracted after scaling.
        std: Per channel, divided by after subtracting.
        scale: Multiplies the uint8 value first; 1/255 by default.
        resize: Shorter side in pixels before the crop, or (height, width), whatever the shape of the image was; None
            leaves the size alone.
        crop: (height, width) in pixels of the centre crop; None takes the whole image.
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
        """Apply the geometric half to one (H, W) map of class indices; `fill` is put where an image would be padded."""
        size = self._resized(mask.shape[0], mask.shape[1])
        if mask.shape != size:
            rows, columns = ((np.arange(new) + 0.5) * old / new for new, old in zip(size, mask.shape, strict=True))
            mask = mask[rows.astype(np.int64)[:, None], columns.astype(np.int64)]
        if self.crop is not None and mask.shape != self.crop:
            mask = _centre_crop(mask, self.crop, fill)
        return mask

    def geometry(self, height: int, width: int) -> tuple[tuple[float, float], tuple[float, float], tuple[int, int]]:
        """Return what the geometric half does to an image of a size.

        Returns:
            By how much (rows, columns) are scaled, by how many pixels they are then shifted, and the (height, width)
            that comes out.
        """
        new = self._resized(height, width)
        scale = (new[0] / height, new[1] / width)
        if self.crop is None or new == self.crop:
            return scale, (0.0, 0.0), new
        shift = tuple(_offset(have, want) for have, want in zip(new, self.crop, strict=True))
        return scale, (shift[0], shift[1]), self.crop

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that an image has before it is cropped."""
        if isinstance(self.resize, tuple):
            return self.resize
        if self.resize is None or min(height, width) == self.resize:
            return height, width
        return _shorter_side(height, width, self.resize)

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Apply the arithmetic half.

        Args:
            images: (N, H, W, C) uint8, RGB or grey; (N, K) rows of several inputs stay as they are.

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
    """Return the size of an image whose shorter side gets a length, as torchvision rounds it."""
    return int(shorter * height / min(height, width)), int(shorter * width / min(height, width))


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize as torchvision does, so that published networks see the pixels they were trained on."""
    height, width = size
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    return resized[..., None] if resized.ndim == 2 else resized


def _offset(have: int, want: int) -> float:
    """Return where an image begins in its centre crop: below 0 where it is cut off, above where it is padded."""
    return (want - have) // 2 if have < want else -round((have - want) / 2)


def _centre_crop(image: np.ndarray, crop: tuple[int, int], fill: int = 0) -> np.ndarray:
    """Cut the middle out as torchvision does; an image smaller than the crop is padded first."""
    missing = [max(0, want - have) for want, have in zip(crop, image.shape[:2], strict=True)]
    if any(missing):
        pads = [(m // 2, m - m // 2) for m in missing] + [(0, 0)] * (image.ndim - 2)
        image = np.pad(image, pads, constant_values=fill)
    top, left = (round((have - want) / 2) for want, have in zip(crop, image.shape[:2], strict=True))
    return image[top : top + crop[0], left : left + crop[1]]
