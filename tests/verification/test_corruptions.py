"""Each corruption spoils images, more with each severity, the same way for the same seed, and in any size."""

import numpy as np
import pytest
from PIL import Image

from compress.catalog import CORRUPTIONS
from compress.verification import corruptions
from compress.verification.corruptions import SEVERITIES, add_noise, corrupt


def pictures(side, channels=3, count=4):
    """Smooth shapes on a gradient, as pictures have them."""
    rows, columns = np.mgrid[:side, :side] / side
    shapes = [
        127 + 90 * np.sin(6 * rows + number) * np.cos(5 * columns) + 30 * ((rows - 0.5) ** 2 < 0.02 * (number + 1))
        for number in range(count)
    ]
    images = np.stack([np.stack([shape * (0.8 + 0.1 * c) for c in range(channels)], -1) for shape in shapes])
    return np.clip(images, 0, 255).astype(np.uint8)


def apart(a, b):
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def test_there_are_those_that_users_expect():
    wanted = {"gaussian_noise", "gaussian_blur", "brightness", "contrast", "jpeg", "pixelate", "elastic", "fog"}
    assert wanted <= set(CORRUPTIONS)
    assert tuple(corruptions._BY_NAME) == CORRUPTIONS
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("side", [28, 32, 112])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_spoils_more_with_each_severity(name, channels, side):
    images = pictures(side, channels)
    before = images.copy()
    distances = []
    for severity in SEVERITIES:
        corrupted = corrupt(name, images, severity, (0,))
        assert (corrupted.shape, corrupted.dtype) == (images.shape, np.uint8)
        distances.append(apart(corrupted, images))
    assert np.array_equal(images, before)
    assert distances[0] > 0
    assert distances[-1] > 1.3 * distances[0]
    assert distances == sorted(distances) or name in ("jpeg", "pixelate")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_decides(name):
    images = pictures(32)
    once, again, other = (corrupt(name, images, 3, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert np.array_equal(once, again)
    is_random = name in ("gaussian_noise", "impulse_noise", "elastic", "fog")
    assert np.array_equal(once, other) != is_random


def test_some_corruptions_by_hand():
    grey = np.full((1, 8, 8, 1), 100, np.uint8)
    assert corrupt("brightness", grey, 3, (0,)).flat[0] == round(100 + 0.15 * 255)
    assert np.array_equal(corrupt("contrast", grey, 5, (0,)), grey)
    assert np.array_equal(corrupt("gaussian_blur", grey, 5, (0,)), grey)
    two = np.concatenate([grey[:, :4], grey[:, :4] + 100], axis=1)
    assert {int(value) for value in np.unique(corrupt("contrast", two, 2, (0,)))} == {125, 175}
    salt = corrupt("impulse_noise", np.full((1, 200, 200, 1), 9, np.uint8), 5, (0,))
    assert ((salt == 0) | (salt == 255)).mean() == pytest.approx(0.27, abs=0.02)
    noisy = corrupt("gaussian_noise", np.full((1, 64, 64, 1), 128, np.uint8), 5, (0,))
    assert noisy.std() == pytest.approx(0.1 * 255, rel=0.05)


def test_pictures_keep_their_colours_apart():
    red = np.zeros((1, 32, 32, 3), np.uint8)
    red[..., 0] = 200
    for name in ("jpeg", "pixelate"):
        corrupted = corrupt(name, red, 5, (0,))
        assert corrupted[..., 0].mean() == pytest.approx(200, abs=3)
        assert corrupted[..., 1:].mean() < 4
    assert Image.fromarray(red[0]).mode == "RGB"


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_noise_has_no_mean_and_the_level_asked_for(kind):
    inputs = np.ones((8, 3, 32, 32), np.float32)
    noisy = add_noise(inputs, kind, 0.3, (5,))
    assert noisy.dtype == np.float32
    assert float(noisy.mean()) == pytest.approx(1.0, abs=0.01)
    if kind == "uniform":
        assert float(np.abs(noisy - 1).max()) == pytest.approx(0.3, abs=0.01)
        assert float(np.abs(noisy - 1).max()) <= 0.3 + 1e-6
    else:
        assert float(noisy.std()) == pytest.approx(0.3, rel=0.02)
    assert np.array_equal(noisy, add_noise(inputs, kind, 0.3, (5,)))
    assert np.array_equal(add_noise(inputs, kind, 0.0, (5,)), inputs)
    twice = add_noise(inputs, kind, 0.6, (5,))
    assert np.allclose(twice - 1, 2 * (noisy - 1), atol=1e-6), "the same noise at each level"
