"""prune: TorchModel -> TorchModel with fewer channels and blocks, within budgets relative to the baseline."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from compress.checkpoint.rebuild import example_input
from compress.config.schema.prune import CutConfig, PruneConfig
from compress.cost.table_file import TableFile
from compress.errors import WITHIN_HINT, AlreadyWithin, InternalError
from compress.model.artifacts import TorchModel
from compress.model.stage_records import BlockTrial, Isometry, MethodRecord, PruneRecord, StreamTrial, WholeNetworks
from compress.progress import Progress
from compress.pruning.blocks import find_removable_blocks
from compress.search.block_numbers import BlockNumberSearch
from compress.search.block_removal import Shortened, shorten, take_shortened
from compress.search.block_repair import repair_blocks
from compress.search.context import StageContext
from compress.search.hooked_training import measure_cut
from compress.search.isometry_record import measure_isometry
from compress.search.learned import learn
from compress.search.prune_record import UNITS, asked_and_reached, prune_record
from compress.search.pruner import Attempt, Prepared, Pruner, best_along_streams
from compress.search.survey import survey
from compress.search.validation import metric_of, validation_quality
from compress.search.whole_networks import search
from compress.training.memory_format import in_fastest_memory_format, set_memory_format


@dataclass(frozen=True)
class _Choice:
    """The attempt that a search has chosen, and the records of the search.

    Attributes:
        attempt: The slim network.
        block_trials: Numbers of blocks that were tried.
        residual_trials: Factors of damage along residual streams that were tried.
        networks: Record of the search among candidate networks; None without one.
        learned: Training of a method; None without one.
    """

    attempt: Attempt
    block_trials: Sequence[BlockTrial] = ()
    residual_trials: tuple[StreamTrial, ...] = ()
    networks: WholeNetworks | None = None
    learned: MethodRecord | None = None


class PruneStage:
    """Stage that removes channels and residual blocks, and repairs the network."""

    def __init__(self, config: PruneConfig) -> None:
        self.config = config

    def run(
        self, artifact: TorchModel, ctx: StageContext, networks: Iterable[Shortened] | None = None
    ) -> tuple[TorchModel, PruneRecord]:
        """Return the slim network.

        Args:
            artifact: The network.
            ctx: Splits, parts and listener of the stage.
            networks: Networks that `shorten` yields, if the caller already has them; None to compute them here.

        Raises:
            BudgetUnreachable: The target cannot be met, or nothing would be removed.
            UntraceableModel: No channel graph could be built.
            UnsupportedLayer: The criterion cannot score a group.
            ConfigValueError: `exclude` or `blocks` does not fit the network.
            ArtifactError: The given latency table is of another machine or network.
        """
        with in_fastest_memory_format(artifact.module, ctx.data.validation) as memory_format:
            pruner = Pruner(self.config, ctx, memory_format)
            model, record = self._run(artifact, self._shorten(artifact, ctx) if networks is None else networks, pruner)
        set_memory_format(model.module, torch.contiguous_format)
        return model, record

    def profile(self, artifact: TorchModel, ctx: StageContext) -> TableFile:
        """Return the timed variants that a choice of widths would use, without choosing any.

        Raises:
            As `run`.
        """
        model = take_shortened(self._shorten(artifact, ctx), self._blocks_first).model
        latency = survey(model, self.config, None, ctx).targets.latency
        if latency is None:
            raise InternalError("A stage without a latency target was asked for a latency table.")
        return latency.file

    def _shorten(self, artifact: TorchModel, ctx: StageContext) -> Iterable[Shortened]:
        config = self.config
        images, refit_images = config.score_images, config.refit_images
        return shorten(artifact, images, config.repair, ctx, refit_images, merges=config.merge)

    @property
    def _blocks_first(self) -> int:
        """Number of blocks that are removed before channels are chosen."""
        return 0 if isinstance(self.config.blocks, str) else self.config.blocks

    def _run(
        self, artifact: TorchModel, networks: Iterable[Shortened], pruner: Pruner
    ) -> tuple[TorchModel, PruneRecord]:
        ctx = pruner.ctx
        before = validation_quality(artifact.module, ctx)
        _note_few_images(self.config, ctx)
        choice = self._choose(networks, pruner)
        best = choice.attempt
        _require_removal(best)
        last_repair = repair_blocks(artifact, best.model, self.config.repair, self.config.block_repair, ctx)
        after = validation_quality(best.model.module, ctx)
        record = prune_record(artifact, best, metric_of(ctx.data.validation), (before, after))
        record = replace(
            record,
            block_trials=tuple(choice.block_trials),
            residual_trials=choice.residual_trials,
            whole_networks=choice.networks,
            method=choice.learned,
            repairs=(*record.repairs, *last_repair),
            isometry=_isometry(artifact, best, pruner),
        )
        _note_result(record, best, ctx.progress)
        return best.model, record

    def _choose(self, networks: Iterable[Shortened], pruner: Pruner) -> _Choice:
        """Search for the best network within the targets, by the search that the settings name."""
        config = self.config
        if config.method is not None:
            return _learn(take_shortened(networks, self._blocks_first), pruner)
        if config.trials:
            return self._search_whole(networks, pruner)
        numbers = BlockNumberSearch(pruner)
        if config.blocks == "auto":
            best = numbers.run(networks)
        else:
            best = pruner.attempt(pruner.prepare(take_shortened(networks, self._blocks_first)))
        best, residual_trials = best_along_streams(best, pruner)
        return _Choice(best, numbers.records, residual_trials)

    def _search_whole(self, networks: Iterable[Shortened], pruner: Pruner) -> _Choice:
        """Choose among candidate networks by damages learned from their losses, perhaps with blocks as well."""
        numbers, blocks = BlockNumberSearch(pruner), tuple[str, ...]()
        if self.config.blocks == "auto":
            prepared = numbers.run(networks).prepared
        else:
            prepared = pruner.prepare(take_shortened(networks, self._blocks_first))
        if self.config.blocks == "joint":
            blocks = _removable_blocks(prepared, pruner.ctx.progress)
        best, record = search(prepared, blocks, pruner)
        return _Choice(best, record.finalists if blocks else numbers.records, networks=record)


def _removable_blocks(prepared: Prepared, progress: Progress) -> tuple[str, ...]:
    shortened = prepared.shortened
    blocks = find_removable_blocks(shortened.whole, example_input(shortened.model.signature))
    if not blocks:
        progress.note("no residual block can be removed: widths alone are chosen")
    return blocks


def _learn(shortened: Shortened, pruner: Pruner) -> _Choice:
    """Train while a method chooses channels, remove them, and repair; record the effect of the removal alone."""
    ctx = pruner.ctx
    learned = learn(shortened.model, pruner.config, ctx)
    model = learned.surveyed.model
    if learned.removed_blocks:
        ctx.progress.note(f"residual blocks removed: {', '.join(learned.removed_blocks)}")
    removed = shortened.removed + learned.removed_blocks
    left = Shortened(model, removed, shortened.repairs, model.module, shortened.blocks)
    prepared = Prepared(left, learned.surveyed, learned.candidates, pruner.identify(left, learned.surveyed))
    cut = pruner.cut(Attempt(prepared, model, learned.selection, learned.timed))
    record = measure_cut(learned.record, cut.model.module, ctx)
    return _Choice(pruner.repair(cut), learned=record)


def _require_removal(best: Attempt) -> None:
    """Raise AlreadyWithin if an attempt removes nothing."""
    if best.selection.removed or best.removed_blocks:
        return
    asked, reached = asked_and_reached(best)
    got = ", ".join(f"{value:.3f} {UNITS[name]}" for name, value in reached.items())
    wanted = ", ".join(f"{name} {value}" for name, value in asked.items())
    raise AlreadyWithin(f"Target {wanted} must remove something, but the network already has {got}.", hint=WITHIN_HINT)


def _isometry(artifact: TorchModel, best: Attempt, pruner: Pruner) -> Isometry:
    """Measure Jacobian singular values before the stage, after the removal of channels and after its repair."""
    unrepaired = replace(best, model=best.prepared.shortened.model, repairs=())
    is_repaired = bool(best.selection.removed) and any(one.is_kept for one in best.repairs)
    networks = {
        "before": lambda: artifact.module,
        "after_cut": (lambda: pruner.cut(unrepaired).model.module) if is_repaired else lambda: best.model.module,
        "after_repair": (lambda: best.model.module) if is_repaired else None,
    }
    return measure_isometry(artifact, networks, pruner.ctx)


def _note_few_images(config: PruneConfig, ctx: StageContext) -> None:
    """Note if the calibration split has fewer images than a setting requests, unless the setting is the default."""
    for name in ("score_images", "refit_images"):
        asked, there = getattr(config, name), len(ctx.data.calibration)
        if asked > there and asked != CutConfig.model_fields[name].default:
            ctx.progress.note(
                f"{name}: {asked} asked for, the calibration split has {there}; data.calibration sets its size"
            )


def _note_result(record: PruneRecord, best: Attempt, progress: Progress) -> None:
    if record.shortfall is not None:
        progress.note(f"target: {record.shortfall}")
    repair: Sequence[str] = best.prepared.surveyed.config.repair
    has_factors = any(one.scales is not None for one in best.prepared.candidates)
    if "scaling" in repair and repair != CutConfig.model_fields["repair"].default and not has_factors:
        progress.note("repair: scaling was left out, as nothing found factors for the channels that it keeps")
    cut, merged = len(best.selection.removed), len(best.merged_blocks)
    removed, said = len(best.removed_blocks) - merged, f", {merged} merged" if merged else ""
    progress.note(
        f"{cut} of {len(best.prepared.surveyed.groups)} channel groups cut, {removed} blocks removed{said}: "
        f"{record.macs_before / record.macs_after:.2f}x fewer MACs in this stage"
    )
