"""Scheme and ranks of each layer for one relative error that all layers share.

Pure arithmetic on singular values and costs. For a shared relative error every layer takes, of all schemes, the
cheapest ranks whose error bound keeps it. A layer stays dense if no ranks are cheaper than the layer itself. The total
cost never rises with the error, so the error is bisected to a budget; the smallest error that meets it is kept.

Source: one shared threshold with ranks that adapt to the layer, as in trained rank pruning (Xu et al., IJCAI 2020,
arXiv:2004.14566); bisecting it to a budget, as the global step of ALDS (Liebenwein et al., NeurIPS 2021,
arXiv:2107.11442) does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compress.errors import BudgetUnreachable

Metric = Literal["macs", "params"]
_BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a factorised layer: first * r1 + joint * r1 * r2 + second * r2; with one rank, first * r1.

    >>> Cost(3).at((4,)), Cost(3, 2, 5).at((4, 10))
    (12, 142)
    """

    first: int
    joint: int = 0
    second: int = 0

    def at(self, ranks: tuple[int, ...]) -> int:
        """Return the cost at these ranks."""
        if len(ranks) == 1:
            return self.first * ranks[0]
        return self.first * ranks[0] + self.joint * ranks[0] * ranks[1] + self.second * ranks[1]


@dataclass(frozen=True, slots=True)
class SchemeSpectra:
    """One way to factorise a layer.

    Attributes:
        scheme: Name of the scheme.
        singular_values: One falling spectrum for each rank.
        macs: MACs by rank.
        params: Params by rank, without the bias.
        norm_bounds: (full + 1,) bounds of the operator norm of the residual by rank; None if the scheme has no bounds.
    """

    scheme: str
    singular_values: tuple[np.ndarray, ...]
    macs: Cost
    params: Cost
    norm_bounds: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class LayerSpectra:
    """One layer and the ways to factorise it.

    Attributes:
        layer: Module path.
        macs: MACs of the dense layer.
        params: Params of the dense layer, without the bias.
        schemes: Ways to choose from; () keeps it dense.
    """

    layer: str
    macs: int
    params: int
    schemes: tuple[SchemeSpectra, ...]


@dataclass(frozen=True, slots=True)
class RankChoice:
    """Choice for one layer: scheme and ranks.

    Attributes:
        layer: Module path.
        scheme: Name of the scheme; None for a dense layer.
        ranks: Ranks of the scheme; () for a dense layer.
        error_bound: Upper bound of the relative error; exact for a scheme with one rank, except that errors of outputs
            are estimates if `singular_values` estimates them. For "alds", it bounds the operator norm.
        macs: MACs after the choice.
        params: Params after the choice, without the bias.
    """

    layer: str
    scheme: str | None
    ranks: tuple[int, ...]
    error_bound: float
    macs: int
    params: int

    def cost(self, metric: Metric) -> int:
        """Return MACs or params."""
        return self.macs if metric == "macs" else self.params


def choose_ranks(
    layers: Sequence[LayerSpectra], relative_error: float, multiple_of: int = 1, metric: Metric = "macs"
) -> tuple[RankChoice, ...]:
    """Choose scheme and ranks of each layer for one shared relative error.

    Args:
        layers: Spectra and costs of each layer.
        relative_error: Bound of the relative error, in [0, 1].
        multiple_of: Ranks are multiples of this, rounded up, where the full rank is at least this; the full rank
            itself is always allowed.
        metric: Cost that the choice minimises; the other cost never grows either.

    Returns:
        One choice for each layer, in order.

    Source: for Tucker-2 the error of the truncated higher-order SVD, error^2 <= tail_1 + tail_2 (De Lathauwer et al.
    2000), decides how much each side may lose.
    """
    return tuple(_choose(layer, relative_error, multiple_of, metric) for layer in layers)


def solve_relative_error(
    layers: Sequence[LayerSpectra],
    fixed_cost: int,
    target_cost: float,
    multiple_of: int = 1,
    metric: Metric = "macs",
    baseline_cost: int | None = None,
) -> float:
    """Return the smallest shared relative error whose total cost meets the target; never above it.

    Args:
        layers: Spectra and costs of each layer.
        fixed_cost: Cost of everything that is not in `layers`.
        target_cost: Upper limit of the total, in the unit of `metric`.
        multiple_of: As in `choose_ranks`.
        metric: Cost that is limited.
        baseline_cost: Cost that ratios in messages are relative to; the dense total by default.

    Returns:
        In [0, 1]; 0 when the dense layers meet the target already.

    Raises:
        BudgetUnreachable: Even the smallest ranks cost too much; the message states the best reachable cost and its
            limits.
    """

    def total(relative_error: float) -> int:
        choices = choose_ranks(layers, relative_error, multiple_of, metric)
        return fixed_cost + sum(choice.cost(metric) for choice in choices)

    dense = fixed_cost + sum(layer.macs if metric == "macs" else layer.params for layer in layers)
    if dense <= target_cost:
        return 0.0
    if total(1.0) > target_cost:
        cheapest = choose_ranks(layers, 1.0, multiple_of, metric)
        raise unreachable(cheapest, fixed_cost, target_cost, multiple_of, metric, baseline_cost or dense)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if total(middle) <= target_cost else (middle, high)
    return high


def allowed_ranks(full: int, multiple_of: int) -> np.ndarray:
    """Return the ranks a spectrum of length `full` may be cut to, rising.

    >>> allowed_ranks(20, 8).tolist(), allowed_ranks(3, 8).tolist()
    ([8, 16, 20], [1, 2, 3])
    """
    if full < multiple_of:
        return np.arange(1, full + 1)
    ranks = np.arange(multiple_of, full + 1, multiple_of)
    return ranks if ranks[-1] == full else np.append(ranks, full)


def _choose(layer: LayerSpectra, relative_error: float, multiple_of: int, metric: Metric) -> RankChoice:
    best = RankChoice(layer.layer, None, (), 0.0, layer.macs, layer.params)
    for spectra in layer.schemes:
        for ranks, bound in _candidates(spectra, relative_error, multiple_of):
            macs, params = spectra.macs.at(ranks), spectra.params.at(ranks)
            if macs > layer.macs or params > layer.params:
                continue
            found = RankChoice(layer.layer, spectra.scheme, ranks, bound, macs, params)
            if found.cost(metric) < best.cost(metric):
                best = found
    return best


def _candidates(spectra: SchemeSpectra, relative_error: float, multiple_of: int) -> list[tuple[tuple[int, ...], float]]:
    """Return the ranks that keep the error, none smaller in every part than another, with their error bounds."""
    budget = relative_error**2
    grids = [allowed_ranks(len(values), multiple_of) for values in spectra.singular_values]
    tails = [lost_energy(values)[grid] for values, grid in zip(spectra.singular_values, grids, strict=True)]
    if len(grids) == 1:
        index = _first_within(tails[0], np.asarray([budget]))[0]
        return [((int(grids[0][index]),), float(np.sqrt(tails[0][index])))] if index < len(grids[0]) else []
    partners = _first_within(tails[1], budget - tails[0])
    return [
        ((int(grids[0][i]), int(grids[1][j])), float(np.sqrt(tails[0][i] + tails[1][j])))
        for i, j in enumerate(partners)
        if j < len(grids[1])
    ]


def lost_energy(values: np.ndarray) -> np.ndarray:
    """Return the lost share of the energy for each rank from 0 to the full one; 0 everywhere for a zero kernel."""
    energy = np.append(np.cumsum(values[::-1] ** 2)[::-1], 0.0)
    return energy / energy[0] if energy[0] > 0 else energy


def _first_within(tails: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Return for each budget the index of the first of the falling tails that is within it, or their number."""
    return np.searchsorted(-tails, -budgets, side="left")


def unreachable(
    choices: Sequence[RankChoice],
    fixed_cost: int,
    target_cost: float,
    multiple_of: int,
    metric: Metric,
    baseline_cost: int,
) -> BudgetUnreachable:
    """Return the error for a budget that the cheapest choices miss.

    Args:
        choices: Cheapest choice of each layer.
        fixed_cost: Cost of everything else.
        target_cost: Limit that is missed.
        multiple_of: Ranks are multiples of this.
        metric: Unit of the limit.
        baseline_cost: Cost that ratios are relative to.
    """
    best = fixed_cost + sum(choice.cost(metric) for choice in choices)
    dense = sum(choice.scheme is None for choice in choices)
    label = "MACs" if metric == "macs" else "params"
    limits = [f"the smallest ranks (multiple_of={multiple_of}) in {len(choices) - dense} layers"]
    limits += [f"{dense} layers that no scheme makes cheaper"] if dense else []
    limits += [f"{fixed_cost / baseline_cost:.2f} in parts that are not factorised"] if fixed_cost else []
    return BudgetUnreachable(
        f"Target {target_cost / baseline_cost:.2f} of baseline {label} cannot be reached by factorisation; "
        f"the best is {best / baseline_cost:.2f}, limited by {', '.join(limits)}.",
        hint="Raise the target, lower multiple_of, exclude fewer layers, or prune first.",
    )
