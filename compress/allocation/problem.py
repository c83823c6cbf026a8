"""Decisions under a budget, and the costs of their choices.

    decision   one choice to make: a channel group's width, whether a block is kept, a layer's rank
    option     one answer to a decision, by position; each has a damage
    factor     a table of costs over one or two decisions; a removed block takes the factors inside it along. If more
               decisions lower a channel count together, it is a table over counts (`compress.allocation.sizes`)
    choice     decision name -> position of the option taken

A layer's cost depends on both of its widths, so costs are tables over pairs and never sums of savings.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix

from compress.allocation.costs import Axis, CoupledCost
from compress.allocation.sizes import SizeFactor, SizeTerms
from compress.errors import InternalError

Choice = dict[str, int]
_NOTHING = np.zeros(1)


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """One choice to make among several options.

    Attributes:
        name: Name, unique in a problem.
        damages: (n,) float64, finite, >= 0; estimated damage of each option to the network.
    """

    name: str
    damages: np.ndarray

    def __post_init__(self) -> None:
        if self.damages.ndim != 1 or not len(self.damages):
            raise InternalError(f"Decision '{self.name}' must have a row of options, it has {self.damages.shape}.")
        if not (np.isfinite(self.damages).all() and (self.damages >= 0).all()):
            raise InternalError(f"Decision '{self.name}' must have finite damages of at least 0.")


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """The cost of one part of the network.

    Attributes:
        decisions: Names of the decisions that the cost depends on, two at most.
        table: Costs, with one axis for each decision.
        switch: A decision whose option 0 removes this part, which then costs nothing.
    """

    decisions: tuple[str, ...]
    table: np.ndarray
    switch: str | None = None


@dataclass(frozen=True, eq=False)
class TableCost:
    """The cost of a complete network, in one unit, as a function of a choice.

    Attributes:
        fixed: Cost that no decision changes.
        factors: Costs that depend on one or two decisions.
        sized: Costs that depend on channel counts which several decisions lower together.

    >>> cost = TableCost(1.0, (Factor(("a", "b"), np.array([[1.0, 2.0], [3.0, 4.0]])),))
    >>> cost.at({"a": 1, "b": 0}), cost.of_options({"a": 1, "b": 0}, "b").tolist()
    (4.0, [4.0, 5.0])
    >>> {name: costs.tolist() for name, costs in cost.of_each({"a": 1, "b": 0}, ["a", "b", "c"], 4.0).items()}
    {'a': [2.0, 4.0], 'b': [4.0, 5.0], 'c': [4.0]}
    """

    fixed: float
    factors: tuple[Factor, ...] = field(default_factory=tuple)
    sized: tuple[SizeFactor, ...] = ()

    def at(self, choice: Mapping[str, int]) -> float:
        """Return the cost of a choice."""
        switched = sum(_value(factor, choice) for factor in self._switched)
        return self.fixed + self._stacked.at(choice) + switched + self._sizes.at(choice)

    def of_options(self, choice: Mapping[str, int], name: str, here: float | None = None) -> np.ndarray:
        """Return (n,) costs of the complete network when decision `name` takes each of its options, the others fixed.

        Args:
            choice: Present option of each decision.
            name: Decision to vary; the result is (1,) if no cost depends on it.
            here: `at(choice)`, if it is known.
        """
        touching = [f for f in self._switched if name in f.decisions or name == f.switch]
        own = self._stacked.of_options(choice, name)
        rest = (self.at(choice) if here is None else here) - sum(_value(factor, choice) for factor in touching)
        if own is not None:
            rest, start = rest - own[choice[name]], own
        else:
            start = np.zeros(1)
        start = start + self._sizes.changes(choice, [name]).get(name, 0.0)
        return np.asarray(sum((_row(factor, choice, name) for factor in touching), start=start + rest))

    def of_each(self, choice: Mapping[str, int], names: Iterable[str], here: float) -> dict[str, np.ndarray]:
        """Return the costs of `of_options` for each of several decisions.

        Args:
            choice: Present option of each decision.
            names: Decisions to vary, one at a time.
            here: `at(choice)`.
        """
        if self._switched:
            return {name: self.of_options(choice, name, here) for name in names}
        own, wanted = self._stacked.of_each(choice), list(names)
        sized, found = self._sizes.changes(choice, wanted), {}
        for name in wanted:
            row, changes = own.get(name, _NOTHING), sized.get(name)
            row = row + (here - row[choice[name] if name in own else 0])
            found[name] = row if changes is None else row + changes
        return found

    @cached_property
    def _switched(self) -> tuple[Factor, ...]:
        return tuple(factor for factor in self.factors if factor.switch is not None)

    @cached_property
    def _sizes(self) -> SizeTerms:
        return SizeTerms(self.sized)

    @cached_property
    def _stacked(self) -> "_Stacked":
        return _Stacked([factor for factor in self.factors if factor.switch is None])


class _Stacked:
    """Factors without a switch as one sparse matrix over all options of all decisions.

    With x the vector that is 1 at each chosen option, the cost is `constant + linear . x + x . pairs x`.

    Args:
        factors: Factors over two decisions at most.
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        sizes = {name: n for f in factors for name, n in zip(f.decisions, f.table.shape, strict=True)}
        ends = np.cumsum([0, *sizes.values()])
        self._starts = {name: int(start) for name, start in zip(sizes, ends, strict=False)}
        self._sizes, self._count = sizes, int(ends[-1])
        self._constant, self._linear = 0.0, np.zeros(self._count)
        rows, columns, values = [], [], []
        for factor in factors:
            places = [self._starts[name] + np.arange(sizes[name]) for name in factor.decisions]
            if len(places) == 2:
                row, column = np.meshgrid(*places, indexing="ij")
                rows.append(row.ravel())
                columns.append(column.ravel())
                values.append(factor.table.ravel())
            elif places:
                self._linear[places[0]] += factor.table
            else:
                self._constant += float(factor.table)
        shape = (self._count, self._count)
        pairs = csr_matrix((_flat(values), (_flat(rows), _flat(columns))), shape=shape) if values else csr_matrix(shape)
        both = (pairs + pairs.T).tocsr()
        self._pairs = pairs
        self._both = both
        self._blocks = {name: both[start : start + sizes[name]] for name, start in self._starts.items()}

    def at(self, choice: Mapping[str, int]) -> float:
        """Return the cost of a choice."""
        x = self._chosen(choice)
        return float(self._constant + self._linear @ x + x @ (self._pairs @ x))

    def of_options(self, choice: Mapping[str, int], name: str) -> np.ndarray | None:
        """Return (n,) the cost that depends on a decision, at each of its options; None if no cost does."""
        if name not in self._starts:
            return None
        start = self._starts[name]
        found: np.ndarray = self._linear[start : start + self._sizes[name]] + self._blocks[name] @ self._chosen(choice)
        return found

    def of_each(self, choice: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Return the costs of `of_options` for every decision that a cost depends on."""
        found = self._linear + self._both @ self._chosen(choice)
        return {name: found[start : start + self._sizes[name]] for name, start in self._starts.items()}

    def _chosen(self, choice: Mapping[str, int]) -> np.ndarray:
        x = np.zeros(self._count)
        x[[start + choice[name] for name, start in self._starts.items()]] = 1
        return x


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays)


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """Upper limit of one cost.

    Attributes:
        name: Name of the quantity: "macs", "latency_ms".
        cost: Cost in the unit of the quantity.
        limit: Limit in the same unit.
        whole: Cost that shares in messages refer to; None for messages in the unit itself.
        of: Name of the cost `whole` in messages.
        is_absolute: Whether the limit was given in the unit itself: messages then show it beside the share.
    """

    name: str
    cost: TableCost
    limit: float
    whole: float | None = None
    of: str = ""
    is_absolute: bool = False

    def allows(self, choice: Mapping[str, int]) -> bool:
        """Return whether a choice is within the limit, up to the rounding of a sum of floats."""
        return self.within(self.cost.at(choice))

    def within(self, cost: float) -> bool:
        """Return whether a cost is within the limit, up to the rounding of a sum of floats."""
        return cost <= self.limit + 1e-9 * abs(self.limit)

    def show(self, cost: float) -> str:
        """Return a cost in words.

        >>> Budget("macs", TableCost(0.0), 10.0).show(5.0)
        '5 macs'
        >>> Budget("macs", TableCost(0.0), 10.0, 20.0, "the baseline's MACs").show(5.0)
        "0.250 of the baseline's MACs"
        >>> Budget("ms", TableCost(0.0), 10.0, 20.0, "the baseline's latency", is_absolute=True).show(5.0)
        "5 ms (0.250 of the baseline's latency)"
        """
        if self.whole is None:
            return f"{cost:.6g} {self.name}"
        share = f"{cost / self.whole:.3f} of {self.of}"
        return f"{cost:.4g} {self.name} ({share})" if self.is_absolute else share


def from_widths(
    cost: CoupledCost, levels: Mapping[str, Sequence[int]], switches: Mapping[int, str] | None = None
) -> TableCost:
    """Return a cost that is a sum of products of widths as tables over the allowed widths.

    Args:
        cost: A sum of products of two axes.
        levels: Decision (channel group) -> its allowed widths, in the order of its options. Groups without levels
            keep their full width.
        switches: Position of a term in `cost.terms` -> the decision that removes it.
    """
    removed = {name: cost.widths[name] - np.asarray(widths, dtype=np.float64) for name, widths in levels.items()}
    fixed, tables = cost.fixed, _Tables()
    for position, term in enumerate(cost.terms):
        switch = (switches or {}).get(position)
        out, inp = _linear(term.out, removed), _linear(term.inp, removed)
        tables.add(switch, term.factor * term.out.size * term.inp.size)
        for name, loss in out.items():
            tables.add(switch, -term.factor * term.inp.size * loss, name)
        for name, loss in inp.items():
            tables.add(switch, -term.factor * term.out.size * loss, name)
        for a, loss_a in out.items():
            for b, loss_b in inp.items():
                if a == b:
                    tables.add(switch, term.factor * loss_a * loss_b, a)
                else:
                    tables.add(switch, term.factor * np.outer(loss_a, loss_b), a, b)
    return TableCost(fixed + tables.fixed, tables.factors())


class _Tables:
    """Sums of tables over the same decisions: a pair of decisions has one table, however many layers share it."""

    def __init__(self) -> None:
        self.fixed = 0.0
        self._sums: dict[tuple[str | None, tuple[str, ...]], np.ndarray] = {}

    def add(self, switch: str | None, values: np.ndarray | float, *names: str) -> None:
        if not names and switch is None:
            self.fixed += float(values)
            return
        table = np.asarray(values, dtype=np.float64)
        if list(names) != sorted(names):
            names, table = names[::-1], table.T
        key = (switch, names)
        self._sums[key] = self._sums[key] + table if key in self._sums else table

    def factors(self) -> tuple[Factor, ...]:
        return tuple(Factor(names, table, switch) for (switch, names), table in self._sums.items())


def _linear(axis: Axis, removed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return decision -> slots that each of its options removes from an axis."""
    return {name: slots * removed[name] for name, slots in axis.slots.items() if name in removed}


def _is_off(factor: Factor, choice: Mapping[str, int]) -> bool:
    return factor.switch is not None and choice[factor.switch] == 0


def _value(factor: Factor, choice: Mapping[str, int]) -> float:
    if _is_off(factor, choice):
        return 0.0
    return float(factor.table[tuple(choice[name] for name in factor.decisions)])


def _row(factor: Factor, choice: Mapping[str, int], name: str) -> np.ndarray:
    """Return a factor's cost for each option of `name`, the other decisions as in `choice`."""
    if name == factor.switch:
        return np.asarray([0.0, _value(factor, {**choice, name: 1})])
    if _is_off(factor, choice):
        return np.zeros(factor.table.shape[factor.decisions.index(name)])
    index = tuple(slice(None) if other == name else choice[other] for other in factor.decisions)
    return np.asarray(factor.table[index])
