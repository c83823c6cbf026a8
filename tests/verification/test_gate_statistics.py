"""Statistics of verification against values worked out by hand or by another formula; neither torch nor files."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from compress.model.artifacts import ModelMetrics
from compress.tasks.base import Task
from compress.verification.gates import Gates
from compress.verification.latency import LatencyRatio, LatencySample
from compress.verification.metrics import (
    Estimate,
    Predictions,
    as_estimate,
    class_accuracy,
    class_name,
    estimate_changes,
    estimate_quality,
    mean_loss_interval,
    mean_share_interval,
    paired_drop,
    share_interval,
    softmax_distance,
)
from compress.verification.quantization_loss import AGREEMENT, check_agreement, drop_shares, of_float
from compress.verification.resources import Resources
from compress.verification.task_metrics import Measured

Z = 1.959963984540054


def predictions(outputs, labels):
    return Predictions(np.asarray(outputs, np.float32), np.asarray(labels, np.int64))


def one_hot(classes, count):
    return np.eye(count, dtype=np.float32)[np.asarray(classes)]


# shares and drops


@pytest.mark.parametrize(("right", "count", "comparisons"), [(3, 10, 1), (0, 7, 1), (95, 100, 1)])
def test_the_interval_of_a_share_is_wilsons(right, count, comparisons):
    z = NormalDist().inv_cdf(1 - 0.05 / comparisons / 2)
    share = right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    assert share_interval(right, count, comparisons) == pytest.approx((middle - half, middle + half), abs=1e-9)


def test_the_interval_of_a_drop_is_agresti_and_mins():
    """6 lost and 2 won of 20: half an image more in each cell, so 6.5 and 2.5 of 22."""
    before = np.array([True] * 6 + [False] * 2 + [True] * 10 + [False] * 2)
    after = np.array([False] * 6 + [True] * 2 + [True] * 10 + [False] * 2)
    drop = paired_drop(before, after)
    lost, won = 6.5 / 22, 2.5 / 22
    half = Z * math.sqrt((lost + won - (lost - won) ** 2) / 22)
    assert drop.interval == pytest.approx((lost - won - half, lost - won + half))
    assert drop.p_value == pytest.approx(2 * binom.cdf(2, 8, 0.5))
    assert (drop.drop, drop.only_before, drop.only_after) == (0.2, 6, 2)
    estimate = as_estimate(drop)
    assert (estimate.value, estimate.low, estimate.high) == (0.2, *drop.interval)
    assert estimate.detail == "6 images lost, 2 won; exact McNemar test p = 0.29"


def test_of_several_comparisons_each_has_its_part_of_the_five_percent():
    before, after = np.array([True] * 9 + [False]), np.array([True] * 4 + [False] * 6)
    one, three = paired_drop(before, after), paired_drop(before, after, 3)
    assert three.p_value == pytest.approx(3 * one.p_value)
    assert paired_drop(before, after, 1000).p_value == 1.0
    z = NormalDist().inv_cdf(1 - 0.05 / 2 / 3)
    middle = (one.interval[0] + one.interval[1]) / 2
    assert (three.interval[1] - middle) / (one.interval[1] - middle) == pytest.approx(z / Z)


def test_intervals_of_means_add_their_images_and_end_at_one():
    losses = np.array([1.0, 0.5, 0.0, -0.25])
    middle = 1.25 / 6
    half = Z * math.sqrt((1 + 0.25 + 0.0625 + 1 - 1.25**2 / 6) / 36)
    assert mean_loss_interval(losses) == pytest.approx((middle - half, middle + half))
    assert mean_loss_interval(np.array([-1.0, -1.0]))[0] == -1.0
    assert mean_loss_interval(np.array([1.0, 1.0]))[1] == 1.0
    shares = np.array([1.0, 0.5, 0.75, 0.0, 1.0, 1.0])
    middle = 6.25 / 10
    half = Z * math.sqrt((1 + 0.25 + 0.5625 + 1 + 1 + 2 - 6.25**2 / 10) / 100)
    assert mean_share_interval(shares) == pytest.approx((middle - half, middle + half))
    assert mean_share_interval(np.zeros(2))[0] == 0.0
    assert mean_share_interval(np.ones(2))[1] == 1.0


# predictions


def test_every_part_of_many_images_counts():
    """More than one part of 4,096 images, with equal outputs at its border."""
    labels = np.arange(4100) % 3
    outputs = np.zeros((4100, 3), np.float32)
    outputs[4096:] = one_hot(labels[4096:], 3)
    some = predictions(outputs, labels)
    assert some.among(1)[:4096].tolist() == (labels[:4096] == 0).tolist()
    assert some.among(1)[4096:].all()
    assert len(some.among(2)) == len(some) == 4100


def test_outputs_are_taken_for_probabilities_only_where_all_of_them_are():
    almost = predictions([[0.25, 0.7495], [1.0, 0.0]], [0, 1])
    assert almost.probabilities.tolist() == almost.outputs.tolist()
    for outputs in ([[0.25, 0.75], [0.5, 0.502]], [[-0.01, 1.01], [0.5, 0.5]], [[0.25, 0.75], [2.0, 0.0]]):
        some = predictions(outputs, [0, 1])
        wanted = np.exp(some.outputs) / np.exp(some.outputs).sum(1, keepdims=True)
        assert some.probabilities == pytest.approx(wanted, rel=1e-5)
        assert some.outputs.tolist() == np.float32(outputs).tolist(), "left as they were"


def test_a_class_without_images_has_no_accuracy_and_counts_are_those_of_labels():
    accuracy, counts = class_accuracy(predictions(one_hot([0, 1, 1, 3], 4), [0, 1, 0, 3]))
    assert counts.tolist() == [2, 1, 0, 1]
    assert accuracy[[0, 1, 3]].tolist() == [0.5, 1.0, 1.0]
    assert np.isnan(accuracy[2])


def test_distance_is_the_mean_of_the_norms():
    before = predictions([[1.0, 0.0], [0.5, 0.5]], [0, 1])
    after = predictions([[0.6, 0.4], [0.5, 0.5]], [0, 1])
    assert softmax_distance(before, after) == pytest.approx(0.4 * math.sqrt(2) / 2)
    found = estimate_changes(before, after)["softmax_distance"]
    assert 0.0 < found.low < found.value < found.high
    assert found.detail == "mean l2 norm over images"


def test_quality_of_seven_classes():
    """14 images, two of each class; class 3 is right once, and on one image its label is the sixth of seven."""
    labels = np.repeat(np.arange(7), 2)
    outputs = one_hot(labels, 7) * 10
    outputs[6] = [9, 8, 7, 1, 6, 5, 0]
    found = estimate_quality(predictions(outputs, labels), tuple("abcdefg"))
    assert (found["top1"].value, found["top1"].detail) == (13 / 14, "13 of 14 images")
    assert (found["top5"].value, found["top5"].detail) == (13 / 14, "13 of 14 images")
    assert (found["top5"].low, found["top5"].high) == share_interval(13, 14)
    assert (found["worst_class"].value, found["worst_class"].detail) == (0.5, "class 3 ('d') of 7, 1 of 2 images")
    assert (found["worst_class"].low, found["worst_class"].high) == share_interval(1, 2, 7)
    outputs[6] = [9, 8, 7, 6.5, 6, 5, 0]
    assert estimate_quality(predictions(outputs, labels))["top5"].value == 1.0
    assert "top5" not in estimate_quality(predictions(outputs[:10, :5], labels[:10]))
    assert class_name(3, ()) == "3"


def test_changes_of_seven_classes():
    labels = np.repeat(np.arange(7), 3)
    before, after = one_hot(labels, 7) * 5, one_hot(labels, 7) * 5
    before[0] = one_hot([6], 7)  # wrong before, right now
    after[3] = one_hot([0], 7) * 9  # class 1 loses two of three
    after[4] = one_hot([0], 7) * 9
    after[9] = one_hot([0], 7) * 9  # class 3 loses one
    found = estimate_changes(predictions(before, labels), predictions(after, labels), tuple("abcdefg"))
    assert found["drop.top1"].value == pytest.approx((3 - 1) / 21)
    assert found["drop.top1"].detail.startswith("3 images lost, 1 won; exact McNemar test p = 0.62")
    assert found["drop.worst_class"].value == pytest.approx(2 / 3)
    assert found["drop.worst_class"].detail == "class 1 ('b') of 7; 2 images lost, 0 won; exact McNemar test p = 1"
    assert (found["churn"].value, found["churn"].detail) == (4 / 21, "4 of 21 predictions are others")
    assert (found["churn"].low, found["churn"].high) == share_interval(4, 21)
    assert found["drop.top5"].value == pytest.approx(0.0), "the labels are among the first five all the same"


def test_the_first_of_equal_outputs_ranks_first_in_the_top_five():
    labels = [0, 4, 5, 6]
    found = estimate_quality(predictions(np.zeros((4, 7)), labels))
    assert found["top5"].value == 0.5


# quantised files


def test_agreement_is_the_share_of_equal_classes():
    whole = predictions(one_hot([0, 1, 2, 3], 4) * 4, [0, 1, 2, 0])
    rounded = predictions(one_hot([0, 1, 3, 0], 4) * 4, [0, 1, 2, 0])
    check = check_agreement(whole, rounded)
    assert (check.name, check.status, check.value, check.limit, check.unit) == (AGREEMENT, "pass", 0.5, None, "share")
    assert check.detail.startswith("top-1 agrees with the float file on 50.00% of 4 images, mean distance (l2) of the ")
    assert check.detail.endswith(f"{softmax_distance(whole, rounded):.4g}")
    assert check_agreement(whole, whole).value == 1.0
    assert of_float(check).detail == f"{check.detail} (of the float file it was quantised from)"


def test_each_part_of_a_pipeline_has_its_share_of_the_drop():
    labels = np.zeros(4, np.int64)
    before, whole, after = (predictions(one_hot(chosen, 2), labels) for chosen in ([0] * 4, [0, 0, 0, 1], [0, 1, 1, 1]))
    assert drop_shares(before, whole, after) == [
        {"stage": "slimming", "top1_before": 1.0, "top1_after": 0.75, "points": -25.0},
        {"stage": "quantize", "top1_before": 0.75, "top1_after": 0.25, "points": -50.0},
    ]
    assert drop_shares(before, None, after) == [
        {"stage": "slimming", "top1_before": 1.0, "top1_after": 0.25, "points": -75.0}
    ]
    assert drop_shares(None, None, after) == []
    assert [one["stage"] for one in drop_shares(before, whole, None)] == ["slimming"]
    assert [one["stage"] for one in drop_shares(None, whole, after)] == ["quantize"]


# other tasks


class Heights(Task):
    """Mean height."""

    metric = "mean"
    resamples = 50

    def aggregate(self, facts):
        return {"mean": float(np.mean(facts["height"])), "most": float(np.max(facts["height"]))}


def test_agreement_of_another_task_is_the_difference_of_its_figures():
    whole, rounded = (Measured(Heights(), {"height": np.full(4, height)}) for height in (0.75, 0.5))
    check = check_agreement(whole, rounded)
    assert (check.name, check.status, check.value, check.limit) == (AGREEMENT, "pass", 0.25, None)
    assert check.unit == "share"
    assert check.detail == f"{Heights().main.words} 50.00%, of the float file 75.00%"
    assert check_agreement(rounded, whole).value == 0.25
    for one in (whole, rounded):
        one.task.is_share = False
    assert check_agreement(whole, rounded).unit == ""
    mixed = predictions([[1.0, 0.0]], [0])
    assert check_agreement(mixed, rounded).value == 0.5
    assert check_agreement(rounded, mixed).value == 0.5


# limits


@pytest.mark.parametrize(
    ("kind", "value", "limit", "status"),
    [
        ("max", 0.1, 0.1, "pass"),
        ("max", 0.1 + 1e-10, 0.1, "pass"),
        ("max", 0.1 + 1e-8, 0.1, "fail"),
        ("min", 0.9, 0.9, "pass"),
        ("min", 0.9 - 1e-10, 0.9, "pass"),
        ("min", 0.9 - 1e-8, 0.9, "fail"),
    ],
)
def test_limits_are_kept_when_they_are_met_to_the_last_digit(kind, value, limit, status):
    name = "churn" if kind == "max" else "top1"
    gates = Gates(maximum={name: limit}) if kind == "max" else Gates(minimum={name: limit})
    (check,) = gates.check_quality({"top1": Estimate(value)}, {"churn": Estimate(value)})
    assert (check.name, check.status, check.value, check.limit) == (f"{kind}.{name}", status, value, limit)


def test_the_share_of_a_latency_is_the_ratio_that_was_measured():
    """Not the quotient of two medians, which were of different moments."""
    slim, baseline = (ModelMetrics(1, 1, 1, {}, {"p50": ms, "p95": 2 * ms}) for ms in (1.0, 2.0))
    ratio = LatencyRatio(0.48, 0.47, 0.49, 0.004, 6, LatencyRatio(1.001, 0.998, 1.004, 0.001))
    gates = Gates(max_ratio={"p50": 0.485, "p95": 0.485}, judge_by="bound")
    half, slow = gates.check_ratios(slim, baseline, None, ratio)
    assert (half.status, half.value) == ("inconclusive", 0.48), "the interval ends at 0.49"
    assert "the baseline against itself in the same run: 1.001 (0.998 to 1.004)" in half.detail
    assert (slow.status, slow.value) == ("fail", 0.5)
    assert replace(gates, judge_by="estimate").check_ratios(slim, baseline, None, ratio)[0].status == "pass"
    assert gates.check_ratios(slim, baseline, None)[0].value == 0.5


def test_a_speed_up_has_the_interval_of_its_ratio_turned_around():
    sample = LatencySample((1.0,) * 30, (1.0,) * 6)
    ratio = LatencyRatio(0.5, 0.4, 0.625, 0.04)
    assert Gates(min_speedup=1.9).check_speed(sample, ratio, "")[0].status == "pass"
    assert Gates(min_speedup=1.9, judge_by="bound").check_speed(sample, ratio, "")[0].status == "inconclusive"
    assert Gates(min_speedup=1.6, judge_by="bound").check_speed(sample, ratio, "")[0].status == "pass"
    assert (
        "with 95 % confidence from 1.6000 to 2.5000" in Gates(min_speedup=1.9).check_speed(sample, ratio, "")[0].detail
    )


@pytest.mark.parametrize(("limit", "is_close"), [(1.75, True), (2.34, True), (1.73, False), (2.36, False)])
def test_close_is_within_fifteen_percent_of_the_limit(limit, is_close):
    assert Gates(min_speedup=limit).is_close_to_speed(LatencyRatio(0.5, 0.4, 0.6, 0.01)) == is_close


def test_resources_are_held_to_their_limits_at_the_batch_size_where_they_are_best():
    found = Resources(
        {"slim": 12.0}, {"slim": 3_000_000}, [{"batch_size": 1, "slim": 90.0}, {"batch_size": 8, "slim": 400.0}]
    )
    gates = Gates(max_cold_start_ms=11.0, max_memory_mb=3.0, min_images_per_second=400.0)
    start, memory, throughput = gates.check_resources(found, "slim")
    assert (start.status, start.value, start.unit) == ("fail", 12.0, "ms")
    assert (memory.status, memory.value, memory.unit) == ("pass", 3.0, "MB")
    assert (throughput.status, throughput.value, throughput.unit) == ("pass", 400.0, "images/s")
    assert [check.status for check in gates.check_resources(None, "slim")] == ["skipped"] * 3


def test_a_mcnemar_test_agrees_with_a_library():
    before = np.array([True] * 30 + [False] * 12)
    after = np.array([False] * 11 + [True] * 19 + [True] * 4 + [False] * 8)
    assert paired_drop(before, after).p_value == pytest.approx(binomtest(11, 15).pvalue)
