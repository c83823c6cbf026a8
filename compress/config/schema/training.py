"""Schema of training: `finetune`, and `training` of training-time methods."""

from typing import Annotated, Any, Literal

from pydantic import Field

from compress.config.schema.base import (
    MAX_SIDE,
    BatchSize,
    Count,
    OptionalPath,
    OptionalReference,
    Section,
    Share,
)


class AugmentationConfig(Section):
    """Random augmentation of training images."""

    crop_padding: int = Field(
        0, ge=0, le=MAX_SIDE, description="pixels of padding before a random crop back to the size"
    )
    flip: bool = Field(False, description="horizontal flip of half of the images")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup; 0 is off")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix; 0 is off")
    resized_crop: Share = Field(
        0.0, description="least share of the area in a random crop that is resized to the full size; 0 is off"
    )
    policy: Literal["none", "rand_augment", "trivial_augment", "auto_augment"] = Field(
        "none", description="random photometric and geometric operations of torchvision on images"
    )
    magnitude: int = Field(9, ge=0, le=30, description="strength of the operations of rand_augment")
    erasing: Share = Field(0.0, description="probability that a random rectangle of an image is set to zeros; 0 is off")


class DistillationConfig(Section):
    """Distillation from the outputs and feature maps of the baseline."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="weight in the loss, in (0, 1]")
    temperature: float = Field(4.0, gt=0, description="divisor of the logits")
    features: float = Field(
        0.0, ge=0, description="weight of the distance between feature maps of the same shape; 0 is off"
    )
    cached: bool = Field(
        True,
        description="true: outputs of the baseline are kept for trainings on the same images with the same seed, on "
        "the CPU and without features; results do not change",
    )


class OriginalTrainingConfig(Section):
    """Original training of the network, which the peak rate of fine-tuning follows from."""

    learning_rate: float = Field(gt=0, description="peak learning rate")
    epochs: float = Field(gt=0, description="number of epochs")


class TrainingConfig(Section):
    """Training: SGD with Nesterov momentum, or AdamW; warm-up, then a schedule from the peak rate down."""

    epochs: float | None = Field(None, gt=0, description="passes over the training split")
    steps: Count | None = Field(None, description="optimiser steps, in place of epochs")
    batch_size: BatchSize = Field(128, description="images in one step of one process")
    learning_rate: float | None = Field(
        None, gt=0, description="peak of the schedule; by default from original, or 0.02, or 0.001 for adamw"
    )
    original: OriginalTrainingConfig | None = Field(None, description="original training of the network")
    probe: bool = Field(
        False, description="true: one epoch at 0.1, 0.3 and 1 times the peak first; the best on validation is used"
    )
    momentum: Share = Field(0.9, description="momentum of sgd; adamw has none")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay of the optimiser")
    warmup_ratio: Share = Field(0.05, description="share of the steps with rising learning rate")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="SGD with Nesterov momentum, or AdamW")
    schedule: Literal["cosine", "one_cycle", "step"] = Field("cosine", description="schedule of the learning rate")
    gradient_clip: float | None = Field(
        None,
        gt=0,
        description="largest global gradient norm; by default 1 for networks without norms and for tasks without "
        "classes",
    )
    accumulation: Count = Field(1, description="batches for one optimiser step")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of the moving average of the weights, which is evaluated and kept; 0 is off"
    )
    average_ratio: Share = Field(
        0.0, description="share of the steps, at the end, whose average weights are one more candidate; 0 is off"
    )
    label_smoothing: Share = Field(0.0, description="share of the target that is spread over all classes")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="precision of convolutions and linear layers in training; weights are fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of training; auto: GPU if there is one")
    compiled: bool = Field(False, description="train through torch.compile; needs a C++ compiler")
    sync_batch_norm: bool = Field(False, description="true: batch norms of several processes share their statistics")
    save_minutes: float = Field(
        5.0, ge=0, description="minutes between saves of the training state, in addition to one after each epoch"
    )
    augmentation: AugmentationConfig = AugmentationConfig()
    distillation: DistillationConfig | None = None

    @property
    def schedule_start(self) -> float:
        """Share of the learning-rate schedule that lies before the first step."""
        return 0.0

    @property
    def keeps_original_peak(self) -> bool:
        """True if the peak rate is that of the original training, independent of the length of this one."""
        return False

    @property
    def rounded_ratio(self) -> float:
        """Share of the steps, at the end, in which layers are rounded to 8 bits."""
        return 0.0

    def _check_rules(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("must hold exactly one of epochs, steps")
        if self.learning_rate is not None and self.original is not None:
            raise ValueError("must hold at most one of learning_rate, original")


def check_training(method: str | None, training: TrainingConfig | None) -> None:
    """Check that a method has training settings, without settings that undo its effect.

    Raises:
        ValueError: One is given without the other, or a setting does not fit.
    """
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
        description="initial weights: those after pruning, those of rewind_to pruned in the same way, or a new "
        "initialisation of the same structure",
    )
    rewind_to: OptionalPath = Field(
        None, description="checkpoint of the unpruned network from early in its training; formats as weights of load"
    )
    rewind_schedule: Literal["whole", "tail"] | None = Field(
        None,
        description="whole: the original schedule from its peak; tail: its part after rewind_epoch; by default the "
        "schedule and peak of fine-tuning",
    )
    rewind_epoch: float | None = Field(
        None, ge=0, description="epoch of the original training that weights or schedule are rewound to"
    )
    own: OptionalReference = Field(
        None,
        description='training loop of your own: "path/to/file.py:train", called as train(model, context, **kwargs)',
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of own")
    trained: OptionalPath = Field(
        None,
        description="state dict of the slim network, trained elsewhere; all other settings then have no effect",
    )
    quantization_aware: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="share of the steps, at the end, in which weights and inputs of layers are rounded to 8 bits as "
        "the quantize stage rounds them; 0 is off",
    )
    norms: bool = Field(
        True,
        description="true: batch norms behind the convolutions of a network without norms, for training only; they "
        "are folded afterwards",
    )

    def _given(self) -> set[str]:
        """Return the settings that differ from their defaults."""
        fields = type(self).model_fields
        return {
            name
            for name, field in fields.items()
            if field.is_required() or getattr(self, name) != field.get_default(call_default_factory=True)
        }

    @property
    def schedule_start(self) -> float:
        """Share of the learning-rate schedule that lies before the first step."""
        if self.rewind_schedule != "tail" or self.original is None or self.rewind_epoch is None:
            return 0.0
        return self.rewind_epoch / self.original.epochs

    @property
    def keeps_original_peak(self) -> bool:
        """True if the peak rate is that of the original training, independent of the length of this one."""
        return self.rewind_schedule is not None

    @property
    def rounded_ratio(self) -> float:
        """Share of the steps, at the end, in which layers are rounded to 8 bits."""
        return self.quantization_aware

    def _check_rules(self) -> None:
        if self.kwargs and self.own is None:
            raise ValueError("kwargs must be left out without own")
        if self.trained is not None:
            return  # the other settings have no effect, so that --weights can be given with any pipeline
        if self.own is not None:
            others = sorted(self._given() - {"stage", "own", "kwargs", "weights", "rewind_to"})
            if others:
                raise ValueError(f"{others[0]} must be left out with own, where it has no effect")
        else:
            super()._check_rules()
        if self.weights == "rewound" and self.rewind_to is None:
            raise ValueError("rewind_to must name a checkpoint where weights is rewound")
        if self.weights != "rewound" and self.rewind_to is not None:
            raise ValueError("rewind_to must be left out unless weights is rewound")
        if self.quantization_aware and self.compiled:
            raise ValueError("compiled must be false with quantization_aware, which torch.compile cannot follow")
        if self.quantization_aware and self.precision != "fp32":
            raise ValueError("precision must be fp32 with quantization_aware, which rounds float32 values")
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
