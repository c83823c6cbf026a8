"""ModelMetrics about predictions are those of small cases counted by hand, and intervals hold what they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from compress.errors import DataError
from compress.verification.metrics import (
    Predictions,
    calibration_error,
    class_accuracy,
    estimate_changes,
    estimate_quality,
    mean_distance_interval,
    mean_loss_interval,
    mean_share_interval,
    paired_drop,
    share_interval,
    softmax_distance,
)


def predictions(outputs, labels):
    return Predictions(np.asarray(outputs, np.float32), np.asarray(labels, np.int64))


FOUR = predictions([[3, 1, 0], [0, 2, 5], [1, 1, 0], [0, 0, 4]], [0, 1, 1, 2])


def test_hits_and_top_counts_by_hand():
    assert FOUR.chosen.tolist() == [0, 2, 0, 2]
    assert FOUR.hits.tolist() == [True, False, False, True]
    assert [FOUR.among(count).mean() for count in (1, 2, 3)] == [0.5, 1.0, 1.0]


def test_of_equal_outputs_the_first_count():
    equal = predictions([[1, 1, 1, 1]] * 4, [0, 1, 2, 3])
    assert [equal.among(count).mean() for count in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert equal.hits.tolist() == [True, False, False, False]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_top_is_that_of_sorted_outputs(seed, count):
    random = np.random.default_rng(seed)
    some = predictions(random.integers(0, 4, (50, 7)), random.integers(0, 7, 50))
    order = np.argsort(-some.outputs, axis=1, kind="stable")[:, :count]
    assert some.among(count).mean() == pytest.approx((order == some.labels[:, None]).any(1).mean())


def test_many_images_are_looked_at_in_parts():
    random = np.random.default_rng(0)
    some = predictions(random.normal(size=(9000, 3)), random.integers(0, 3, 9000))
    assert some.among(1).mean() == some.hits.mean()


def test_accuracy_of_each_class_and_of_one_without_images():
    accuracy, counts = class_accuracy(predictions([[3, 1, 0], [0, 2, 5], [1, 1, 0]], [0, 1, 1]))
    assert counts.tolist() == [1, 2, 0]
    assert accuracy[:2].tolist() == [1.0, 0.0]
    assert np.isnan(accuracy[2])


def test_probabilities_are_left_as_they_are():
    given_ones = predictions([[0.25, 0.75], [1.0, 0.0]], [0, 1])
    assert given_ones.probabilities.tolist() == [[0.25, 0.75], [1.0, 0.0]]
    logits = predictions([[0.0, np.log(3)], [1000.0, 0.0]], [0, 1])
    assert logits.probabilities == pytest.approx(np.array([[0.25, 0.75], [1.0, 0.0]]))


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (10, 10), (95, 100), (9173, 10000), (1, 2)])
def test_interval_of_a_share_is_that_of_a_library(successes, count):
    wanted = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert share_interval(successes, count) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_a_drop_is_counted_image_by_image():
    before = np.array([True] * 8 + [False] * 2)
    after = np.array([True] * 5 + [False] * 3 + [True] + [False])
    drop = paired_drop(before, after)
    assert (drop.only_before, drop.only_after) == (3, 1)
    assert drop.drop == pytest.approx(0.2)
    assert drop.p_value == pytest.approx(10 / 16)  # 4 images: 3 or more of one kind
    assert drop.interval[0] < 0.2 < drop.interval[1]


def test_two_networks_that_are_alike_differ_by_nothing():
    hits = np.array([True, False] * 50)
    drop = paired_drop(hits, hits.copy())
    assert (drop.drop, drop.p_value) == (0.0, 1.0)
    assert drop.interval == pytest.approx((-drop.interval[1], drop.interval[1]))
    assert 0 < drop.interval[1] < 0.03


def test_the_interval_of_a_drop_holds_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        kind = random.choice(4, size=500, p=[0.86, 0.05, 0.03, 0.06])
        before, after = np.isin(kind, (0, 1)), np.isin(kind, (0, 2))
        low, high = paired_drop(before, after).interval
        held += low <= 0.02 <= high
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_images_that_are_not_the_same_cannot_be_compared(before, after):
    with pytest.raises(DataError, match="on the same images"):
        paired_drop(np.array(before, bool), np.array(after, bool))


def test_distance_by_hand():
    assert softmax_distance(FOUR, FOUR) == 0.0
    sure, other_way = predictions([[1.0, 0.0]], [0]), predictions([[0.0, 1.0]], [0])
    assert softmax_distance(sure, other_way) == pytest.approx(2**0.5)


def test_quality_by_hand():
    found = estimate_quality(FOUR, ("ant", "bee", "cat"))
    assert set(found) == {"top1", "worst_class", "calibration_error"}
    assert (found["top1"].value, found["top1"].detail) == (0.5, "2 of 4 images")
    assert (found["top1"].low, found["top1"].high) == share_interval(2, 4)
    assert (found["worst_class"].value, found["worst_class"].detail) == (0.0, "class 1 ('bee') of 3, 0 of 2 images")
    ends = [share_interval(1, 1, 3), share_interval(0, 2, 3)]
    assert (found["worst_class"].low, found["worst_class"].high) == (ends[1][0], ends[1][1])
    assert [found[name].images for name in ("top1", "worst_class", "calibration_error")] == [4, 2, 4]
    assert found["calibration_error"].value == calibration_error(FOUR).value
    seven = predictions(np.eye(7)[::-1], np.arange(7))
    assert estimate_quality(seven)["top5"].value == pytest.approx(seven.among(5).mean())


def test_changes_by_hand():
    other = predictions([[3, 1, 0], [0, 5, 2], [1, 1, 0], [4, 0, 0]], [0, 1, 1, 2])
    found = estimate_changes(FOUR, other, ("ant", "bee", "cat"))
    assert found["drop.top1"].value == 0.0
    assert found["drop.top1"].detail == "1 images lost, 1 won; exact McNemar test p = 1"
    assert (found["churn"].value, found["churn"].detail) == (0.5, "2 of 4 predictions are others")
    assert found["drop.worst_class"].value == 1.0
    assert found["drop.worst_class"].detail.startswith("class 2 ('cat') of 3; 1 images lost, 0 won")
    each = [paired_drop(FOUR.hits[of], other.hits[of], 3) for of in (FOUR.labels == index for index in range(3))]
    assert found["drop.worst_class"].low == max(drop.interval[0] for drop in each)
    assert found["drop.worst_class"].high == max(drop.interval[1] for drop in each)
    assert (found["drop.top1"].images, found["drop.worst_class"].images) == (4, 1)
    assert found["rise.calibration_error"].value == calibration_error(other).value - calibration_error(FOUR).value
    assert found["softmax_distance"].value == softmax_distance(FOUR, other)
    same = estimate_changes(FOUR, FOUR)
    assert {name: one.value for name, one in same.items()} == dict.fromkeys(found, 0.0)


def test_where_a_class_has_no_image_none_is_the_worst():
    some = predictions([[3, 1, 0], [0, 2, 5]], [0, 1])
    assert set(estimate_quality(some)) == {"top1", "calibration_error"}
    assert "drop.worst_class" not in estimate_changes(some, some)


def test_the_worst_of_many_is_less_sure_than_one_alone():
    for one, many in ((share_interval(90, 100), share_interval(90, 100, 10)),):
        assert many[0] < one[0] < one[1] < many[1]
    before, after = np.arange(100) < 95, np.arange(100) < 90
    one, many = paired_drop(before, after), paired_drop(before, after, 10)
    assert many.interval[0] < one.interval[0] < one.interval[1] < many.interval[1]
    assert many.p_value == pytest.approx(10 * one.p_value)


def test_the_worst_of_ten_equal_classes_seldom_seems_to_differ():
    """Two networks that are as good in every class: the interval of the class that lost most holds no drop."""
    random, found = np.random.default_rng(5), []
    for _ in range(200):
        before, after = random.random((2, 10, 200)) < 0.9
        worst = int((before.mean(1) - after.mean(1)).argmax())
        low, high = paired_drop(before[worst], after[worst], 10).interval
        found.append(low <= 0 <= high)
    assert np.mean(found) >= 0.93


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    random, held = np.random.default_rng(6), []
    for _ in range(400):
        losses = random.choice([-1, 0, 1], (3, 150), p=[0.05, 0.85, 0.1]).mean(0)
        low, high = mean_loss_interval(losses)
        held.append(low <= 0.05 <= high)
        low, high = mean_share_interval(random.random(60) < 0.8)
        held.append(low <= 0.8 <= high)
    assert 0.93 <= np.mean(held) <= 0.985


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_the_mean_distance_lies_between_its_ends_and_0(share):
    low, high = mean_distance_interval(np.array([share] * 20))
    assert 0 <= low <= share < high <= 2**0.5


def test_the_interval_of_a_mean_distance_by_hand():
    """One image at 0 and one at the largest distance of all: mean sqrt(2) / 2, standard error 1 / 2."""
    low, high = mean_distance_interval(np.array([0.0]))
    assert (low, high) == pytest.approx((0.0, 2**0.5))
    low, high = mean_distance_interval(np.array([0.0] * 99))
    mean, spread = 2**0.5 / 100, (2 / 100 - 2 / 100**2) ** 0.5
    assert (low, high) == pytest.approx((0.0, mean + 1.959964 * spread / 10))


def test_rare_large_distances_that_few_images_do_not_show_are_allowed_for():
    random, held = np.random.default_rng(8), []
    for _ in range(200):
        distances = np.where(random.random(90) < 0.97, random.exponential(0.005, 90), random.uniform(0.2, 1.3, 90))
        low, high = mean_distance_interval(distances)
        held.append(low <= 0.97 * 0.005 + 0.03 * 0.75 <= high)
    assert np.mean(held) >= 0.93


def test_the_least_class_may_be_one_with_few_images():
    """Ten of 100 images are wrong in one class, none of two in the other, which may yet be the worse one."""
    outputs = np.zeros((102, 2))
    outputs[:90, 0] = outputs[100:, 1] = 1
    outputs[90:100, 1] = 1
    found = estimate_quality(predictions(outputs, [0] * 100 + [1] * 2))["worst_class"]
    assert found.value == 0.9
    assert found.low == share_interval(2, 2, 2)[0]
    assert found.high == share_interval(90, 100, 2)[1]
