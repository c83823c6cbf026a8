"""Schema of training: `finetune`, and `training` of the methods that learn."""

from typing import Annotated, Literal

from pydantic import Field

from compress.config.schema.base import (
    MAX_SIDE,
    BatchSize,
    Count,
    OptionalPath,
    Section,
    Share,
)


class AugmentationConfig(Section):
    """What is varied while training."""

    crop_padding: int = Field(
        0, ge=0, le=MAX_SIDE, description="pixels of padding before a random crop back to the size"
    )
    flip: bool = Field(False, description="mirror half of the images left to right")
    mixup: float = Field(0.0, ge=0, description="alpha of the shares in which pairs of images are mixed; 0 is off")
    cutmix: float = Field(0.0, ge=0, description="alpha of the share of a rectangle out of another image; 0 is off")


class DistillationConfig(Section):
    """Learning from the outputs of the baseline, and from its feature maps."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="share of the loss")
    temperature: float = Field(4.0, gt=0, description="divides the logits")
    features: float = Field(
        0.0, ge=0, description="weight of the difference between feature maps of the same shape; 0 is off"
    )


class OriginalTrainingConfig(Section):
    """How the network was trained before: the peak rate to fine-tune with follows from it."""

    learning_rate: float = Field(gt=0, description="its peak")
    epochs: float = Field(gt=0, description="its length")


class TrainingConfig(Section):
    """How to train: SGD with Nesterov momentum or AdamW, a warm-up, a schedule down from the peak rate."""

    epochs: float | None = Field(None, gt=0, description="passes over the training split")
    steps: Count | None = Field(None, description="optimiser steps, instead of epochs")
    batch_size: BatchSize = 128
    learning_rate: float | None = Field(
        None, gt=0, description="peak of the schedule; without it what follows from original, or 0.02; of adamw 0.001"
    )
    original: OriginalTrainingConfig | None = Field(None, description="how the network was trained before")
    probe: bool = Field(
        False, description="train an epoch at 0.1, 0.3 and 1 times the peak first; the best on validation is taken"
    )
    momentum: Share = 0.9
    weight_decay: float = Field(1e-4, ge=0)
    warmup_ratio: Share = Field(0.05, description="share of the steps with a rising rate")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd, with Nesterov momentum, or adamw")
    schedule: Literal["cosine", "one_cycle", "step"] = Field("cosine", description="of the learning rate")
    gradient_clip: float | None = Field(
        None,
        gt=0,
        description="largest norm of all gradients together; without it 1 where the network has no norms or does not "
        "choose among classes",
    )
    accumulation: Count = Field(1, description="batches a step, where memory holds no larger one")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of the average of the weights that is measured and kept; 0 is off"
    )
    average_ratio: Share = Field(
        0.0, description="share of the steps, at the end, whose average is one more candidate; 0 is off"
    )
    label_smoothing: Share = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of convolutions and linear layers while training; weights stay fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the network trains; auto takes the GPU where there is one"
    )
    compiled: bool = Field(False, description="train through torch.compile; needs a C++ compiler")
    sync_batch_norm: bool = Field(
        False, description="batch norms of several processes use the statistics of the whole batch"
    )
    save_minutes: float = Field(
        5.0, ge=0, description="between saves of the state; after each epoch there is one anyway"
    )
    augmentation: AugmentationConfig = AugmentationConfig()
    distillation: DistillationConfig | None = None

    @property
    def schedule_start(self) -> float:
        """Share of the learning-rate schedule that lies before the first step."""
        return 0.0

    @property
    def keeps_original_peak(self) -> bool:
        """True where the peak rate is that of the original training however short this one is."""
        return False

    def _check_rules(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("must hold exactly one of epochs, steps")
        if self.learning_rate is not None and self.original is not None:
            raise ValueError("must hold at most one of learning_rate, original")


def check_training(method: str | None, training: TrainingConfig | None) -> None:
    """Check that a method has its training, and that training nothing that would undo what it does by the last step."""
    if (method is None) != (training is None):
        missing, given = ("training", "method") if training is None else ("method", "training")
        raise ValueError(f"{missing} must be given where {given} is")
    for name in ("ema", "average_ratio", "probe"):
        if training is not None and getattr(training, name):
            raise ValueError(f"training.{name} must be left out where a method is at work")
    if training is not None and training.precision == "fp16":
        raise ValueError("training.precision must not be fp16 where a method is at work, which reads gradients")


class FinetuneConfig(TrainingConfig):
    """Train the slim network."""

    stage: Literal["finetune"]
    weights: Literal["inherited", "rewound", "random"] = Field(
        "inherited",
        description="start of training: the weights that the cut left, those of rewind_to cut in the same way, or a "
        "new initialisation at the same structure",
    )
    rewind_to: OptionalPath = Field(
        None, description="checkpoint of the whole network early in its training; formats as weights of load"
    )
    rewind_schedule: Literal["whole", "tail"] | None = Field(
        None,
        description="whole: the whole original schedule from its own peak; tail: what of it follows rewind_epoch; "
        "by default the schedule and peak of fine-tuning",
    )
    rewind_epoch: float | None = Field(
        None, ge=0, description="epoch of the original training that weights or schedule go back to"
    )
    norms: bool = Field(
        True,
        description="put batch norms behind the convolutions of a network that has none while it trains; they are "
        "folded into them afterwards",
    )

    @property
    def schedule_start(self) -> float:
        """Share of the learning-rate schedule that lies before the first step."""
        if self.rewind_schedule != "tail" or self.original is None or self.rewind_epoch is None:
            return 0.0
        return self.rewind_epoch / self.original.epochs

    @property
    def keeps_original_peak(self) -> bool:
        """True where the peak rate is that of the original training however short this one is."""
        return self.rewind_schedule is not None

    def _check_rules(self) -> None:
        super()._check_rules()
        if self.weights == "rewound" and self.rewind_to is None:
            raise ValueError("rewind_to must name a checkpoint where weights is rewound")
        if self.weights != "rewound" and self.rewind_to is not None:
            raise ValueError("rewind_to must be left out unless weights is rewound")
        if self.rewind_schedule is not None and self.probe:
            raise ValueError("probe must be false with rewind_schedule, which fixes the peak rate")
        if self.rewind_schedule == "whole" and self.original is None and self.learning_rate is None:
            raise ValueError("original must be given with rewind_schedule: whole, or learning_rate")
        if self.rewind_schedule == "tail":
            if self.original is None:
                raise ValueError("original must be given with rewind_schedule: tail")
            if self.rewind_epoch is None:
                raise ValueError("rewind_epoch must be given with rewind_schedule: tail")
        elif self.weights != "rewound" and self.rewind_epoch is not None:
            raise ValueError("rewind_epoch must be left out unless weights is rewound or rewind_schedule is tail")
        if self.original is not None and self.rewind_epoch is not None and self.rewind_epoch >= self.original.epochs:
            raise ValueError(f"rewind_epoch must be below original.epochs ({self.original.epochs:g})")
