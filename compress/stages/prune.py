"""prune: TorchModel -> TorchModel with fewer channels and blocks, within a budget relative to the baseline."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from compress.allocation.widths import Limits
from compress.artifacts import TorchModel
from compress.building import example_input
from compress.catalog import CRITERIA
from compress.config.schema import PruneConfig
from compress.cost.macs import count_macs, count_params
from compress.data.batches import Batch, Split, evaluation_batches
from compress.errors import BudgetUnreachable, ConfigValueError, InternalError
from compress.progress import Progress, Task
from compress.pruning.blocks import find_removable_blocks
from compress.pruning.costs import build_cost
from compress.pruning.criteria.base import collect_gradients
from compress.pruning.damage import block_damage
from compress.pruning.graph import ChannelGroup, Exclusion, find_cuttable, kept_outputs, silenced_copy
from compress.pruning.repair import reestimate_batch_norm, refit_readers
from compress.pruning.selection import Selection, score_groups, select_channels
from compress.pruning.surgery import remove_block, remove_channels
from compress.recipe import RemoveBlock, RemoveChannels
from compress.registry import closest
from compress.stages.context import Record, StageContext
from compress.training.evaluate import evaluate_top1

Groups = Mapping[str, ChannelGroup]

SCORE_BATCH, SCORE_IMAGES_EACH = 64, 8
MET_WITHIN = 0.005
CUT_TOLERANCE = 1e-3


class PruneStage:
    """Choose, cut, repair; say what was asked and what was reached."""

    def __init__(self, config: PruneConfig) -> None:
        self.config = config
        self.unit = "macs" if config.target.macs is not None else "params"
        self.asked = config.target.macs if config.target.macs is not None else config.target.params

    def run(self, artifact: TorchModel, ctx: StageContext) -> tuple[TorchModel, Record]:
        """Return the slim network.

        Raises:
            BudgetUnreachable: The target cannot be met, or nothing would be removed.
            UntraceableModel: No channel graph could be built.
            UnsupportedLayer: The criterion cannot score a group.
            ConfigValueError: `exclude` or `blocks` does not fit the network.
        """
        example = example_input(artifact.signature)
        before = evaluate_top1(artifact.module, ctx.data.validation, progress=ctx.progress)
        trunk, removed_blocks = self._remove_blocks(artifact.module, example, ctx)
        groups, excluded = self._find_groups(trunk, example, ctx.progress)
        selection = self._select(trunk, example, groups, artifact, ctx)
        if not selection.removed and not removed_blocks:
            raise BudgetUnreachable(
                f"Target {self.unit} {self.asked} must remove something, but the network already has "
                f"{selection.cost / self._baseline(artifact):.3f} of the baseline's {self.unit}.",
            )
        recipe = artifact.recipe.then(*(RemoveBlock(name) for name in removed_blocks))
        slim = trunk
        if selection.removed:
            edit = RemoveChannels(selection.removed)
            slim = remove_channels(trunk, edit, example)
            check_cut(slim, trunk, selection, groups, ctx.data.calibration)
            recipe = recipe.then(edit)
        self._repair(slim, trunk, selection, groups, ctx)
        slim_model = replace(artifact, module=slim, recipe=recipe)
        after = evaluate_top1(slim, ctx.data.validation, progress=ctx.progress)
        record = self._record(artifact, slim_model, selection, groups, excluded, removed_blocks, ctx.progress)
        return slim_model, {**record, "validation_top1_before": before, "validation_top1_after": after}

    def _baseline(self, artifact: TorchModel) -> int:
        figures = artifact.baseline.figures
        return figures.macs if self.unit == "macs" else figures.params

    def _remove_blocks(
        self, module: nn.Module, example: Tensor, ctx: StageContext
    ) -> tuple[nn.Module, tuple[str, ...]]:
        """Remove blocks one by one, each time the one whose absence raises the loss least."""
        removed: list[str] = []
        while len(removed) < self.config.blocks:
            names = find_removable_blocks(module, example)
            if not names:
                raise ConfigValueError(
                    f"blocks must not be more than the residual blocks that can be removed ({len(removed)}), "
                    f"got {self.config.blocks}."
                )
            damage = block_damage(module, names, ctx.data.calibration.first(self.config.score_images), ctx.progress)
            weakest = min(names, key=lambda name: damage[name])
            module = remove_block(module, RemoveBlock(weakest))
            removed.append(weakest)
            ctx.progress.note(f"block {weakest} removed (loss {damage[weakest]:+.4f})")
        if removed and self.config.repair != "none":
            reestimate_batch_norm(module, ctx.data.calibration, ctx.progress)
        return module, tuple(removed)

    def _find_groups(
        self, module: nn.Module, example: Tensor, progress: Progress
    ) -> tuple[dict[str, ChannelGroup], list[Exclusion]]:
        with progress.task("find and try channel groups", 1) as task:
            groups, excluded = find_cuttable(module, example)
            task.advance()
        for exclusion in excluded:
            if not exclusion.expected:
                progress.warn(f"Channel group '{exclusion.name}' stays whole: {exclusion.reason}.")
        chosen = excluded_by_patterns(groups, self.config.exclude)
        excluded += [Exclusion(name, "excluded by the pipeline file", expected=True) for name in chosen]
        return {name: group for name, group in groups.items() if name not in chosen}, excluded

    def _select(
        self, module: nn.Module, example: Tensor, groups: Groups, artifact: TorchModel, ctx: StageContext
    ) -> Selection:
        config = self.config
        assert self.asked is not None
        criterion = CRITERIA.get(config.criterion)(seed=ctx.seed)
        stats = None
        if criterion.needs_gradients:
            split = ctx.data.calibration.first(config.score_images)
            with ctx.progress.task("score channels", len(split)) as task:
                batches = _counted(evaluation_batches(split, SCORE_BATCH), task)
                stats = collect_gradients(module, groups.values(), batches, SCORE_IMAGES_EACH)
        scores = score_groups(groups, criterion, stats)
        cost = build_cost(module, example, groups, self.unit)
        whole = (self._baseline(artifact), f"the baseline's {self.unit}")
        budget = self.asked * whole[0]
        limits = Limits(config.min_width, config.max_removed_ratio, config.multiple_of)
        return select_channels(groups, scores, cost, budget, limits, config.allocation, criterion.comparable, whole)

    def _repair(
        self, slim: nn.Module, original: nn.Module, selection: Selection, groups: Groups, ctx: StageContext
    ) -> None:
        """Repair in place. Readers refitted to the original's outputs need the original's statistics behind them."""
        if self.config.repair == "none" or not selection.removed:
            return
        split = ctx.data.calibration
        if self.config.repair == "least_squares":
            readers = {reader.layer for name in selection.removed for reader in groups[name].readers}
            kept = kept_outputs(selection.removed, groups)
            if set(refit_readers(slim, original, readers, kept, split, ctx.progress)) == readers:
                return
        reestimate_batch_norm(slim, split, ctx.progress)

    def _record(
        self,
        before: TorchModel,
        after: TorchModel,
        selection: Selection,
        groups: Groups,
        excluded: list[Exclusion],
        blocks: tuple[str, ...],
        progress: Progress,
    ) -> Record:
        example = example_input(before.signature)
        figures = {
            f"{unit}_{when}": count
            for when, model in (("before", before), ("after", after))
            for unit, count in (("macs", count_macs(model.module, example)), ("params", count_params(model.module)))
        }
        actual = figures[f"{self.unit}_after"]
        if actual != round(selection.cost):
            raise InternalError(f"The cut was predicted to leave {selection.cost} {self.unit}, it left {actual}.")
        assert self.asked is not None
        reached = actual / self._baseline(before)
        shortfall = None
        if abs(reached - self.asked) > MET_WITHIN * self.asked:
            shortfall = (
                f"asked for {self.asked:.4f} of the baseline's {self.unit}, reached {reached:.4f}: the widths that the "
                f"ranking and the limits allow (multiples of {self.config.multiple_of} where groups are wide enough"
                f"{', blocks removed first' if blocks else ''}) come no nearer"
            )
            progress.note(f"target: {shortfall}")
        progress.note(
            f"{len(selection.removed)} of {len(groups)} channel groups cut, {len(blocks)} blocks removed: "
            f"{figures['macs_before'] / figures['macs_after']:.2f}x fewer MACs in this stage"
        )
        return {
            "target": {self.unit: self.asked},
            "asked_ratio": self.asked,
            "reached_ratio": reached,
            "criterion": self.config.criterion,
            "groups": [
                {"name": name, "width_before": group.width, "width_after": selection.widths[name]}
                for name, group in groups.items()
            ],
            "removed_blocks": list(blocks),
            "excluded": [{"name": item.name, "reason": item.reason} for item in excluded],
            "shortfall": shortfall,
            **figures,
        }


def excluded_by_patterns(groups: Groups, patterns: tuple[str, ...]) -> set[str]:
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


@torch.no_grad()
def check_cut(slim: nn.Module, original: nn.Module, selection: Selection, groups: Groups, split: Split) -> None:
    """Check that the cut network equals the original with the removed channels silenced.

    Raises:
        InternalError: It does not.
    """
    images, _ = next(evaluation_batches(split.first(8), 8))
    expected = silenced_copy(original, selection.removed, groups)(images)
    difference = float((slim(images) - expected).abs().max())
    if not difference <= CUT_TOLERANCE * (1 + float(expected.abs().max())):
        raise InternalError(f"The cut network differs from the silenced original by {difference:.2g}.")


def _counted(batches: Iterator[Batch], task: Task) -> Iterator[Batch]:
    """Pass batches on and tell the task how many images they hold."""
    for images, labels in batches:
        yield images, labels
        task.advance(len(labels))
