"""Forward selection and the LASSO path equal a brute-force search, values by hand, and their optimality conditions."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from compress.pruning.groups import ChannelGroup, Member
from compress.pruning.ranking.elimination import ReaderStats, removal_ranking
from compress.pruning.ranking.forward_selection import (
    _descend,
    contribution_gram,
    imitation_ranking,
    lasso_ranking,
    refit_ranking,
)


def _group(units: int, layers: dict[str, nn.Module], parts: int = 1) -> ChannelGroup:
    channels = torch.arange(units * parts)
    members = tuple(Member(name, layer, "in", channels, channels) for name, layer in layers.items())
    return ChannelGroup("g", units * parts, parts, members, ())


def _random_case(units: int, outputs: int = 3, seed: int = 0, has_intercept: bool = True, cells: int = 1):
    """Give a group with one reader, its statistics, and (rows, units, outputs) what each unit adds to each output."""
    random = np.random.default_rng(seed)
    size = units * cells
    x = random.normal(size=(50, size)) @ random.normal(size=(size, size)) / size**0.5 + random.normal(size=size)
    layer = nn.Conv2d(units, outputs, (1, cells)) if cells > 1 else nn.Linear(units, outputs)
    weight = random.normal(size=(outputs, size))
    rows = np.concatenate([x, np.ones((50, 1))], 1) if has_intercept else x
    full = np.concatenate([weight, random.normal(size=(outputs, 1))], 1) if has_intercept else weight
    gram = torch.from_numpy(rows.T @ rows / len(rows))
    centred = x - x.mean(0) if has_intercept else x
    energy = float(((centred @ weight.T) ** 2).sum(1).mean())
    parts = (
        centred.reshape(50, units, cells)[:, :, None] * weight.reshape(outputs, units, cells).transpose(1, 0, 2)
    ).sum(3)
    stats = {"r": ReaderStats("r", gram, torch.from_numpy(full), energy, has_intercept)}
    return _group(units, {"r": layer}), stats, parts, energy


@pytest.mark.parametrize(("has_intercept", "cells"), [(True, 1), (False, 1), (True, 3)])
def test_the_contribution_gram_is_that_of_what_units_add(has_intercept, cells) -> None:
    group, stats, parts, energy = _random_case(4, has_intercept=has_intercept, cells=cells)
    wanted = np.einsum("rio,rjo->ij", parts, parts) / len(parts) / energy
    assert np.allclose(contribution_gram(group, stats), wanted)


def test_contributions_to_several_readers_are_added_each_over_its_energy() -> None:
    group, stats, _, _ = _random_case(4)
    _, others, _, _ = _random_case(4, seed=1)
    both = _group(4, {"r": nn.Linear(4, 3), "s": nn.Linear(4, 3)})
    wanted = contribution_gram(group, stats) + contribution_gram(group, others)
    assert np.allclose(contribution_gram(both, {"r": stats["r"], "s": others["r"]}), wanted)


def test_imitation_of_two_units_by_hand() -> None:
    """Units that add 3 and 1 to one output: F = 4. With H = 6 and 2, u = (1/2, 1/2).

    Either single unit is 2 away from 4; the first wins. Then weight moves: 6 (1 - t) + 2 t = 4 at t = 1/2.
    """
    ranking = imitation_ranking(np.array([[9.0, 3.0], [3.0, 1.0]]), 1)
    assert ranking.order.tolist() == [1, 0]
    assert ranking.errors.tolist() == pytest.approx([0.0, 4.0, 4.0])
    assert ranking.scales[1].tolist() == [2.0, 0.0]  # 6 for the 4 that is wanted
    assert ranking.scales[0].tolist() == [1.0, 1.0]


def _reference_imitation(gram: np.ndarray) -> list[tuple[int, float, np.ndarray]]:
    """Give (unit, distance, weights) of each entry, each step found by trying all units and many step sizes."""
    units = len(gram)
    scaled, u = gram * units**2, np.full(units, 1 / units)

    def distance(a: np.ndarray) -> float:
        return float((a - u) @ scaled @ (a - u))

    first = min(range(units), key=lambda i: distance(np.eye(units)[i]))
    a, found = np.eye(units)[first], [first]
    states = []
    for _ in range(500):
        if len(found) == units:
            break
        best: tuple[float, int, float] = (np.inf, -1, 0.0)
        for i in range(units):
            low = -a[i] / (1 - a[i]) if a[i] < 1 else 0.0
            for t in np.linspace(low, 1.0, 2001):
                value = distance((1 - t) * a + t * np.eye(units)[i])
                if value < best[0] - 1e-12:
                    best = value, i, t
        _, i, t = best
        if i not in found:
            states.append((len(found), distance(a), a.copy()))
            found.append(i)
        a = (1 - t) * a + t * np.eye(units)[i]
    return found, states


@pytest.mark.parametrize("seed", range(4))
def test_imitation_follows_a_brute_force_search_step_by_step(seed) -> None:
    group, stats, _, _ = _random_case(5, seed=seed)
    gram = contribution_gram(group, stats)
    found, states = _reference_imitation(gram)
    ranking = imitation_ranking(gram, 4)
    assert len(found) >= 3
    assert ranking.order[::-1][: len(found)].tolist() == found
    for kept, distance, weights in states:
        assert ranking.errors[5 - kept] == pytest.approx(distance, rel=2e-3, abs=1e-6)
        assert ranking.scales[5 - kept] == pytest.approx(5 * weights, abs=0.03)


def test_imitation_scales_give_the_error_that_is_reported() -> None:
    group, stats, parts, energy = _random_case(8, seed=5)
    ranking = imitation_ranking(contribution_gram(group, stats), 7)
    for removed in range(1, 8):
        scales = ranking.scales[removed]
        assert not scales[ranking.order[:removed]].any()
        gap = (parts * (1 - scales)[None, :, None]).sum(1)
        assert (gap**2).sum(1).mean() / energy <= ranking.errors[removed] + 1e-6
    assert (np.diff(ranking.errors) >= 0).all()


@pytest.mark.parametrize("cells", [1, 2])
def test_refit_adds_the_unit_that_lowers_the_refitted_error_most(cells) -> None:
    group, stats, _, energy = _random_case(5, seed=2, cells=cells)
    ranking = refit_ranking(group, stats, 4)
    kept: list[int] = []

    def error(units: list[int]) -> float:
        gone = [u * cells + c for u in range(5) if u not in units for c in range(cells)]
        gap = stats["r"].weight - stats["r"].refit(torch.tensor(gone, dtype=torch.int64))
        return float(((gap @ stats["r"].gram) * gap).sum()) / energy

    for _ in range(5):
        kept.append(min((u for u in range(5) if u not in kept), key=lambda u: error([*kept, u])))
        removed = 5 - len(kept)
        assert ranking.order[::-1][: len(kept)].tolist() == kept
        assert ranking.errors[removed] == pytest.approx(error(kept) if removed else 0.0, abs=1e-5)


def test_forward_and_backward_agree_on_the_error_of_the_same_set() -> None:
    group, stats, _, _ = _random_case(5, seed=3)
    forward, backward = refit_ranking(group, stats, 4), removal_ranking(group, stats, 4)
    same = [n for n in range(1, 5) if set(forward.order[:n]) == set(backward.order[:n])]
    assert same
    for removed in same:
        assert forward.errors[removed] == pytest.approx(backward.errors[removed], rel=1e-3, abs=1e-6)


def test_wide_groups_are_added_several_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr("compress.pruning.ranking.forward_selection._ROUNDS", 2)
    group, stats, _, _ = _random_case(6, seed=4)
    ranking = refit_ranking(group, stats, 5)
    assert sorted(ranking.order.tolist()) == list(range(6))
    assert (np.diff(ranking.errors) >= 0).all()


def test_the_lasso_keeps_its_optimality_conditions() -> None:
    group, stats, _, _ = _random_case(6, seed=1)
    gram = contribution_gram(group, stats)
    sizes = np.sqrt(gram.diagonal())
    unit_gram, wanted = gram / np.outer(sizes, sizes), gram.sum(1) / sizes
    for share in (0.7, 0.3, 0.05):
        penalty = share * np.abs(wanted).max()
        coefficients, residual = np.zeros(6), wanted.copy()
        _descend(unit_gram, coefficients, residual, penalty, np.zeros(6, dtype=bool))
        slope = wanted - unit_gram @ coefficients
        assert np.allclose(slope, residual, atol=1e-6)
        is_in = coefficients != 0
        assert is_in.any()
        assert np.allclose(slope[is_in], penalty * np.sign(coefficients[is_in]), atol=1e-4)
        assert (np.abs(slope[~is_in]) <= penalty + 1e-4).all()


def test_the_lasso_path_of_independent_units_is_by_size() -> None:
    """Of units that know nothing of one another the larger enters first: slopes are their sizes."""
    ranking = lasso_ranking(np.diag([4.0, 1.0, 9.0, 0.0]), 3)
    assert ranking.order.tolist() == [3, 1, 0, 2]
    assert ranking.errors.tolist() == pytest.approx([0.0, 0.0, 1.0, 5.0, 5.0], abs=1e-6)


def test_the_order_of_entry_is_that_of_penalties_solved_one_by_one() -> None:
    """Cold starts at many penalties find the same order; by the coefficients of a small penalty it is another one."""
    other = 0
    for seed in range(12):
        group, stats, _, _ = _random_case(7, seed=seed)
        gram = contribution_gram(group, stats)
        sizes = np.sqrt(gram.diagonal())
        unit_gram, wanted = gram / np.outer(sizes, sizes), gram.sum(1) / sizes
        entered: list[int] = []
        largest = np.abs(wanted).max()
        for penalty in largest * np.geomspace(1, 1e-4, 100)[1:]:
            coefficients, residual = np.zeros(7), wanted.copy()
            _descend(unit_gram, coefficients, residual, penalty, np.zeros(7, dtype=bool))
            new = [unit for unit in np.flatnonzero(coefficients) if unit not in entered]
            entered += sorted(new, key=lambda unit: -abs(coefficients[unit]))
        order = lasso_ranking(gram, 6).order[::-1].tolist()
        assert order[: len(entered)] == entered
        other += order != np.argsort(-np.abs(coefficients), kind="stable").tolist()
    assert other > 0


def test_lasso_errors_are_those_of_the_best_factors() -> None:
    group, stats, parts, energy = _random_case(5, seed=7)
    gram = contribution_gram(group, stats)
    ranking = lasso_ranking(gram, 4)
    for removed in range(1, 5):
        kept = ranking.order[removed:]
        flat = parts[:, kept].transpose(0, 2, 1).reshape(-1, len(kept))
        whole = parts.sum(1).reshape(-1)
        left = whole - flat @ np.linalg.lstsq(flat, whole, rcond=None)[0]
        assert ranking.errors[removed] == pytest.approx((left**2).sum() / len(parts) / energy, rel=1e-4, abs=1e-6)


def test_of_two_equal_units_one_is_kept() -> None:
    """One of two copies, read twice as strong, is as good as both."""
    h = np.array([1.0, 1.0, 0.8])  # the third is alone in its direction
    gram = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.64]]) * np.outer(h, h) / np.outer(h, h)
    lasso, imitation = lasso_ranking(gram, 2), imitation_ranking(gram, 2)
    assert lasso.order[0] in (0, 1)
    assert lasso.errors[1] == pytest.approx(0.0, abs=1e-6)
    assert imitation.order[0] in (0, 1)


@pytest.mark.parametrize("rank", [lambda gram: imitation_ranking(gram, 3), lambda gram: lasso_ranking(gram, 3)])
def test_dead_units_are_no_trouble(rank) -> None:
    ranking = rank(np.zeros((4, 4)))
    assert sorted(ranking.order.tolist()) == [0, 1, 2, 3]
    assert not ranking.errors.any()


@pytest.mark.parametrize("units", [1, 2])
def test_the_smallest_groups(units) -> None:
    group, stats, _, _ = _random_case(units, seed=9)
    gram = contribution_gram(group, stats)
    for ranking in (
        imitation_ranking(gram, units - 1),
        lasso_ranking(gram, units - 1),
        refit_ranking(group, stats, units - 1),
    ):
        assert sorted(ranking.order.tolist()) == list(range(units))
        assert ranking.errors[0] == 0.0


def test_refitted_forward_selection_is_the_best_subset_where_greedy_is() -> None:
    """Of three units one adds nothing that the others do not: the best pair of all pairs is found."""
    group, stats, _, energy = _random_case(3, seed=11)

    def error(kept: tuple[int, ...]) -> float:
        gone = torch.tensor([u for u in range(3) if u not in kept])
        gap = stats["r"].weight - stats["r"].refit(gone)
        return float(((gap @ stats["r"].gram) * gap).sum()) / energy

    best = min(error(pair) for pair in itertools.combinations(range(3), 2))
    found = removal_ranking(group, stats, 1)
    assert found.errors[1] == pytest.approx(best)
