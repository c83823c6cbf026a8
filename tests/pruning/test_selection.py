"""Scores of groups without a common scale are compared as shares of their group's mean."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compress.catalog import CRITERIA
from compress.pruning.ranking.selection import find_candidates


def _candidates(scores, comparable, parts=1):
    groups = {name: SimpleNamespace(parts=parts) for name in scores}
    levels = {name: tuple(range(1, len(values) + 1)) for name, values in scores.items()}
    tensors = {name: torch.tensor(values) for name, values in scores.items()}
    return {one.name: one for one in find_candidates(groups, tensors, levels, comparable)}


@pytest.mark.parametrize(
    ("name", "comparable"), [("l1", False), ("l2", False), ("bn_scale", False), ("taylor", True), ("random", True)]
)
def test_which_scores_have_a_common_scale(name, comparable):
    assert CRITERIA.get(name).comparable is comparable


def test_scores_without_a_common_scale_have_mean_one_in_each_group():
    found = _candidates({"small": [0.1, 0.2, 0.3], "large": [10.0, 20.0, 30.0], "dead": [0.0, 0.0]}, False)
    assert found["small"].scores == pytest.approx([0.5, 1.0, 1.5])
    assert found["large"].scores == pytest.approx([0.5, 1.0, 1.5])
    assert found["dead"].scores.tolist() == [0.0, 0.0]
    assert found["small"].damages == pytest.approx(found["large"].damages)


def test_scores_with_a_common_scale_stay_as_they_are():
    found = _candidates({"small": [0.1, 0.2], "large": [10.0, 20.0]}, True)
    assert found["small"].scores == pytest.approx([0.1, 0.2])
    assert found["large"].scores == pytest.approx([10.0, 20.0])


def test_a_unit_scores_what_its_channels_score_together():
    found = _candidates({"a": [1.0, 2.0, 3.0, 4.0]}, True, parts=2)
    assert np.array_equal(found["a"].scores, [4.0, 6.0])
    assert found["a"].channels_per_unit == 2
