"""Local search over the choices of a knapsack: one decision is changed at a time, priced on the true tables."""

from collections.abc import Mapping, Sequence

import numpy as np

from compress.allocation.problem import Budget, Choice, Decision

_ROUNDING = 1e-12


class _Options:
    """Options of all decisions, one after the other in one row.

    Args:
        damages: Decision -> (options,) damage of each of its options.
    """

    def __init__(self, damages: Mapping[str, np.ndarray]) -> None:
        self.damages = np.concatenate(list(damages.values())) if damages else np.zeros(0)
        self._names, self._sizes = list(damages), [len(values) for values in damages.values()]
        self._owners = np.repeat(np.arange(len(self._sizes)), self._sizes)
        self._starts = np.cumsum([0, *self._sizes])[:-1]

    def places(self, choice: Mapping[str, int]) -> np.ndarray:
        """Return, for each option in the row, the position of the option that its decision has chosen."""
        chosen = self._starts + np.asarray([choice[name] for name in self._names], np.int64)
        found: np.ndarray = chosen[self._owners]
        return found

    def joined(self, each: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return values of each decision's options, or one for all of them, as one row."""
        rows = (each[name] for name in self._names)
        return np.concatenate(
            [row if len(row) == size else np.full(size, row[0]) for row, size in zip(rows, self._sizes, strict=True)]
        )

    def taken(self, choice: Choice, place: int) -> Choice:
        """Return a choice in which the option at position `place` in the row replaces its decision's present option."""
        owner = int(self._owners[place])
        return {**choice, self._names[owner]: int(place - self._starts[owner])}


class PricedProblem:
    """Damages and costs of choices.

    Args:
        decisions: Decisions in the order of their names.
        budgets: Budgets, all of which must be kept.

    Attributes:
        damages: Decision -> (options,) damage of each of its options.
        options: The options of all decisions in one row.
        limits: (budgets,) limit of each budget.
    """

    def __init__(self, decisions: Sequence[Decision], budgets: Sequence[Budget]) -> None:
        self.decisions, self.budgets = tuple(decisions), tuple(budgets)
        self.damages = {decision.name: decision.damages for decision in decisions}
        self.options = _Options(self.damages)
        self.limits = np.asarray([budget.limit for budget in budgets])

    def allows(self, choice: Mapping[str, int]) -> bool:
        """Return whether a choice keeps all budgets."""
        return all(budget.allows(choice) for budget in self.budgets)

    def damage(self, choice: Mapping[str, int]) -> float:
        """Return the damage of a choice, summed over the decisions."""
        return float(sum(values[choice[name]] for name, values in self.damages.items()))

    def costs(self, choice: Choice) -> np.ndarray:
        """Return (budgets,) the cost of a choice in each budget."""
        return np.asarray([budget.cost.at(choice) for budget in self.budgets])

    def rank(self, choice: Mapping[str, int]) -> tuple[float, int, float]:
        """Return the sort key of a choice, least first: damage, then later options, then cost."""
        return self.damage(choice), -sum(choice.values()), total_share(choice, self.budgets)

    def least_damage(self) -> Choice:
        """Return the choice of least damage; the last option among equals."""
        return {name: int(len(values) - 1 - np.argmin(values[::-1])) for name, values in self.damages.items()}

    def shares(self, choice: Choice, here: np.ndarray) -> np.ndarray:
        """Return (budgets, options of all decisions) costs over limits when one decision takes each of its options.

        Args:
            choice: The options of the other decisions.
            here: (budgets,) the costs of the choice.
        """
        rows = []
        for budget, cost in zip(self.budgets, here, strict=True):
            each = budget.cost.of_each(choice, self.damages, float(cost))
            rows.append(self.options.joined(each) / budget.limit)
        return np.stack(rows)


class LocalSearch:
    """Searches that change one decision at a time.

    Args:
        problem: Damages and costs.
    """

    def __init__(self, problem: PricedProblem) -> None:
        self._problem = problem

    def cheapest(self, budgets: Sequence[Budget]) -> Choice:
        """Return a choice whose cost, in shares of the limits, no change of one decision lowers."""
        starts = [dict.fromkeys(self._problem.damages, 0), self._problem.least_damage()]
        return min((self._descend(start, budgets) for start in starts), key=lambda choice: total_share(choice, budgets))

    def greedy(self) -> list[Choice]:
        """Return greedy choices within the budgets, from the least damage and from the least cost."""
        problem = self._problem
        found = [self.narrowed(problem.least_damage()), self.cheapest(problem.budgets)]
        return [self.polished(choice) for choice in found if choice is not None and problem.allows(choice)]

    def polished(self, choice: Choice) -> Choice:
        """Return a choice that no change of one decision improves; `choice` must be within the budgets.

        Each step takes the change that avoids most damage for its cost. Of equally harmless options the later one is
        better, so that a budget is used up. Damage falls, or is equal while options rise, so the search terminates.
        """
        problem, options = self._problem, self._problem.options
        while True:
            shares, here = problem.shares(choice, problem.costs(choice)), options.places(choice)
            avoided = options.damages[here] - options.damages
            price = (shares - shares[:, here]).sum(axis=0)
            is_later = np.arange(len(here)) > here
            is_better = (shares <= 1 + 1e-9).all(axis=0) & ((avoided > 0) | ((avoided == 0) & is_later))
            if not is_better.any():
                return choice
            value = np.full(len(here), np.inf)
            np.divide(avoided, price, out=value, where=price > 0)
            choice = options.taken(choice, int(np.where(is_better, value, -np.inf).argmax()))

    def narrowed(self, choice: Choice) -> Choice | None:
        """Take the change that costs least damage for what it saves, until the budgets are kept; None when stuck."""
        problem, options = self._problem, self._problem.options
        while not problem.allows(choice):
            here = problem.costs(choice)
            over = float(np.maximum(here / problem.limits - 1, 0).sum())
            shares, places = problem.shares(choice, here), options.places(choice)
            saved = over - np.maximum(shares - 1, 0).sum(axis=0)
            if not (saved > _ROUNDING).any():
                return None
            price = np.full(len(places), np.inf)
            lost = options.damages - options.damages[places]
            np.divide(lost, saved, out=price, where=saved > _ROUNDING)
            choice = options.taken(choice, int(price.argmin()))
        return choice

    def _descend(self, choice: Choice, budgets: Sequence[Budget]) -> Choice:
        choice, has_changed = dict(choice), True
        while has_changed:
            has_changed = False
            for name, damages in self._problem.damages.items():
                shares = _shares_of(choice, name, damages, budgets).sum(axis=0)
                best = int(np.argmin(shares))
                if shares[best] < shares[choice[name]] - _ROUNDING:
                    choice[name], has_changed = best, True
        return choice


def total_share(choice: Mapping[str, int], budgets: Sequence[Budget]) -> float:
    """Return the sum over budgets of the cost of a choice over the limit."""
    return float(sum(budget.cost.at(choice) / budget.limit for budget in budgets))


def _shares_of(choice: Choice, name: str, damages: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
    """Return (budgets, options) costs over limits, when one decision takes each of its options."""
    rows = [np.broadcast_to(budget.cost.of_options(choice, name), damages.shape) / budget.limit for budget in budgets]
    return np.stack(rows)
