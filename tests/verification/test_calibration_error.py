"""Calibration error: values counted by hand, and intervals that hold the truth as often as they say."""

import math

import numpy as np
import pytest

from compress.verification.statistics import Bounds, calibration_bounds, difference_bounds

Z2 = 1.959963984540054**2


def test_one_bin_by_hand():
    """Of eight images with confidence 0.75 four are right: a gap of 1/4, its variance 2/7, an eighth of that noise."""
    found = calibration_bounds(np.full(8, 0.75), np.arange(8) < 4)
    total = 1 / 16 - 2 / 7 / 8
    assert found.value == pytest.approx(math.sqrt(total))
    noise = 2 / 7 / 8  # more than 1/4 / 8, that of a share of one half
    middle, half = total + 2 * noise * Z2, math.sqrt(Z2 * (2 * noise**2 + 4 * noise * total + 4 * noise**2 * Z2))
    assert found.low == pytest.approx(math.sqrt(max(0, middle - half)))
    assert found.high == pytest.approx(math.sqrt(middle + half))


def test_two_bins_by_hand():
    """Twenty images: ten with confidence 0.6, five of them right, and ten with 0.9, all right."""
    confidence = np.repeat([0.6, 0.9], 10)
    hits = np.r_[np.arange(10) < 5, np.ones(10)]
    found = calibration_bounds(confidence, hits)
    total = 0.5 * (0.01 - 10 / 36 / 10) + 0.5 * 0.01
    assert total < 0
    assert (found.value, found.low) == (0.0, 0.0)
    noise = np.array([10 / 36, 11 / 12 * 1 / 12]) / 20
    slope = noise.mean()  # both gaps are as large
    half = math.sqrt(Z2 * (2 * (noise**2).sum() + 4 * slope * total + 4 * slope**2 * Z2))
    assert found.high == pytest.approx(math.sqrt(total + 2 * slope * Z2 + half))


def test_a_clear_error_has_an_interval_above_0():
    found = calibration_bounds(np.full(1000, 0.9), np.arange(1000) < 500)
    assert found.value == pytest.approx(math.sqrt(0.16 - 0.25 / 999))
    assert 0.36 < found.low < 0.4 < found.high < 0.44


def test_images_of_one_confidence_share_a_bin_however_they_are_ordered():
    hits = np.arange(300) < 150
    in_order = calibration_bounds(np.full(300, 0.5), hits)
    assert in_order == calibration_bounds(np.full(300, 0.5), np.random.default_rng(0).permutation(hits))
    assert in_order.value == 0.0


@pytest.mark.parametrize("right", [0, 1])
def test_sure_answers_that_are_all_right_or_all_wrong(right):
    found = calibration_bounds(np.ones(200), np.full(200, bool(right)))
    assert found.value == 1 - right
    assert found.low <= found.value <= found.high
    assert found.high - found.low > 0.01


def test_a_single_image_has_no_interval():
    assert calibration_bounds(np.array([0.7]), np.array([True])) == Bounds(pytest.approx(0.3), None, None)


def test_nineteen_images_are_one_bin_and_twenty_are_two():
    confidence, hits = np.linspace(0.5, 0.9, 20), np.arange(20) % 2 == 0
    one = calibration_bounds(confidence[:19], hits[:19])
    gaps = hits[:19] - confidence[:19]
    assert one.value == pytest.approx(math.sqrt(max(0.0, gaps.mean() ** 2 - gaps.var(ddof=1) / 19)))
    two = calibration_bounds(confidence, hits)
    halves = [hits[half] - confidence[half] for half in (slice(10), slice(10, 20))]
    total = sum(0.5 * (half.mean() ** 2 - half.var(ddof=1) / 10) for half in halves)
    assert two.value == pytest.approx(math.sqrt(max(0.0, total)))


def test_the_difference_of_two_values_by_hand():
    assert difference_bounds(Bounds(0.5, 0.25, 1.0), Bounds(0.25, 0.0, 0.75)) == Bounds(0.25, -0.5, 1.0)
    assert difference_bounds(Bounds(0.5, None, None), Bounds(0.25, 0.1, 0.4)) == Bounds(0.25, None, None)
    assert difference_bounds(Bounds(0.5, 0.4, 0.6), Bounds(0.25, None, None)) == Bounds(0.25, None, None)


def drawn(random, count, temperature):
    """Return confidences of a sure network, and answers that are right as often as at another temperature."""
    confidence = np.minimum(1 - 0.5 * random.beta(0.5, 6, count), 1 - 1e-12)
    accuracy = 1 / (1 + np.exp(-temperature * np.log(confidence / (1 - confidence))))
    return confidence, random.random(count) < accuracy, accuracy


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("count", [90, 1000])
def test_the_interval_holds_the_truth_and_the_estimate(count, temperature):
    random = np.random.default_rng(count)
    confidence, _, accuracy = drawn(random, 200_000, temperature)
    truth = math.sqrt(np.mean((accuracy - confidence) ** 2))
    found = [calibration_bounds(*drawn(random, count, temperature)[:2]) for _ in range(200)]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.93
    assert all(one.low <= one.value <= one.high for one in found)


def test_the_interval_of_a_rise_from_a_calibrated_network_holds_the_truth():
    random, held = np.random.default_rng(2), []
    confidence, _, accuracy = drawn(random, 200_000, 0.6)
    truth = math.sqrt(np.mean((accuracy - confidence) ** 2))
    for _ in range(100):
        confidence, hits, _ = drawn(random, 10_000, 0.6)
        before = calibration_bounds(confidence, random.random(10_000) < confidence)
        rise = difference_bounds(calibration_bounds(confidence, hits), before)
        held.append(rise.low <= truth <= rise.high)
    assert np.mean(held) >= 0.93


def test_the_interval_of_a_rise_holds_no_rise_between_networks_that_are_as_calibrated():
    random, held = np.random.default_rng(1), []
    for _ in range(200):
        confidence, hits, accuracy = drawn(random, 500, 1.0)
        other = random.random(500) < accuracy
        rise = difference_bounds(calibration_bounds(confidence, other), calibration_bounds(confidence, hits))
        held.append(rise.low <= 0 <= rise.high)
    assert np.mean(held) >= 0.93
