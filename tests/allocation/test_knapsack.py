"""The search for widths, by hand: what is proved, what is found where nothing can be, and in which order."""

import itertools

import numpy as np
import pytest

from compress.allocation import knapsack, program
from compress.allocation.knapsack import allocate, allocate_evenly
from compress.allocation.problem import Budget, Decision, Factor, TableCost
from compress.allocation.program import Program
from compress.allocation.sizes import SizeAxis, SizeFactor
from compress.errors import BudgetUnreachable

DAMAGES = {"a": (9.0, 4.0, 0.0), "b": (8.0, 3.0, 0.0), "c": (7.0, 2.0, 0.0)}
LOST = np.asarray([4.0, 2.0, 0.0])


def _decisions(damages=None):
    return [Decision(name, np.asarray(values)) for name, values in (damages or DAMAGES).items()]


def _row_cost() -> TableCost:
    return TableCost(1.0, tuple(Factor((name,), np.asarray([1.0, 3.0, 5.0])) for name in DAMAGES))


def _sum_cost() -> TableCost:
    axis = SizeAxis(12.0, dict.fromkeys(DAMAGES, LOST))
    return TableCost(1.0, (), (SizeFactor((axis,), axis.sizes**1.5),))


def _best(cost: TableCost, limit: float) -> float:
    choices = (dict(zip(DAMAGES, options, strict=True)) for options in itertools.product(range(3), repeat=3))
    return min(sum(DAMAGES[n][o] for n, o in choice.items()) for choice in choices if cost.at(choice) <= limit + 1e-9)


@pytest.mark.parametrize("cost", [_row_cost(), _sum_cost()], ids=["rows", "sums"])
@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.8])
def test_the_least_damage_is_found_and_proved(cost, share):
    limit = share * cost.at(dict.fromkeys(DAMAGES, 2))
    found = allocate(_decisions(), [Budget("ms", cost, limit)])
    assert found.is_optimal
    assert found.damage == pytest.approx(_best(cost, limit))
    assert found.costs == {"ms": cost.at(found.choice)}
    assert found.costs["ms"] <= limit


def test_nothing_is_proved_by_a_search_that_is_not_exact(monkeypatch):
    monkeypatch.setattr(knapsack, "EXACT_VARIABLES", 0)
    for cost in (_row_cost(), _sum_cost()):
        found = allocate(_decisions(), [Budget("ms", cost, 0.6 * cost.at(dict.fromkeys(DAMAGES, 2)))])
        assert not found.is_optimal


def test_nothing_is_proved_when_the_solver_stops_early(monkeypatch):
    def stopped(self, scale, lowered=None):
        return dict.fromkeys(DAMAGES, 1), False

    monkeypatch.setattr(Program, "least_damage", stopped)
    found = allocate(_decisions(), [Budget("ms", _row_cost(), 11.0)])
    assert not found.is_optimal


def test_nothing_is_proved_when_the_limit_had_to_be_lowered(monkeypatch):
    """The solver keeps a limit to a tolerance; an answer to a stricter question proves nothing about this one."""
    true, asked = Program.least_damage, []

    def tolerant(self, scale, lowered=None):
        asked.append(list(lowered))
        return ({"a": 2, "b": 2, "c": 2}, True) if len(asked) == 1 else true(self, scale, lowered)

    monkeypatch.setattr(Program, "least_damage", tolerant)
    found = allocate(_decisions(), [Budget("ms", _row_cost(), 12.0)])
    assert len(asked) == 2
    assert asked[1][0] == pytest.approx(1.5 * (16 / 12 - 1))
    assert not found.is_optimal


def test_what_harms_nothing_is_proved_without_a_search(monkeypatch):
    monkeypatch.setattr(Program, "least_damage", None)
    found = allocate(_decisions(), [Budget("ms", _row_cost(), 16.0)])
    assert (found.choice, found.damage, found.is_optimal) == (dict.fromkeys(DAMAGES, 2), 0.0, True)


def test_a_solver_that_ends_at_its_limit_on_nodes_says_so(monkeypatch):
    class Ended:
        x = np.zeros(9)
        status = 1

    monkeypatch.setattr(program, "milp", lambda *args, **more: Ended)
    choice, is_proved = Program(_decisions(), [Budget("ms", _row_cost(), 9.0)]).least_damage(1.0)
    assert (choice, is_proved) == (dict.fromkeys(DAMAGES, 0), False)
    Ended.status = 0
    assert Program(_decisions(), [Budget("ms", _row_cost(), 9.0)]).least_damage(1.0)[1]
    Ended.x = None
    assert Program(_decisions(), [Budget("ms", _row_cost(), 9.0)]).least_damage(1.0) == (None, False)


def test_axes_and_pairs_are_shared_by_the_budgets():
    axis = SizeAxis(12.0, dict.fromkeys(DAMAGES, LOST))  # 0, 2, ... 12
    single = SizeAxis(4.0, {"a": LOST})
    table = np.outer(single.sizes + 1.0, axis.sizes)
    costs = [TableCost(0.0, (), (SizeFactor((single, axis), table * factor),)) for factor in (1.0, 2.0)]
    built = Program(_decisions(), [Budget(name, cost, 9.0) for name, cost in zip("mn", costs, strict=True)])
    assert built.size == 9 + 7 + 3 * 7


def test_the_least_cost_over_sums_is_exact():
    """A staircase over the sum has its least where no change of one decision leads."""
    axis = SizeAxis(12.0, dict.fromkeys(DAMAGES, LOST))
    cost = TableCost(1.0, (), (SizeFactor((axis,), np.asarray([9.0, 8.0, 2.0, 7.0, 6.0, 8.0, 3.0])),))
    budget = Budget("ms", cost, 10.0)
    choice = Program(_decisions(), [budget]).least_cost(budget)
    assert cost.at(choice) == 3.0
    with pytest.raises(BudgetUnreachable, match="the best is 3 ms"):
        allocate(_decisions(), [Budget("ms", cost, 2.5)])
    found = allocate(_decisions(), [Budget("ms", cost, 3.5)])
    assert (found.costs, found.is_optimal) == ({"ms": 3.0}, True)


def test_the_even_search_takes_the_first_choice_that_fits_and_fills_it_up():
    choices = [dict.fromkeys(DAMAGES, option) for option in (2, 1, 0)]
    found = allocate_evenly(_decisions(), [Budget("ms", _row_cost(), 12.5)], choices)
    assert found.choice == {"a": 2, "b": 1, "c": 1}, "4 is the most damage that 2 ms avoid"
    assert not found.is_optimal
    nothing = allocate_evenly(_decisions(), [Budget("ms", _row_cost(), 5.0)], choices[:1])
    assert nothing.costs["ms"] <= 5.0
    with pytest.raises(BudgetUnreachable, match="the best is 4 ms, for a reason"):
        allocate_evenly(_decisions(), [Budget("ms", _row_cost(), 3.0)], choices, ", for a reason")


def test_budgets_that_exclude_one_another_are_refused_together():
    up = TableCost(0.0, (Factor(("a",), np.asarray([1.0, 2.0, 3.0])),))
    down = TableCost(0.0, (Factor(("a",), np.asarray([3.0, 2.0, 1.0])),))
    budgets = [Budget("m", up, 1.5), Budget("n", down, 1.5)]
    for search in (
        lambda: allocate(_decisions(), budgets),
        lambda: allocate_evenly(_decisions(), budgets, [dict.fromkeys(DAMAGES, 1)]),
    ):
        said = r"^Targets 1\.5 m, 1\.5 n cannot be reached together; the nearest found is \d m, \d n\.$"
        with pytest.raises(BudgetUnreachable, match=said):
            search()
