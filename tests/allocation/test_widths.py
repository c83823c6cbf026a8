"""Widths, damages and levels of single groups, by hand."""

import re

import numpy as np
import pytest

from compress.allocation.costs import Axis, CoupledCost, Term
from compress.allocation.problem import Budget, Factor, TableCost, from_widths
from compress.allocation.widths import Candidates, Limits, allocate_widths, width_levels
from compress.errors import BudgetUnreachable


def _group(name="a", scores=(4.0, 1.0, 3.0, 2.0), parts=1, levels=(1, 2, 3, 4), **more) -> Candidates:
    return Candidates(name, np.asarray(scores), parts, levels, **more)


def test_damage_is_the_squared_sum_of_the_lowest_scores():
    assert _group().damages.tolist() == [36.0, 9.0, 1.0, 0.0]
    assert _group(scores=(0.5, 0.5, 0.5, 0.5), levels=(2, 4)).damages.tolist() == [1.0, 0.0]


def test_damage_counts_units_and_not_channels():
    group = _group(scores=(1.0, 2.0), parts=3, levels=(3, 6))
    assert group.full == 6
    assert group.damages.tolist() == [1.0, 0.0]


def test_scores_below_zero_do_no_damage():
    assert _group(scores=(-3.0, 1.0), levels=(1, 2)).damages.tolist() == [0.0, 0.0]


def test_measured_damage_counts_instead_of_scores():
    measured = np.asarray([7.0, 0.5, 0.0])
    assert _group(levels=(1, 2, 4), measured=measured).damages is measured


@pytest.mark.parametrize("measured", [None, np.asarray([7.0, 5.0, 3.0, 0.0])])
@pytest.mark.parametrize("factor", [4.0, 0.25, 1e4])
def test_dearer_multiplies_every_damage_by_the_factor(measured, factor):
    group = _group(measured=measured)
    dearer = group.dearer(factor)
    assert dearer.damages == pytest.approx(factor * group.damages)
    assert (dearer.name, dearer.levels, dearer.order) == (group.name, group.levels, None)
    assert dearer.removed_units(2) == group.removed_units(2)


def test_units_go_by_score_and_of_equals_the_later_first():
    group = _group(scores=(1.0, 0.0, 1.0, 1.0))
    assert [group.removed_units(width) for width in (4, 3, 2, 1)] == [(), (1,), (1, 3), (1, 2, 3)]


def test_units_go_in_the_order_given():
    group = _group(order=np.asarray([2, 0, 1, 3]))
    assert [group.removed_units(width) for width in (3, 2, 1)] == [(2,), (0, 2), (0, 1, 2)]
    pairs = _group(scores=(1.0, 2.0), parts=2, levels=(2, 4), order=np.asarray([1, 0]))
    assert pairs.removed_units(2) == (1,)


@pytest.mark.parametrize(
    ("full", "parts", "limits", "at_most", "levels"),
    [
        (4, 1, Limits(), None, (1, 2, 3, 4)),
        (20, 1, Limits(), None, tuple(range(2, 21))),
        (20, 1, Limits(max_removed_ratio=0.5), None, tuple(range(10, 21))),
        (20, 1, Limits(min_width=18), None, (18, 19, 20)),
        (20, 1, Limits(min_width=99), None, (20,)),
        (32, 1, Limits(multiple_of=8), None, (8, 16, 24, 32)),
        (33, 1, Limits(multiple_of=8), None, (8, 16, 24, 32, 33)),
        (16, 1, Limits(multiple_of=8), None, (8, 16)),
        (15, 1, Limits(multiple_of=8), None, (4, 8, 12, 15)),
        (5, 1, Limits(multiple_of=3), None, (1, 2, 3, 4, 5)),
        (12, 4, Limits(), None, (4, 8, 12)),
        (12, 3, Limits(multiple_of=2), None, (6, 12)),
        (64, 1, Limits(multiple_of=8), 4, (16, 32, 48, 64)),
        (64, 1, Limits(multiple_of=8), 8, tuple(range(8, 65, 8))),
        (72, 1, Limits(multiple_of=8), 8, (16, 32, 48, 64, 72)),
        (10, 1, Limits(max_removed_ratio=0.7), None, (3, 4, 5, 6, 7, 8, 9, 10)),
    ],
)
def test_levels(full, parts, limits, at_most, levels):
    assert width_levels(full, parts, limits, at_most) == levels


def _budget(limit: float, levels, whole: float | None = None) -> Budget:
    cost = CoupledCost((Term(1.0, Axis(4, {"a": 1}), Axis(4, {"b": 1})),), 0.0, {"a": 4, "b": 4})
    return Budget("macs", from_widths(cost, levels), limit, whole, "the baseline's macs")


LEVELS = {"a": (1, 2, 3, 4), "b": (1, 2, 3, 4)}


def test_global_takes_what_harms_least_and_uniform_the_same_share():
    groups = [_group("a", (0.1, 0.1, 0.1, 9.0)), _group("b", (5.0, 5.0, 5.0, 5.0))]
    assert allocate_widths(groups, [_budget(4.0, LEVELS)]) == ({"a": 1, "b": 4}, True)
    assert allocate_widths(groups, [_budget(4.0, LEVELS)], "uniform") == ({"a": 2, "b": 2}, False)


def test_uniform_uses_up_what_equal_shares_leave():
    groups = [_group("a"), _group("b")]
    widths, _ = allocate_widths(groups, [_budget(6.0, LEVELS)], "uniform")
    assert sorted(widths.values()) == [2, 3]


def test_unreachable_says_what_limits_the_widths():
    text = "Target 0.020 of the baseline's macs cannot be reached; the best is 0.062 of the baseline's macs"
    for method in ("global", "uniform"):
        for groups, counted in (([_group("a"), _group("b")], ", with 2 channel groups at the widths allowed (why)."),):
            with pytest.raises(BudgetUnreachable, match=re.escape(text + counted)) as caught:
                allocate_widths(groups, [_budget(0.32, LEVELS, 16.0)], method, " (why)")
            assert caught.value.best == 1.0


def test_one_group_is_named_in_the_singular():
    cost = TableCost(0.0, (Factor(("a",), np.asarray([1.0, 2.0, 3.0, 4.0])),))
    with pytest.raises(BudgetUnreachable, match="with 1 channel group at the widths allowed"):
        allocate_widths([_group()], [Budget("macs", cost, 0.5)])
    with pytest.raises(BudgetUnreachable, match="No prunable channel group"):
        allocate_widths([], [Budget("macs", cost, 0.5)])


@pytest.mark.parametrize(
    ("limit", "widths"),
    [
        (8.0, {"a": 4, "b": 4}),
        (6.0, {"a": 3, "b": 3}),
        (5.0, {"a": 3, "b": 2}),
        (4.0, {"a": 3, "b": 1}),
        (2.0, {"a": 1, "b": 1}),
    ],
)
def test_one_bound_on_the_damage_of_every_group_by_hand(limit, widths):
    """Bounds 0, 0.5, 1, 1.5, 2, 4, 9 leave 4+4, 4+3, 3+3, 3+2, 3+1, 2+1, 1+1 channels; the first that fits is taken."""
    damages = {"a": [9.0, 4.0, 1.0, 0.0], "b": [2.0, 1.5, 0.5, 0.0]}
    groups = [
        Candidates(name, np.zeros(4), 1, (1, 2, 3, 4), measured=np.asarray(values)) for name, values in damages.items()
    ]
    cost = TableCost(0.0, tuple(Factor((name,), np.arange(1.0, 5.0)) for name in damages))
    found, is_optimal = allocate_widths(groups, [Budget("macs", cost, limit, 8.0)], "shared_error")
    assert found == widths
    assert not is_optimal
