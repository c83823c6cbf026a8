"""Training within a stage: settings from the pipeline, a probe of learning rates, the baseline as the teacher."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from compress.checkpoint.rebuild import apply_edits, example_input
from compress.config.schema.training import DistillationConfig, TrainingConfig
from compress.data.batches import Augmentation
from compress.data.splits import Split
from compress.errors import ArtifactError, ConfigValueError, NonFinite
from compress.model.artifacts import TorchModel
from compress.model.stage_records import Isometry, Probe, TrainingRecord
from compress.pruning.survival import surviving_channels
from compress.search.context import StageContext
from compress.search.isometry_record import conclusion, measure_isometry
from compress.search.teacher import BaselineTeacher
from compress.search.validation import is_quality_worse, metric_of
from compress.storage.digest import add_digest, read_record
from compress.storage.files import write_atomic
from compress.tasks.base import Metric
from compress.training.batch_norm_unfolding import NORMS, can_unfold, folded, unfolded
from compress.training.distributed import current_ranks, leave
from compress.training.evaluate import quality_facts
from compress.training.fake_quantization import Int8Rounding
from compress.training.loop import fit
from compress.training.schedule import peak_from_original
from compress.training.settings import Distillation, FitResult, FitSettings, TrainingData, plan_steps
from compress.training.state import StateFile

LEARNING_RATES = {"sgd": 0.02, "adamw": 0.001}
FEW_STEPS = 20
CLIP = 1.0  # where gradients may be of any size
PROBED = (0.1, 0.3, 1.0)


def training_epochs(config: TrainingConfig, images: int) -> float:
    """Return the number of epochs, computed from the steps if those are given."""
    return config.epochs or (config.steps or 0) * config.batch_size * config.accumulation / images


def train(
    artifact: TorchModel,
    config: TrainingConfig,
    ctx: StageContext,
    state_file: str,
    unfolds: bool = True,
    reverts: bool = True,
) -> tuple[TorchModel, TrainingRecord]:
    """Train a copy of a network, and return it with the record; resume from `state_file` if it exists.

    If training lowers the quality on the validation split by more than noise, the original weights are kept, unless
    `reverts` is False. Of several ranks, rank 0 alone returns.

    Args:
        artifact: The network, not modified.
        config: Settings of the training.
        ctx: Splits, teacher, folder and listener of the stage.
        state_file: Name of the file of the saved state, in the stage's folder.
        unfolds: True adds batch norms to a network without norms while it trains.
        reverts: False keeps a network that training made worse, where more removals and training follow.

    Raises:
        As `compress.training.loop.fit`.
    """
    task, metric = ctx.data.validation.task, metric_of(ctx.data.validation)
    facts = quality_facts(artifact.module, ctx.data.validation, progress=ctx.progress)
    before = task.aggregate(facts)[metric.name]
    start, is_unfolded = _started(artifact.module, ctx) if unfolds else (artifact.module, False)
    settings = fit_settings(config, ctx.seed, ctx.data.train, start)
    if config.rounded_ratio:
        settings = replace(settings, keep="last", rounding=_rounding(ctx), rounded_ratio=config.rounded_ratio)
    warnings = _few_steps(config, settings, ctx.data.train)
    distillation = distillation_from(config.distillation, artifact, ctx)

    def trained(settings: FitSettings, state_file: StateFile) -> tuple[nn.Module, FitResult]:
        module, data = copy.deepcopy(start), TrainingData(ctx.data.train, ctx.data.validation)
        return module, fit(module, data, settings, distillation, state_file, ctx.progress)

    probed: list[Probe] = []
    if config.probe:
        probed = _probe(
            settings,
            ctx,
            state_file,
            lambda tried: trained(tried, StateFile(ctx.folder / _probe_file(state_file, tried.learning_rate)))[1],
        )
        sign = 1 if metric.higher_is_better else -1
        known = [(sign * one.validation, one.learning_rate) for one in probed if one.validation is not None]
        settings = replace(settings, learning_rate=max(known, key=lambda one: one[0])[1])
    ctx.progress.note(pace(settings))
    isometry = _isometry_before(artifact, config, settings, ctx, warnings)
    # until the stage's result is stored, the state is kept
    module, result = trained(settings, StateFile(ctx.folder / state_file, is_kept=True))
    leave()
    reached = _reached(result)
    is_worse = False
    if reverts and metric.is_better(before, reached):
        now = quality_facts(module, ctx.data.validation, progress=ctx.progress)
        is_worse = is_quality_worse(facts, now, task)
        change = f"validation {metric.words} {metric.show(before)} -> {metric.show(reached)}"
        warnings.append(
            f"Training made the network worse: {change}. The original weights are kept; a lower "
            "learning_rate, or more epochs, may do better."
            if is_worse
            else f"Training did no more harm than noise: {change} on {len(ctx.data.validation):,} images. The trained "
            "network is kept; more validation images would tell more."
        )
    for warning in warnings:
        ctx.progress.warn(warning)
    if is_worse:
        module = artifact.module
    elif is_unfolded:
        module = folded(module, artifact.module)
    if isometry.skipped is None:
        after = measure_isometry(artifact, {"after": lambda: module}, ctx)
        isometry = replace(after, values={**isometry.values, **after.values})
    record = TrainingRecord(
        metric=metric,
        isometry=isometry,
        epochs=result.epochs,
        chosen_epoch=0 if is_worse else result.chosen_epoch,
        averaged=result.averaged,
        is_averaged=result.is_averaged and not is_worse,
        is_unfolded=is_unfolded,
        peak_learning_rate=settings.learning_rate,
        gradient_clip=settings.gradient_clip,
        probed_learning_rates=tuple(probed),
        batch_size=settings.batch_size,
        steps=result.steps,
        validation_before=before,
        validation_after=before if is_worse else reached,
        warnings=tuple(warnings),
    )
    return replace(artifact, module=module), record


def _isometry_before(
    artifact: TorchModel, config: TrainingConfig, settings: FitSettings, ctx: StageContext, warnings: list[str]
) -> Isometry:
    """Measure the Jacobian's singular values before training, and log advice on the peak learning rate.

    Args:
        artifact: The network about to be trained.
        config: Settings of the pipeline file, perhaps with the original training.
        settings: Settings of the loop, with the peak learning rate.
        ctx: Context of the stage, with the calibration images and the teacher.
        warnings: List to which a warning is appended.
    """
    baseline = None if artifact.recipe.is_baseline or ctx.teacher is None else ctx.teacher.build
    isometry = measure_isometry(artifact, {"baseline": baseline, "before": lambda: artifact.module}, ctx)
    if config.original is not None:
        reference, name = config.original.learning_rate, "of the original training"
    else:
        reference, name = LEARNING_RATES[config.optimizer], f"of {config.optimizer} by default"
    text, is_warning = conclusion(isometry, settings.learning_rate, reference, name)
    if is_warning:
        warnings.append(text)
    elif text:
        ctx.progress.note(text)
    return isometry


def _few_steps(config: TrainingConfig, settings: FitSettings, train: Split) -> list[str]:
    """Return a warning if the epochs come to fewer than `FEW_STEPS` optimiser steps."""
    per_epoch, steps = plan_steps(train, settings)
    if config.steps is not None or steps >= FEW_STEPS:
        return []
    return [
        f"Training comes to {steps} optimiser {'step' if steps == 1 else 'steps'} ({per_epoch} an epoch of "
        f"{len(train):,} images), too few to recover much. Lower batch_size ({config.batch_size}) or raise epochs "
        f"({config.epochs:g})."
    ]


def _started(module: nn.Module, ctx: StageContext) -> tuple[nn.Module, bool]:
    """Return the network that training starts from, and whether it was given batch norms."""
    if not can_unfold(module):
        return module, False
    ctx.progress.note("the network has no norms: batch norms are put behind its convolutions while it trains")
    return unfolded(module, ctx.data.calibration), True


def _reached(result: FitResult) -> float:
    """Return the primary metric, on validation, of the weights that training kept."""
    if result.is_averaged and result.averaged is not None:
        return result.averaged
    return next(epoch.validation for epoch in result.epochs if epoch.epoch == result.chosen_epoch)


def _probe(
    settings: FitSettings, ctx: StageContext, state_file: str, trained: Callable[[FitSettings], FitResult]
) -> list[Probe]:
    """Train for an epoch at each of several rates, smallest first, and return the metric of each.

    Results are saved in a file, so that a resumed run does not try a rate again.

    Raises:
        NonFinite: The loss became NaN or infinite at every rate.
    """
    metric, path = metric_of(ctx.data.validation), ctx.folder / f"{state_file}-probed.json"
    probed = _read_probed(path, metric)
    steps = min(plan_steps(ctx.data.train, settings))
    rates = [factor * settings.learning_rate for factor in PROBED]
    if [one.learning_rate for one in probed] != rates[: len(probed)]:
        probed = []
    for rate in rates[len(probed) :]:
        try:
            result = trained(replace(settings, learning_rate=rate, steps=steps))
            reached: float | None = result.epochs[-1].validation
            said = f"{metric.words} {metric.show(result.epochs[-1].validation)}"
        except NonFinite:
            if rate == rates[-1] and all(one.validation is None for one in probed):
                raise
            reached, said = None, f"{metric.words} the loss became NaN or infinite"
            (ctx.folder / _probe_file(state_file, rate)).unlink(missing_ok=True)
        probed.append(Probe(learning_rate=rate, validation=reached))
        if current_ranks().rank == 0:
            write_atomic(path, json.dumps(add_digest({"probed": [one.to_dict(metric) for one in probed]})))
        ctx.progress.note(f"probe of learning rate {rate:g}: validation {said}")
    return probed


def _read_probed(path: Path, metric: Metric) -> list[Probe]:
    """Return the rates that a killed run has tried; none if the file is missing or damaged."""
    try:
        probed, key = read_record(path)["probed"], f"validation_{metric.name}"
        return [Probe(learning_rate=one["learning_rate"], validation=one[key]) for one in probed]
    except (ArtifactError, KeyError):
        return []


def _probe_file(state_file: str, rate: float) -> str:
    """Return the name of the file of the state while a rate is tried."""
    return f"probe-of-{rate:.3g}-{state_file}"


def pace(settings: FitSettings) -> str:
    """Return the peak learning rate and the gradient clipping, as a note states them."""
    clip = "" if settings.gradient_clip is None else f", gradients clipped to {settings.gradient_clip:g}"
    return f"peak learning rate {settings.learning_rate:g}{clip}"


def _rounding(ctx: StageContext) -> Int8Rounding:
    """Return the rounding of the pipeline's `quantize` stage."""
    if ctx.quantize is None:
        raise ConfigValueError(
            "quantization_aware needs a quantize stage, whose settings it trains for; the pipeline has none.",
            hint="add after export: - {stage: quantize}",
        )
    config = ctx.quantize
    return Int8Rounding(
        per_channel=config.per_channel,
        reduce_range=config.reduce_range,
        has_signed_weights=config.weight_type == "int8",
        has_signed_activations=config.activation_type == "int8",
        exclude=config.exclude,
    )


def fit_settings(config: TrainingConfig, seed: int, train: Split, module: nn.Module) -> FitSettings:
    """Return the settings of the loop.

    Gradients are clipped to `CLIP` in two cases in which the usual rates diverge, unless the pipeline sets a limit. One
    is a network without norms, such as an ONNX file with batch norms folded into convolutions. The other is a loss of
    any size, such as that of regression or a loss of the user.

    Args:
        config: Training settings of the pipeline file.
        seed: Seed of the run.
        train: The training split.
        module: The network.
    """
    is_tame = train.objective.chooses and any(isinstance(part, NORMS) for part in module.modules())
    clip = CLIP if config.gradient_clip is None and not is_tame else config.gradient_clip
    rate, original = config.learning_rate or LEARNING_RATES[config.optimizer], config.original
    if original is not None:
        rate = original.learning_rate
        if not config.keeps_original_peak:
            rate = peak_from_original(rate, original.epochs, training_epochs(config, len(train)))
    return FitSettings(
        epochs=config.epochs or 0.0,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        warmup_ratio=config.warmup_ratio,
        label_smoothing=config.label_smoothing,
        augmentation=Augmentation(**config.augmentation.model_dump()),
        optimizer=config.optimizer,
        schedule=config.schedule,
        schedule_start=config.schedule_start,
        gradient_clip=clip,
        accumulation=config.accumulation,
        ema=config.ema,
        average_ratio=config.average_ratio,
        precision=config.precision,
        device=config.device,
        compiled=config.compiled,
        sync_batch_norm=config.sync_batch_norm,
        save_minutes=config.save_minutes,
        seed=seed,
    )


def distillation_from(
    config: DistillationConfig | None, artifact: TorchModel, ctx: StageContext
) -> Distillation | None:
    """Return the requested distillation, with the baseline as the teacher.

    Args:
        config: Settings of the pipeline file; None for no distillation.
        artifact: The network about to be trained.
        ctx: Context of the stage; if it has no teacher, the baseline of the artifact is built.
    """
    if config is None:
        return None
    teacher = ctx.teacher or BaselineTeacher(artifact)
    baseline, kept = teacher.build(), dict[str, Tensor]()
    if config.features:
        kept = surviving_channels(
            baseline, artifact.recipe.after_baseline, example_input(artifact.signature), apply_edits
        )
    folder = ctx.teacher_outputs if config.cached else None
    return Distillation(baseline, config.weight, config.temperature, config.features, kept, folder)
