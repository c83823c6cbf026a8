"""Two networks on the same validation images: what is inside the noise decides nothing."""

import numpy as np
import pytest
import torch

from compress.search.validation import is_loss_higher, is_quality_worse
from compress.tasks.base import Task, is_shown_worse
from compress.tasks.classification import CLASSIFICATION
from compress.tasks.regression import Regression


@pytest.mark.parametrize(
    ("lost", "won", "worse"),
    [(4, 0, False), (5, 0, False), (6, 0, True), (0, 6, False), (12, 4, False), (14, 4, True), (0, 0, False)],
)
def test_right_and_wrong_answers_by_hand(lost, won, worse):
    """6 of 6: p = 2 / 64. 12 of 16: p = 0.077. 14 of 18: p = 0.031."""
    before = np.arange(256) >= won
    after = np.arange(256)[::-1] >= lost
    assert is_shown_worse(before, after) is worse
    assert is_quality_worse({"right": before}, {"right": after}, CLASSIFICATION) is worse


def errors(values):
    values = np.asarray(values, np.float64)
    return {"squared": values**2, "absolute": np.abs(values)}


def test_a_figure_that_should_be_low():
    random = np.random.default_rng(0)
    before = random.normal(size=200)
    noise = before + 0.2 * random.normal(size=200) + 0.01
    assert is_quality_worse(errors(before), errors(1.5 * before), Regression())
    assert not is_quality_worse(errors(1.5 * before), errors(before), Regression())
    assert not is_quality_worse(errors(before), errors(before), Regression())
    change = np.sqrt((noise**2).mean()) - np.sqrt((before**2).mean())
    assert 0 < change < 0.1
    assert not is_quality_worse(errors(before), errors(noise), Regression())


class Share(Task):
    """A task of the user's, without intervals."""

    metric = "share"

    def aggregate(self, facts):
        return {"share": float(facts["score"].mean())}


def test_a_task_without_intervals_is_compared_in_ten_parts():
    random = np.random.default_rng(1)
    before = random.random(100)
    assert is_quality_worse({"score": before}, {"score": before - 0.1}, Share())
    assert not is_quality_worse({"score": before}, {"score": before - 0.001 + 0.1 * random.normal(size=100)}, Share())
    assert not is_quality_worse({"score": before}, {"score": before + 0.1}, Share())


def test_what_is_no_number_is_worse():
    some = {"score": np.ones(20)}
    assert is_quality_worse(some, {"score": np.full(20, np.nan)}, Share())
    assert not is_quality_worse({"score": np.full(20, np.nan)}, some, Share())


def test_losses():
    before = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert is_loss_higher(before, before + 0.01)
    assert not is_loss_higher(before, before - 0.01)
    assert not is_loss_higher(before, before)
    noise = torch.randn(100, generator=torch.Generator().manual_seed(1))
    noise = noise - noise.mean() + 0.05
    assert (before + noise).mean() > before.mean()
    assert not is_loss_higher(before, before + noise)
    assert is_loss_higher(before, torch.full((100,), float("nan")))
    assert is_loss_higher(before[:1], before[:1] + 0.1)
    assert not is_loss_higher(before[:1], before[:1])
