"""Conversion of image files to uint8 arrays: a documented conversion for each mode of Pillow, or an error.

    1, L, P, RGB, YCbCr, HSV, CMYK    as Pillow converts them, without colour profiles
    LA, PA, RGBA ...                  the same, alpha is dropped
    I;16 (16-bit grey)                divided by 257: 65535 is white
    I, F, LAB                         refused: their white level is not known

EXIF orientation is not applied, as in torchvision; of several frames the first is read. For users: docs/images.md.
"""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from compress.errors import DataError, translated

_PLAIN = ("1", "L", "P", "RGB", "YCbCr", "HSV", "CMYK", "RGBX")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_SCALED_TO_16_BITS = ("PNG", "PPM")  # some versions of Pillow return their 16-bit values in mode I
_BITS_PER_SAMPLE = 258  # tag of TIFF
_WHITE = 2**16 - 1


def open_picture(path: Path) -> Image.Image:
    """Return a decoded picture.

    Raises:
        DataError: The file is no picture, damaged, cut short, or larger than Pillow's limit (179 million pixels).
    """

    def unreadable(error: Exception) -> DataError:
        return DataError(f"'{path}' must be a readable image: {(str(error).strip() or type(error).__name__)[:200]}")

    with translated(unreadable), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, and of more than half of the limit of pixels
        with Image.open(path) as picture:
            picture.load()
            return picture


def to_pixels(picture: Image.Image, grey: bool, what: str = "") -> np.ndarray:
    """Return a picture of any mode as uint8 (H, W, 3), or (H, W, 1) if `grey`.

    Args:
        picture: Decoded picture.
        grey: Whether one channel is returned.
        what: Name in messages of a picture without a file.

    Raises:
        DataError: The black and white levels of its mode are not known.
    """
    if picture.mode in SIXTEEN_BITS or (picture.mode == "I" and picture.format in _SCALED_TO_16_BITS):
        pixels = _from_16_bits(picture, what)
        return pixels if grey else np.repeat(pixels, 3, axis=-1)
    if picture.mode not in (*_PLAIN, *_WITH_ALPHA):
        raise _refusal(picture, what)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # or Pillow warns about the transparency, which is dropped
    if picture.mode in ("La", "RGBa"):  # premultiplied
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    found = np.asarray(picture.convert("L" if grey else "RGB"))
    return found[..., None] if grey else found


def _from_16_bits(picture: Image.Image, what: str) -> np.ndarray:
    bits = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
    values = np.asarray(picture).astype(np.int64)
    if tuple(bits) != (16,) or values.min(initial=0) < 0 or values.max(initial=0) > _WHITE:
        raise _refusal(picture, what)
    scaled: np.ndarray = ((values + 128) // 257).astype(np.uint8)
    return scaled[..., None]


def _refusal(picture: Image.Image, what: str) -> DataError:
    name = getattr(picture, "filename", "") or what or "an image"
    return DataError(
        f"'{name}' must be an image of 8 bits a channel or of 16-bit grey, it has the mode {picture.mode}, in which "
        "black and white are not known.",
        hint="Convert it to 8 bits, with the scale that the network was trained on; a data set of your own may give "
        "floating-point arrays.",
    )
