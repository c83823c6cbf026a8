"""Intervals by the jackknife: those of Student's t for a mean, by hand for a root, and wide enough in simulations."""

import numpy as np
import pytest
from scipy.stats import t

from compress.verification.statistics import jackknife_intervals, mean_interval


def student(values):
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half


def test_a_mean_has_the_widest_of_three_student_intervals():
    values = np.array([0.0, 0.0, 1.0, 3.0])
    ends = [student(values), student([*values, 0.0]), student([*values, 3.0])]
    assert mean_interval(values) == pytest.approx((min(low for low, _ in ends), max(high for _, high in ends)))


def test_without_one_image_in_turn_a_mean_is_made_of_its_own_values():
    values = np.random.default_rng(0).normal(size=30)
    found = jackknife_intervals(lambda places: {"mean": float(values[places].mean())}, 30, 400)
    assert found["mean"] == pytest.approx(mean_interval(values))


def test_a_root_by_hand():
    """Squares 1, 4 and 7: the root of their mean is 2, of two of them the roots of 5.5, 4 and 2.5."""
    squares = np.array([1.0, 4.0, 7.0])
    found = jackknife_intervals(lambda places: {"rmse": float(np.sqrt(squares[places].mean()))}, 3, 400)
    without = np.sqrt([5.5, 4.0, 2.5])
    assert found["rmse"] == pytest.approx(mean_interval(2.0 - 2 * (without - without.mean())))


def test_every_image_is_left_out_once_in_parts_of_equal_size():
    seen = []

    def figures(places):
        seen.append(places)
        return {"count": float(len(places))}

    jackknife_intervals(figures, 103, 10)
    assert sorted({len(places) for places in seen[1:]}) == [92, 93]
    left_out = np.concatenate([np.setdiff1d(np.arange(103), places) for places in seen[1:]])
    assert len(seen) == 11
    assert np.sort(left_out).tolist() == list(range(103))
    assert seen[0].tolist() == list(range(103))


@pytest.mark.parametrize(("count", "parts"), [(1, 400), (50, 0), (50, 1)])
def test_nothing_is_known_of_one_part(count, parts):
    assert jackknife_intervals(lambda places: {"mean": 1.0}, count, parts) == {}


def test_a_figure_that_is_no_number_without_some_image_has_no_interval():
    found = jackknife_intervals(lambda places: {"some": float("nan") if 3 not in places else 1.0, "all": 1.0}, 20, 20)
    assert found == {"all": (1.0, 1.0)}


@pytest.mark.parametrize("count", [30, 90])
def test_the_interval_of_a_root_of_skewed_squares_holds_the_truth(count):
    random, held = np.random.default_rng(count), []
    for _ in range(200):
        squares = random.laplace(0, 1, count) ** 2
        interval = jackknife_intervals(
            lambda places, of=squares: {"rmse": float(np.sqrt(of[places].mean()))}, count, 400
        )
        held.append(interval["rmse"][0] <= np.sqrt(2) <= interval["rmse"][1])
    assert np.mean(held) >= 0.93
