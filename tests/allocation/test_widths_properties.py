"""Allocation of widths: the budget is never exceeded in silence, floors, caps and multiples always hold."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compress.allocation.costs import Axis, CoupledCost, Term
from compress.allocation.problem import Budget, from_widths
from compress.allocation.widths import Candidates, Limits, allocate_widths, width_levels
from compress.errors import BudgetUnreachable

METHODS = st.sampled_from(["global", "uniform"])
SETTINGS = settings(max_examples=60, deadline=None)


@st.composite
def problems(draw):
    """Draw a chain of layers: groups with scores, a cost in which neighbours multiply, and limits."""
    count = draw(st.integers(1, 5))
    limits = Limits(
        min_width=draw(st.integers(1, 12)),
        max_removed_ratio=draw(st.sampled_from([0.1, 0.5, 0.9, 0.99])),
        multiple_of=draw(st.sampled_from([1, 2, 8])),
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tied = draw(st.booleans())
    groups = []
    for index in range(count):
        parts = draw(st.sampled_from([1, 1, 2, 4]))
        units = draw(st.integers(1, 12))
        scores = random.integers(0, 3, units).astype(float) if tied else random.random(units) * random.choice([1, 100])
        groups.append(Candidates(f"g{index}", scores, parts, width_levels(units * parts, parts, limits)))
    cost = _chain_cost(groups, [draw(st.integers(1, 50)) for _ in range(count + 1)], draw(st.integers(0, 100)))
    return groups, cost, limits


def _chain_cost(groups: list[Candidates], factors: list[int], fixed: int) -> CoupledCost:
    axes = [Axis(3.0), *(Axis(float(group.full), {group.name: 1.0}) for group in groups), Axis(4.0)]
    terms = [Term(float(f), axes[i + 1], axes[i]) for i, f in enumerate(factors)]
    return CoupledCost(tuple(terms), float(fixed), {group.name: group.full for group in groups})


def _allocate(groups, cost, budget, method="global", limits_text=""):
    tables = from_widths(cost, {group.name: group.levels for group in groups})
    whole = Budget("macs", tables, budget, cost.full, "the whole")
    return allocate_widths(groups, [whole], method, limits_text)[0]


def _least(groups: list[Candidates], cost: CoupledCost) -> float:
    return cost.at({group.name: group.levels[0] for group in groups})


@SETTINGS
@given(problems(), st.floats(0.01, 1.2), METHODS)
def test_budget_is_kept_or_the_best_is_named(problem, share, method):
    groups, cost, limits = problem
    budget = share * cost.full
    best = _least(groups, cost)
    if best > budget:
        with pytest.raises(BudgetUnreachable, match=re.escape(f"the best is {best / cost.full:.3f} of the whole, ")):
            _allocate(groups, cost, budget, method)
        return
    widths = _allocate(groups, cost, budget, method)
    assert cost.at(widths) <= budget * (1 + 1e-9)
    for group in groups:
        width = widths[group.name]
        assert width in group.levels
        assert width >= min(limits.min_width, group.full)
        assert width >= group.full * (1 - limits.max_removed_ratio) - 1e-6
        removed = group.removed_units(width)
        assert len(removed) * group.channels_per_unit == group.full - width
        kept = set(range(len(group.scores))) - set(removed)
        assert not removed or max(group.scores[list(removed)]) <= min(group.scores[list(kept)])


@SETTINGS
@given(problems(), st.floats(0.01, 1.0), METHODS)
def test_nothing_that_still_fits_is_left_on_the_table(problem, share, method):
    groups, cost, _ = problem
    budget = share * cost.full
    assume(_least(groups, cost) <= budget)
    widths = _allocate(groups, cost, budget, method)
    for group in groups:
        for wider in (level for level in group.levels if level > widths[group.name]):
            assert cost.at({**widths, group.name: wider}) > budget * (1 - 1e-9)


@SETTINGS
@given(problems(), st.lists(st.floats(0.01, 1.1), min_size=2, max_size=8), METHODS)
def test_a_larger_budget_reaches_no_lower_cost_and_no_larger_damage(problem, shares, method):
    # A network at a lower cost is within the smaller budget, too: only one of equal damage can be preferred there.
    groups, cost, _ = problem
    budgets = [share * cost.full for share in sorted(shares) if share * cost.full >= _least(groups, cost)]
    assume(len(budgets) > 1)
    found = [_allocate(groups, cost, budget, method) for budget in budgets]
    for smaller, larger in itertools.pairwise(found):
        before, after = _damage(groups, smaller), _damage(groups, larger)
        assert method == "uniform" or after <= before * (1 + 1e-9)
        assert cost.at(larger) >= cost.at(smaller) or (method == "global" and after >= before * (1 - 1e-9))


def _damage(groups, widths):
    return sum(group.damages[group.levels.index(widths[group.name])] for group in groups)


@SETTINGS
@given(problems(), METHODS)
def test_every_cost_between_least_and_full_is_a_budget_that_can_be_met(problem, method):
    groups, cost, _ = problem
    least = _least(groups, cost)
    for budget in np.linspace(least, cost.full, 5):
        assert cost.at(_allocate(groups, cost, float(budget) + 1e-9, method)) <= budget + 1e-6
    assert _allocate(groups, cost, cost.full, method) == {group.name: group.full for group in groups}


@SETTINGS
@given(problems(), st.floats(0.2, 1.0), METHODS, st.randoms(use_true_random=False))
def test_order_of_the_groups_does_not_matter(problem, share, method, random):
    groups, cost, _ = problem
    budget = share * cost.full
    assume(_least(groups, cost) <= budget)
    shuffled = list(groups)
    random.shuffle(shuffled)
    assert _allocate(groups, cost, budget, method) == _allocate(shuffled, cost, budget, method)


@SETTINGS
@given(problems(), st.floats(0.3, 0.99))
def test_one_layer_ranking_lowest_is_not_emptied_and_the_target_is_met(problem, share):
    groups, cost, limits = problem
    lowest = groups[0]
    groups = [Candidates(lowest.name, lowest.scores * 1e-6, lowest.channels_per_unit, lowest.levels), *groups[1:]]
    budget = share * cost.full
    assume(_least(groups, cost) <= budget)
    widths = _allocate(groups, cost, budget, "global")
    assert cost.at(widths) <= budget * (1 + 1e-9)
    assert widths[lowest.name] >= max(1, math.ceil(lowest.full * (1 - limits.max_removed_ratio) - 1e-6))


@SETTINGS
@given(problems(), st.floats(0.2, 1.0))
def test_scores_matter_by_their_order_and_scale_only_within_the_uniform_method(problem, share):
    """Uniform widths do not depend on how large the scores of a group are before the rest is spent."""
    groups, cost, _ = problem
    budget = share * cost.full
    assume(_least(groups, cost) <= budget)
    larger = [Candidates(g.name, g.scores * 8, g.channels_per_unit, g.levels) for g in groups]
    assert _allocate(groups, cost, budget, "uniform") == _allocate(larger, cost, budget, "uniform")


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.data())
def test_ties_go_from_the_back_and_removals_are_nested(values, data):
    group = Candidates("g", np.array(values, float), 1, tuple(range(1, len(values) + 1)))
    width = data.draw(st.integers(1, len(values)))
    removed = group.removed_units(width)
    expected = sorted(range(len(values)), key=lambda unit: (values[unit], -unit))[: len(values) - width]
    assert list(removed) == sorted(expected)
    if width > 1:
        assert set(removed) < set(group.removed_units(width - 1))


@given(st.integers(1, 300), st.sampled_from([1, 2, 4]), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(1, 32))
def test_levels_keep_floor_cap_and_multiple(units, parts, min_width, max_removed_ratio, multiple_of):
    full = units * parts
    levels = width_levels(full, parts, Limits(min_width, max_removed_ratio, multiple_of))
    assert levels[-1] == full
    assert list(levels) == sorted(set(levels))
    for level in levels[:-1]:
        assert level >= max(1, min_width, parts)
        assert level >= full * (1 - max_removed_ratio) - 1e-6
        assert level % parts == 0
        if full >= 2 * multiple_of:
            assert level % multiple_of == 0


def _equal_groups(count: int, width: int) -> tuple[list[Candidates], CoupledCost]:
    levels = width_levels(width, 1, Limits())
    groups = [Candidates(f"g{i}", np.arange(width, dtype=float), 1, levels) for i in range(count)]
    return groups, _chain_cost(groups, [1] * (count + 1), 0)


def test_uniform_takes_the_same_share_of_every_group():
    groups, cost = _equal_groups(4, 32)
    uneven = [Candidates(g.name, g.scores * 10**i, 1, g.levels) for i, g in enumerate(groups)]
    widths = _allocate(uneven, cost, 0.5 * cost.full, "uniform")
    assert max(widths.values()) - min(widths.values()) <= 1
    assert 0.47 * cost.full < cost.at(widths) <= 0.5 * cost.full


def test_global_takes_from_the_group_with_the_lowest_scores():
    groups, cost = _equal_groups(3, 32)
    groups[1] = Candidates("g1", groups[1].scores * 1e-3, 1, groups[1].levels)
    widths = _allocate(groups, cost, 0.3 * cost.full, "global")
    assert widths["g1"] < 10
    assert min(widths["g0"], widths["g2"]) > 28


def test_all_scores_equal_still_meets_the_budget_closely():
    levels = width_levels(32, 1, Limits())
    groups = [Candidates(f"g{i}", np.ones(32), 1, levels) for i in range(3)]
    cost = _chain_cost(groups, [1] * 4, 0)
    widths = _allocate(groups, cost, 0.5 * cost.full, "global")
    assert 0.47 * cost.full < cost.at(widths) <= 0.5 * cost.full


def test_unreachable_names_the_best_and_the_limits():
    groups, cost = _equal_groups(2, 8)
    limited = [Candidates(g.name, g.scores, 1, (6, 8)) for g in groups]
    best = _least(limited, cost) / cost.full
    text = re.escape(f"the best is {best:.3f} of the whole, with 2 channel groups at the widths allowed (limits).")
    with pytest.raises(BudgetUnreachable, match=f"0.100 .* cannot be reached; {text}"):
        _allocate(limited, cost, 0.1 * cost.full, "global", " (limits)")


def test_no_groups_at_all_is_unreachable():
    with pytest.raises(BudgetUnreachable, match="No prunable channel group is left"):
        _allocate([], CoupledCost((), 10.0, {}), 5.0)
