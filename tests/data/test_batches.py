"""Batches: the same for the same (seed, epoch), every image where it must be, augmentation that keeps the shape."""

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.data.batches import (
    Augmentation,
    augment,
    batches_per_epoch,
    evaluation_batches,
    fast_batch_size,
    random_seed,
    training_batches,
)
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import DataError

PLAIN = Preprocessing(scale=1.0)


def _split(count: int = 10, preprocessing: Preprocessing = PLAIN) -> Split:
    """Images whose every pixel is their index, labels that are ten times the index."""
    images = np.broadcast_to(np.arange(2 * count, dtype=np.uint8)[:, None, None, None], (2 * count, 4, 6, 3))
    return Split("train", ArraySource(images, np.arange(2 * count) * 10), np.arange(count) * 2, preprocessing)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ids(batches: list[tuple[Tensor, Tensor]]) -> list[list[int]]:
    return [images[:, 0, 0, 0].int().tolist() for images, _ in batches]


def test_evaluation_reads_every_image_once_in_order() -> None:
    batches = list(evaluation_batches(_split(), 4))
    assert _ids(batches) == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]
    assert [labels.tolist() for _, labels in batches] == [[10 * i for i in ids] for ids in _ids(batches)]
    assert batches[0][0].dtype == torch.float32
    assert batches[0][1].dtype == torch.int64
    assert batches[0][0].shape == (4, 3, 4, 6)
    assert list(evaluation_batches(_split(0), 4)) == []


@pytest.mark.parametrize(("side", "expected"), [(8, 256), (32, 128), (224, 4), (1000, 4)])
def test_few_large_images_make_a_fast_batch_and_many_small_ones(side: int, expected: int) -> None:
    images = np.zeros((2, side, side, 3), np.uint8)
    assert fast_batch_size(Split("validation", ArraySource(images, np.arange(2)), np.arange(2), PLAIN)) == expected
    assert fast_batch_size(_split(0)) == 256


def test_training_leaves_the_remainder_out_and_keeps_labels_with_images() -> None:
    batches = list(training_batches(_split(), 4, Augmentation(), seed=0, epoch=0))
    assert [len(labels) for _, labels in batches] == [4, 4]
    seen = [index for ids in _ids(batches) for index in ids]
    assert len(set(seen)) == 8
    assert [label for _, labels in batches for label in labels.tolist()] == [10 * index for index in seen]


def test_an_epoch_can_be_entered_at_any_batch() -> None:
    varied = Augmentation(2, True)
    whole = list(training_batches(_split(), 2, varied, seed=3, epoch=1))
    assert len(whole) == 5
    for start in range(6):
        rest = list(training_batches(_split(), 2, varied, 3, 1, start))
        assert len(rest) == 5 - start
        for (images, labels), (same, same_labels) in zip(rest, whole[start:], strict=True):
            assert torch.equal(images, same)
            assert torch.equal(labels, same_labels)


def test_what_is_drawn_for_one_purpose_says_nothing_of_another() -> None:
    parts = [("order", 0), ("order", 1), ("augmentation", 0, 0), ("augmentation", 0, 1), ("step", 0), ("step", 1)]
    assert len({random_seed(seed, *part) for seed in (0, 1) for part in parts}) == 12


def test_a_split_smaller_than_a_batch_is_one_batch() -> None:
    batches = list(training_batches(_split(3), 8, Augmentation(), seed=0, epoch=0))
    assert [sorted(ids) for ids in _ids(batches)] == [[0, 2, 4]]
    assert batches_per_epoch(_split(3), 8) == 1


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return _ids(list(training_batches(_split(20), 5, Augmentation(2, True), seed, epoch)))

    torch.manual_seed(1)
    first = order(3, 1)
    torch.manual_seed(2)
    assert order(3, 1) == first
    assert order(3, 2) != first
    assert order(4, 1) != first


def test_augmentation_of_an_epoch_is_the_same_again() -> None:
    random = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    split = Split("train", ArraySource(random, np.zeros(20, np.int64)), np.arange(20), PLAIN)
    runs = [list(training_batches(split, 5, Augmentation(2, True), 0, 4)) for _ in range(2)]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(*runs, strict=True))
    plain = list(training_batches(split, 5, Augmentation(), 0, 4))
    assert not torch.equal(runs[0][0][0], plain[0][0])


def test_large_seeds_work() -> None:
    assert len(list(training_batches(_split(), 4, Augmentation(), seed=2**62, epoch=3))) == 2
    assert 0 <= random_seed(2**80, "order", 5) < 2**63


def test_crop_moves_whole_images_by_at_most_the_padding() -> None:
    images = torch.arange(1, 1 + 64 * 5 * 7).remainder(255).add(1).to(torch.uint8).reshape(64, 5, 7, 1)
    varied = augment(images, Augmentation(crop_padding=2), _generator())
    assert varied.shape == images.shape
    assert varied.dtype == torch.uint8
    padded = torch.nn.functional.pad(images, (0, 0, 2, 2, 2, 2))
    shifts = set()
    for before, after in zip(padded, varied, strict=True):
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(before[y : y + 5, x : x + 7], after)]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 10


def test_flip_mirrors_about_half_of_the_images_left_to_right() -> None:
    images = torch.randint(0, 256, (200, 3, 5, 2), generator=_generator(), dtype=torch.uint8)
    varied = augment(images, Augmentation(flip=True), _generator())
    flipped = [torch.equal(a, b.flip(1)) for a, b in zip(varied, images, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(varied, images, strict=True)]
    assert all(a or b for a, b in zip(flipped, kept, strict=True))
    assert 70 < sum(flipped) < 130


def test_rows_of_several_inputs_are_not_cropped_or_mirrored() -> None:
    rows, generator = torch.rand(4, 10), torch.Generator()
    assert torch.equal(augment(rows, Augmentation(), generator), rows)
    for wanted in (Augmentation(flip=True), Augmentation(crop_padding=2)):
        with pytest.raises(DataError, match="cannot be cropped, mirrored or transformed"):
            augment(rows, wanted, generator)


def test_no_augmentation_draws_nothing() -> None:
    generator = _generator()
    images = torch.zeros(2, 3, 3, 1, dtype=torch.uint8)
    assert augment(images, Augmentation(), generator) is images
    assert torch.equal(generator.get_state(), _generator().get_state())


def test_network_input_is_contiguous() -> None:
    images, _ = next(evaluation_batches(_split(), 4))
    assert images.is_contiguous()
    assert images.view(len(images), -1).shape == (4, 4 * 6 * 3)
    images, _ = next(evaluation_batches(_split(10, Preprocessing(layout="NHWC")), 4))
    assert images.shape == (4, 4, 6, 3)


@pytest.mark.parametrize(
    ("count", "expected"), [(3, [0, 8, 18]), (10, list(range(0, 20, 2))), (99, list(range(0, 20, 2)))]
)
def test_first_is_spread_over_the_split(count: int, expected: list[int]) -> None:
    assert _split().first(count).indices.tolist() == expected


class _Watched:
    """A source that says which thread reads what, and fails where it is told to."""

    classes: tuple[str, ...] = ()

    def __init__(self, broken: int | None = None) -> None:
        self.labels = np.zeros(40, np.int64)
        self.reads: list[int] = []
        self.threads: set[int] = set()
        self.broken = broken

    def read_targets(self, indices: np.ndarray) -> np.ndarray:
        return self.labels[indices]

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.reads.append(int(indices[0]))
        self.threads.add(threading.get_ident())
        if self.broken is not None and self.broken in indices:
            raise DataError("image 25 is broken")
        return np.zeros((len(indices), 2, 2, 3), np.uint8)


def test_one_batch_is_read_ahead_in_a_thread_and_no_more() -> None:
    source = _Watched()
    batches = evaluation_batches(Split("evaluation", source, np.arange(40), PLAIN), 10)
    next(batches)
    next(batches)
    assert source.threads.isdisjoint({threading.get_ident()})
    assert source.reads[:2] == [0, 10]
    assert len(source.reads) <= 3
    batches.close()  # type: ignore[attr-defined]
    assert source.reads == [0, 10, 20]
    assert not any(thread.ident in source.threads for thread in threading.enumerate())


def test_reading_errors_reach_the_caller_after_the_good_batches() -> None:
    batches = evaluation_batches(Split("evaluation", _Watched(broken=25), np.arange(40), PLAIN), 10)
    next(batches)
    next(batches)
    with pytest.raises(DataError, match="image 25 is broken"):
        next(batches)
