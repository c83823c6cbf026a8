"""Mixed-integer linear program of a knapsack with coupled costs.

    x[d, k]     1 where decision d takes option k; every row sums to 1
    u[s, i]     1 where a count that several decisions lower has its i-th possible size; every row sums to 1, and this
                size is the full count less the channels that the options in x remove
    y[f, a, b]  1 where the two decisions of factor f take the options a and b; its margins are the two rows of x (or u)

The y of a factor inside a removable block has margins of at most x, and sums to the entry of x that keeps the block.
Factors of several budgets over the same decisions share one y. x and u are whole numbers, so that a proof holds for
tables over counts as well.

Source: the level-one lift of Sherali and Adams 1990, "A hierarchy of relaxations between the continuous and convex
hull representations for zero-one programming problems"; solved by HiGHS (Huangfu and Hall 2018).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from compress.allocation.problem import Budget, Choice, Decision, TableCost
from compress.allocation.sizes import SizeAxis, SizeFactor

NODE_LIMIT = 4000
_RELATIVE_GAP = 1e-6
_FOUND_OPTIMUM = 0

_Row = str | SizeAxis  # a row of x by the name of its decision, or a row of u by its axis
_Key = tuple[tuple[_Row, ...], str | None]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A factor over decisions or over counts.

    Attributes:
        rows: Rows of x or u that the cost depends on, two at most.
        table: Costs, with one axis for each row.
        switch: Decision whose option 0 removes this part, or None.
    """

    rows: tuple[_Row, ...]
    table: np.ndarray
    switch: str | None

    @property
    def is_coupled(self) -> bool:
        return len(self.rows) + (self.switch is not None) > 1

    @property
    def key(self) -> _Key:
        return self.rows, self.switch


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
        budgets: Budgets, whose factors determine the variables y.

    Attributes:
        size: Number of variables.
    """

    def __init__(self, decisions: Sequence[Decision], budgets: Sequence[Budget]) -> None:
        self.decisions = decisions
        self.budgets = budgets
        self._rows: dict[_Row, np.ndarray] = {}
        self.size = 0
        for decision in decisions:
            self._rows[decision.name] = self._new(len(decision.damages))
        self._parts = [list(_parts(budget.cost)) for budget in budgets]
        parts = [part for found in self._parts for part in found]
        for row in dict.fromkeys(row for part in parts for row in part.rows if isinstance(row, SizeAxis)):
            self._rows[row] = self._new(len(row.sizes))
        self._whole = self.size
        self._y: dict[_Key, np.ndarray] = {}
        for part in parts:
            if part.is_coupled and part.key not in self._y:
                self._y[part.key] = self._new(part.table.size).reshape(part.table.shape)

    def least_damage(self, scale: float, lowered: Sequence[float] | None = None) -> tuple[Choice | None, bool]:
        """Return the choice of least damage within the budgets, and whether it is proved optimal.

        Args:
            scale: Unit of the damages, so that the solver's absolute tolerances mean little.
            lowered: Share by which each limit is lowered.

        Returns:
            The choice is None if no choice is within the budgets, or the limit on nodes is reached without one.
        """
        objective = np.zeros(self.size)
        for decision in self.decisions:
            objective[self._rows[decision.name]] = decision.damages / scale
        shares = lowered or [0.0] * len(self.budgets)
        return self._solve(objective, [1 - share for share in shares])

    def least_cost(self, budget: Budget) -> Choice | None:
        """Return the choice that costs least in the unit of one budget; None if it was not found."""
        return self._solve(self._cost_row(budget, list(_parts(budget.cost)))[0], [])[0]

    def _solve(self, objective: np.ndarray, limits: Sequence[float]) -> tuple[Choice | None, bool]:
        rows = _Rows()
        for row, columns in self._rows.items():
            rows.add(columns, np.ones(len(columns)), 1, 1)
            if isinstance(row, SizeAxis):
                self._add_size(rows, row, columns)
        for key, columns in self._y.items():
            self._add_margins(rows, key, columns)
        for budget, parts, limit in zip(self.budgets, self._parts, limits, strict=False):
            costs, fixed = self._cost_row(budget, parts)
            columns = np.flatnonzero(costs)
            rows.add(columns, costs[columns], -np.inf, limit - fixed)
        result = milp(
            objective,
            integrality=(np.arange(self.size) < self._whole).astype(int),
            bounds=Bounds(0, 1),
            constraints=rows.constraint(self.size),
            options={"node_limit": NODE_LIMIT, "mip_rel_gap": _RELATIVE_GAP},
        )
        if result.x is None:
            return None, False
        choice = {one.name: int(np.argmax(result.x[self._rows[one.name]])) for one in self.decisions}
        return choice, result.status == _FOUND_OPTIMUM

    def _add_size(self, rows: _Rows, axis: SizeAxis, u: np.ndarray) -> None:
        """Add the constraint that u names the size that x leaves, in steps of the sizes to keep the numbers small."""
        unit = float(np.gcd.reduce(np.diff(axis.sizes))) if len(axis.sizes) > 1 and axis.is_whole else 1.0
        columns = np.concatenate([u, *(self._rows[name] for name in axis.lost)])
        values = np.concatenate([axis.sizes, *axis.lost.values()]) / unit
        off = 0.0 if axis.is_whole else 0.5
        rows.add(columns, values, axis.full / unit - off, axis.full / unit + off)

    def _add_margins(self, rows: _Rows, key: _Key, y: np.ndarray) -> None:
        names, switch = key
        low = 0.0 if switch is None else -np.inf
        for axis, name in enumerate(names):
            for option, x in enumerate(self._rows[name]):
                columns = np.append(np.take(y, option, axis).ravel(), x)
                rows.add(columns, np.append(np.ones(len(columns) - 1), -1.0), low, 0.0)
        if switch is not None:
            columns = np.append(y.ravel(), self._rows[switch][1])
            rows.add(columns, np.append(np.ones(y.size), -1.0), 0.0, 0.0)

    def _cost_row(self, budget: Budget, parts: Sequence[_Part]) -> tuple[np.ndarray, float]:
        """Return the coefficients of a cost, and its fixed part, as shares of the limit."""
        row = np.zeros(self.size)
        for part in parts:
            if part.is_coupled:
                columns = self._y[part.key]
            elif part.rows:
                columns = self._rows[part.rows[0]]
            else:  # a part removed only with its block
                columns = self._rows[str(part.switch)][1:]
            np.add.at(row, columns.ravel(), part.table.ravel() / budget.limit)
        return row, budget.cost.fixed / budget.limit

    def _new(self, count: int) -> np.ndarray:
        self.size += count
        return np.arange(self.size - count, self.size)


def _parts(cost: TableCost) -> Iterator[_Part]:
    for factor in cost.factors:
        yield _Part(factor.decisions, factor.table, factor.switch)
    for sized in cost.sized:
        yield _sized_part(sized)


def _sized_part(factor: SizeFactor) -> _Part:
    """Return a factor over counts; a count that a single decision lowers is indexed by its options."""
    rows: list[_Row] = []
    table = factor.table
    for side, axis in enumerate(factor.axes):
        if len(axis.lost) == 1:
            ((name, lost),) = axis.lost.items()
            rows.append(name)
            table = np.take(table, axis.places(lost), axis=side)
        else:
            rows.append(axis)
    return _Part(tuple(rows), table, factor.switch)
