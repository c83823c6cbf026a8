"""Geometry equals torchvision's, arithmetic is the same in torch and numpy, and values survive JSON."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import functional as reference

from compress.config.schema.data import PreprocessingConfig
from compress.data.batches import evaluation_batches
from compress.data.preprocessing import Preprocessing
from compress.data.sources.boxes import moved
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split

SIDES = st.integers(1, 40)


def _image(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * 41 + width).integers(0, 256, (height, width, channels), np.uint8)


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, st.integers(1, 40))
def test_resize_equals_torchvision(height: int, width: int, shorter: int) -> None:
    image = _image(height, width)
    expected = reference.resize(Image.fromarray(image), [shorter])
    assert np.array_equal(Preprocessing(resize=shorter).fit_image(image), np.asarray(expected))


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, SIDES, SIDES)
def test_centre_crop_equals_torchvision(height: int, width: int, crop_height: int, crop_width: int) -> None:
    image = _image(height, width)
    expected = reference.center_crop(Image.fromarray(image), [crop_height, crop_width])
    fitted = Preprocessing(crop=(crop_height, crop_width)).fit_image(image)
    assert np.array_equal(fitted, np.asarray(expected))


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, SIDES, SIDES)
def test_resize_to_both_sides_stretches_images_boxes_and_masks_alike(
    height: int, width: int, new_height: int, new_width: int
) -> None:
    wanted = Preprocessing(resize=(new_height, new_width))
    image = _image(height, width)
    expected = reference.resize(Image.fromarray(image), [new_height, new_width])
    assert np.array_equal(wanted.fit_image(image), np.asarray(expected))
    assert wanted.fit_mask(image[..., 0], 255).shape == (new_height, new_width)
    scale, shift, size = wanted.geometry(height, width)
    box = {"boxes": np.array([[0, 0, width, height]], np.float32), "labels": np.zeros(1, np.int64)}
    (found,) = moved(box, scale, shift, size)["boxes"]
    assert found == pytest.approx([0, 0, new_width, new_height])


def test_resize_comes_before_crop_and_grey_keeps_its_axis() -> None:
    grey = _image(20, 30, 1)
    fitted = Preprocessing(resize=10, crop=(8, 8), channels="L").fit_image(grey)
    resized = Image.fromarray(grey[..., 0]).resize((15, 10), Image.Resampling.BILINEAR)
    assert np.array_equal(fitted[..., 0], np.asarray(reference.center_crop(resized, [8, 8])))
    assert fitted.shape == (8, 8, 1)


def test_nothing_asked_leaves_the_image_alone() -> None:
    image = _image(5, 9)
    assert Preprocessing().fit_image(image) is image


def test_normalize_is_scale_then_mean_then_std() -> None:
    images = np.stack([_image(4, 6), _image(4, 6)[::-1]])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    got = Preprocessing(mean=mean, std=std).normalize(images)
    scaled = torch.from_numpy(images.copy()).permute(0, 3, 1, 2) / 255
    expected = reference.normalize(scaled, list(mean), list(std))
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    assert np.abs(got - expected.numpy()).max() < 1e-5


def test_channel_order_and_layout() -> None:
    images = _image(4, 6)[None]
    plain = Preprocessing(scale=1.0).normalize(images)
    assert np.array_equal(Preprocessing(scale=1.0, channels="BGR").normalize(images), plain[:, ::-1])
    assert np.array_equal(Preprocessing(scale=1.0, layout="NHWC").normalize(images), plain.transpose(0, 2, 3, 1))
    assert np.array_equal(plain[0, 1], images[0, :, :, 1].astype(np.float32))


@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_torch_batches_equal_numpy_bit_for_bit(channels: str, layout: str) -> None:
    count = 1 if channels == "L" else 3
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 6, count), np.uint8)
    wanted = Preprocessing((0.48, 0.45, 0.4)[:count], (0.23, 0.22, 0.21)[:count], layout=layout, channels=channels)
    split = Split("evaluation", ArraySource(images, np.zeros(10, np.int64)), np.arange(10), wanted)
    batches = [batch.numpy() for batch, _ in evaluation_batches(split, 4)]
    assert np.array_equal(np.concatenate(batches), wanted.normalize(images))


def test_values_survive_json_and_come_from_a_config() -> None:
    config = PreprocessingConfig(mean=(0.1, 0.2, 0.3), resize=12, crop=(10, 11), layout="NHWC", channels="BGR")
    wanted = Preprocessing(**config.model_dump())
    assert wanted.crop == (10, 11)
    assert Preprocessing.from_dict(json.loads(json.dumps(wanted.to_dict()))) == wanted
    both = Preprocessing(**PreprocessingConfig(resize=(12, 14)).model_dump())
    assert Preprocessing.from_dict(json.loads(json.dumps(both.to_dict()))) == both


@pytest.mark.parametrize("value", [0, True, 1.5, "12", [12], [12, 0], [12, 14, 16], {}])
def test_resize_that_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(ValidationError, match=r"must be a whole number of at least 1, or \[height, width\]"):
        PreprocessingConfig.model_validate({"resize": value})
