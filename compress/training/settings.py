"""Settings of a training run, its number of steps, its learning rates, and its result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from compress.data.batches import Augmentation, batches_per_epoch
from compress.data.splits import Split
from compress.model.stage_records import EpochRecord
from compress.training.fake_quantization import Int8Rounding
from compress.training.schedule import schedule


class TrainingData(NamedTuple):
    """Images of a training run.

    Attributes:
        train: Images to learn from; their task is the training task.
        validation: Images that the epoch is chosen on; never the evaluation split.
    """

    train: Split
    validation: Split


@dataclass(frozen=True, slots=True)
class Distillation:
    """Learning from another network: its outputs (Hinton et al. 2015, arXiv:1503.02531) and its feature maps.

    Attributes:
        teacher: Network in eval mode with the same classes.
        weight: Share of the loss, in [0, 1], that comes from the teacher's outputs.
        temperature: Divisor of both networks' logits before the softmax.
        features: Weight of the mean relative squared difference of feature maps that both networks have under the same
            name and shape (as the hints of Romero et al. 2015, arXiv:1412.6550, without their regressor).
        kept: Module path -> (n,) channels of the teacher's map that the network keeps, if some were removed.
        folder: Folder of the teacher's outputs that trainings share; None computes all of them. It has no effect on
            results, nor where feature maps are compared.
    """

    teacher: nn.Module
    weight: float
    temperature: float
    features: float = 0.0
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class FitSettings:
    """Hyperparameters of a training run.

    Attributes:
        epochs: Passes over the training split; may be a fraction. Ignored when `steps` is given.
        steps: Optimiser steps; None counts them from `epochs`.
        batch_size: Images per batch; a step takes `accumulation` batches.
        learning_rate: Peak of the schedule.
        momentum: Momentum of SGD, with Nesterov's correction.
        weight_decay: L2 factor on every parameter; with "adamw" decoupled from the gradient.
        warmup_ratio: Share of the steps, in [0, 1), over which the rate rises.
        label_smoothing: Label smoothing, in [0, 1).
        augmentation: Random changes of training images.
        seed: Seed of the order, the augmentation and the random numbers of the network.
        keep: "best" returns the epoch that is best on validation, or the last one that is not shown to be worse (exact
            McNemar test, of classifiers), "last" the final one.
        compiled: True runs the forward pass through `torch.compile` (needs a C++ compiler).
        optimizer: "sgd" with Nesterov momentum, or "adamw".
        schedule: Name of the schedule, as in `compress.training.schedule.schedule`.
        schedule_start: Share of that schedule, in [0, 1), that lies before the first step.
        gradient_clip: Largest norm of all gradients together; None is off.
        accumulation: Batches per step; their gradients are averaged. Batch norm sees one batch at a time.
        ema: Decay of the moving average of the weights, which is measured and returned instead of them; 0 is off.
        average_ratio: Share of the steps, at the end, whose weights are averaged; with batch-norm statistics measured
            again, that average is one more candidate. 0 is off.
        precision: "fp32"; or "bf16", "fp16": convolutions and linear layers compute in it, weights stay float32.
        device: "cpu", "cuda", or "auto" for the GPU if torch sees one.
        sync_batch_norm: True normalises by the statistics of the complete batch, not of each rank's part.
        save_minutes: Longest time in minutes between two saved states; each epoch also ends with one.
        rounding: Rounding of weights and inputs of layers to 8 bits, or None.
        rounded_ratio: Share of the steps, at the end, with that rounding.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 128
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_ratio: float = 0.05
    label_smoothing: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0
    keep: str = "best"
    compiled: bool = False
    optimizer: str = "sgd"
    schedule: str = "cosine"
    schedule_start: float = 0.0
    gradient_clip: float | None = None
    accumulation: int = 1
    ema: float = 0.0
    average_ratio: float = 0.0
    precision: str = "fp32"
    device: str = "auto"
    sync_batch_norm: bool = False
    save_minutes: float = 5.0
    rounding: Int8Rounding | None = None
    rounded_ratio: float = 0.0


@dataclass(frozen=True, slots=True)
class FitResult:
    """Result of a training run.

    Attributes:
        epochs: Record of each epoch.
        chosen_epoch: The epoch whose weights the module now holds; the last epoch if it holds the average.
        steps: Number of optimiser steps.
        averaged: The primary metric of the average of the last steps, on the validation split; None without average.
        is_averaged: True if the module holds that average.
    """

    epochs: tuple[EpochRecord, ...]
    chosen_epoch: int
    steps: int
    averaged: float | None = None
    is_averaged: bool = False


class StepPlan(NamedTuple):
    """Numbers of optimiser steps.

    Attributes:
        per_epoch: Steps of a full epoch.
        total: Steps of the run.
    """

    per_epoch: int
    total: int

    @property
    def epochs(self) -> int:
        """Number of epochs of the run; the last may be shorter."""
        return math.ceil(self.total / self.per_epoch)

    def last(self, share: float) -> int:
        """Return the number of steps in a share of all steps, at least 1."""
        return max(1, round(share * self.total))


def plan_steps(train: Split, settings: FitSettings) -> StepPlan:
    """Return the number of optimiser steps of an epoch and of the run."""
    per_epoch = max(1, batches_per_epoch(train, settings.batch_size) // settings.accumulation)
    return StepPlan(per_epoch, settings.steps or max(1, round(settings.epochs * per_epoch)))


def learning_rate(settings: FitSettings, step: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    share = schedule(step, total_steps, settings.warmup_ratio, settings.schedule, settings.schedule_start)
    return settings.learning_rate * share
