"""Splits never share an image, keep the class balance, and depend on their own seed alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.config.schema.data import ArraysSource, DataConfig
from compress.data.from_config import Splits
from compress.data.splits import carve
from compress.errors import DataError

LABELS = st.lists(st.integers(0, 6), min_size=4, max_size=120).map(np.asarray)
SEEDS = st.integers(0, 2**32)


@st.composite
def requests(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, int]]:
    """Labels and sizes that leave at least one image to train on."""
    labels = draw(LABELS)
    calibration = draw(st.integers(1, len(labels) - 3))
    return labels, {"calibration": calibration, "validation": draw(st.integers(1, len(labels) - calibration - 1))}


@given(requests(), SEEDS)
def test_parts_are_disjoint_sorted_complete_and_as_large_as_asked(
    request_: tuple[np.ndarray, dict[str, int]], seed: int
) -> None:
    labels, sizes = request_
    parts = carve(labels, sizes, seed)
    together = np.concatenate(list(parts.values()))
    assert sorted(together.tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts.values())
    assert {name: len(parts[name]) for name in sizes} == sizes


@given(requests(), SEEDS)
def test_the_same_seed_gives_the_same_parts(request_: tuple[np.ndarray, dict[str, int]], seed: int) -> None:
    labels, sizes = request_
    again = carve(labels.copy(), sizes, seed)
    assert all(np.array_equal(part, again[name]) for name, part in carve(labels, sizes, seed).items())


@given(st.integers(2, 10), st.integers(4, 30), st.data())
def test_balanced_sources_give_balanced_parts(classes: int, per_class: int, data: st.DataObject) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), per_class))
    size = data.draw(st.integers(1, len(labels) - 2))
    other = data.draw(st.integers(1, len(labels) - size - 1))
    parts = carve(labels, {"calibration": size, "validation": other}, seed=1)
    for part in parts.values():
        counts = np.bincount(labels[part], minlength=classes)
        assert counts.max() - counts.min() <= 2


def test_rare_classes_are_in_every_part() -> None:
    labels = np.asarray([0] * 900 + [1] * 100)
    parts = carve(labels, {"calibration": 100, "validation": 200}, seed=0)
    assert {name: int((labels[part] == 1).sum()) for name, part in parts.items()} == {
        "calibration": 10,
        "validation": 20,
        "train": 70,
    }


def test_another_seed_gives_other_parts() -> None:
    labels = np.arange(200) % 10
    one, other = (carve(labels, {"validation": 50}, seed)["validation"] for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_images_of_one_class_are_not_taken_in_file_order() -> None:
    parts = carve(np.zeros(100, np.int64), {"validation": 50}, seed=0)
    assert parts["validation"].max() > 60


@pytest.mark.parametrize("size", [10, 11])
def test_nothing_left_to_train_on_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=rf"it has 10, asked: calibration 0, validation {size}\."):
        carve(np.zeros(10, np.int64), {"calibration": 0, "validation": size}, seed=0)


def test_evaluation_images_can_be_taken_from_the_training_source(tmp_path):
    path, labels = tmp_path / "images.npz", np.arange(90) % 3
    images = np.arange(90, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 4, 4, 1), np.uint8)
    np.savez(path, x=images, y=labels)
    source = ArraysSource(arrays=str(path))

    def parts(evaluation):
        data = Splits(DataConfig(train=source, evaluation=evaluation, calibration=12, validation=9))
        found = {name: getattr(data, name) for name in ("train", "calibration", "validation", "evaluation")}
        return {name: set(split.indices.tolist()) for name, split in found.items()}

    carved, whole = parts(30), parts(source)
    assert [len(carved[name]) for name in ("train", "calibration", "validation", "evaluation")] == [39, 12, 9, 30]
    assert sum(map(len, carved.values())) == len(set().union(*carved.values())) == 90
    assert np.bincount(labels[sorted(carved["evaluation"])]).tolist() == [10, 10, 10]
    assert all(carved[name] == whole[name] for name in ("calibration", "validation")), "other splits do not move"
    with pytest.raises(DataError, match=r"evaluation 80"):
        parts(80)
