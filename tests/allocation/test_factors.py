"""Factors of damages are recovered from whole networks, never free, and drawn together where little is known."""

import itertools

import numpy as np
import pytest

from compress.allocation.blocks import allocate_structure, block_decision
from compress.allocation.factors import LEAST, RIDGES, Observation, learn_factors
from compress.allocation.problem import Budget, Factor, TableCost
from compress.allocation.widths import Candidates
from compress.errors import BudgetUnreachable, InternalError

KINDS = {"a": "inside", "b": "inside", "c": "residual", "d()": "block"}
TRUE = {"a": 2.0, "b": 3.0, "c": 10.0, "d()": 0.25}


def _networks(count: int, power: float, noise: float = 0.0) -> list[Observation]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        damages = {name: float(random.uniform(0.1, 1)) * (random.random() < 0.7) for name in KINDS}
        damages["a"] += 0.05
        rise = sum(TRUE[name] * damage**power for name, damage in damages.items())
        found.append(Observation(damages, rise * float(np.exp(noise * random.normal()))))
    return found


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_factors_and_the_power_are_recovered(power: float) -> None:
    fit = learn_factors(_networks(40, power), KINDS)
    assert fit.power == power
    assert fit.ridge == RIDGES[0], "nothing is to be gained from the scale of a kind"
    assert fit.error < 0.01
    assert fit.factors == pytest.approx(TRUE, rel=0.02)
    unseen = {"a": 0.5, "d()": 0.3}
    assert fit.rise(unseen) == pytest.approx(2.0 * 0.5**power + 0.25 * 0.3**power, rel=0.02)


def test_noise_asks_for_a_stronger_ridge_and_factors_stay_near() -> None:
    fit = learn_factors(_networks(40, 1.0, noise=0.2), KINDS)
    assert fit.ridge > RIDGES[0]
    assert all(0.5 < fit.factors[name] / TRUE[name] < 2 for name in KINDS)
    assert 0.1 < fit.error < 0.4


def test_of_one_network_all_factors_are_alike() -> None:
    fit = learn_factors([Observation({"a": 1.0, "b": 3.0}, 8.0)], KINDS)
    assert fit.rise({"a": 1.0, "b": 3.0}) == pytest.approx(8.0, rel=0.01)
    assert fit.factors["a"] == pytest.approx(fit.factors["b"], rel=0.02)
    assert all(factor > 0 for factor in fit.factors.values())


def test_relative_errors_count_not_absolute_ones() -> None:
    """One factor, two networks: the least sum of squared relative errors is at x = (1/2 + 1) / (1/4 + 1) = 1.2."""
    fit = learn_factors([Observation({"a": 1.0}, 2.0), Observation({"a": 1.0}, 1.0)], {"a": "inside"})
    assert fit.power == 1.0
    assert fit.factors["a"] == pytest.approx(1.2, rel=0.01)


def test_nothing_is_free() -> None:
    seen = [Observation({"a": 1.0, "b": amount}, 1.0) for amount in (0.0, 5.0, 9.0, 13.0)] * 3
    fit = learn_factors(seen, {"a": "inside", "b": "inside"})
    assert fit.factors["b"] == pytest.approx(LEAST * fit.scales["inside"])


@pytest.mark.parametrize(
    "seen",
    [[], [Observation({"a": 1.0}, 0.0)], [Observation({"a": 1.0}, float("nan"))], [Observation({"a": 0.0}, 1.0)]],
)
def test_networks_that_teach_nothing_are_an_internal_error(seen: list[Observation]) -> None:
    with pytest.raises(InternalError, match="damaged networks of higher, finite loss"):
        learn_factors(seen, {"a": "inside"})


# -- blocks and widths in one solve ----------------------------------------------------------------------------------

LEVELS = (4, 8, 12, 16)
STREAM, INNER, OTHER = "stream", "one.conv", "two.conv"


def _problem(seed: int) -> tuple[list[Candidates], dict[str, float], TableCost]:
    """Return a stream that two blocks with a group each lie along; all of a block's cost goes with it."""
    random = np.random.default_rng(seed)
    groups = [
        Candidates(
            name,
            np.zeros(16),
            1,
            LEVELS,
            measured=np.append(np.sort(random.random(3) * 10.0 ** random.integers(-2, 2))[::-1], 0),
        )
        for name in (STREAM, INNER, OTHER)
    ]
    blocks = {"one": float(random.random()), "two": float(random.random())}
    widths = np.asarray(LEVELS, dtype=np.float64)
    factors = [Factor((STREAM,), widths)]
    for block, group in (("one", INNER), ("two", OTHER)):
        decision = block_decision(block)
        factors.append(Factor((STREAM, group), 2 * np.outer(widths, widths) + random.random((4, 4)), decision))
        factors.append(Factor((), np.asarray(3.0), decision))
    return groups, blocks, TableCost(1.0, tuple(factors))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6])
def test_one_solve_is_as_good_as_all_widths_times_all_sets_of_blocks(seed: int, share: float) -> None:
    groups, blocks, cost = _problem(seed)
    limit = share * cost.at({STREAM: 3, INNER: 3, OTHER: 3, "one()": 1, "two()": 1})
    least = np.inf
    for options in itertools.product(range(4), range(4), range(4), (0, 1), (0, 1)):
        choice = dict(zip((STREAM, INNER, OTHER, "one()", "two()"), options, strict=True))
        if cost.at(choice) <= limit:
            damage = sum(float(one.damages[choice[one.name]]) for one in groups)
            damage += sum(blocks[name] for name in blocks if not choice[block_decision(name)])
            least = min(least, damage)
    found = allocate_structure(groups, blocks, [Budget("macs", cost, limit)])
    damage = sum(float(one.damages[LEVELS.index(found.widths[one.name])]) for one in groups)
    damage += sum(blocks[name] for name in found.removed)
    assert damage == pytest.approx(least)
    assert found.is_optimal
    assert found.costs["macs"] <= limit * (1 + 1e-9)
    for block, group in (("one", INNER), ("two", OTHER)):
        if block in found.removed:
            assert found.widths[group] == 16, "a group in a removed block does no damage"
    assert found.removed == tuple(name for name in blocks if name in found.removed)


def test_what_cannot_be_reached_is_said_with_what_there_is_to_remove() -> None:
    groups, blocks, cost = _problem(0)
    with pytest.raises(
        BudgetUnreachable, match="with 3 channel groups and 2 residual blocks at the widths allowed, so"
    ):
        allocate_structure(groups, blocks, [Budget("macs", cost, 4.0)], ", so")
    with pytest.raises(BudgetUnreachable, match="No channel group and no residual block can be removed"):
        allocate_structure([], {}, [Budget("macs", cost, 4.0)])
    only_blocks = TableCost(1.0, (Factor((), np.asarray(3.0), "one()"),))
    assert allocate_structure([], {"one": 1.0}, [Budget("macs", only_blocks, 2.0)]).removed == ("one",)
