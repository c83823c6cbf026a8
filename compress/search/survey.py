"""Survey of a network: its prunable channel groups, their allowed widths, and the budgets that its targets set."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from compress.allocation.costs import CoupledCost
from compress.allocation.problem import Budget, Factor, TableCost, from_widths
from compress.allocation.widths import Candidates, Limits, width_levels
from compress.catalog import closest
from compress.checkpoint.rebuild import example_input
from compress.config.schema.prune import CutConfig, PruneConfig
from compress.config.schema.targets import TargetConfig
from compress.cost.macs import layer_macs
from compress.errors import BudgetUnreachable, ConfigValueError, InternalError
from compress.model.artifacts import ModelMetrics, TorchModel
from compress.progress import Progress
from compress.pruning.groups import ChannelGroup, Exclusion, exclusions_by_cause
from compress.pruning.ranking.selection import Groups, Selection, select_channels
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import build_cost, layer_axes
from compress.search.context import StageContext
from compress.search.export import exported
from compress.search.latency_loop import TimedChoice, meet_latency
from compress.search.width_latency import LatencyModel, model_latency
from compress.training.distributed import on_rank_0
from compress.verification.measurement import existing_bytes

MEASURED_LEVELS = 8
_WEIGHT_BYTES = 4

Widths = Mapping[str, int]
Unfit = Callable[[ChannelGroup], str | None]


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
        config: The targets, in shares of the baseline or absolute.
        baseline: Costs of the baseline.
        module: The present network.
        example: One input, (1, C, H, W).
        groups: Groups whose width may change.
        file_bytes: Size of the present network's ONNX file; 0 without a target of size.
        latency: Latency of the network; None unless a target needs it. Of several ranks, rank 0 alone has it.
        correction: Factor of the latency limit, found by timing complete networks.
    """

    config: TargetConfig
    baseline: ModelMetrics
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
        """Largest share of the baseline's latency that the targets allow."""
        if self.latency is None:
            return None
        asked = [self.config.latency] if self.config.latency is not None else []
        if self.config.latency_ms is not None:
            asked.append(self.config.latency_ms / self.latency.reference_ms)
        return min(asked)

    def budgets(self, levels: Mapping[str, Sequence[int]], blocks: Mapping[str, str] | None = None) -> list[Budget]:
        """Return all budgets, as tables over the allowed widths.

        Args:
            levels: Group name -> its allowed widths.
            blocks: Module path of a residual block -> the decision whose option 0 removes it. No block lies in another.

        Raises:
            BudgetUnreachable: The layers that cannot be narrowed take more than the allowed latency by themselves.
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
        """Return MACs, params or weights as tables over widths and removed blocks.

        A removed block also saves its MACs or params that no group changes. Of weights it saves only those that a group
        changes, so that a file is no larger than its table predicts.
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
        """Return the MACs or params that the removal of a block saves, with all channels."""
        if unit == "macs":
            if self._layer_macs is None:
                self._layer_macs = layer_macs(self.module, self.example)
            return float(sum(count for layer, count in self._layer_macs.items() if is_inside(layer, block)))
        outside = {id(p) for name, p in self.module.named_parameters() if not is_inside(name, block)}
        return float(sum(p.numel() for p in self.module.get_submodule(block).parameters() if id(p) not in outside))

    def _size_budget(self, levels: Mapping[str, Sequence[int]], size_mb: float, blocks: Mapping[str, str]) -> Budget:
        """Return the budget of the file's size: the present size less the removed weights."""
        weights = self._table("weights", levels, blocks)
        full = {name: len(widths) - 1 for name, widths in levels.items()} | dict.fromkeys(blocks.values(), 1)
        rest = self.file_bytes / _WEIGHT_BYTES - weights.at(full)
        factors = tuple(Factor(f.decisions, f.table * _WEIGHT_BYTES / 1e6, f.switch) for f in weights.factors)
        cost = TableCost((weights.fixed + rest) * _WEIGHT_BYTES / 1e6, factors)
        return Budget("MB", cost, size_mb)

    def reached(self, widths: Widths) -> dict[str, float]:
        """Return the kept shares of the baseline's MACs and params at the given widths."""
        return {unit: self.cost(unit).at(widths) / float(getattr(self.baseline, unit)) for unit in ("macs", "params")}

    def size_mb(self, widths: Widths) -> float:
        """Return an upper bound of the file's size in MB at the given widths."""
        weights = self.cost("weights")
        return (self.file_bytes - (weights.full - weights.at(widths)) * _WEIGHT_BYTES) / 1e6


@dataclass(frozen=True)
class Survey:
    """Prunable groups of a network, their allowed widths, and the targets.

    Attributes:
        model: The network.
        config: Settings of the prune stage.
        limits: Floors, caps and multiples of widths.
        groups: Its prunable channel groups.
        excluded: Excluded channel groups, with reasons.
        levels: Group name -> allowed widths, ascending; the last is the full width.
        targets: Targets of the stage for this network.
    """

    model: TorchModel
    config: PruneConfig
    limits: Limits
    groups: dict[str, ChannelGroup]
    excluded: list[Exclusion]
    levels: dict[str, tuple[int, ...]]
    targets: Targets

    def choose(self, candidates: Sequence[Candidates], correction: float) -> Selection:
        """Choose the channels to remove, with the limit of the latency multiplied by a factor.

        Raises:
            BudgetUnreachable: No allowed widths are within the budgets.
        """
        self.targets.correction = correction
        budgets = self.targets.budgets(self.levels)
        return select_channels(self.groups, candidates, budgets, self.limits, self.config.allocation)

    def choose_timed(self, candidates: Sequence[Candidates], progress: Progress) -> tuple[Selection, list[TimedChoice]]:
        """Choose the channels to remove; with a latency target, time them and choose again until the time is met.

        Raises:
            BudgetUnreachable: No allowed widths are within the budgets.
        """
        asked, latency = self.targets.latency_ratio, self.targets.latency
        if latency is None or asked is None or not latency.is_measured_here:
            return self.choose(candidates, 1.0), []
        in_ms = self.config.target.latency_ms is not None
        return meet_latency(lambda correction: self.choose(candidates, correction), latency, asked, progress, in_ms)


def survey(
    model: TorchModel,
    config: PruneConfig,
    latency: LatencyModel | None,
    ctx: StageContext,
    unfit: Unfit | None = None,
    among: frozenset[str] | None = None,
) -> Survey:
    """Find the prunable groups of a network, their allowed widths, and the budgets of the targets.

    Args:
        model: The network.
        config: Settings of the prune stage.
        latency: Latency of the same network with more blocks; its table is reused if it covers this network.
        ctx: Splits, folder and listener of the stage.
        unfit: Function that returns the reason why a method cannot prune a group, or None.
        among: Layers that compute the prunable groups, if these were found before; `unfit` and `config.exclude` are
            then not used.

    Raises:
        UntraceableModel: No channel graph could be built.
        ConfigValueError: `exclude` names no layer with prunable channels.
        ArtifactError: The given latency table is of another machine or network.
    """
    example = example_input(model.signature)
    if among is None:
        groups, excluded = find_groups(model.module, example, config, ctx.progress, unfit)
    else:
        found, excluded = find_cuttable(model.module, example)
        groups = {name: group for name, group in found.items() if name in among}
    limits = Limits(config.min_width, config.max_removed_ratio, config.multiple_of)
    is_measured = config.target.needs_latency or config.damage == "sensitivity"
    at_most = MEASURED_LEVELS if is_measured else None
    own = _limits_by_group(groups, config, limits, all_there=among is None)
    levels = {name: width_levels(group.width, group.parts, own[name], at_most) for name, group in groups.items()}
    targets = _find_targets(model, config, groups, levels, latency, ctx)
    return Survey(model, config, limits, groups, excluded, levels, targets)


def find_groups(
    module: nn.Module, example: Tensor, config: CutConfig, progress: Progress, unfit: Unfit | None
) -> tuple[dict[str, ChannelGroup], list[Exclusion]]:
    """Return the channel groups that a stage may prune, and the excluded ones with reasons.

    Args:
        module: The network.
        example: One input, (1, ...).
        config: Settings of the stage, with `exclude`, `only` and `residual`.
        progress: Receives one warning for each reason of exclusion.
        unfit: Function that returns the reason why a method cannot prune a group, or None.

    Raises:
        UntraceableModel: No channel graph could be built.
        ConfigValueError: `exclude` names no layer with prunable channels.
    """
    with progress.task("find and try channel groups", 1) as task:
        groups, excluded = find_cuttable(module, example)
        task.advance()
    reasons = {name: reason for name, group in groups.items() if unfit and (reason := unfit(group))}
    excluded += [Exclusion(name, reason) for name, reason in reasons.items()]
    for sentence in exclusions_by_cause(excluded):
        progress.warn(sentence)
    chosen = _matching(groups, config.exclude, "exclude")
    if config.only:
        listed = _matching(groups, config.only, "only")
        excluded += [Exclusion(name, "not listed in only", expected=True) for name in groups.keys() - listed]
        groups = {name: group for name, group in groups.items() if name in listed}
        chosen &= listed
        reasons = {name: reason for name, reason in reasons.items() if name in listed}
    if config.residual == "keep":
        chosen |= {name for name, group in groups.items() if group.is_summed}
    excluded += [Exclusion(name, "excluded by the pipeline file", expected=True) for name in chosen - reasons.keys()]
    return {name: group for name, group in groups.items() if name not in chosen | reasons.keys()}, excluded


def _limits_by_group(groups: Groups, config: CutConfig, limits: Limits, all_there: bool) -> dict[str, Limits]:
    """Return group -> its limits: by the last pattern that names the group, else the limits of the stage.

    Args:
        groups: The groups.
        config: Settings of the stage, with `limits` by pattern.
        limits: Limits of the stage.
        all_there: False if blocks were removed; a pattern may then name no group.

    Raises:
        ConfigValueError: A pattern names no group, although `all_there`.
    """
    found = dict.fromkeys(groups, limits)
    for pattern, own in config.limits.items():
        given = {key: value for key, value in own.model_dump().items() if value is not None}
        matching = {name for name, group in groups.items() if _is_named(group, pattern)}
        for name in _matching(groups, (pattern,), "limits") if all_there else matching:
            found[name] = replace(limits, **given)
    return found


def _matching(groups: Groups, patterns: tuple[str, ...], setting: str) -> set[str]:
    """Return the groups with a producer that one of the patterns of a setting names.

    Raises:
        ConfigValueError: A pattern names no group.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {name for name, group in groups.items() if _is_named(group, pattern)}
        if not matching:
            layers = [producer.layer for group in groups.values() for producer in group.producers]
            raise ConfigValueError(
                f"{setting} must name layers with prunable channels, '{pattern}' names none.",
                hint=closest(pattern, layers) or f"They are {', '.join(layers[:8])} ...",
            )
        chosen |= matching
    return chosen


def _is_named(group: ChannelGroup, pattern: str) -> bool:
    return any(fnmatch(producer.layer, pattern) for producer in group.producers)


def _find_targets(
    model: TorchModel,
    config: PruneConfig,
    groups: Groups,
    levels: dict[str, tuple[int, ...]],
    latency: LatencyModel | None,
    ctx: StageContext,
) -> Targets:
    """Return the targets, with the network's latency if a target needs it."""
    target, example = config.target, example_input(model.signature)
    size = 0
    if target.size_mb is not None:
        with tempfile.TemporaryDirectory(dir=ctx.folder) as folder:  # of this process alone
            size = existing_bytes(exported(model, Path(folder), ctx))
    targets = Targets(target, model.baseline.metrics, model.module, example, groups, size)
    if target.needs_latency:
        if ctx.deploy is None:
            raise InternalError("A pipeline with a latency target passed validation without a deploy section.")
        axes, count = layer_axes(model.module, groups), targets.cost("macs").at
        deploy = ctx.deploy
        targets.latency = on_rank_0(lambda: model_latency(model, axes, levels, deploy, ctx, count, latency))
    return targets
