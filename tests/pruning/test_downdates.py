"""Downdates equal plain refits from scratch, whatever the order, the precision and the moment of dropping."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.pruning.ranking import downdates
from compress.pruning.ranking.downdates import Downdates, preferred_dtype


def regression(units: int, cells: int, others: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (n, n) moments, (outputs, n) weights and (units, cells) unknowns in random places."""
    random = np.random.default_rng(seed)
    count = units * cells + others
    rows = random.normal(size=(4 * count + 8, count)) @ random.normal(size=(count, count)) + random.normal(size=count)
    gram = rows.T @ rows / len(rows) + 0.01 * np.eye(count)
    places = torch.from_numpy(random.permutation(count)[: units * cells].reshape(units, cells))
    return torch.from_numpy(gram), torch.from_numpy(random.normal(size=(outputs, count))), places


def plain_error(gram: Tensor, weight: Tensor, gone: Tensor) -> float:
    """Return the squared error of the best weights without some inputs, by one solution from scratch."""
    left = torch.ones(len(gram), dtype=torch.bool)
    left[gone] = False
    found = torch.zeros_like(weight)
    found[:, left] = torch.linalg.solve(gram[left][:, left], gram[left] @ weight.T).T
    gap = found - weight
    return float(((gap @ gram) * gap).sum())


def plain_order(gram: Tensor, weight: Tensor, units: Tensor, most: int, at_once: int = 1) -> list[int]:
    """Return the order of removal by trying each unit at each step with refits from scratch."""
    order: list[int] = []
    while len(order) < most:
        gone = units[order].flatten()
        alive = [unit for unit in range(len(units)) if unit not in order]
        errors = [plain_error(gram, weight, torch.cat([gone, units[unit]])) for unit in alive]
        order += [alive[place] for place in np.argsort(errors, kind="stable")[: min(at_once, most - len(order))]]
    return order


def fast_order(one: Downdates, units: int, most: int, at_once: int = 1) -> list[int]:
    """Return the order of removal by downdates."""
    alive, order = np.arange(units), list[int]()
    while len(order) < most:
        chosen = np.argsort(one.losses().numpy(), kind="stable")[: min(at_once, most - len(order))]
        one.remove(torch.from_numpy(chosen))
        order += alive[chosen].tolist()
        alive = np.delete(alive, chosen)
    return order


@given(
    units=st.integers(1, 9),
    cells=st.integers(1, 3),
    others=st.integers(0, 4),
    outputs=st.integers(1, 4),
    at_once=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_losses_after_any_removals_are_those_of_refits_from_scratch(units, cells, others, outputs, at_once, seed):
    gram, weight, places = regression(units, cells, others, outputs, seed)
    one, random = Downdates(gram, weight, places), np.random.default_rng(seed)
    alive, gone = np.arange(units), torch.zeros(0, dtype=torch.int64)
    while len(alive):
        before = plain_error(gram, weight, gone)
        rises = [plain_error(gram, weight, torch.cat([gone, places[unit]])) - before for unit in alive]
        assert one.losses().numpy() == pytest.approx(np.asarray(rises), rel=1e-6, abs=1e-9 * (1 + before))
        chosen = random.permutation(len(alive))[:at_once]
        gone = torch.cat([gone, places[alive[chosen]].flatten()])
        one.remove(torch.from_numpy(chosen))
        alive = np.delete(alive, chosen)
    assert len(one.losses()) == 0


@pytest.mark.parametrize(("units", "cells", "others"), [(12, 1, 1), (12, 1, 0), (8, 4, 1), (6, 9, 10)])
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_order_is_that_of_plain_elimination(units, cells, others, at_once, dtype):
    gram, weight, places = regression(units, cells, others, 5)
    found = fast_order(Downdates(gram, weight, places, dtype), units, units, at_once)
    assert found == plain_order(gram, weight, places, units, at_once)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_order_does_not_depend_on_when_removed_units_are_dropped(dtype, monkeypatch):
    gram, weight, places = regression(20, 3, 1, 4)
    drops: list[int] = []
    real = Downdates._drop_removed
    monkeypatch.setattr(Downdates, "_drop_removed", lambda one: drops.append(1) or real(one))
    orders, counts = [], []
    for share in (0.0, downdates._COMPACT, 1.0):
        monkeypatch.setattr(downdates, "_COMPACT", share)
        drops.clear()
        orders.append(fast_order(Downdates(gram, weight, places, dtype), 20, 18))
        counts.append(len(drops))
    assert orders[0] == orders[1] == orders[2]
    assert counts[0] == 18 > counts[1] > counts[2] == 0


def test_losses_do_not_depend_on_the_scale_of_an_input():
    gram, weight, places = regression(6, 2, 1, 3)
    scale = torch.logspace(-6, 6, len(gram), dtype=torch.float64)
    scaled = Downdates(gram * scale * scale[:, None], weight / scale, places)
    plain = Downdates(gram, weight, places)
    for one in (scaled, plain):
        one.remove(torch.tensor([3, 0]))
    assert torch.allclose(scaled.losses(), plain.losses(), rtol=1e-6)


def test_the_moments_and_weights_given_are_left_as_they_are():
    gram, weight, _ = regression(6, 2, 1, 3)
    before = gram.clone(), weight.clone()
    one = Downdates(gram, weight, torch.arange(12).reshape(6, 2))
    fast_order(one, 6, 5)
    assert torch.equal(gram, before[0])
    assert torch.equal(weight, before[1])


def test_twins_cost_nothing_until_one_of_them_is_removed():
    """Two inputs that are equal up to the ridge: the first costs its ridge, the second all that both carried."""
    gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    gram.diagonal().add_(1e-6)
    one = Downdates(gram, torch.tensor([[1.0, 1.0, 0.5]], dtype=torch.float64), torch.arange(3)[:, None])
    assert one.losses().tolist() == pytest.approx([2e-6, 2e-6, 0.25], rel=1e-3)
    one.remove(torch.tensor([0]))
    assert one.losses().tolist() == pytest.approx([4.0, 0.25], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_moments_without_full_rank_are_refused(dtype):
    gram = torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        Downdates(gram, torch.ones(1, 3, dtype=torch.float64), torch.arange(3)[:, None], dtype)


def test_few_unknowns_are_computed_in_float64():
    limit = downdates._FLOAT32_ABOVE
    assert (preferred_dtype(limit), preferred_dtype(limit + 1)) == (torch.float64, torch.float32)
