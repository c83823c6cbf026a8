"""Costs of choices as tables: pairs of decisions, sums of counts, blocks that go; values by hand."""

import itertools

import numpy as np
import pytest

from compress.allocation.costs import Axis, CoupledCost, Term, whole_channels
from compress.allocation.problem import Budget, Decision, Factor, TableCost, from_widths
from compress.allocation.sizes import SizeAxis, SizeFactor, SizeTerms
from compress.errors import InternalError

ROW = np.asarray([1.0, 2.0, 4.0])
PAIR = np.asarray([[10.0, 20.0], [30.0, 50.0], [70.0, 110.0]])


def test_an_axis_loses_slots_for_each_channel_removed():
    axis = Axis(12.0, {"a": 1.0, "b": 2.5})
    assert axis.at({}) == 12.0
    assert axis.at({"a": 3, "b": 2, "other": 9}) == 4.0
    assert axis.channels_at({"b": 1}) == 10  # 9.5, to the even one
    assert axis.channels_at({"a": 1, "b": 1}) == 8  # 8.5
    assert isinstance(axis.channels_at({}), int)


def test_whole_channels_do_not_depend_on_the_last_digits():
    assert whole_channels(np.asarray([3.0, 3.4999, 3.5001, 2.5 + 1e-9, 2.5 - 1e-9])).tolist() == [3, 3, 4, 2, 2]


def test_a_product_of_widths_is_no_sum_of_savings():
    cost = CoupledCost(
        (Term(2.0, Axis(8, {"a": 1}), Axis(4, {"b": 1})), Term(3.0, Axis(8, {"a": 1}))), 5.0, {"a": 8, "b": 4}
    )
    assert cost.full == 2 * 8 * 4 + 3 * 8 + 5
    assert cost.at({"a": 2}) == 2 * 2 * 4 + 3 * 2 + 5
    assert cost.at({"a": 2, "b": 1}) == 2 * 2 * 1 + 3 * 2 + 5


def test_tables_over_widths_have_the_fixed_cost_and_the_products():
    cost = CoupledCost(
        (Term(2.0, Axis(8, {"a": 1}), Axis(4, {"b": 1})), Term(3.0, Axis(8, {"a": 1}), Axis(8, {"a": 1}))),
        5.0,
        {"a": 8, "b": 4},
    )
    tables = from_widths(cost, {"a": (2, 8), "b": (1, 4)})
    for a, width in enumerate((2, 8)):
        for b, other in enumerate((1, 4)):
            assert tables.at({"a": a, "b": b}) == 2 * width * other + 3 * width * width + 5


def test_a_term_goes_with_its_block():
    cost = CoupledCost((Term(2.0, Axis(8, {"a": 1})), Term(1.0, Axis(8, {"a": 1}))), 5.0, {"a": 8})
    tables = from_widths(cost, {"a": (2, 8)}, {0: "block"})
    assert [tables.at({"a": a, "block": b}) for a in (0, 1) for b in (0, 1)] == [7.0, 11.0, 13.0, 29.0]


def test_every_part_of_a_product_goes_with_its_block():
    terms = (Term(2.0, Axis(8, {"a": 1}), Axis(8, {"a": 1})), Term(3.0, Axis(8, {"a": 1}), Axis(4, {"b": 1})))
    tables = from_widths(CoupledCost(terms, 5.0, {"a": 8, "b": 4}), {"a": (2, 8), "b": (1, 4)}, {0: "one", 1: "two"})
    for (a, width), (b, other), one, two in itertools.product(enumerate((2, 8)), enumerate((1, 4)), (0, 1), (0, 1)):
        wanted = 5 + one * 2 * width * width + two * 3 * width * other
        assert tables.at({"a": a, "b": b, "one": one, "two": two}) == wanted


@pytest.fixture
def cost() -> TableCost:
    return TableCost(
        0.5,
        (
            Factor((), np.asarray(2.0)),
            Factor(("a",), ROW),
            Factor(("a", "b"), PAIR),
            Factor(("a",), ROW * 1000, "block"),
            Factor((), np.asarray(300.0), "block"),
        ),
    )


@pytest.mark.parametrize(
    ("choice", "value"),
    [
        ({"a": 0, "b": 0, "block": 0}, 0.5 + 2 + 1 + 10),
        ({"a": 2, "b": 1, "block": 0}, 0.5 + 2 + 4 + 110),
        ({"a": 1, "b": 1, "block": 1}, 0.5 + 2 + 2 + 50 + 2000 + 300),
    ],
)
def test_the_cost_of_a_choice_is_the_sum_of_its_tables(cost, choice, value):
    assert cost.at(choice) == value
    for name, count in {"a": 3, "b": 2, "block": 2}.items():
        wanted = [cost.at({**choice, name: option}) for option in range(count)]
        assert cost.of_options(choice, name).tolist() == wanted
        assert cost.of_options(choice, name, cost.at(choice)).tolist() == wanted
        assert cost.of_each(choice, [name], cost.at(choice))[name].tolist() == wanted
    assert cost.of_options(choice, "nothing").tolist() == [value]
    assert cost.of_each(choice, ["nothing"], value)["nothing"].tolist() == [value]


def test_costs_without_blocks_are_the_same_in_one_pass():
    cost = TableCost(0.5, (Factor(("a",), ROW), Factor(("a", "b"), PAIR)))
    choice = {"a": 1, "b": 0}
    each = cost.of_each(choice, ["a", "b", "c"], cost.at(choice))
    assert {name: row.tolist() for name, row in each.items()} == {
        "a": [11.5, 32.5, 74.5],
        "b": [32.5, 52.5],
        "c": [32.5],
    }


def test_sizes_are_those_that_options_can_leave():
    axis = SizeAxis(16.0, {"a": np.asarray([6.0, 3.0, 0.0]), "b": np.asarray([4.0, 0.0])})
    assert axis.sizes.tolist() == [6, 9, 10, 12, 13, 16]
    assert axis.is_whole
    assert axis.places(np.asarray([0.0, 4.0, 10.0])).tolist() == [5, 3, 0]
    assert SizeAxis(5.0, {}).sizes.tolist() == [5]
    assert SizeAxis(5.0, {"a": np.asarray([2.0, 1.0])}).sizes.tolist() == [3, 4], "the full count cannot occur"


def test_shares_of_a_channel_leave_any_count_between():
    axis = SizeAxis(8.0, {"a": np.asarray([4.5, 0.0])})
    assert axis.sizes.tolist() == [4, 5, 6, 7, 8]
    assert not axis.is_whole
    assert not SizeAxis(8.5, {"a": np.asarray([4.0, 0.0])}).is_whole


def test_an_axis_cannot_lose_more_than_it_has():
    with pytest.raises(InternalError, match="of 4 channels cannot lose 6"):
        SizeAxis(4.0, {"a": np.asarray([3.0, 0.0]), "b": np.asarray([3.0, 0.0])})


OUT = SizeAxis(6.0, {"a": np.asarray([2.0, 0.0]), "b": np.asarray([2.0, 0.0])})  # 2, 4, 6
INP = SizeAxis(5.0, {"b": np.asarray([3.0, 0.0]), "c": np.asarray([1.0, 0.0])})  # 1, 2, 4, 5
TABLE = np.arange(12.0).reshape(3, 4) ** 2


def test_a_table_must_have_a_place_for_every_size():
    with pytest.raises(InternalError, match=r"must have the shape \(3, 4\), it has \(4, 3\)"):
        SizeFactor((OUT, INP), TABLE.T)
    with pytest.raises(InternalError, match="must have the shape"):
        SizeFactor((), np.asarray(1.0))
    assert SizeFactor((OUT, INP), TABLE).decisions == ("a", "b", "c")


@pytest.mark.parametrize("switch", [None, "block"])
def test_costs_over_counts_are_looked_up_by_their_sums(switch):
    factors = (SizeFactor((OUT, INP), TABLE, switch), SizeFactor((INP,), np.asarray([1.0, 10.0, 100.0, 1000.0])))
    cost = TableCost(0.25, (Factor(("a",), np.asarray([7.0, 8.0])),), factors)
    for a in (0, 1):
        for b in (0, 1):
            for c in (0, 1):
                for block in (0, 1):
                    choice = {"a": a, "b": b, "c": c, "block": block}
                    place = 2 * b + c if b == 0 else 2 + c  # of what is left of 5: 1, 2, 4, 5
                    value = 0.25 + 7 + a + 10**place
                    if switch is None or block:
                        value += TABLE[a + b, place]
                    assert cost.at(choice) == value
    for choice in ({"a": 0, "b": 1, "c": 0, "block": 1}, {"a": 1, "b": 0, "c": 1, "block": 0}):
        each = cost.of_each(choice, ["a", "b", "c", "block", "d"], cost.at(choice))
        for name in choice:
            wanted = [cost.at({**choice, name: option}) for option in (0, 1)]
            assert np.broadcast_to(each[name], 2).tolist() == wanted
            assert np.broadcast_to(cost.of_options(choice, name), 2).tolist() == wanted
        assert each["d"].tolist() == [cost.at(choice)]


def test_changes_name_only_what_they_are_asked_for_and_what_matters():
    terms = SizeTerms([SizeFactor((OUT,), np.asarray([0.0, 1.0, 5.0]))])
    found = terms.changes({"a": 1, "b": 1, "x": 0}, ["a", "x"])
    assert {name: row.tolist() for name, row in found.items()} == {"a": [-4.0, 0.0]}
    assert SizeTerms([]).changes({"a": 1}, ["a"]) == {}
    assert SizeTerms([]).at({"a": 1}) == 0.0


def test_a_budget_is_kept_up_to_rounding():
    budget = Budget("ms", TableCost(0.0, (Factor(("a",), np.asarray([10.0, 10.0 + 1e-9, 10.001])),)), 10.0)
    assert [budget.allows({"a": option}) for option in range(3)] == [True, True, False]
    assert (budget.within(10.0), budget.within(10.1)) == (True, False)
    assert budget.show(5.0) == "5 ms"
    assert Budget("ms", TableCost(0.0), 10.0, 20.0, "it").show(5.0) == "0.250 of it"


def test_decisions_have_finite_damages_of_at_least_zero():
    for damages, text in (
        ([np.inf], "finite"),
        ([-1.0], "finite"),
        ([], "row of options"),
        ([[1.0]], "row of options"),
    ):
        with pytest.raises(InternalError, match=text):
            Decision("a", np.asarray(damages))
    assert Decision("a", np.zeros(1)).name == "a"
