"""Image files as uint8 arrays; `pixels.py` has the conversion of each mode of Pillow.

EXIF orientation is not applied, as in torchvision; of several frames the first is read. For users: docs/images.md.
"""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from compress.data.pixels import UnknownLevels, convert_picture
from compress.errors import DataError, translated


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
    try:
        return convert_picture(picture, grey)
    except UnknownLevels as error:
        raise _refusal(picture, what) from error


def _refusal(picture: Image.Image, what: str) -> DataError:
    name = getattr(picture, "filename", "") or what or "an image"
    return DataError(
        f"'{name}' must be an image of 8 bits a channel or of 16-bit grey, it has the mode {picture.mode}, in which "
        "black and white are not known.",
        hint="Convert it to 8 bits, with the scale that the network was trained on; a data set of your own may give "
        "floating-point arrays.",
    )
