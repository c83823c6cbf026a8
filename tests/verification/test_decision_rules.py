"""Gates: pass, fail and inconclusive by each rule, and the number of images that a limit needs."""

import numpy as np
import pytest

from compress.model.artifacts import CheckResult, Verdict
from compress.verification.decision_rules import images_needed, is_coarse, is_undecided, judge
from compress.verification.gates import Gates
from compress.verification.metrics import Estimate, as_estimate, paired_drop
from compress.verification.remedies import with_remedies

KEPT, UNDER, OVER, BROKEN = (
    Estimate(0.002, 0.001, 0.004),
    Estimate(0.008, -0.002, 0.018),
    Estimate(0.012, 0.002, 0.022),
    Estimate(0.03, 0.02, 0.04),
)


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("estimate", ["pass", "pass", "fail", "fail"]),
        ("bound", ["pass", "inconclusive", "inconclusive", "fail"]),
        ("significant", ["pass", "pass", "inconclusive", "fail"]),
    ],
)
def test_what_each_rule_says_of_a_largest_and_a_least_value(rule, wanted):
    values = (KEPT, UNDER, OVER, BROKEN)
    assert [judge(one, 0.01, is_least=False, judge_by=rule) for one in values] == wanted
    turned = [Estimate(-one.value, -one.high, -one.low) for one in values]
    assert [judge(one, -0.01, is_least=True, judge_by=rule) for one in turned] == wanted


def test_where_one_image_weighs_more_than_the_limit_a_failure_must_be_shown():
    assert judge(OVER, 0.01, is_least=False, judge_by="estimate", is_coarse=True) == "inconclusive"
    assert judge(BROKEN, 0.01, is_least=False, judge_by="estimate", is_coarse=True) == "fail"
    assert judge(UNDER, 0.01, is_least=False, judge_by="estimate", is_coarse=True) == "pass"


@pytest.mark.parametrize("rule", ["estimate", "bound", "significant"])
def test_what_has_no_interval_is_judged_by_itself(rule):
    assert judge(Estimate(0.01), 0.01, is_least=False, judge_by=rule) == "pass"
    assert judge(Estimate(0.0101), 0.01, is_least=False, judge_by=rule) == "fail"


@pytest.mark.parametrize("rule", ["estimate", "bound", "significant"])
def test_the_last_bit_of_a_number_decides_nothing(rule):
    drop = 0.9173 - 0.9073
    assert drop > 0.01
    assert judge(Estimate(drop, drop, drop), 0.01, is_least=False, judge_by=rule) == "pass"
    assert judge(Estimate(drop, drop, drop), 0.00999, is_least=False, judge_by=rule) == "fail"


@pytest.mark.parametrize(
    ("images", "limit", "wanted"),
    [(90, 0.01, True), (100, 0.01, False), (99, 0.01, True), (90, 0.0, False), (90, -0.01, False), (None, 0.01, False)],
)
def test_a_limit_is_coarse_below_one_image(images, limit, wanted):
    assert is_coarse(Estimate(0.0, images=images), limit) is wanted


def test_a_limit_at_an_end_of_the_interval_is_decided():
    assert is_undecided(UNDER, 0.0)
    assert not is_undecided(UNDER, 0.018)
    assert not is_undecided(UNDER, -0.002)
    assert not is_undecided(Estimate(0.5), 0.5)


def test_images_needed_by_hand():
    """Half a width of 0.03 with 100 images: for 0.01 nine times as many; for 0.005 away from 0.8, 36 times as many."""
    drop = Estimate(0.011, -0.019, 0.041, images=100)
    assert images_needed(drop, 0.01, compares=True, is_share=True) == 900
    own = Estimate(0.805, 0.775, 0.835, images=100)
    assert images_needed(own, 0.8, compares=False, is_share=True) == 3600
    assert images_needed(own, 0.805, compares=False, is_share=True) is None
    assert images_needed(own, 0.7, compares=False, is_share=True) is None
    assert images_needed(Estimate(0.805, 0.775, 0.835), 0.8, compares=False, is_share=True) is None
    near = Estimate(0.8, 0.77, 0.83, images=100)
    assert images_needed(near, 0.8 + 1e-7, compares=False, is_share=True) is None  # more than 10^9


def test_images_needed_where_the_limit_is_wider_than_the_noise():
    """0.02 could be told from 0 with the images there are: what counts is how far the value is from it."""
    drop = Estimate(0.019, 0.009, 0.029, images=100)
    assert images_needed(drop, 0.02, compares=True, is_share=True) == 10_000


def test_one_image_must_not_weigh_more_than_the_limit():
    drop = Estimate(0.0, -0.002, 0.002, images=90)
    assert images_needed(drop, 0.001, compares=True, is_share=True) == 1000
    assert images_needed(drop, 0.001, compares=True, is_share=False) == 360
    assert images_needed(drop, -0.001, compares=True, is_share=True) == 360


def changes_of(images, lost):
    before = np.ones(images, bool)
    after = np.arange(images) >= lost
    return {"drop.top1": as_estimate(paired_drop(before, after))}


def test_one_image_of_ninety_is_inconclusive_and_says_how_many_would_do():
    (check,) = Gates(max_drop={"top1": 0.01}).check_quality({}, changes_of(90, 1))
    assert check.status == "inconclusive"
    assert "p = 1" in check.detail
    assert "this limit needs at least 820 images, there are 90" in check.detail
    assert check.remedy == "evaluate on at least 820 images, or allow for more than 0.01"


@pytest.mark.parametrize(
    ("images", "lost", "rule", "wanted"),
    [
        (90, 0, "estimate", "pass"),
        (90, 20, "estimate", "fail"),
        (1000, 11, "estimate", "fail"),
        (1000, 11, "significant", "inconclusive"),
        (1000, 30, "significant", "fail"),
        (1000, 9, "significant", "pass"),
        (1000, 9, "bound", "inconclusive"),
        (1000, 2, "bound", "pass"),
        (1000, 30, "bound", "fail"),
    ],
)
def test_drops_by_each_rule(images, lost, rule, wanted):
    (check,) = Gates(max_drop={"top1": 0.01}, judge_by=rule).check_quality({}, changes_of(images, lost))
    assert check.status == wanted
    assert ("noise may have decided" in check.detail) == (rule == "estimate" and lost == 11)


def test_a_least_value_is_never_too_fine_for_the_images():
    (check,) = Gates(minimum={"top1": 0.01}).check_quality({"top1": Estimate(0.0, 0.0, 0.04, images=90)}, None)
    assert check.status == "fail"


def test_numbers_that_are_no_shares_are_never_too_fine_for_the_images():
    own = {"softmax_distance": Estimate(0.002, 0.0, 0.04, images=90)}
    (check,) = Gates(maximum={"softmax_distance": 0.001}).check_quality({}, own)
    assert check.status == "fail"


def check(name, status):
    return CheckResult(name, status, 0.0, 0.0, "", "")


@pytest.mark.parametrize(
    ("statuses", "outcome"),
    [
        (["pass"], "passed"),
        (["pass", "inconclusive"], "inconclusive"),
        (["fail", "inconclusive"], "failed"),
        (["skipped", "inconclusive"], "inconclusive"),
        (["skipped"], "failed"),
        ([], "failed"),
    ],
)
def test_the_outcome_of_a_verdict(statuses, outcome):
    verdict = Verdict(tuple(check(str(number), one) for number, one in enumerate(statuses)), (), None, None)
    assert (verdict.outcome, verdict.passed) == (outcome, outcome == "passed")


def test_a_required_check_that_was_not_made_fails_the_verdict_even_beside_an_inconclusive_one():
    verdict = Verdict((check("a", "inconclusive"), check("b", "skipped")), ("b",), None, None)
    assert verdict.outcome == "failed"
    assert [one.name for one in verdict.open_checks] == ["a", "b"]
    assert [one.name for one in Verdict(verdict.checks, (), None, None).open_checks] == ["a"]


GATE_NAMES = (
    "max_drop.top1", "max_drop.worst_class", "max_drop.corruptions", "max_drop_on.jpeg 3", "max_drop.agreement",
    "max_rise.calibration_error", "max_rise.excess_error", "max_rise.rmse", "min.top1", "min.noise",
    "max.calibration_error", "max.churn", "max_ratio.macs", "max_ratio.params", "max_ratio.size", "max_ratio.p50",
    "max_ratio.memory", "max_ratio.cold_start", "max_ratio.energy", "max_quantile_ms.p95", "min_speedup",
    "max_latency_ms", "max_size_mb", "max_macs", "max_params", "max_cold_start_ms", "max_memory_mb",
    "min_images_per_second", "max_fallback_nodes", "parity",
)  # fmt: skip


@pytest.mark.parametrize("name", GATE_NAMES)
def test_every_gate_that_does_not_pass_has_a_next_step(name):
    failed, undecided, passed = with_remedies([check(name, one) for one in ("fail", "inconclusive", "pass")], ())
    assert failed.remedy
    assert undecided.remedy
    assert passed.remedy == ""


@pytest.mark.parametrize(
    ("name", "wording"),
    [
        ("max_rise.calibration_error", "label_smoothing"),
        ("max_drop.corruptions", "augmentation"),
        ("max_drop.top1", "more epochs"),
        ("max_ratio.p50", "target.latency"),
        ("max_ratio.macs", "target.macs"),
        ("max_ratio.size", "size_mb"),
        ("also.CPU.4", "verify.also"),
    ],
)
def test_the_next_step_fits_the_kind_of_gate(name, wording):
    assert wording in with_remedies([check(name, "fail")], ())[0].remedy


def test_a_gate_without_a_baseline_asks_for_one_and_a_remedy_of_its_own_is_kept():
    missing = CheckResult("max_drop.top1", "skipped", None, 0.01, "share", "no baseline file to compare with")
    assert with_remedies([missing], ["max_drop.top1"])[0].remedy == "name the baseline's file with --against"
    assert with_remedies([missing], [])[0].remedy == ""
    own = CheckResult("max_drop.top1", "inconclusive", 0.0, 0.01, "share", "", "more images")
    assert with_remedies([own], [])[0].remedy == "more images"
