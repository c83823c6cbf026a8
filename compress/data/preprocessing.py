"""What happens to an image before the network sees it, as data that travels with the model.

uint8 (H, W, C) --resize shorter side--> --centre crop--> --scale, mean, std--> float32 (C, H, W)

The geometric half is done where images are read, so that batches have one shape; the arithmetic half is done on
whole batches, in torch while training and in numpy where there is no torch.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How to turn uint8 images into the network's input.

    Attributes:
        mean: Per channel, subtracted after scaling.
        std: Per channel, divided by after subtracting.
        scale: Multiplies the uint8 value first; 1/255 by default.
        resize: Shorter side in pixels before the crop; None leaves the size alone.
        crop: (height, width) in pixels of the centre crop; None takes the whole image.
        layout: "NCHW" or "NHWC", the axis order of the network's input.
        channels: "RGB", "BGR" or "L", the channel order of the network's input.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    resize: int | None = None
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
        if self.resize is not None and min(image.shape[:2]) != self.resize:
            image = _resize_shorter_side(image, self.resize)
        if self.crop is not None and image.shape[:2] != self.crop:
            image = _centre_crop(image, self.crop)
        return image

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Apply the arithmetic half.

        Args:
            images: (N, H, W, C) uint8, RGB or grey.

        Returns:
            float32 in the network's layout, (N, C, H, W) or (N, H, W, C), contiguous.
        """
        if self.channels == "BGR":
            images = images[..., ::-1]
        x = images.astype(np.float32) * np.float32(self.scale)
        x -= np.asarray(self.mean, np.float32)
        x /= np.asarray(self.std, np.float32)
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2) if self.layout == "NCHW" else x)


def _resize_shorter_side(image: np.ndarray, shorter: int) -> np.ndarray:
    """Resize as torchvision does, so that published networks see the pixels they were trained on."""
    height, width = image.shape[:2]
    size = (int(shorter * width / min(height, width)), int(shorter * height / min(height, width)))
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    return resized[..., None] if resized.ndim == 2 else resized


def _centre_crop(image: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
    """Cut the middle out as torchvision does; an image smaller than the crop is padded with zeros first."""
    missing = [max(0, want - have) for want, have in zip(crop, image.shape[:2], strict=True)]
    if any(missing):
        pads = [(m // 2, m - m // 2) for m in missing]
        image = np.pad(image, [*pads, (0, 0)])
    top, left = (round((have - want) / 2) for want, have in zip(crop, image.shape[:2], strict=True))
    return image[top : top + crop[0], left : left + crop[1]]
