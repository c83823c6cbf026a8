"""What of a network can be cut, to which widths, and which budgets do they have to keep?"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor, nn

from compress.allocation.widths import Candidates, Limits, width_levels
from compress.checkpoint.rebuild import example_input
from compress.config.schema import PruneConfig
from compress.errors import ConfigValueError, InternalError
from compress.model.artifacts import TorchModel
from compress.progress import Progress
from compress.pruning.groups import ChannelGroup, Exclusion, exclusions_by_cause
from compress.pruning.ranking.selection import Groups, Selection, select_channels
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import layer_axes
from compress.registry import closest
from compress.search.budgets import Targets
from compress.search.context import StageContext
from compress.search.export import exported
from compress.search.latency_loop import TimedChoice, meet_latency
from compress.search.width_latency import LatencyModel, model_latency
from compress.verification.measurement import existing_bytes

MEASURED_LEVELS = 8

Unfit = Callable[[ChannelGroup], str | None]


@dataclass(frozen=True)
class Survey:
    """A network about to be cut.

    Attributes:
        model: The network.
        config: What is asked.
        limits: Floors, caps and multiples.
        groups: Its channel groups that may be cut.
        excluded: The others.
        levels: Group name -> allowed widths, ascending; the last is the full width.
        targets: What is to be met.
    """

    model: TorchModel
    config: PruneConfig
    limits: Limits
    groups: dict[str, ChannelGroup]
    excluded: list[Exclusion]
    levels: dict[str, tuple[int, ...]]
    targets: Targets

    def choose(self, candidates: Sequence[Candidates], correction: float) -> Selection:
        """Choose the channels that go, with the limit of the latency multiplied by a factor.

        Raises:
            BudgetUnreachable: No allowed widths are within the budgets.
        """
        self.targets.correction = correction
        budgets = self.targets.budgets(self.levels)
        return select_channels(self.groups, candidates, budgets, self.limits, self.config.allocation)

    def choose_timed(self, candidates: Sequence[Candidates], progress: Progress) -> tuple[Selection, list[TimedChoice]]:
        """Choose the channels that go; with a latency target, time them and choose again until the time is met.

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
    """Find what can be cut and what it costs.

    Args:
        model: The network.
        config: What is asked.
        latency: Of the same network with more blocks; its table is used where it covers this one.
        ctx: Surroundings.
        unfit: Says why a group cannot be cut for a reason of its own, or None.
        among: Layers that compute what may be cut, where that was settled before; `unfit` and `config.exclude` are not
            asked again.

    Raises:
        UntraceableModel: No channel graph could be built.
        ConfigValueError: `exclude` names no layer whose channels can be cut.
        ArtifactError: The latency table given is of another machine or network.
    """
    example = example_input(model.signature)
    if among is None:
        groups, excluded = _find_groups(model.module, example, config, ctx.progress, unfit)
    else:
        found, excluded = find_cuttable(model.module, example)
        groups = {name: group for name, group in found.items() if name in among}
    limits = Limits(config.min_width, config.max_removed_ratio, config.multiple_of)
    is_measured = config.target.needs_latency or config.damage == "sensitivity"
    at_most = MEASURED_LEVELS if is_measured else None
    levels = {name: width_levels(group.width, group.parts, limits, at_most) for name, group in groups.items()}
    targets = _find_targets(model, config, groups, levels, latency, ctx)
    return Survey(model, config, limits, groups, excluded, levels, targets)


def _find_groups(
    module: nn.Module, example: Tensor, config: PruneConfig, progress: Progress, unfit: Unfit | None
) -> tuple[dict[str, ChannelGroup], list[Exclusion]]:
    with progress.task("find and try channel groups", 1) as task:
        groups, excluded = find_cuttable(module, example)
        task.advance()
    reasons = {name: reason for name, group in groups.items() if unfit and (reason := unfit(group))}
    excluded += [Exclusion(name, reason) for name, reason in reasons.items()]
    for sentence in exclusions_by_cause(excluded):
        progress.warn(sentence)
    chosen = _excluded_by_patterns(groups, config.exclude)
    if config.residual == "keep":
        chosen |= {name for name, group in groups.items() if group.is_summed}
    excluded += [Exclusion(name, "excluded by the pipeline file", expected=True) for name in chosen - reasons.keys()]
    return {name: group for name, group in groups.items() if name not in chosen | reasons.keys()}, excluded


def _excluded_by_patterns(groups: Groups, patterns: tuple[str, ...]) -> set[str]:
    """Return the groups with a producer that one of the patterns names.

    Raises:
        ConfigValueError: A pattern names none.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {
            name
            for name, group in groups.items()
            if any(fnmatch(producer.layer, pattern) for producer in group.producers)
        }
        if not matching:
            layers = [producer.layer for group in groups.values() for producer in group.producers]
            raise ConfigValueError(
                f"exclude must name layers whose channels can be cut, '{pattern}' names none.",
                hint=closest(pattern, layers) or f"They are {', '.join(layers[:8])} ...",
            )
        chosen |= matching
    return chosen


def _find_targets(
    model: TorchModel,
    config: PruneConfig,
    groups: Groups,
    levels: dict[str, tuple[int, ...]],
    latency: LatencyModel | None,
    ctx: StageContext,
) -> Targets:
    """Return the targets, with the network's latency where one of them needs it."""
    target, example = config.target, example_input(model.signature)
    size = 0
    if target.size_mb is not None:
        with tempfile.TemporaryDirectory(dir=ctx.folder) as folder:  # of this process alone
            size = existing_bytes(exported(model, Path(folder), ctx))
    targets = Targets(target, model.baseline.figures, model.module, example, groups, size)
    if target.needs_latency:
        if ctx.deploy is None:
            raise InternalError("A pipeline with a latency target passed validation without a deploy section.")
        axes, count = layer_axes(model.module, groups), targets.cost("macs").at
        targets.latency = model_latency(model, axes, levels, ctx.deploy, ctx, count, latency)
    return targets
