"""Which budgets does a target set, over the widths that are allowed? From shares of the baseline to tables of costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, nn

from compress.allocation.costs import CoupledCost
from compress.allocation.problem import Budget, Factor, TableCost, from_widths
from compress.config.schema import TargetConfig
from compress.cost.macs import layer_macs
from compress.errors import BudgetUnreachable
from compress.model.artifacts import Figures
from compress.pruning.groups import ChannelGroup
from compress.pruning.width_costs import build_cost
from compress.search.width_latency import LatencyModel

_WEIGHT_BYTES = 4

Widths = Mapping[str, int]


def is_inside(name: str, block: str) -> bool:
    """Return True for a residual block, or a module or parameter inside it.

    >>> is_inside("body.1.conv1", "body.1"), is_inside("body.10", "body.1")
    (True, False)
    """
    return f"{name}.".startswith(f"{block}.")


@dataclass
class Targets:
    """The targets of one stage, for one network.

    Attributes:
        config: What was asked.
        baseline: The untouched network.
        module: The network as it is now.
        example: One input, (1, C, H, W).
        groups: Groups whose width may change.
        file_bytes: Size of the present network's ONNX file.
        latency: Its latency, where a target needs it.
        correction: What the limit of the latency is multiplied by, after whole networks were timed.
    """

    config: TargetConfig
    baseline: Figures
    module: nn.Module
    example: Tensor
    groups: Mapping[str, ChannelGroup]
    file_bytes: int
    latency: LatencyModel | None = None
    correction: float = 1.0
    _costs: dict[str, CoupledCost] = field(default_factory=dict)
    _layer_macs: dict[str, int] | None = None

    def cost(self, unit: str) -> CoupledCost:
        """Return MACs, params or weights of the network as a function of its widths."""
        if unit not in self._costs:
            self._costs[unit] = build_cost(self.module, self.example, self.groups, unit)
        return self._costs[unit]

    @property
    def latency_ratio(self) -> float | None:
        """The share of the baseline's latency that is to be kept at most."""
        if self.latency is None:
            return None
        asked = [self.config.latency] if self.config.latency is not None else []
        if self.config.latency_ms is not None:
            asked.append(self.config.latency_ms / self.latency.reference_ms)
        return min(asked)

    def budgets(self, levels: Mapping[str, Sequence[int]], blocks: Mapping[str, str] | None = None) -> list[Budget]:
        """Return every budget, as tables over the widths allowed.

        Args:
            levels: Group name -> its allowed widths.
            blocks: Module path of a residual block -> the decision whose option 0 removes it. No block lies in another.

        Raises:
            BudgetUnreachable: What cannot be narrowed alone takes more than the latency allowed.
        """
        found = []
        for unit in ("macs", "params"):
            share = getattr(self.config, unit)
            if share is not None:
                whole = float(getattr(self.baseline, unit))
                cost = self._table(unit, levels, blocks or {})
                found.append(Budget(unit, cost, share * whole, whole, f"the baseline's {unit}"))
        if self.config.size_mb is not None:
            found.append(self._size_budget(levels, self.config.size_mb, blocks or {}))
        if self.latency is not None and self.latency_ratio is not None:
            budget = self.latency.budget(self.latency_ratio * self.correction, blocks or {})
            budget = replace(budget, is_absolute=self.config.latency_ms is not None)
            if budget.cost.fixed > budget.limit:
                raise BudgetUnreachable(
                    f"Target {budget.show(budget.limit)} cannot be reached: what no channel group changes alone takes "
                    f"{budget.show(budget.cost.fixed)}.",
                    best=budget.cost.fixed,
                )
            found.append(budget)
        return found

    def _table(self, unit: str, levels: Mapping[str, Sequence[int]], blocks: Mapping[str, str]) -> TableCost:
        """Return MACs, params or weights as tables; what no group changes in a block goes with the block, too.

        Of weights only those that some group changes go with a block, so that a file is no larger than its table says.
        """
        cost = self.cost(unit)
        switches = {
            position: decision
            for position, term in enumerate(cost.terms)
            for block, decision in blocks.items()
            if is_inside(term.layer, block)
        }
        table = from_widths(cost, levels, switches)
        rest = {decision: self._amount_in(unit, block) for block, decision in blocks.items() if unit != "weights"}
        for position, decision in switches.items():
            if decision in rest:
                term = cost.terms[position]
                rest[decision] -= term.factor * term.out.size * term.inp.size
        fixed = tuple(Factor((), np.asarray(amount), decision) for decision, amount in rest.items())
        return TableCost(table.fixed - sum(rest.values()), table.factors + fixed, table.sized)

    def _amount_in(self, unit: str, block: str) -> float:
        """Return the MACs or params that go with a block, all channels in place."""
        if unit == "macs":
            if self._layer_macs is None:
                self._layer_macs = layer_macs(self.module, self.example)
            return float(sum(count for layer, count in self._layer_macs.items() if is_inside(layer, block)))
        outside = {id(p) for name, p in self.module.named_parameters() if not is_inside(name, block)}
        return float(sum(p.numel() for p in self.module.get_submodule(block).parameters() if id(p) not in outside))

    def _size_budget(self, levels: Mapping[str, Sequence[int]], size_mb: float, blocks: Mapping[str, str]) -> Budget:
        """Return the budget of the file's size: the present size less the weights that go; all else stays."""
        weights = self._table("weights", levels, blocks)
        full = {name: len(widths) - 1 for name, widths in levels.items()} | dict.fromkeys(blocks.values(), 1)
        rest = self.file_bytes / _WEIGHT_BYTES - weights.at(full)
        factors = tuple(Factor(f.decisions, f.table * _WEIGHT_BYTES / 1e6, f.switch) for f in weights.factors)
        cost = TableCost((weights.fixed + rest) * _WEIGHT_BYTES / 1e6, factors)
        return Budget("MB", cost, size_mb)

    def reached(self, widths: Widths) -> dict[str, float]:
        """Return what is left of the baseline's MACs and params at the given widths, as shares."""
        return {unit: self.cost(unit).at(widths) / float(getattr(self.baseline, unit)) for unit in ("macs", "params")}

    def size_mb(self, widths: Widths) -> float:
        """Return the size of the file at the given widths, at most."""
        weights = self.cost("weights")
        return (self.file_bytes - (weights.full - weights.at(widths)) * _WEIGHT_BYTES) / 1e6
