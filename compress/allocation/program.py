"""How is a knapsack with coupled costs written for a solver of mixed-integer linear programs?

    x[d, k]     1 where decision d takes option k; every row sums to 1
    y[f, a, b]  1 where the two decisions of factor f take the options a and b; its margins are the two rows of x

A factor inside a block that may go has margins of at most x, and sums to the row entry that says the block stays.
Factors of several budgets over the same decisions share one y.

Source: the level-one lift of Sherali and Adams 1990, "A hierarchy of relaxations between the continuous and convex
hull representations for zero-one programming problems"; solved by HiGHS (Huangfu and Hall 2018).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from compress.allocation.problem import Budget, Choice, Decision, Factor

NODE_LIMIT = 4000
_RELATIVE_GAP = 1e-6
_FOUND_OPTIMUM = 0

_Key = tuple[tuple[str, ...], str | None]


@dataclass(slots=True)
class _Rows:
    """Rows of a sparse constraint matrix, with their bounds."""

    values: list[np.ndarray] = field(default_factory=list)
    columns: list[np.ndarray] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, columns: np.ndarray, values: np.ndarray, low: float, high: float) -> None:
        self.columns.append(columns)
        self.values.append(values)
        self.low.append(low)
        self.high.append(high)

    def constraint(self, width: int) -> LinearConstraint:
        rows = np.repeat(np.arange(len(self.columns)), [len(columns) for columns in self.columns])
        entries = (np.concatenate(self.values), (rows, np.concatenate(self.columns)))
        return LinearConstraint(coo_array(entries, shape=(len(self.columns), width)).tocsr(), self.low, self.high)


class Program:
    """The linear program of a set of decisions and budgets.

    Args:
        decisions: The rows of x, in this order.
        budgets: Their factors decide which y there are.

    Attributes:
        size: Number of variables.
    """

    def __init__(self, decisions: Sequence[Decision], budgets: Sequence[Budget]) -> None:
        self.decisions = decisions
        self.budgets = budgets
        self._x: dict[str, np.ndarray] = {}
        self.size = 0
        for decision in decisions:
            self._x[decision.name] = self._new(len(decision.damages))
        self._y: dict[_Key, np.ndarray] = {}
        for budget in budgets:
            for factor in budget.cost.factors:
                if _is_coupled(factor) and _key(factor) not in self._y:
                    self._y[_key(factor)] = self._new(factor.table.size).reshape(factor.table.shape)

    def least_damage(self, scale: float, lowered: Sequence[float] | None = None) -> tuple[Choice | None, bool]:
        """Return the choice of least damage within the budgets, and whether it is proved to be that.

        Args:
            scale: A damage to count in, so that the solver's absolute tolerances mean little.
            lowered: What is taken off each limit, as a share of it.

        Returns:
            None when there is no such choice, or none was found within the limit on nodes.
        """
        objective = np.zeros(self.size)
        for decision in self.decisions:
            objective[self._x[decision.name]] = decision.damages / scale
        shares = lowered or [0.0] * len(self.budgets)
        return self._solve(objective, [1 - share for share in shares])

    def least_cost(self, budget: Budget) -> Choice | None:
        """Return the choice that costs least in the unit of one budget; None when it was not found."""
        return self._solve(self._cost_row(budget)[0], [])[0]

    def _solve(self, objective: np.ndarray, limits: Sequence[float]) -> tuple[Choice | None, bool]:
        rows = _Rows()
        for columns in self._x.values():
            rows.add(columns, np.ones(len(columns)), 1, 1)
        for key, columns in self._y.items():
            self._add_margins(rows, key, columns)
        for budget, limit in zip(self.budgets, limits, strict=False):
            row, fixed = self._cost_row(budget)
            columns = np.flatnonzero(row)
            rows.add(columns, row[columns], -np.inf, limit - fixed)
        is_x = np.arange(self.size) < sum(len(columns) for columns in self._x.values())
        result = milp(
            objective,
            integrality=is_x.astype(int),
            bounds=Bounds(0, 1),
            constraints=rows.constraint(self.size),
            options={"node_limit": NODE_LIMIT, "mip_rel_gap": _RELATIVE_GAP},
        )
        if result.x is None:
            return None, False
        choice = {name: int(np.argmax(result.x[columns])) for name, columns in self._x.items()}
        return choice, result.status == _FOUND_OPTIMUM

    def _add_margins(self, rows: _Rows, key: _Key, y: np.ndarray) -> None:
        names, switch = key
        low = 0.0 if switch is None else -np.inf
        for axis, name in enumerate(names):
            for option, x in enumerate(self._x[name]):
                columns = np.append(np.take(y, option, axis).ravel(), x)
                rows.add(columns, np.append(np.ones(len(columns) - 1), -1.0), low, 0.0)
        if switch is not None:
            columns = np.append(y.ravel(), self._x[switch][1])
            rows.add(columns, np.append(np.ones(y.size), -1.0), 0.0, 0.0)

    def _cost_row(self, budget: Budget) -> tuple[np.ndarray, float]:
        """Return the coefficients of a cost, and what is fixed, as shares of the limit."""
        row = np.zeros(self.size)
        for factor in budget.cost.factors:
            if _is_coupled(factor):
                columns = self._y[_key(factor)]
            elif factor.decisions:
                columns = self._x[factor.decisions[0]]
            else:  # a part that only goes with its block
                columns = self._x[str(factor.switch)][1:]
            np.add.at(row, columns.ravel(), factor.table.ravel() / budget.limit)
        return row, budget.cost.fixed / budget.limit

    def _new(self, count: int) -> np.ndarray:
        self.size += count
        return np.arange(self.size - count, self.size)


def _is_coupled(factor: Factor) -> bool:
    return len(factor.decisions) + (factor.switch is not None) > 1


def _key(factor: Factor) -> _Key:
    return factor.decisions, factor.switch
