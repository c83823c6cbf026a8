"""Conversion of decoded pictures to uint8 arrays: a documented conversion for each mode of Pillow, or an error.

    1, L, P, RGB, YCbCr, HSV, CMYK    as Pillow converts them, without colour profiles
    LA, PA, RGBA ...                  the same, alpha is dropped
    I;16 (16-bit grey)                divided by 257: 65535 is white
    I, F, LAB                         refused: their white level is not known

This file needs NumPy and Pillow only: bundles carry a copy of it.
"""

import numpy as np
from PIL import Image

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_PLAIN = ("1", "L", "P", "RGB", "YCbCr", "HSV", "CMYK", "RGBX")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_SCALED_TO_16_BITS = ("PNG", "PPM")  # some versions of Pillow return their 16-bit values in mode I
_BITS_PER_SAMPLE = 258  # tag of TIFF
_WHITE = 2**16 - 1


class UnknownLevels(ValueError):
    """Black and white of a picture's mode are not known."""


def convert_picture(picture: Image.Image, grey: bool) -> np.ndarray:
    """Return a picture of any mode as uint8 (H, W, 3), or (H, W, 1) if `grey`.

    Args:
        picture: Decoded picture.
        grey: Whether one channel is returned.

    Raises:
        UnknownLevels: The black and white levels of its mode are not known.
    """
    if picture.mode in SIXTEEN_BITS or (picture.mode == "I" and picture.format in _SCALED_TO_16_BITS):
        pixels = _from_16_bits(picture)
        return pixels if grey else np.repeat(pixels, 3, axis=-1)
    if picture.mode not in (*_PLAIN, *_WITH_ALPHA):
        raise UnknownLevels(picture.mode)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # or Pillow warns about the transparency, which is dropped
    if picture.mode in ("La", "RGBa"):  # premultiplied
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    found = np.asarray(picture.convert("L" if grey else "RGB"))
    return found[..., None] if grey else found


def _from_16_bits(picture: Image.Image) -> np.ndarray:
    bits = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
    values = np.asarray(picture).astype(np.int64)
    if tuple(bits) != (16,) or values.min(initial=0) < 0 or values.max(initial=0) > _WHITE:
        raise UnknownLevels(picture.mode)
    scaled: np.ndarray = ((values + 128) // 257).astype(np.uint8)
    return scaled[..., None]
