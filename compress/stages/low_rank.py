"""low_rank: TorchModel -> TorchModel with kernels replaced by products of smaller ones, where that is cheaper.

Ranks come from one relative error that all layers share, which is given or solved from a budget. Within a budget they
can also come from ALDS or the energy-against-cost rule (`lowrank/allocations.py`). Batch-norm statistics are
re-estimated on calibration images afterwards.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from compress.checkpoint.rebuild import example_input
from compress.config.schema.low_rank import LowRankConfig, TrpConfig
from compress.cost.macs import count_params, layer_macs
from compress.errors import InternalError
from compress.lowrank.layers import find_layers
from compress.lowrank.ranks import RankChoice
from compress.lowrank.surgery import factorized_copy
from compress.lowrank.trp import TrainedRank
from compress.model.artifacts import TorchModel
from compress.model.recipe import Factorize
from compress.model.stage_records import DenseLayer, FactorizedLayer, LowRankRecord, MethodRecord, Repair
from compress.model.tensors import weights_digest
from compress.progress import Progress, SilentProgress
from compress.search.block_repair import repair_blocks
from compress.search.context import StageContext
from compress.search.hooked_training import measure_cut, train_with_hooks
from compress.search.parts import Part
from compress.search.rank_choice import LABELS, RankChooser, RankDecision, rank_metric, rank_target
from compress.search.rank_inputs import exclude_layers
from compress.search.repairs import apply_repairs, batch_norm_repair, repaired_part, repairs_of
from compress.search.validation import metric_of, validation_quality
from compress.training.distributed import from_rank_0, on_rank_0

STATE_FILE = "method.pt"


class LowRankStage:
    """Stage that factorises convolutions and linear layers.

    Args:
        config: Validated section of the pipeline file.
    """

    def __init__(self, config: LowRankConfig) -> None:
        self.config = config

    def run(self, artifact: TorchModel, ctx: StageContext) -> tuple[TorchModel, LowRankRecord]:
        """Return the factorised network and the record of each layer.

        Raises:
            BudgetUnreachable: The target cannot be met; the message names the best reachable value.
            StageError: Nothing would be factorised, or an exclude pattern matches no layer.
            NonFinite: A weight is not finite.
        """
        example = example_input(artifact.signature)
        found, reasons = exclude_layers(*find_layers(artifact.module, example), self.config.exclude)
        macs_before, params_before = layer_macs(artifact.module, example), count_params(artifact.module)
        total = sum(macs_before.values()) if rank_metric(self.config) == "macs" else params_before
        chooser = RankChooser(self.config, found, total, ctx)
        learned: MethodRecord | None = None
        if self.config.method is None:
            decision = chooser.decide_once(artifact)
        else:
            artifact, decision, learned = self._train(artifact, chooser)
        before = validation_quality(artifact.module, ctx)
        slim, errors = _factorise(artifact.module, decision, ctx.progress)
        if learned is not None:
            learned = measure_cut(replace(learned, cause=_cause(errors)), slim, ctx)
        factorised = replace(artifact, module=slim, recipe=artifact.recipe.then(*decision.edits))
        repairs = [*_repair(slim, self.config.repair, ctx)]
        repairs += repair_blocks(artifact, factorised, self.config.repair, self.config.block_repair, ctx)
        after = validation_quality(slim, ctx)
        macs_after = layer_macs(slim, example)
        metric = metric_of(ctx.data.validation)
        record = LowRankRecord(
            metric=metric,
            layers=_factorized_layers(decision.choices, errors, macs_before, macs_after),
            dense=_dense_layers(decision.choices, reasons, macs_before, self.config),
            macs_before=sum(macs_before.values()),
            macs_after=sum(macs_after.values()),
            params_before=params_before,
            params_after=count_params(slim),
            validation_before=before,
            validation_after=after,
            shared_relative_error=decision.shared_error,
            allocation=self.config.allocation,
            largest_bound=_largest_bound(decision.choices, self.config),
            repairs=tuple(repairs),
            latency=decision.latency,
            method=learned,
        )
        said = f"{metric.words} {metric.show(before)} -> {metric.show(after)}"
        self._state_result(artifact, record, said, ctx.progress)
        return factorised, record

    def _train(self, artifact: TorchModel, chooser: RankChooser) -> tuple[TorchModel, RankDecision, MethodRecord]:
        """Train the network towards low rank; return it, the ranks of its layers, and the record of the training.

        With a latency target, ranks are chosen before the training; otherwise they follow the trained weights. Of
        several ranks, rank 0 chooses, and it alone returns.
        """
        first = on_rank_0(lambda: chooser.decide_once(artifact))
        training, options, ctx = self.config.training, self.config.trp or TrpConfig(), chooser.ctx
        if training is None:
            raise InternalError("A pipeline with a method but no training passed validation.")
        trained = replace(artifact, module=copy.deepcopy(artifact.module))
        quiet = replace(chooser, ctx=replace(ctx, progress=SilentProgress()))

        def decide() -> RankDecision:
            return first if first is not None and first.latency is not None else quiet.decide(trained)

        def decided() -> list[Factorize]:
            found = from_rank_0(lambda: [[edit.layer, edit.scheme, edit.ranks] for edit in decide().edits])
            return [Factorize(layer, scheme, tuple(ranks)) for layer, scheme, ranks in found]

        hooks = TrainedRank(trained.module, decided, options.interval, options.strength)
        state = ctx.folder / STATE_FILE
        record = train_with_hooks(hooks.name, trained.module, artifact, training, hooks, state, ctx)
        return trained, decide(), record

    def _state_result(self, artifact: TorchModel, record: LowRankRecord, quality: str, progress: Progress) -> None:
        if self.config.target is not None and not self.config.target.needs_latency:
            metric, (kept, baseline) = rank_metric(self.config), rank_target(self.config, artifact.baseline.metrics)
            reached = record.macs_after if metric == "macs" else record.params_after
            if reached > kept * baseline:
                raise InternalError(f"Factorisation ended at {reached} {metric}, above {kept} of {baseline}.")
            progress.note(f"target {kept:.3f} of baseline {LABELS[metric]}: reached {reached / baseline:.3f}")
        progress.note(
            f"{len(record.layers)} layers factorised, {len(record.dense)} stay dense; MACs "
            f"{record.macs_before:,} -> {record.macs_after:,}, validation {quality} before fine-tuning"
        )


def _factorise(module: nn.Module, decision: RankDecision, progress: Progress) -> tuple[nn.Module, dict[str, float]]:
    """Return a copy with factorised layers, in eval mode, and layer -> relative error."""
    with progress.task("factorise", 1) as task:
        slim, errors = factorized_copy(module, decision.edits, decision.moments)
        task.advance()
    return slim.eval(), errors


def _cause(errors: Mapping[str, float]) -> str:
    """Return the likely cause of a higher loss after the factorisation of a network that was trained for it."""
    layer, error = max(errors.items(), key=lambda item: item[1])
    cause = f"Kernels were up to {error:.1%} away from their rank ('{layer}'); more steps, or more trp.strength"
    return f"{cause}, would help."


def _repair(slim: nn.Module, names: Sequence[str], ctx: StageContext) -> tuple[Repair, ...]:
    """Repair a factorised network in place, or load the repaired weights of an interrupted run."""
    wanted = [repair for repair in (batch_norm_repair(ctx),) if repair[0] in names]

    def repair() -> Part:
        return repaired_part(slim, apply_repairs(slim, wanted, ctx))

    part = ctx.parts.keep({"part": "low_rank", "of": weights_digest(slim)}, repair)
    slim.load_state_dict(part.tensors)
    return repairs_of(part.record)


def _factorized_layers(
    choices: Sequence[RankChoice], errors: Mapping[str, float], before: Mapping[str, int], after: Mapping[str, int]
) -> tuple[FactorizedLayer, ...]:
    return tuple(
        FactorizedLayer(
            layer=choice.layer,
            scheme=choice.scheme,
            ranks=choice.ranks,
            relative_error=errors[choice.layer],
            macs_before=before[choice.layer],
            macs_after=sum(macs for name, macs in after.items() if name.startswith(f"{choice.layer}.")),
        )
        for choice in choices
        if choice.scheme is not None
    )


def _dense_layers(
    choices: Sequence[RankChoice], reasons: Mapping[str, str], macs: Mapping[str, int], config: LowRankConfig
) -> tuple[DenseLayer, ...]:
    label = LABELS[rank_metric(config)]
    reason = f"has no scheme with fewer {label} at this error"
    if config.allocation != "shared_error":
        reason = f"need not be factorised for the budget, or has no scheme with fewer {label}"
    if config.target is not None and config.target.needs_latency:
        reason = "need not be factorised for the budget, or has no factorisation that is faster"
    costly = {choice.layer: reason for choice in choices if not choice.scheme}
    reasons = {**reasons, **costly}
    return tuple(DenseLayer(layer=name, reason=reasons[name]) for name in macs if name in reasons)


def _largest_bound(choices: Sequence[RankChoice], config: LowRankConfig) -> float | None:
    """Return the largest bound of an operator norm, which ALDS minimises; None for other allocations."""
    return max((choice.error_bound for choice in choices), default=None) if config.allocation == "alds" else None
