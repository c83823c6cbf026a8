"""Allocation of ranks to layers under one limit of cost: ALDS, and retained energy against cost.

Pure arithmetic on tables. Each layer has options, the dense layer among them; each option has an error and a cost, in
MACs, params or milliseconds.

    alds      the smallest error bound that all layers keep within the limit; scheme and rank are chosen together
    energy    per layer the option with the largest   retained energy - multiplier * cost

For a shared bound each layer takes its cheapest option, so the total cost never rises with the bound, and the smallest
bound within the limit is found by bisection over the bounds that occur. It is the optimum. The paper alternates between
ranks for given schemes and schemes for given costs, from 15 random starts, because it searches over all divisors.

Sources: Liebenwein et al. 2021, "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
Decomposition", NeurIPS, arXiv:2107.11442, whose error per layer is corrected (`factorize.norm_bounds`); for the energy
rule Idelbayev & Carreira-Perpinan 2020, "Low-rank Compression of Neural Nets: Learning the Rank of Each Layer", CVPR,
of which only the choice of ranks for fixed weights is taken, with its multiplier found from a budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compress.errors import InternalError
from compress.lowrank.ranks import (
    LayerSpectra,
    Metric,
    RankChoice,
    SchemeSpectra,
    allowed_ranks,
    lost_energy,
    unreachable,
)

Rule = Literal["alds", "energy"]
_BISECTIONS = 60
_DOUBLINGS = 200


@dataclass(frozen=True, slots=True, eq=False)
class RankOptions:
    """Options of one layer; the last is the dense layer, the others cost less.

    Attributes:
        layer: Module path.
        picks: (options,) scheme and ranks; None and () for the dense layer.
        errors: (options,) error bounds of the rule, >= 0; 0 for the dense layer.
        macs: (options,) MACs.
        params: (options,) params without the bias.
    """

    layer: str
    picks: tuple[tuple[str | None, tuple[int, ...]], ...]
    errors: np.ndarray
    macs: np.ndarray
    params: np.ndarray

    def costs(self, metric: Metric) -> np.ndarray:
        """Return (options,) MACs or params, float64."""
        return np.asarray(self.macs if metric == "macs" else self.params, np.float64)

    def choice(self, option: int) -> RankChoice:
        """Return one option as a choice."""
        scheme, ranks = self.picks[option]
        error = float(self.errors[option])
        return RankChoice(self.layer, scheme, ranks, error, int(self.macs[option]), int(self.params[option]))

    def cheapest_within(self, error: float, metric: Metric) -> RankChoice:
        """Return the cheapest option whose error bound is at most `error`; among equal costs, the smallest error."""
        return self.choice(_cheapest(self.errors, self.costs(metric), error))


def rank_options(layer: LayerSpectra, rule: Rule, multiple_of: int = 1, metric: Metric = "macs") -> RankOptions:
    """List the options of a layer.

    Args:
        layer: Spectra and costs of the layer; "alds" leaves out schemes without norm bounds.
        rule: "alds" bounds the operator norm of the residual, "energy" its Frobenius norm, both relative to the kernel.
        multiple_of: As in `choose_ranks`.
        metric: Cost that must be below that of the dense layer; the other one must not be above it.
    """
    picks: list[tuple[str | None, tuple[int, ...]]] = []
    errors, macs, params = [], [], []
    for spectra in layer.schemes:
        for ranks, error in _grid(spectra, rule, multiple_of):
            cost = spectra.macs.at(ranks), spectra.params.at(ranks)
            saved = layer.macs - cost[0], layer.params - cost[1]
            if min(saved) < 0 or saved[metric == "params"] == 0:
                continue
            picks.append((spectra.scheme, ranks))
            errors.append(error)
            macs.append(cost[0])
            params.append(cost[1])
    columns = (np.asarray([*errors, 0.0]), np.asarray([*macs, layer.macs]), np.asarray([*params, layer.params]))
    return RankOptions(layer.layer, (*picks, (None, ())), *columns)


def allocate_ranks(
    layers: Sequence[LayerSpectra],
    rule: Rule,
    fixed_cost: int,
    target_cost: float,
    multiple_of: int = 1,
    metric: Metric = "macs",
    baseline_cost: int | None = None,
) -> tuple[RankChoice, ...]:
    """Choose scheme and ranks of each layer by a rule, within a total cost.

    Args:
        layers: Spectra and costs of each layer; with norm bounds for "alds".
        rule: "alds" or "energy".
        fixed_cost: Cost of everything that is not in `layers`.
        target_cost: Upper limit of the total, in the unit of `metric`.
        multiple_of: As in `choose_ranks`.
        metric: Cost that is limited.
        baseline_cost: Cost that ratios in messages are relative to; the dense total by default.

    Returns:
        One choice for each layer, in order.

    Raises:
        BudgetUnreachable: The cheapest options cost too much; the message states the best reachable cost and its
            limits.
    """
    options = [rank_options(layer, rule, multiple_of, metric) for layer in layers]
    costs = [one.costs(metric) for one in options]
    found = choose_options(rule, [one.errors for one in options], costs, target_cost - fixed_cost)
    if found is None:
        cheapest = [one.choice(int(np.argmin(cost))) for one, cost in zip(options, costs, strict=True)]
        dense = fixed_cost + sum(layer.macs if metric == "macs" else layer.params for layer in layers)
        raise unreachable(cheapest, fixed_cost, target_cost, multiple_of, metric, baseline_cost or dense)
    return tuple(one.choice(option) for one, option in zip(options, found, strict=True))


def choose_options(
    rule: Rule, errors: Sequence[np.ndarray], costs: Sequence[np.ndarray], limit: float
) -> tuple[int, ...] | None:
    """Choose an option for each layer by a rule; None if even the cheapest options cost more than the limit.

    Args:
        rule: "alds" or "energy".
        errors: For each layer (options,) relative errors; the retained energy of the energy rule is 1 - error^2.
        costs: For each layer (options,) costs in the unit of the limit.
        limit: Upper limit of the sum of costs.
    """
    if rule == "alds":
        return least_worst_error(errors, costs, limit)
    return most_energy([1 - np.square(row) for row in errors], costs, limit)


def least_worst_error(
    errors: Sequence[np.ndarray], costs: Sequence[np.ndarray], limit: float
) -> tuple[int, ...] | None:
    """Return the options whose largest error is as small as the limit allows; None if no options are within it.

    Args:
        errors: For each layer (options,) errors, at least one option each.
        costs: For each layer (options,) costs.
        limit: Upper limit of the sum of costs.

    >>> least_worst_error([np.array([0.5, 0.2, 0.0])] * 2, [np.array([1.0, 2.0, 4.0])] * 2, 5.0)
    (1, 1)
    """
    _check_tables(errors, costs)
    least = max((float(row.min()) for row in errors), default=0.0)
    levels = np.unique(np.concatenate([np.array([least]), *errors]))
    levels = levels[levels >= least]

    def at(level: float) -> tuple[int, ...]:
        return tuple(_cheapest(row, cost, level) for row, cost in zip(errors, costs, strict=True))

    low, high = 0, len(levels) - 1
    if _total(costs, at(levels[high])) > limit:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _total(costs, at(levels[middle])) <= limit else (middle + 1, high)
    return at(levels[high])


def most_energy(energies: Sequence[np.ndarray], costs: Sequence[np.ndarray], limit: float) -> tuple[int, ...] | None:
    """Return the options of the energy-against-cost rule within a limit; None if no options are within it.

    Each layer takes the option with the largest energy - multiplier * cost. The multiplier is doubled until the limit
    is kept, then bisected. That reaches only options on the upper hull of (cost, energy), so the limit is seldom used
    up; an addition of ours spends the rest on the steps of single layers with the most energy for their cost.

    Args:
        energies: For each layer (options,) retained shares, at most 1; at least one option each.
        costs: For each layer (options,) costs, >= 0.
        limit: Upper limit of the sum of costs.

    >>> energies, costs = [np.array([0.5, 0.9, 1.0]), np.array([0.8, 1.0])], [np.array([1, 2, 4]), np.array([1, 4])]
    >>> most_energy(energies, costs, 4.0)
    (1, 0)
    """
    _check_tables(energies, costs)

    def at(multiplier: float) -> tuple[int, ...]:
        pairs = zip(energies, costs, strict=True)
        return tuple(int(np.lexsort((cost, multiplier * cost - energy))[0]) for energy, cost in pairs)

    if _total(costs, found := at(0.0)) <= limit:
        return found
    cheapest = tuple(int(np.lexsort((-row, cost))[0]) for row, cost in zip(energies, costs, strict=True))
    if _total(costs, cheapest) > limit:
        return None
    low, high = 0.0, 1 / (sum(float(cost.max()) for cost in costs) or 1.0)
    for _ in range(_DOUBLINGS):
        if _total(costs, at(high)) <= limit:
            break
        low, high = high, 2 * high
    else:
        return _spend_rest(energies, costs, cheapest, limit)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if _total(costs, at(middle)) <= limit else (middle, high)
    return _spend_rest(energies, costs, at(high), limit)


def _spend_rest(
    energies: Sequence[np.ndarray], costs: Sequence[np.ndarray], found: tuple[int, ...], limit: float
) -> tuple[int, ...]:
    """Take, one by one, the change of a single layer with the most energy for its cost that the limit still allows."""
    chosen = list(found)
    while True:
        best: tuple[float, int, int] | None = None
        rest = limit - _total(costs, chosen)
        for index, (energy, cost) in enumerate(zip(energies, costs, strict=True)):
            gained, extra = energy - energy[chosen[index]], cost - cost[chosen[index]]
            allowed = np.flatnonzero((gained > 0) & (extra <= rest))
            if not len(allowed):
                continue
            worth = np.full(len(allowed), np.inf)
            np.divide(gained[allowed], extra[allowed], out=worth, where=extra[allowed] > 0)
            most = int(worth.argmax())
            if best is None or worth[most] > best[0]:
                best = float(worth[most]), index, int(allowed[most])
        if best is None:
            return tuple(chosen)
        chosen[best[1]] = best[2]


def _grid(spectra: SchemeSpectra, rule: Rule, multiple_of: int) -> list[tuple[tuple[int, ...], float]]:
    """Return all ranks of a scheme with their error bounds."""
    if rule == "alds":
        bounds = spectra.norm_bounds
        if bounds is None:
            return []
        return [((int(rank),), float(bounds[rank])) for rank in allowed_ranks(len(bounds) - 1, multiple_of)]
    grids = [allowed_ranks(len(values), multiple_of) for values in spectra.singular_values]
    lost = [lost_energy(values)[grid] for values, grid in zip(spectra.singular_values, grids, strict=True)]
    if len(grids) == 1:
        return [((int(rank),), float(np.sqrt(share))) for rank, share in zip(grids[0], lost[0], strict=True)]
    pairs = np.sqrt(lost[0][:, None] + lost[1][None, :])
    return [((int(a), int(b)), float(pairs[i, j])) for i, a in enumerate(grids[0]) for j, b in enumerate(grids[1])]


def _cheapest(errors: np.ndarray, costs: np.ndarray, level: float) -> int:
    within = np.where(errors <= level, costs, np.inf)
    return int(np.lexsort((errors, within))[0])


def _total(costs: Sequence[np.ndarray], chosen: Sequence[int]) -> float:
    return sum((float(cost[option]) for cost, option in zip(costs, chosen, strict=True)), 0.0)


def _check_tables(values: Sequence[np.ndarray], costs: Sequence[np.ndarray]) -> None:
    sizes, others = [len(row) for row in values], [len(row) for row in costs]
    if sizes != others or 0 in sizes:
        raise InternalError(f"Each layer must have as many values as costs, got {sizes} and {others}.")
