"""Whatever the spectra and costs: ranks keep the error, cost falls with the error, and a budget is never exceeded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import BudgetUnreachable
from compress.lowrank.ranks import (
    Cost,
    LayerSpectra,
    Metric,
    RankChoice,
    SchemeSpectra,
    allowed_ranks,
    choose_ranks,
    solve_relative_error,
)

METRICS = st.sampled_from(["macs", "params"])
ERRORS = st.floats(0, 1)
MULTIPLES = st.sampled_from([1, 2, 4, 8])


def _spectrum(energies: list[float]) -> np.ndarray:
    return np.sort(np.asarray(energies, np.float64))[::-1]


SPECTRA = st.lists(st.floats(0, 10), min_size=1, max_size=20).map(_spectrum)


@st.composite
def layers(draw: st.DrawFn, name: str) -> LayerSpectra:
    """A layer with up to three schemes of arbitrary cost; a third of the spectra are all zero or tied."""
    cost = st.integers(1, 50)
    options = []
    for scheme in draw(st.lists(st.sampled_from(["nc", "vh", "tucker2"]), max_size=3, unique=True)):
        count = 2 if scheme == "tucker2" else 1
        costs = [Cost(draw(cost), draw(cost) if count == 2 else 0, draw(cost) if count == 2 else 0) for _ in range(2)]
        options.append(SchemeSpectra(scheme, tuple(draw(SPECTRA) for _ in range(count)), *costs))
    return LayerSpectra(name, draw(st.integers(1, 600)), draw(st.integers(1, 600)), tuple(options))


NETWORKS = st.integers(1, 4).flatmap(lambda count: st.tuples(*[layers(f"layer{index}") for index in range(count)]))


def _true_bound(layer: LayerSpectra, choice: RankChoice) -> float:
    """Compute the error bound by a sum over the spectrum, another way than the code does."""
    (option,) = [option for option in layer.schemes if option.scheme == choice.scheme]
    lost = 0.0
    for values, rank in zip(option.singular_values, choice.ranks, strict=True):
        energy = float(np.sum(values**2))
        lost += float(np.sum(values[rank:] ** 2)) / energy if energy > 0 else 0.0
    return lost**0.5


def _total(choices: tuple[RankChoice, ...], metric: Metric) -> int:
    return sum(choice.cost(metric) for choice in choices)


@given(NETWORKS, ERRORS, MULTIPLES, METRICS)
def test_choice_keeps_the_error_the_grid_and_both_costs(
    network: tuple[LayerSpectra, ...], error: float, multiple_of: int, metric: Metric
) -> None:
    for layer, choice in zip(network, choose_ranks(network, error, multiple_of, metric), strict=True):
        assert choice.layer == layer.layer
        if choice.scheme is None:
            assert (choice.ranks, choice.macs, choice.params) == ((), layer.macs, layer.params)
            continue
        (option,) = [option for option in layer.schemes if option.scheme == choice.scheme]
        assert _true_bound(layer, choice) <= error + 1e-7
        assert choice.error_bound == pytest.approx(_true_bound(layer, choice), abs=1e-6)
        assert (choice.macs, choice.params) == (option.macs.at(choice.ranks), option.params.at(choice.ranks))
        assert choice.macs <= layer.macs
        assert choice.params <= layer.params
        assert choice.cost(metric) < (layer.macs if metric == "macs" else layer.params)
        for rank, values in zip(choice.ranks, option.singular_values, strict=True):
            assert rank in allowed_ranks(len(values), multiple_of)


@given(NETWORKS, ERRORS, MULTIPLES)
def test_no_cheaper_ranks_would_keep_the_error(
    network: tuple[LayerSpectra, ...], error: float, multiple_of: int
) -> None:
    for layer, choice in zip(network, choose_ranks(network, error, multiple_of), strict=True):
        for option in layer.schemes:
            grids = [allowed_ranks(len(values), multiple_of) for values in option.singular_values]
            for ranks in np.stack(np.meshgrid(*grids), -1).reshape(-1, len(grids)).tolist():
                rival = RankChoice(layer.layer, option.scheme, tuple(ranks), 0.0, option.macs.at(tuple(ranks)), 0)
                keeps = _true_bound(layer, rival) <= error - 1e-7
                fits = rival.macs <= layer.macs and option.params.at(tuple(ranks)) <= layer.params
                assert not (keeps and fits and rival.macs < choice.macs)


@given(NETWORKS, ERRORS, ERRORS, MULTIPLES, METRICS)
def test_cost_never_rises_with_the_error(
    network: tuple[LayerSpectra, ...], one: float, other: float, multiple_of: int, metric: Metric
) -> None:
    small, large = sorted((one, other))
    strict = _total(choose_ranks(network, small, multiple_of, metric), metric)
    assert _total(choose_ranks(network, large, multiple_of, metric), metric) <= strict


@settings(max_examples=60, deadline=None)
@given(NETWORKS, st.integers(0, 300), st.floats(0.05, 1.2), MULTIPLES, METRICS)
def test_budget_is_met_by_the_smallest_error_or_refused(
    network: tuple[LayerSpectra, ...], fixed: int, kept: float, multiple_of: int, metric: Metric
) -> None:
    dense = fixed + sum(layer.macs if metric == "macs" else layer.params for layer in network)
    best = fixed + _total(choose_ranks(network, 1.0, multiple_of, metric), metric)
    target = kept * dense
    if min(best, dense) > target:
        with pytest.raises(BudgetUnreachable, match=f"the best is {best / dense:.2f}, limited by"):
            solve_relative_error(network, fixed, target, multiple_of, metric)
        return
    error = solve_relative_error(network, fixed, target, multiple_of, metric)
    assert 0 <= error <= 1
    if dense <= target:
        assert error == 0
        return
    assert fixed + _total(choose_ranks(network, error, multiple_of, metric), metric) <= target
    if error > 1e-9:
        assert fixed + _total(choose_ranks(network, error * (1 - 1e-9), multiple_of, metric), metric) > target


@given(st.integers(1, 40), st.integers(1, 10))
def test_allowed_ranks_are_multiples_where_wide_enough(full: int, multiple_of: int) -> None:
    ranks = allowed_ranks(full, multiple_of)
    assert ranks[-1] == full
    assert (np.diff(ranks) > 0).all()
    if full >= multiple_of:
        assert all(rank % multiple_of == 0 for rank in ranks[:-1])
        assert ranks[0] == multiple_of
    else:
        assert ranks[0] == 1


def test_rank_is_rounded_up_never_down() -> None:
    values = np.asarray([1.0] * 16)
    layer = LayerSpectra("conv", 10_000, 10_000, (SchemeSpectra("nc", (values,), Cost(100), Cost(100)),))
    half = 0.5**0.5
    assert choose_ranks([layer], half + 1e-6, 8)[0].ranks == (8,)
    assert choose_ranks([layer], half - 1e-3, 8)[0].ranks == (16,)
    assert choose_ranks([layer], half - 1e-3, 1)[0].ranks == (9,)


def test_ties_do_not_stop_the_budget() -> None:
    values = np.asarray([3.0, 1.0, 1.0, 1.0])
    layer = LayerSpectra("conv", 40, 40, (SchemeSpectra("nc", (values,), Cost(9), Cost(9)),))
    error = solve_relative_error([layer] * 3, 10, 40)
    assert [choice.ranks for choice in choose_ranks([layer] * 3, error)] == [(1,)] * 3


def test_unreachable_budget_says_what_limits_it() -> None:
    values = np.asarray([2.0, 1.0])
    small = LayerSpectra("conv", 100, 100, (SchemeSpectra("nc", (values,), Cost(30), Cost(30)),))
    whole = LayerSpectra("head", 50, 50, ())
    with pytest.raises(
        BudgetUnreachable,
        match=r"Target 0\.40 of baseline MACs cannot .* best is 0\.65, limited by the smallest ranks \(multiple_of=1\) "
        r"in 1 layers, 1 layers that no scheme makes cheaper, 0\.25 in parts that are not factorised",
    ):
        solve_relative_error([small, whole], 50, 80)
