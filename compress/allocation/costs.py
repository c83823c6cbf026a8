"""Costs of a network as a function of the widths of its channel groups.

A layer's cost depends on both of its widths, so savings must not be added up layer by layer:

    cost = fixed + sum over terms of   factor * out(widths) * in(widths)

where `out` and `in` are a layer's channel counts, each the full size less the channels lost by the groups on that axis.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Axis:
    """A channel count that shrinks with some groups.

    Attributes:
        size: Count with nothing removed.
        slots: Group name -> slots on this axis for each channel of the group (an integer or, where channels have
            unequal shares, their average).
    """

    size: float
    slots: Mapping[str, float] = field(default_factory=dict)

    def at(self, removed: Mapping[str, int]) -> float:
        """Return the count after `removed` channels of each group are gone."""
        return self.size - sum(slots * removed.get(group, 0) for group, slots in self.slots.items())

    def channels_at(self, removed: Mapping[str, int]) -> int:
        """Return the count of `at`, rounded by `whole_channels`."""
        return int(whole_channels(np.asarray(self.at(removed))))


def whole_channels(counts: np.ndarray) -> np.ndarray:
    """Return counts rounded to int64, ties to even.

    Sums of the same shares in another order differ in their last digits, and must not be rounded differently.

    >>> whole_channels(np.array([2.4, 10.5 - 1e-12, 10.5 + 1e-12])).tolist()
    [2, 10, 10]
    """
    found: np.ndarray = np.rint(np.round(counts, 6)).astype(np.int64)
    return found


ONE = Axis(1.0)


@dataclass(frozen=True, slots=True)
class Term:
    """One product in the cost.

    Attributes:
        factor: Cost of one output channel reading one input channel.
        out: Output channels.
        inp: Input channels; ONE where they do not matter.
        layer: Module path of the layer whose cost this is.
    """

    factor: float
    out: Axis
    inp: Axis = ONE
    layer: str = ""


@dataclass(frozen=True, slots=True)
class CoupledCost:
    """The cost of a network as a function of its widths.

    Attributes:
        terms: The products.
        fixed: Cost that no group changes.
        widths: Group name -> full width.

    >>> cost = CoupledCost((Term(2.0, Axis(8, {"a": 1}), Axis(4)),), 10.0, {"a": 8})
    >>> cost.at({"a": 8}), cost.at({"a": 2})
    (74.0, 26.0)
    """

    terms: tuple[Term, ...]
    fixed: float
    widths: Mapping[str, int]

    def at(self, widths: Mapping[str, int]) -> float:
        """Return the cost at the given widths; groups not named keep their full width."""
        removed = {name: full - widths.get(name, full) for name, full in self.widths.items()}
        return self.fixed + sum(term.factor * term.out.at(removed) * term.inp.at(removed) for term in self.terms)

    @property
    def full(self) -> float:
        """The cost with nothing removed."""
        return self.at({})
