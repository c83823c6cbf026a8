"""Which images of which classes are kept for the report."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.verification.metrics import Predictions
from compress.verification.summary import CLASSES, IMAGES, SIDE, to_png, worst_images


def split_of(labels: np.ndarray, side: int = 8, channels: int = 3) -> Split:
    """Images whose every pixel is their number."""
    count = len(labels)
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, side, side, channels))
    return Split("evaluation", ArraySource(images.copy(), labels, ()), np.arange(count), Preprocessing((0.5,), (0.5,)))


def test_images_that_are_prepared_already_are_no_pictures() -> None:
    labels = np.array([0, 1])
    before, after = predictions_of([0, 1], labels, 2), predictions_of([0, 0], labels, 2)
    split = split_of(labels)
    assert worst_images(before, after, split)
    prepared = replace(split, source=replace(split.source, images=split.source.images.astype(np.float32)))
    assert worst_images(before, after, prepared) == []


def predictions_of(chosen: list[int], labels: np.ndarray, classes: int, sure: list[float] | None = None) -> Predictions:
    outputs = np.zeros((len(chosen), classes), np.float32)
    outputs[np.arange(len(chosen)), chosen] = sure or 1.0
    return Predictions(outputs, labels)


def decode(image: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image)))


def test_images_are_those_that_the_baseline_alone_gets_right_of_the_classes_that_lost_most() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    before = predictions_of([0, 0, 1, 1, 1, 1, 2, 0], labels, 3)
    after = predictions_of([0, 2, 2, 0, 0, 1, 2, 2], labels, 3)  # 0 loses one of 3, 1 loses two of 3, 2 wins one
    split = split_of(labels)
    found = worst_images(before, after, split)
    assert [(one["class"], one["label"], one["predicted"], one["index"]) for one in found] == [
        (1, 1, 0, 3),
        (1, 1, 0, 4),
        (0, 0, 2, 1),
    ], "image 2 was wrong before, class 2 lost nothing"
    for one in found:
        picture = decode(one["image"])
        assert (picture.format, picture.size, picture.getpixel((0, 0))) == ("PNG", (8, 8), (one["index"],) * 3)


def test_without_a_baseline_they_are_simply_wrong_and_of_the_worst_classes() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    found = worst_images(None, predictions_of([0, 1, 0, 0, 2, 2], labels, 4), split_of(labels))
    assert [(one["class"], one["index"]) for one in found] == [(1, 2), (1, 3), (0, 1)]


def test_the_surest_mistakes_come_first() -> None:
    labels = np.zeros(4, np.int64)
    found = worst_images(None, predictions_of([1, 1, 2, 0], labels, 3, [1.0, 3.0, 2.0, 9.0]), split_of(labels))
    assert [one["index"] for one in found] == [1, 2, 0]


def test_there_are_no_more_than_a_report_can_hold() -> None:
    labels = np.arange(200) % 10
    found = worst_images(None, predictions_of(((labels + 1) % 10).tolist(), labels, 10), split_of(labels))
    assert len(found) == CLASSES * IMAGES == 32
    assert len({one["class"] for one in found}) == CLASSES
    assert [one["class"] for one in found] == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8, "of equal ones the first"


@pytest.mark.parametrize("with_baseline", [True, False])
def test_nothing_wrong_and_nothing_known_give_no_images(with_baseline: bool) -> None:
    labels = np.array([0, 1])
    right = predictions_of([0, 1], labels, 2)
    assert worst_images(right if with_baseline else None, right, split_of(labels)) == []
    assert worst_images(right if with_baseline else None, None, split_of(labels)) == []


def test_a_place_in_the_source_is_told_where_the_split_is_a_part_of_it() -> None:
    labels = np.array([0, 0, 0, 0])
    split = Split("evaluation", split_of(labels).source, np.array([3, 1]), Preprocessing((0.5,), (0.5,)))
    found = worst_images(None, predictions_of([1, 0], labels[:2], 2), split)
    assert [one["index"] for one in found] == [3]
    assert decode(found[0]["image"]).getpixel((0, 0)) == (3, 3, 3)


@pytest.mark.parametrize(
    ("shape", "size", "mode"),
    [
        ((32, 32, 3), (32, 32), "RGB"),
        ((28, 28, 1), (28, 28), "L"),
        ((224, 112, 3), (SIDE // 2, SIDE), "RGB"),
        ((1, 500, 1), (SIDE, 1), "L"),
    ],
)
def test_pictures_are_scaled_down_and_never_up(shape: tuple[int, ...], size: tuple[int, int], mode: str) -> None:
    picture = decode(to_png(np.full(shape, 77, np.uint8)))
    assert (picture.size, picture.mode) == (size, mode)
    assert picture.getextrema() in ((77, 77), ((77, 77),) * 3)


def test_the_largest_picture_is_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8)
    assert len(to_png(noise)) < 20_000
