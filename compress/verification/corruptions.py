"""Common image corruptions (NumPy, SciPy, Pillow), and noise on the network's input.

The module needs no torch, so that a file is judged alike with and without it. Severities from 1 to 5 follow Hendrycks
and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", arXiv:1903.12261:
their values for CIFAR on small images, their values for ImageNet on larger ones. Elastic distortion and fog are simpler
than in the paper.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

SEVERITIES = (1, 2, 3, 4, 5)
_SMALL = 96  # pixels of the shorter side below which an image is small

Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def corrupt(name: str, images: np.ndarray, severity: int, seed: tuple[int, ...]) -> np.ndarray:
    """Return corrupted images.

    Args:
        name: Name in `catalog.CORRUPTIONS`.
        images: (N, H, W, C) uint8; not changed in place.
        severity: 1 to 5.
        seed: Seed of all random numbers; every severity draws the same ones.

    Returns:
        (N, H, W, C) uint8.
    """
    corrupted: np.ndarray = _BY_NAME[name](images, severity, np.random.default_rng([*seed, *name.encode()]))
    return corrupted


def add_noise(inputs: np.ndarray, kind: str, level: float, seed: tuple[int, ...]) -> np.ndarray:
    """Return network inputs with noise.

    Args:
        inputs: float32, after normalisation.
        kind: "uniform": between -level and level; "gaussian": with standard deviation `level`.
        level: Strength of the noise, in units of the network's input.
        seed: Seed of the noise.
    """
    random = np.random.default_rng([*seed, *kind.encode()])
    if kind == "uniform":
        noise = random.random(inputs.shape, np.float32) * 2 - 1
    else:
        noise = random.standard_normal(inputs.shape, np.float32)
    noisy: np.ndarray = inputs + noise * np.float32(level)
    return noisy


def _gaussian_noise(images: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    level = _by_size(images, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38))[severity - 1]
    return _as_uint8(_as_float(images) + level * random.standard_normal(images.shape, np.float32))


def _impulse_noise(images: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Set single values to black or white."""
    share = _by_size(images, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27))[severity - 1]
    drawn = random.random(images.shape, np.float32)
    return np.where(drawn < share / 2, np.uint8(0), np.where(drawn > 1 - share / 2, np.uint8(255), images))


def _gaussian_blur(images: np.ndarray, severity: int, _random: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter  # scipy takes a second to import

    width = _by_size(images, (0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0))[severity - 1]
    return _as_uint8(gaussian_filter(_as_float(images), (0, width, width, 0), mode="nearest"))


def _brightness(images: np.ndarray, severity: int, _random: np.random.Generator) -> np.ndarray:
    more = _by_size(images, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5))[severity - 1]
    return _as_uint8(_as_float(images) + more)


def _contrast(images: np.ndarray, severity: int, _random: np.random.Generator) -> np.ndarray:
    share = _by_size(images, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))[severity - 1]
    values = _as_float(images)
    mean = values.mean((1, 2), keepdims=True)
    return _as_uint8((values - mean) * share + mean)


def _jpeg(images: np.ndarray, severity: int, _random: np.random.Generator) -> np.ndarray:
    quality = int(_by_size(images, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7))[severity - 1])

    def compressed(picture: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return _by_picture(images, compressed)


def _pixelate(images: np.ndarray, severity: int, _random: np.random.Generator) -> np.ndarray:
    share = _by_size(images, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25))[severity - 1]

    def coarse(picture: Image.Image) -> Image.Image:
        size = max(1, round(picture.width * share)), max(1, round(picture.height * share))
        return picture.resize(size, Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)

    return _by_picture(images, coarse)


def _elastic(images: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Shift each pixel by a smooth random field: up to about 1 % to 5 % of the side, with waves of an eighth of it."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    count, height, width, channels = images.shape
    side = min(height, width)
    fields = gaussian_filter(random.standard_normal((2, count, height, width)), (0, 0, side / 8, side / 8))
    fields *= 0.01 * severity * side / np.abs(fields).max((2, 3), keepdims=True)
    rows, columns = np.mgrid[:height, :width]
    corrupted = np.empty_like(images)
    for number in range(count):
        places = [rows + fields[0, number], columns + fields[1, number]]
        for channel in range(channels):
            corrupted[number, ..., channel] = map_coordinates(
                images[number, ..., channel], places, order=1, mode="reflect"
            )
    return corrupted


def _fog(images: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Blend in a light haze of uneven density: noise of several wavelengths."""
    from scipy.ndimage import zoom

    share = (0.2, 0.3, 0.4, 0.5, 0.6)[severity - 1]
    count, height, width, _ = images.shape
    haze = np.zeros((count, height, width), np.float32)
    for cells in (2, 4, 8):
        noise = random.random((count, cells, cells), np.float32)
        smooth = zoom(noise, (1, height / cells, width / cells), order=1, grid_mode=True, mode="nearest")
        haze += smooth[:, :height, :width] / cells
    low, high = haze.min((1, 2), keepdims=True), haze.max((1, 2), keepdims=True)
    haze = 0.7 + 0.3 * (haze - low) / np.maximum(high - low, 1e-6)
    return _as_uint8(_as_float(images) * (1 - share) + share * haze[..., None])


_FUNCTIONS: tuple[Corruption, ...] = (
    _gaussian_noise,
    _impulse_noise,
    _gaussian_blur,
    _brightness,
    _contrast,
    _jpeg,
    _pixelate,
    _elastic,
    _fog,
)
_BY_NAME = {function.__name__[1:]: function for function in _FUNCTIONS}


def _by_size(images: np.ndarray, small: tuple[float, ...], large: tuple[float, ...]) -> tuple[float, ...]:
    return small if min(images.shape[1:3]) < _SMALL else large


def _as_float(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 255


def _as_uint8(values: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    return rounded


def _by_picture(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Apply a Pillow operation to each of (N, H, W, C) images."""
    is_grey = images.shape[-1] == 1
    corrupted = [np.asarray(change(Image.fromarray(image[..., 0] if is_grey else image))) for image in images]
    together: np.ndarray = np.stack(corrupted)
    return together[..., None] if is_grey else together
