"""Prices of estimated damages: factors that bring damages of widths, residual streams and blocks to one unit."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compress.allocation.blocks import Structure, block_decision
from compress.allocation.widths import Candidates
from compress.pruning.ranking.selection import Groups

_INSIDE, _RESIDUAL, _BLOCK = "inside", "residual", "block"


@dataclass(frozen=True)
class Pricing:
    """Prices of estimated damages: a factor for each decision, and a common exponent.

    Attributes:
        source: Origin of the factors, for notes and the report.
        power: Exponent of each damage.
        factors: Decision -> factor of its damage.
    """

    source: str
    power: float
    factors: Mapping[str, float]

    def damage(self, name: str, damage: float | np.ndarray) -> float | np.ndarray:
        """Return the priced damage of a decision, which the knapsack minimises."""
        return self.factors[name] * damage**self.power

    def repriced(self, candidates: Iterable[Candidates], names: Mapping[str, str] | None = None) -> list[Candidates]:
        """Return candidates with priced damages.

        Args:
            candidates: Groups with estimated damages.
            names: Group -> decision whose factor it uses; by default the decision of the same name.
        """
        return [
            replace(
                one, measured=np.asarray(self.damage(names[one.name] if names else one.name, one.damages)), errors=None
            )
            for one in candidates
        ]


class Estimates:
    """Estimated damages of the decisions about one network: the width of each group, the removal of each block.

    Args:
        candidates: Groups with estimated damages of each width.
        groups: The same groups, by name; each states whether it lies along a residual stream.
        block_damages: Residual block -> estimated damage of its removal, above 0.

    Attributes:
        candidates: Group -> its candidates.
        block_damages: Residual block -> estimated damage of its removal.
        decisions: Residual block -> name of the decision about it.
        kinds: Decision -> kind: "inside" a block, along a "residual" stream, or a "block".
    """

    def __init__(self, candidates: Sequence[Candidates], groups: Groups, block_damages: Mapping[str, float]) -> None:
        self.candidates = {one.name: one for one in candidates}
        self.block_damages = dict(block_damages)
        self.decisions = {block: block_decision(block) for block in block_damages}
        self.kinds = {name: _RESIDUAL if groups[name].is_summed else _INSIDE for name in self.candidates}
        self.kinds |= dict.fromkeys(self.decisions.values(), _BLOCK)

    def damages(self, structure: Structure) -> dict[str, float]:
        """Return decision -> estimated damage of its chosen option; kept blocks are left out."""
        damages = {
            name: float(one.damages[one.levels.index(structure.widths[name])]) for name, one in self.candidates.items()
        }
        return damages | {self.decisions[block]: self.block_damages[block] for block in structure.removed}

    def channel_damage(self, structure: Structure, pricing: Pricing) -> float:
        """Return the priced damage of a network's channels."""
        found = self.damages(structure)
        return sum(float(pricing.damage(name, found[name])) for name in self.candidates)

    def priced_blocks(self, pricing: Pricing) -> dict[str, float]:
        """Return block -> priced damage of its removal."""
        return {
            block: float(pricing.damage(decision, self.block_damages[block]))
            for block, decision in self.decisions.items()
        }

    def price(self, source: str, residual: float, block: float | None = None) -> Pricing:
        """Return factors for residual streams and for blocks; channels inside blocks have the factor 1.

        Args:
            source: Origin of the factors.
            residual: Factor of residual streams.
            block: Factor of blocks; None for one at which all blocks are kept.
        """
        of_kind = {_INSIDE: 1.0, _RESIDUAL: residual, _BLOCK: self._dearest(residual) if block is None else block}
        return Pricing(source, 1.0, {name: of_kind[kind] for name, kind in self.kinds.items()})

    def vary(self, pricing: Pricing, source: str, spread: float, random: np.random.Generator) -> Pricing:
        """Return factors multiplied by log-normal noise, one for each kind and one for each decision."""
        of_kind = {kind: random.normal() for kind in (_INSIDE, _RESIDUAL, _BLOCK)}
        factors = {
            name: factor * math.exp(spread * (of_kind[self.kinds[name]] + random.normal()))
            for name, factor in pricing.factors.items()
        }
        return Pricing(source, pricing.power, factors)

    def _dearest(self, residual: float) -> float:
        """Return a factor of blocks at which the least harmful block costs as much as all channels together."""
        most = [
            float(one.damages.max()) * (residual if self.kinds[name] == _RESIDUAL else 1.0)
            for name, one in self.candidates.items()
        ]
        return (sum(most) or 1.0) / min(self.block_damages.values(), default=1.0)
