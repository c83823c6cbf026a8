"""Costs of layers whose channel counts are sums over several decisions, as behind a concatenation.

    axis     a channel count: its full size less the channels that the chosen option of each decision removes
    sizes    the counts that can occur, ascending
    factor   a table over the sizes of one or two axes

A table over the options themselves would have as many axes as decisions; a table over sums has two at most, and gives
every choice the same cost.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from compress.allocation.costs import whole_channels
from compress.errors import InternalError


@dataclass(frozen=True, eq=False)
class SizeAxis:
    """A channel count that decisions lower.

    Attributes:
        full: The count with nothing removed.
        lost: Decision -> (options,) channels that each option removes from the count.
        sizes: (n,) int64, ascending; every count that a choice can leave, and possibly more.

    >>> SizeAxis(10.0, {"a": np.array([4.0, 0.0]), "b": np.array([4.0, 2.0, 0.0])}).sizes.tolist()
    [2, 4, 6, 8, 10]
    """

    full: float
    lost: Mapping[str, np.ndarray]
    sizes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", _possible_sizes(self.full, list(self.lost.values())))

    @property
    def is_whole(self) -> bool:
        """Return whether all options take whole numbers of channels."""
        return _is_whole(self.full, self.lost.values())

    def places(self, lost: np.ndarray) -> np.ndarray:
        """Return the positions in `sizes` of the counts that remain when `lost` channels are removed in all."""
        found: np.ndarray = np.searchsorted(self.sizes, whole_channels(self.full - lost))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class SizeFactor:
    """The cost of one part of the network as a function of one or two channel counts.

    Attributes:
        axes: Channel counts that the cost depends on, one or two.
        table: (sizes of the first axis, sizes of the second) costs.
        switch: A decision whose option 0 removes this part, which then costs nothing. It lowers no count.
    """

    axes: tuple[SizeAxis, ...]
    table: np.ndarray
    switch: str | None = None

    def __post_init__(self) -> None:
        expected = tuple(len(axis.sizes) for axis in self.axes)
        if self.table.shape != expected or len(expected) not in (1, 2):
            raise InternalError(f"A table over sizes must have the shape {expected}, it has {self.table.shape}.")

    @property
    def decisions(self) -> tuple[str, ...]:
        """The decisions that lower its counts, in the order of their names."""
        return tuple(sorted({name for axis in self.axes for name in axis.lost}))


class SizeTerms:
    """The sum of several factors over sizes, for all options of all decisions at once.

    An entry is one option of one decision in one factor. All entries of all factors lie in one row.

    Args:
        factors: Any number of factors.
    """

    def __init__(self, factors: Sequence[SizeFactor]) -> None:
        self.factors = factors
        counts = _option_counts(factors)
        ends = np.cumsum([0, *counts.values()])
        self._starts = {name: int(start) for name, start in zip(counts, ends, strict=False)}
        self._count = int(ends[-1])
        self._sizes = counts
        self._tables = _joined([factor.table.ravel() for factor in factors], np.float64)
        self._table_starts = np.cumsum([0, *(factor.table.size for factor in factors)])[:-1]
        self._sides = [_Side(factors, side) for side in (0, 1)]
        pairs = [(number, name) for number, factor in enumerate(factors) for name in factor.decisions]
        self._pair_factors = np.asarray([number for number, _ in pairs], dtype=np.int64)
        self._pair_names = [name for _, name in pairs]
        lengths = np.asarray([counts[name] for _, name in pairs], dtype=np.int64)
        self._pair_starts = np.cumsum([0, *lengths])[:-1]
        self._entry_pairs = np.repeat(np.arange(len(pairs)), lengths)
        self._entry_options = _joined([self._starts[name] + np.arange(counts[name]) for _, name in pairs], np.int64)
        self._lost = [_lost_by_entry(factors, pairs, side, counts) for side in (0, 1)]
        everywhere: dict[str, list[np.ndarray]] = {}
        for start, length, (_, name) in zip(self._pair_starts, lengths, pairs, strict=True):
            everywhere.setdefault(name, []).append(np.arange(start, start + length))
        self._entries_of = {name: np.concatenate(found) for name, found in everywhere.items()}
        self._switched = [(number, factor.switch) for number, factor in enumerate(factors) if factor.switch is not None]

    def at(self, choice: Mapping[str, int]) -> float:
        """Return the cost of a choice."""
        return float(self._values(self._chosen(choice), choice).sum()) if self.factors else 0.0

    def changes(self, choice: Mapping[str, int], names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return the change of the cost by each option of each decision, with the other decisions as in `choice`.

        Args:
            choice: Present option of each decision.
            names: Decisions to vary; the result lacks decisions that no cost depends on.
        """
        wanted = [name for name in names if name in self._starts]
        if not wanted:
            return {}
        chosen = self._chosen(choice)
        values = self._values(chosen, choice)
        found = np.zeros(self._count)
        entries = self._entries_of.get(wanted[0], np.zeros(0, np.int64)) if len(wanted) == 1 else slice(None)
        pairs = self._entry_pairs[entries]
        numbers = self._pair_factors[pairs]
        places = self._table_starts[numbers]
        for side, lost in zip(self._sides, self._lost, strict=True):
            now = self._lost_by_factor(lost, chosen)[numbers]
            places = places + side.places(numbers, now - lost[chosen][pairs] + lost[entries])
        is_on = self._is_on(choice)[numbers]
        np.add.at(found, self._entry_options[entries], np.where(is_on, self._tables[places] - values[numbers], 0.0))
        for number, switch in self._switched:
            if switch in wanted:
                there = float(self._values(chosen, {**choice, switch: 1})[number])
                start = self._starts[switch]
                found[start : start + 2] += np.asarray([0.0, there]) - values[number]
        return {name: found[self._starts[name] : self._starts[name] + self._sizes[name]] for name in wanted}

    def _chosen(self, choice: Mapping[str, int]) -> np.ndarray:
        """Return for each decision of each factor the entry that is chosen."""
        options = np.asarray([choice[name] for name in self._pair_names], dtype=np.int64)
        found: np.ndarray = self._pair_starts + options
        return found

    def _lost_by_factor(self, lost: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return np.bincount(self._pair_factors, weights=lost[chosen], minlength=len(self.factors))

    def _values(self, chosen: np.ndarray, choice: Mapping[str, int]) -> np.ndarray:
        """Return (factors,) costs."""
        numbers = np.arange(len(self.factors))
        places = self._table_starts
        for side, lost in zip(self._sides, self._lost, strict=True):
            places = places + side.places(numbers, self._lost_by_factor(lost, chosen))
        return np.where(self._is_on(choice), self._tables[places], 0.0)

    def _is_on(self, choice: Mapping[str, int]) -> np.ndarray:
        found = np.ones(len(self.factors), dtype=bool)
        for number, switch in self._switched:
            found[number] = choice[str(switch)] != 0
        return found


class _Side:
    """The first or second axes of several factors: turns lost channels into offsets into the factors' tables."""

    def __init__(self, factors: Sequence[SizeFactor], side: int) -> None:
        axes = [factor.axes[side] if side < len(factor.axes) else _NO_AXIS for factor in factors]
        self._full = np.asarray([axis.full for axis in axes])
        self._least = np.asarray([axis.sizes[0] for axis in axes], dtype=np.int64)
        rows = []
        for axis, factor in zip(axes, factors, strict=True):
            stride = factor.table.shape[1] if side == 0 and len(factor.axes) == 2 else 1
            row = np.searchsorted(axis.sizes, np.arange(axis.sizes[0], axis.sizes[-1] + 1))
            rows.append(row * stride)
        self._strides = _joined(rows, np.int64)
        self._starts = np.cumsum([0, *(len(row) for row in rows)])[:-1] - self._least

    def places(self, numbers: np.ndarray, lost: np.ndarray) -> np.ndarray:
        """Return offsets into the tables of the factors `numbers` when `lost` channels are removed from their axes."""
        sizes = whole_channels(self._full[numbers] - lost)
        found: np.ndarray = self._strides[self._starts[numbers] + sizes]
        return found


def _joined(rows: Sequence[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *rows])


def _option_counts(factors: Sequence[SizeFactor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for factor in factors:
        for axis in factor.axes:
            counts |= {name: len(lost) for name, lost in axis.lost.items()}
        if factor.switch is not None:
            counts.setdefault(factor.switch, 2)
    return counts


def _lost_by_entry(
    factors: Sequence[SizeFactor], pairs: Sequence[tuple[int, str]], side: int, counts: Mapping[str, int]
) -> np.ndarray:
    rows = []
    for number, name in pairs:
        axes = factors[number].axes
        lost = axes[side].lost.get(name) if side < len(axes) else None
        rows.append(np.zeros(counts[name]) if lost is None else np.asarray(lost, dtype=np.float64))
    return _joined(rows, np.float64)


def _is_whole(full: float, lost: Iterable[np.ndarray]) -> bool:
    return full == round(full) and all((options == np.rint(options)).all() for options in lost)


def _possible_sizes(full: float, lost: Sequence[np.ndarray]) -> np.ndarray:
    """Return (n,) int64 the possible counts, ascending; all counts of the range if a loss is not a whole number."""
    most = math.fsum(float(options.max()) for options in lost)
    least, whole = (int(whole_channels(np.asarray(size))) for size in (full - most, full))
    if least < 0:
        raise InternalError(f"An axis of {full:g} channels cannot lose {most:g}.")
    if not _is_whole(full, lost):
        return np.arange(least, whole + 1)
    is_possible = np.zeros(whole + 1, dtype=bool)
    is_possible[whole] = True
    for options in lost:
        before, is_possible = is_possible, np.zeros_like(is_possible)
        for loss in {int(value) for value in options}:
            is_possible[: whole + 1 - loss] |= before[loss:]
    return np.flatnonzero(is_possible)


_NO_AXIS = SizeAxis(0.0, {})
