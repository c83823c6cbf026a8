"""Diagnosis of classifiers with another order of classes, or with other preprocessing."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.search.diagnosis import (
    describe_baseline,
    describe_other_normalization,
    describe_other_order,
    usual_normalizations,
    with_normalization,
)
from compress.tasks.regression import Regression

NAMES = ("cat", "dog", "fox", "owl")
LABELS = np.arange(80) % 4


class Brightness(nn.Module):
    """A classifier by the normalised brightness of an image: class `order[k]` for the k-th quarter of [0, 1]."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quarter = (x.mean((1, 2, 3)) * 4).long().clamp(0, 3)
        return nn.functional.one_hot(torch.tensor(self.order)[quarter], 4).float()


def split(channels: int = 3, preprocessing: Preprocessing | None = None) -> Split:
    images = np.repeat((LABELS * 64 + 32).astype(np.uint8), 4 * 4 * channels).reshape(80, 4, 4, channels)
    source = ArraySource(images, LABELS, NAMES)
    return Split("evaluation", source, np.arange(80), preprocessing or Preprocessing())


def test_a_shifted_order_is_named_with_the_classes_to_write() -> None:
    said = describe_baseline(Brightness((1, 2, 3, 0)), split())
    assert said[0].startswith("The baseline is at chance level: 0 of 80 evaluation images are right")
    assert said[1] == (
        "The network probably has another order of classes: 80 of 80 images are right with 'cat' as output 1, 'dog' as "
        "output 2, 'fox' as output 3, 'owl' as output 0, 0 as they are. Name the order of the training beside each "
        "folder: classes: [owl, cat, dog, fox]."
    )


def test_two_swapped_classes_are_found_above_chance() -> None:
    (said,) = describe_baseline(Brightness((0, 1, 3, 2)), split())
    assert "80 of 80 images are right with 'fox' as output 3, 'owl' as output 2, 40 as they are" in said


def test_a_right_network_is_not_warned_about() -> None:
    assert describe_baseline(Brightness(), split()) == []
    assert describe_baseline(Brightness((1, 2, 3, 0)), replace(split(), task=Regression())) == []


def test_guesses_have_no_other_order() -> None:
    guesses = np.random.default_rng(0).integers(0, 4, 80)
    assert describe_other_order(guesses, LABELS, NAMES) is None
    same = np.zeros(80, np.int64)
    assert describe_other_order(same, same, ()) is None


def test_labels_without_names_are_numbers() -> None:
    said = describe_other_order((LABELS + 1) % 5, LABELS, ())
    assert said is not None
    assert "with label 0 as output 1" in said
    assert said.endswith("classes: [...].")


def test_another_normalisation_is_named() -> None:
    wrong = split(preprocessing=Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.001, 0.001, 0.001)))
    said = describe_other_normalization(Brightness(), wrong)
    assert said == (
        "With mean [0], std [1] 80 of 80 images are right, 40 as they are: data.preprocessing is probably not that of "
        "the training."
    )
    assert describe_other_normalization(Brightness(), split()) is None
    grey = split(1, Preprocessing(channels="L", scale=1.0))
    assert "With mean [0], std [1] 80 of 80" in str(describe_other_normalization(Brightness(), grey))


def test_usual_normalisations_differ_and_apply_to_a_split() -> None:
    for is_grey in (False, True):
        found = usual_normalizations(is_grey)
        assert len({one.words for one in found}) == len(found) >= 4
    scaled = with_normalization(split(), next(one for one in found if one.scale == 1.0))
    assert scaled.preprocessing.scale == 1.0
    assert scaled.preprocessing.normalize(scaled.read(np.zeros(1, np.int64))).max() == 32.0
