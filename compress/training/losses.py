"""Losses of training: the loss of one batch, with mixed images and distillation, and a log of the steps' losses."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.splits import Split, known_labels
from compress.errors import DataError, ModelError, NonFinite
from compress.tasks.outputs import changed, each, plain
from compress.training.feature_maps import MapPairs, at_least_float32
from compress.training.mixing import mixed, mixed_loss
from compress.training.settings import Distillation, FitSettings, learning_rate

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SHOWN = 20  # number of losses whose mean the progress bar shows


class BatchLoss:
    """Loss of one batch: the loss of the training task, or its mean with the distance to a teacher.

    Args:
        module: Network that learns.
        train: Training split on the CPU, with the task and at least one image.
        settings: Smoothing, mixing, precision, compilation.
        distillation: Teacher, or None.
        device: Device that the network computes on.
        memory_format: Memory format of the images.

    Attributes:
        rounding: Context manager of each forward pass of the network that learns, but not of the teacher's.
        teach: Function from images to the teacher's outputs, `taught` unless some are kept from earlier trainings.

    Raises:
        ModelError: Feature maps are to be compared, but the two networks have no common map.
    """

    def __init__(
        self,
        module: nn.Module,
        train: Split,
        settings: FitSettings,
        distillation: Distillation | None,
        device: torch.device,
        memory_format: torch.memory_format,
    ) -> None:
        self._module, self._train, self._task, self._settings = module, train, train.objective, settings
        self._distillation, self._device, self._memory_format = distillation, device, memory_format
        self._forward: Callable[[Tensor], Any] = torch.compile(module) if settings.compiled else module
        self.rounding: AbstractContextManager[object] = nullcontext()
        self.teach: Callable[[Tensor], Any] = self.taught
        self._maps: MapPairs | None = None
        if distillation is not None and distillation.features:
            self._maps = MapPairs(module, distillation.teacher, train, distillation.kept)

    def __call__(self, images: Tensor, targets: Any, is_first: bool = False) -> Tensor:
        """Return the mean loss of a batch, a scalar with a gradient.

        Args:
            images: (N, C, H, W) or (N, H, W, C).
            targets: Targets of the training task.
            is_first: True checks outputs and targets, as in the first step of a run.

        Raises:
            DataError: Targets do not fit the outputs, or the batch is too small for batch norm.
            ModelError: Outputs do not fit the task, or differ in shape from the teacher's.
        """
        if images.ndim == 4:
            images = images.contiguous(memory_format=self._memory_format)
        images, share = mixed(images, self._settings.augmentation, self._train.preprocessing.layout)
        outputs = changed(self._outputs(images), at_least_float32)
        if is_first:
            every = known_labels(self._train)
            self._task.check(changed(outputs, Tensor.detach), targets if every is None else every)
        hard = self._task_loss(outputs, targets, share)
        return hard if self._distillation is None else self._distilled(hard, outputs, images, self._distillation)

    def watching_maps(self) -> AbstractContextManager[object]:
        """Return a context manager that records feature maps, if they are part of the loss."""
        return nullcontext() if self._maps is None else self._maps

    @torch.no_grad()
    def taught(self, images: Tensor) -> Any:
        """Return the outputs of the teacher, computed in the precision of the training."""
        assert self._distillation is not None
        teacher = self._distillation.teacher
        with self.autocast():
            return plain(teacher(images), getattr(teacher, "output_names", ()))

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context manager for the forward pass in the requested precision."""
        precision = self._settings.precision
        return torch.autocast(self._device.type, _DTYPES[precision], enabled=precision != "fp32")

    def _outputs(self, images: Tensor) -> Any:
        try:
            with self.autocast(), self.rounding:
                return plain(self._forward(images), getattr(self._module, "output_names", ()))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise DataError(
                f"A batch must give every batch norm more than one value for each channel, batch_size "
                f"{len(images)} does not.",
                hint="Raise batch_size.",
            ) from error

    def _task_loss(self, outputs: Any, targets: Any, share: Tensor) -> Tensor:
        """Return the loss of the training task; `share`, (N,) on the CPU, is the neighbour's share of each image."""
        smoothing = self._settings.label_smoothing
        if share.any():
            return mixed_loss(outputs, targets, share, smoothing)
        return self._task.training_loss(outputs, targets, smoothing)

    def _distilled(self, hard: Tensor, outputs: Any, images: Tensor, distillation: Distillation) -> Tensor:
        """Return the weighted mean of task loss and distance to the teacher's outputs, plus the feature-map loss."""
        weight, taught = distillation.weight, self.teach(images)
        shapes = [[tuple(one.shape[1:]) for one in each(values)] for values in (outputs, taught)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"The teacher must have outputs of the shapes of the network it teaches, {shapes[0]} an image, it has "
                f"{shapes[1]}."
            )
        soft = self._task.distance(outputs, changed(taught, at_least_float32), distillation.temperature)
        loss = (1 - weight) * hard + weight * soft
        return loss if self._maps is None else loss + distillation.features * self._maps.difference()


def loss_sync_interval(device: torch.device) -> int:
    """Return the number of steps between loss readbacks; a readback blocks until the GPU has finished the step."""
    return 1 if device.type == "cpu" else 20


class LossLog:
    """Losses of the steps of the present epoch, checked to be finite.

    Args:
        settings: Settings with the learning rates, which the curves show beside the losses.
        total_steps: Number of steps of the run.
        interval: Number of steps between loss readbacks.
        curve: Function that draws the values of a step.

    Attributes:
        values: Losses that were read back.
    """

    def __init__(
        self,
        settings: FitSettings,
        total_steps: int,
        interval: int,
        curve: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        self.values: list[float] = []
        self.interval = interval
        self._settings, self._total_steps, self._curve = settings, total_steps, curve
        self._unread: list[Tensor] = []

    def check_in_step(self, value: Tensor, step: int) -> None:
        """Check the loss of an unfinished step, if every loss is read back.

        Args:
            value: Mean loss of the step's batches.
            step: Number of the step, counted from 1.

        Raises:
            NonFinite: The loss is NaN or infinite.
        """
        if self.interval == 1:
            self._require_finite([value.item()], step)

    def add(self, value: Tensor, step: int) -> None:
        """Add the loss of a step; after every `interval` steps their losses are read back."""
        self._unread.append(value)
        if len(self._unread) == self.interval:
            self.read(step)

    def read(self, step: int) -> None:
        """Read back and check the losses since the last readback.

        Args:
            step: Number of the last of these steps, counted from 1.

        Raises:
            NonFinite: A loss is NaN or infinite; the message names its step.
        """
        if not self._unread:
            return
        values: list[float] = torch.stack(self._unread).tolist()
        first = step - len(values) + 1
        self._require_finite(values, first)
        for number, value in enumerate(values, first):
            self._curve(number, {"loss": value, "learning_rate": self._rate(number)})
        self._unread.clear()
        self.values += values

    def fields(self) -> dict[str, str]:
        """Return the mean of the last losses for the progress bar; empty before the first loss."""
        recent = self.values[-_SHOWN:]
        return {"loss": f"{sum(recent) / len(recent):.3f}"} if recent else {}

    def close_epoch(self) -> float:
        """Return the mean loss of the epoch, and start the next one."""
        loss = sum(self.values) / len(self.values)
        self.values = []
        return loss

    def _rate(self, step: int) -> float:
        return learning_rate(self._settings, step - 1, self._total_steps)

    def _require_finite(self, values: Sequence[float], first: int) -> None:
        for step, value in enumerate(values, first):
            if not math.isfinite(value):
                raise NonFinite(
                    f"The training loss must be finite, got {value} at step {step} of {self._total_steps} "
                    f"(learning rate {self._rate(step):.4g}).",
                    hint="Lower learning_rate, or check the images and weights for NaN.",
                )
