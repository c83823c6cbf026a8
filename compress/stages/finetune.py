"""finetune: TorchModel -> TorchModel with the same structure and better weights."""

import copy
from dataclasses import asdict, replace

import torch

from compress.artifacts import TorchModel
from compress.building import build_module, load_strict, read_weights
from compress.config.schema import DistillationConfig, FinetuneConfig, TrainingConfig
from compress.data.batches import Augmentation
from compress.stages.context import Record, StageContext
from compress.training.evaluate import evaluate_top1
from compress.training.fit import Distillation, FitSettings, fit

STATE_FILE = "training_state.pt"


class FinetuneStage:
    """Train with one seeded loop; the best epoch is chosen on the validation split."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config

    def run(self, artifact: TorchModel, ctx: StageContext) -> tuple[TorchModel, Record]:
        """Return the trained network; a run that was killed goes on from its last state.

        Raises:
            As `compress.training.fit.fit`.
        """
        return train(artifact, self.config, ctx, STATE_FILE)


def train(
    artifact: TorchModel, config: TrainingConfig, ctx: StageContext, state_file: str
) -> tuple[TorchModel, Record]:
    """Return the network trained, and what was done; goes on from `state_file` in the stage's folder, if it is there.

    Raises:
        As `compress.training.fit.fit`.
    """
    settings = _settings(config, ctx.seed)
    module = copy.deepcopy(artifact.module)
    before = evaluate_top1(module, ctx.data.validation, progress=ctx.progress)
    result = fit(
        module,
        ctx.data.train,
        ctx.data.validation,
        settings,
        distillation=_distillation(config.distillation, artifact),
        state_path=ctx.folder / state_file,
        progress=ctx.progress,
    )
    module.to(memory_format=torch.contiguous_format)
    record = {
        "epochs": [asdict(epoch) for epoch in result.epochs],
        "chosen_epoch": result.chosen_epoch,
        "peak_learning_rate": settings.learning_rate,
        "batch_size": settings.batch_size,
        "steps": result.steps,
        "validation_top1_before": before,
    }
    return replace(artifact, module=module), record


def _settings(config: TrainingConfig, seed: int) -> FitSettings:
    return FitSettings(
        epochs=config.epochs or 0.0,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        warmup_ratio=config.warmup_ratio,
        label_smoothing=config.label_smoothing,
        augmentation=Augmentation(**config.augmentation.model_dump()),
        optimizer=config.optimizer,
        schedule=config.schedule,
        gradient_clip=config.gradient_clip,
        accumulation=config.accumulation,
        ema=config.ema,
        save_minutes=config.save_minutes,
        seed=seed,
    )


def _distillation(config: DistillationConfig | None, artifact: TorchModel) -> Distillation | None:
    """Return the untouched network as the teacher, if one is asked for."""
    if config is None:
        return None
    teacher = build_module(artifact.factory)
    load_strict(teacher, read_weights(artifact.baseline.weights_path), "The baseline's weights")
    return Distillation(teacher.requires_grad_(False), config.weight, config.temperature, config.features)
