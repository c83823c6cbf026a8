"""Training with the hooks of a method, and the effect of the removal or factorisation after it."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from compress.config.schema.training import TrainingConfig
from compress.model.artifacts import TorchModel
from compress.model.stage_records import MethodRecord
from compress.search.context import StageContext
from compress.search.training import distillation_from, fit_settings, pace
from compress.search.validation import is_quality_worse, metric_of, validation_quality
from compress.training.distributed import leave
from compress.training.evaluate import evaluate_loss, quality_facts
from compress.training.hooks import TrainingHooks
from compress.training.loop import fit
from compress.training.settings import FitSettings, TrainingData
from compress.training.state import StateFile

CUT_JUMP = 0.02


def hooked_settings(config: TrainingConfig, ctx: StageContext, module: nn.Module) -> FitSettings:
    """Return the settings of a training that keeps its last weights, as the hooks finish only at the end."""
    return replace(fit_settings(config, ctx.seed, ctx.data.train, module), keep="last")


def train_with_hooks(
    name: str,
    module: nn.Module,
    artifact: TorchModel,
    config: TrainingConfig,
    hooks: TrainingHooks,
    state: Path,
    ctx: StageContext,
) -> MethodRecord:
    """Train a network in place and return the record; resume from the file `state` if it exists.

    Warns if training makes the primary metric worse by more than noise. Of several ranks, rank 0 alone returns.

    Args:
        name: Name of the method.
        module: The network; the method may have modified it already.
        artifact: Input of the stage; the distillation teacher is made from it.
        config: Settings of the training.
        hooks: Hooks of the method, called in every step.
        state: Path of the saved training state.
        ctx: Splits, teacher and listener of the stage.

    Raises:
        As `compress.training.loop.fit`.
    """
    settings, validation = hooked_settings(config, ctx, module), ctx.data.validation
    metric, facts = metric_of(validation), quality_facts(module, validation, progress=ctx.progress)
    before = validation.task.aggregate(facts)[metric.name]
    teacher = distillation_from(config.distillation, artifact, ctx)
    ctx.progress.note(pace(settings))
    data, file = TrainingData(ctx.data.train, validation), StateFile(state, is_kept=True)
    result = fit(module, data, settings, teacher, file, ctx.progress, hooks)
    leave()
    now = quality_facts(module, validation, progress=ctx.progress)
    after = validation.task.aggregate(now)[metric.name]
    if is_quality_worse(facts, now, validation.task):
        ctx.progress.warn(
            f"The training made the network worse by itself, before the cut: validation {metric.words} "
            f"{metric.show(before)} -> {metric.show(after)}. More steps, a lower learning_rate or a target that keeps "
            "more would help; a 'finetune' stage may win some of it back."
        )
    return MethodRecord(
        name=name,
        metric=metric,
        validation_before=before,
        epochs=result.epochs,
        chosen_epoch=result.chosen_epoch,
        steps=result.steps,
        peak_learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        loss_before_cut=evaluate_loss(module, validation, progress=ctx.progress),
        quality_before_cut=after,
    )


def measure_cut(record: MethodRecord, module: nn.Module, ctx: StageContext) -> MethodRecord:
    """Measure the effect of the removal on a network that was trained for it; warn if the loss rises.

    Args:
        record: Record of the training, with the cause of a higher loss.
        module: The network after the removal.
        ctx: Validation split and listener of the stage.

    Returns:
        The record with loss and primary metric after the removal.
    """
    before, after = record.loss_before_cut, evaluate_loss(module, ctx.data.validation, progress=ctx.progress)
    quality, metric = validation_quality(module, ctx), record.metric
    ctx.progress.note(
        f"{record.name}: validation loss {before:.4f} before the cut, {after:.4f} after it; {metric.words} "
        f"{metric.show(record.quality_before_cut)}, {metric.show(quality)}"
    )
    if not after - before <= CUT_JUMP:
        ctx.progress.warn(
            f"The cut after '{record.name}' must change next to nothing, it raised the validation loss by "
            f"{after - before:.3f}, above {CUT_JUMP:g}. {record.cause}"
        )
    return replace(record, loss_after_cut=after, quality_after_cut=quality)
