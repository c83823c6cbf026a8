"""Metrics of tasks other than classification: intervals, drops and rises on the same images, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from compress.errors import DataError, NonFinite
from compress.tasks.base import Metric
from compress.verification.metrics import Estimate, paired_drop
from compress.verification.statistics import mean_interval
from compress.verification.task_metrics import Measured, changes_of_measured, estimate_measured, loss_of


def measured(values, resamples=50, higher_is_better=True):
    """A task whose metrics are the mean of its facts, and their number."""
    metric = Metric("mean", higher_is_better)
    task = SimpleNamespace(
        aggregate=lambda facts: {"mean": float(facts["v"].mean()), "count": float(len(facts["v"]))},
        resamples=resamples,
        metric="mean",
        main=metric,
    )
    return Measured(task, {"v": np.asarray(values, np.float64)})


OLD, NEW = np.array([1.0, 2.0, 4.0, 5.0]), np.array([1.0, 1.0, 3.0, 5.5])


def test_metrics_have_the_interval_of_the_jackknife_and_say_of_how_many_images():
    found = estimate_measured(measured(NEW))
    low, high = mean_interval(NEW)
    assert found["mean"] == Estimate(2.625, pytest.approx(low), pytest.approx(high), "4 images", 4)
    without = estimate_measured(measured(NEW, resamples=0))["mean"]
    assert without == Estimate(2.625, None, None, "4 images", 4)


def test_a_drop_and_a_rise_are_the_same_change_with_the_ends_exchanged():
    found = changes_of_measured(measured(OLD), measured(NEW))
    low, high = mean_interval(OLD - NEW)
    drop, rise = found["drop.mean"], found["rise.mean"]
    assert (drop.value, drop.low, drop.high) == (0.375, pytest.approx(low), pytest.approx(high))
    assert (rise.value, rise.low, rise.high) == (-0.375, pytest.approx(-high), pytest.approx(-low))
    assert drop.low < drop.value < drop.high
    assert drop.detail == rise.detail == "3 before, 2.625 now, the same 4 images"
    assert drop.images == rise.images == 4


def test_a_task_without_resamples_has_changes_without_an_interval():
    found = changes_of_measured(measured(OLD, 0), measured(NEW, 0))
    assert [(one.value, one.low, one.high) for one in (found["drop.mean"], found["rise.mean"])] == [
        (0.375, None, None),
        (-0.375, None, None),
    ]


def test_networks_are_compared_on_the_same_images():
    with pytest.raises(DataError, match="on the same images, got 4 and 3"):
        changes_of_measured(measured(OLD), measured(NEW[:3]))


def test_the_loss_is_the_change_for_the_worse():
    changes = changes_of_measured(measured(OLD), measured(NEW))
    for higher_is_better, name in ((True, "drop.mean"), (False, "rise.mean")):
        one = measured(NEW, higher_is_better=higher_is_better)
        assert loss_of(changes, one.metric) is changes[name]
        assert one.value == 2.625


def test_a_metric_that_is_no_finite_number_is_an_error():
    with pytest.raises(NonFinite):
        _ = measured([1.0, np.nan]).metrics


def test_networks_that_are_right_on_the_same_images_are_not_told_apart():
    right = np.array([True, False, True])
    found = paired_drop(right, right)
    assert (found.p_value, found.drop) == (1.0, 0.0)
