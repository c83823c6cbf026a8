"""The one training loop: seeded, resumable, with the best epoch chosen on validation.

One call of `fit` is a run of `steps` optimiser steps, split into epochs; after each epoch validation top-1 is
measured, or whatever decides in another task. The whole state is saved atomically after each epoch, every few minutes
and on Ctrl-C. Everything random depends on the seed, the epoch and the step alone, so a run that was killed goes on
from the last state and ends with the same weights as an undisturbed one (same thread count, CPU).
"""

import copy
import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.batches import Augmentation, Batch, batches_per_epoch, random_seed, training_batches
from compress.data.splits import Split, known_labels
from compress.errors import (
    ArtifactError,
    ConfigValueError,
    DataError,
    ModelError,
    NonFinite,
    OutOfMemory,
    StageError,
    is_out_of_memory,
)
from compress.model.tensors import detach_stored
from compress.progress import Progress, SilentProgress, Task
from compress.storage.files import write_atomic
from compress.tasks.base import Metric, is_shown_worse
from compress.tasks.classification import Classification
from compress.tasks.outputs import changed, each, plain
from compress.training.batch_norm import reestimate_batch_norm, synced_batch_norms
from compress.training.device import moved, placed, require_precision, training_device
from compress.training.distributed import present_team
from compress.training.evaluate import measure_quality
from compress.training.feature_maps import MapPairs, at_least_float32
from compress.training.hooks import OptimizerHooks, TrainingHooks
from compress.training.interrupts import deferred_interrupts
from compress.training.memory_format import fastest_memory_format, set_memory_format
from compress.training.mixing import mixed, mixed_loss
from compress.training.schedule import schedule
from compress.training.weight_averaging import WeightAverage

STATE_MARK = b"compress training state\n"  # then SHA-256 of the rest, which torch wrote
_STATISTICS_IMAGES = 2048
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Distillation:
    """Learning from another network: its outputs (Hinton et al. 2015, arXiv:1503.02531) and its feature maps.

    Attributes:
        teacher: Network in eval mode with the same classes.
        weight: Share of the loss, in [0, 1], that comes from the teacher's outputs.
        temperature: Divides both logits before the softmax.
        features: Weight of the mean relative squared difference of feature maps, where both networks have one of the
            same name and shape (as the hints of Romero et al. 2015, arXiv:1412.6550, without their regressor).
        kept: Part -> (n,) which channels of the teacher's map are left in the network's, where some were cut.
    """

    teacher: nn.Module
    weight: float
    temperature: float
    features: float = 0.0
    kept: Mapping[str, Tensor] = field(default_factory=dict)


def _maps_of(module: nn.Module, distillation: Distillation | None, train: Split) -> MapPairs | None:
    if distillation is None or not distillation.features:
        return None
    return MapPairs(module, distillation.teacher, train, distillation.kept)


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How to train.

    Attributes:
        epochs: Passes over the training split; may be a fraction. Ignored when `steps` is given.
        steps: Optimiser steps; None counts them from `epochs`.
        batch_size: Images a batch, of which a step takes `accumulation`.
        learning_rate: Peak of the schedule.
        momentum: Of SGD with Nesterov's correction.
        weight_decay: L2 factor on every parameter; with "adamw" decoupled from the gradient.
        warmup_ratio: Share of the steps, in [0, 1), over which the rate rises.
        label_smoothing: In [0, 1).
        augmentation: What is varied.
        seed: Decides order, augmentation and what the network draws.
        keep: "best" returns the epoch that is best on validation, or the last one that is not shown to be worse (exact
            McNemar test, of classifiers), "last" the final one.
        compiled: Whether the forward pass goes through `torch.compile` (needs a C++ compiler).
        optimizer: "sgd" with Nesterov momentum, or "adamw".
        schedule: As `compress.training.schedule.schedule` calls it.
        schedule_start: Share of that schedule, in [0, 1), that lies before the first step.
        gradient_clip: Largest norm of all gradients together; None is off.
        accumulation: Batches a step; their gradients are averaged. Batch norm sees one batch at a time.
        ema: Decay of the moving average of the weights that is measured and returned in their place; 0 is off.
        average_ratio: Share of the steps, at the end, whose weights are averaged; with batch-norm statistics measured
            again, that average is one more candidate. 0 is off.
        precision: "fp32"; or "bf16", "fp16": convolutions and linear layers compute in it, weights stay float32.
        device: "cpu", "cuda", or "auto" for the GPU where there is one.
        sync_batch_norm: Whether several processes normalise by the statistics of the whole batch, not of their parts.
        save_minutes: How long after one save of the state another one follows; after each epoch there is one anyway.
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


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """What one epoch did.

    Attributes:
        epoch: Counted from 1.
        loss: Mean training loss.
        validation: The figure that decides, on the validation split; of a classifier top-1, in [0, 1].
        learning_rate: At the end of the epoch.
        images_per_second: While training, without validation.
    """

    epoch: int
    loss: float
    validation: float
    learning_rate: float
    images_per_second: float

    def to_dict(self, metric: Metric) -> dict[str, Any]:
        """Return plain values for the report, such as {"epoch": 1, "loss": 0.3, "validation_top1": 0.9, ...}."""
        return {
            (f"validation_{metric.name}" if name == "validation" else name): value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a run did.

    Attributes:
        epochs: One record each.
        chosen_epoch: Whose weights the module now holds; the last one where it holds the average.
        steps: Optimiser steps.
        averaged: The figure that decides, on the validation split, of the average of the last steps; None without.
        is_averaged: Whether the module holds that average.
    """

    epochs: tuple[EpochRecord, ...]
    chosen_epoch: int
    steps: int
    averaged: float | None = None
    is_averaged: bool = False


def fit(
    module: nn.Module,
    train: Split,
    validation: Split,
    settings: FitSettings,
    distillation: Distillation | None = None,
    state_path: Path | None = None,
    progress: Progress | None = None,
    hooks: TrainingHooks | None = None,
    keeps_state: bool = False,
) -> FitResult:
    """Train `module` in place and leave it in eval mode.

    Args:
        module: Network on the CPU; it comes back there.
        train: What is learned from, and what the task is.
        validation: What the epoch is chosen on; never the evaluation split.
        settings: How.
        distillation: Teacher, or None.
        state_path: Where the state is kept. None: not resumable.
        progress: Told about every step and epoch.
        hooks: What else is done in each step.
        keeps_state: Whether the file stays when all is done, for a caller with more to do: called again, the run is
            then at its end at once. Else it is removed.

    Raises:
        NonFinite: The loss is NaN or infinite; names the step. The last state that was saved stays.
        OutOfMemory: A batch does not fit into memory.
        KeyboardInterrupt: As asked for, after the step under way was made and the state saved.
        DataError: Labels do not fit the outputs, a split is empty, or batches are too small for batch norm.
        ModelError: No parameter requires a gradient, or outputs are not what the task needs.
        ConfigValueError: Images are to be mixed, and the targets are no class indices.
        StageError: The device is not there, the precision is one that it has no instructions for, or the network cannot
            be compiled.
        ArtifactError: The saved state belongs to another run.
    """
    for split in (train, validation):
        if len(split) == 0:
            raise DataError(f"Split '{split.name}' must hold at least one image to train, it holds none.")
    team = present_team()
    if min(settings.batch_size, len(train)) % team.size or len(validation) < team.size:
        raise DataError(
            f"batch_size must be divisible by the number of processes ({team.size}) and each must have an image to "
            f"validate on, got batches of {min(settings.batch_size, len(train))} and {len(validation)} images."
        )
    augmentation = settings.augmentation
    if (augmentation.mixup or augmentation.cutmix) and not train.lesson.can_mix:
        raise ConfigValueError(
            f"augmentation.mixup and augmentation.cutmix must be 0 where targets are no class indices, got "
            f"{augmentation.mixup:g} and {augmentation.cutmix:g}.",
            hint=f"the task is {train.task.name}{', learned without labels' if train.original is not None else ''}",
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ModelError("The network must have a parameter that requires a gradient to be trained, it has none.")
    require_precision(settings.precision, training_device(settings.device))
    run = None
    try:
        with _explained(settings.batch_size):
            said = progress or SilentProgress()
            run = _Run(module, train, validation, settings, distillation, state_path, said, hooks)
            return _trained(run, keeps_state)
    finally:
        del run
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # the runtime that times the file wants memory as well


def _trained(run: "_Run", keeps_state: bool) -> FitResult:
    """Go on from the saved state, train to the end and return what was done."""
    state_path = run.state_path
    if run.team.size > 1:
        run.progress.note(f"{run.team.size} processes train together, each on its part of every batch")
    with moved(run.networks, run.device):
        run.restore()
        if isinstance(run.hooks, OptimizerHooks):
            run.hooks.on_optimizer(run.optimizer)
        with flushed_denormals(), run.surroundings(), deferred_interrupts() as is_interrupted:
            while len(run.records) < run.total_epochs:
                run.train_epoch(is_interrupted)
        result = run.finish()
        detach_stored(run.module)
    if state_path is not None and not keeps_state and run.team.rank == 0:
        state_path.unlink(missing_ok=True)
    return result


def planned_steps(train: Split, settings: FitSettings) -> tuple[int, int]:
    """Return how many optimiser steps an epoch has, and the whole run."""
    per_epoch = max(1, batches_per_epoch(train, settings.batch_size) // settings.accumulation)
    return per_epoch, settings.steps or max(1, round(settings.epochs * per_epoch))


def learning_rate(settings: FitSettings, step: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    share = schedule(step, total_steps, settings.warmup_ratio, settings.schedule, settings.schedule_start)
    return settings.learning_rate * share


class _Run:
    """The state of one call of `fit`."""

    def __init__(
        self,
        module: nn.Module,
        train: Split,
        validation: Split,
        settings: FitSettings,
        distillation: Distillation | None,
        state_path: Path | None,
        progress: Progress,
        hooks: TrainingHooks | None = None,
    ) -> None:
        self.module, self.hooks, self.team = module, hooks, present_team()
        self.device = training_device(settings.device)
        networks = (module,) if distillation is None else (module, distillation.teacher)
        formats = {fastest_memory_format(network, train) for network in networks}
        self.memory_format = formats.pop() if len(formats) == 1 else torch.contiguous_format
        for network in networks:
            set_memory_format(network, self.memory_format)
        self.forward: Callable[[Tensor], Any] = torch.compile(module) if settings.compiled else module
        self.lesson, self.metric = train.lesson, validation.task.main
        self.train, self.validation = placed((train, validation), self.device)
        self.settings, self.distillation, self.progress = settings, distillation, progress
        self.steps_per_epoch, self.total_steps = planned_steps(train, settings)
        self.optimizer = _optimizer(module, settings)
        self.average = WeightAverage(module, settings.ema) if settings.ema else None
        self.tail = WeightAverage(module, None) if settings.average_ratio else None
        self.maps = _maps_of(module, distillation, train)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.state_path, self.saved_at = state_path, time.monotonic()
        self.name = "training" if state_path is None else state_path.stem
        self.step = 0
        self.losses: list[float] = []  # of the epoch under way
        self.unread: list[Tensor] = []  # those of the last steps
        self.read_together = 1 if hooks is not None else steps_read_together(self.device)
        self.records: list[EpochRecord] = []
        self.best: tuple[int, dict[str, Tensor]] | None = None
        self.best_right: Tensor | None = None  # (N,) bool: images that the epoch of the best figure gets right

    def train_epoch(self, is_interrupted: Callable[[], bool]) -> None:
        """Run one epoch (or what is left of it, or of the steps), then measure on validation."""
        self.module.train()
        settings, epoch = self.settings, len(self.records)
        first = epoch * self.steps_per_epoch
        steps = min(self.steps_per_epoch, self.total_steps - first)
        done = self.step - first
        batches = training_batches(
            self.train,
            settings.batch_size,
            settings.augmentation,
            settings.seed,
            epoch,
            done * settings.accumulation,
            (self.team.rank, self.team.size),
        )
        images_seen, started = 0, time.perf_counter()
        with (
            self._own_random_state(),
            self.progress.task(f"epoch {epoch + 1} of {self.total_epochs}", steps) as task,
        ):
            if done:
                task.advance(done)
            for several in _grouped(batches, settings.accumulation, steps - done):
                # dropout and mixing draw the same after a resume
                torch.manual_seed(random_seed(settings.seed, "step", self.step, *self._own_part))
                self._train_step(several)
                images_seen += self.team.size * sum(len(images) for images, _ in several)
                self._advance(task, images_seen / (time.perf_counter() - started))
                self._keep_state(is_interrupted())
            self._read_losses()
        speed = images_seen / (time.perf_counter() - started)
        self._close_epoch(epoch + 1, speed)
        self._keep_state(is_interrupted(), is_due=True)

    def _keep_state(self, is_interrupted: bool, is_due: bool = False) -> None:
        """Save the state when it is time to; end the run when that was asked for, of any process."""
        is_due = is_due or time.monotonic() - self.saved_at >= 60 * self.settings.save_minutes
        is_interrupted, is_due = (votes > 0 for votes in self.team.total([float(is_interrupted), float(is_due)]))
        if self.state_path is not None and (is_interrupted or is_due):
            self.save(self.state_path)
        if is_interrupted:
            if self.state_path is not None:
                self.progress.note(
                    f"Training stopped after step {self.step} of {self.total_steps}; it can go on there."
                )
            raise KeyboardInterrupt

    @property
    def _own_part(self) -> tuple[int, ...]:
        """What parts the random numbers of this process from those of the others."""
        return (self.team.rank,) if self.team.size > 1 else ()

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Keep feature maps for the loss, and let batch norms of several processes agree, while it lasts, if wanted."""
        is_synced = self.settings.sync_batch_norm and self.team.size > 1
        synced = synced_batch_norms(self.module, self.team) if is_synced else nullcontext()
        with synced, nullcontext() if self.maps is None else self.maps:
            yield

    @property
    def networks(self) -> list[nn.Module]:
        """All that computes."""
        teachers = [] if self.distillation is None else [self.distillation.teacher]
        originals = {split.original() for split in (self.train, self.validation) if split.original is not None}
        return [self.module, *teachers, *originals, *(average.module for average in self.averages)]

    def _own_random_state(self) -> AbstractContextManager[None]:
        """Leave the global random state as it was."""
        return torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device])

    @property
    def measured(self) -> nn.Module:
        """The network that is measured and returned: the average, if there is one."""
        return self.module if self.average is None else self.average.module

    @property
    def averages(self) -> list[WeightAverage]:
        """Those that there are."""
        return [average for average in (self.average, self.tail) if average is not None]

    @property
    def tail_steps(self) -> int:
        """Steps at the end whose weights are averaged."""
        return max(1, round(self.settings.average_ratio * self.total_steps))

    @property
    def total_epochs(self) -> int:
        """Epochs in the run; the last may be shorter."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def finish(self) -> FitResult:
        """Load the chosen weights, leave them contiguous and in eval mode, and say what was done."""
        chosen, reached, is_averaged = len(self.records), None, False
        weights = self.measured.state_dict()
        if self.settings.keep == "best" and self.best is not None:
            chosen, weights = self.best
        if self.tail is not None:
            reached = self._measure_tail(self.tail.module)
            best = self.records[chosen - 1].validation
            is_averaged = self.settings.keep == "last" or self.metric.is_better(reached, best)
            if is_averaged:
                chosen, weights = len(self.records), self.tail.module.state_dict()
        self.module.load_state_dict(weights)
        set_memory_format(self.module, torch.contiguous_format)
        self.module.eval()
        return FitResult(tuple(self.records), chosen, self.step, reached, is_averaged)

    def _measure_tail(self, module: nn.Module) -> float:
        """Give the average of the last steps batch-norm statistics of its own, and return its figure on validation."""
        reestimate_batch_norm(module, self.train.first(_STATISTICS_IMAGES), self.progress)
        reached, _ = self._measure(module)
        self.progress.note(f"average of the last {self.tail_steps} steps: validation {self._say(reached)}")
        return reached

    def _say(self, value: float) -> str:
        return f"{self.metric.words} {self.metric.show(value)}"

    def _measure(self, module: nn.Module) -> tuple[float, Tensor | None]:
        """Return the figure that decides, on validation, and (N,) which images are right, where they are that or wrong.

        Of a share of images each process looks at its part.
        """
        size = None if self.device.type == "cpu" else self.settings.batch_size  # what is known to fit there
        is_shared = self.team.size > 1 and isinstance(self.validation.task, Classification)
        part = self.validation.part(self.team.rank, self.team.size) if is_shared else self.validation
        value, found = measure_quality(module, part, size, self.progress)
        if not is_shared or found is None:
            return value, None if found is None else torch.from_numpy(found)
        right = torch.zeros(len(self.validation))
        right[self.team.rank :: self.team.size] = torch.from_numpy(found).float()
        right = torch.tensor(self.team.total(right.tolist()))
        return float(right.sum()) / len(right), right > 0

    def save(self, path: Path) -> None:
        """Write everything a later process needs, so that the file is whole or absent; one process does it for all."""
        self._read_losses()
        self._require_finite_weights()
        self.saved_at = time.monotonic()
        if self.team.rank != 0:
            return
        state = {
            "identity": self._identity(),
            "step": self.step,
            "losses": self.losses,
            "records": [asdict(record) for record in self.records],
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averages": [average.state_dict() for average in self.averages],
            "hooks": None if self.hooks is None else self.hooks.state_dict(),
            "best": None if self.best is None else {"epoch": self.best[0], "weights": self.best[1]},
            "best_right": self.best_right,
        }
        content = io.BytesIO()  # torch's own writer hides what the file system says behind an error of another kind
        torch.save(state, content)
        write_atomic(path, STATE_MARK + hashlib.sha256(content.getbuffer()).digest() + content.getbuffer())

    def restore(self) -> None:
        """Go on from a saved state, if there is one; a state of another run is refused by what differs."""
        self._restore()
        others = self.team.total([self.step])[0] - self.step
        if self.team.any(others != (self.team.size - 1) * self.step):
            raise ArtifactError(
                f"All processes must read the same training state, this one goes on after step {self.step}, others "
                "elsewhere.",
                hint="Keep the run folder on a file system that all machines see alike.",
            )

    def _restore(self) -> None:
        path = self.state_path
        if path is None or not path.is_file():
            return
        try:
            state = torch.load(_read_state(path), weights_only=True, map_location="cpu")
            saved = state["identity"]
        except Exception as error:  # torch raises a dozen types for a damaged file
            self.progress.warn(f"The saved training state is unreadable, training starts again: {error}")
            return
        if differing := _differences(saved, self._identity()):
            raise ArtifactError(
                f"The training state in '{path}' must be of this run, it is of one with {', '.join(differing)}.",
                hint="Remove the file to start again.",
            )
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(saved)
        if self.hooks is not None:
            self.hooks.load_state_dict(state["hooks"])
        self.step, self.losses = state["step"], state["losses"]
        self.records = [EpochRecord(**record) for record in state["records"]]
        if state["best"] is not None:
            self.best, self.best_right = (state["best"]["epoch"], state["best"]["weights"]), state.get("best_right")
        reached = f"epoch {len(self.records)} of {self.total_epochs}"
        if self.losses:
            reached = f"step {self.step} of {self.total_steps}"
        self.progress.note(f"Training goes on after {reached}.")

    def _train_step(self, batches: Sequence[Batch]) -> None:
        """Take one step on what one batch says, or several on average."""
        self._set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        if self.hooks is not None:
            self.hooks.on_step_begin(self.step)
        value = torch.zeros((), device=self.device)
        for images, targets in batches:
            loss = self._batch_loss(images, targets) / len(batches)
            value = value + loss.detach()
            if self.read_together == 1:
                self._require_finite(self._mean_over_team([value.item()]))
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        learned = [*self.module.parameters(), *(self.hooks.parameters() if self.hooks is not None else ())]
        gradients = [parameter.grad for parameter in learned if parameter.grad is not None]
        self.team.average([*gradients, *_statistics(self.module)])
        if self.settings.gradient_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.gradient_clip)
        if self.hooks is not None:
            self.hooks.on_gradients(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.hooks is not None:
            self.hooks.on_step_end(self.step)
        if self.average is not None:
            self.average.update(self.module)
        self.step += 1
        if self.tail is not None and self.step > self.total_steps - self.tail_steps:
            self.tail.update(self.module)
        self.unread.append(value)
        if len(self.unread) == self.read_together:
            self._read_losses()

    def _read_losses(self) -> None:
        """Read and check the losses of the last steps."""
        if not self.unread:
            return
        values = self._mean_over_team(torch.stack(self.unread).tolist())
        self._require_finite(values)
        for value, step in zip(values, range(self.step - len(values) + 1, self.step + 1), strict=True):
            rate = learning_rate(self.settings, step - 1, self.total_steps)
            self.progress.curve(self.name, step, {"loss": value, "learning_rate": rate})
        self.unread.clear()
        self.losses += values

    def _mean_over_team(self, values: list[float]) -> list[float]:
        return [value / self.team.size for value in self.team.total(values)]

    def _require_finite(self, values: Sequence[float]) -> None:
        """Check the losses of the last steps, the one under way among them if it is not over."""
        for value, step in zip(values, range(self.step - len(self.unread) + 1, self.total_steps + 1), strict=False):
            if not math.isfinite(value):
                raise NonFinite(
                    f"The training loss must be finite, got {value} at step {step} of {self.total_steps} "
                    f"(learning rate {self.optimizer.param_groups[0]['lr']:.4g}).",
                    hint="Lower learning_rate, or check the images and weights for NaN.",
                )

    def _require_finite_weights(self) -> None:
        """Check what the last step made of the network, so that no broken one is saved over a good one."""
        for name, value in self.module.state_dict().items():
            if not torch.isfinite(value).all():
                raise NonFinite(
                    f"Weights must be finite, '{name}' is not after step {self.step} of {self.total_steps} "
                    f"(learning rate {self.optimizer.param_groups[0]['lr']:.4g}).",
                    hint="Lower learning_rate.",
                )

    def _batch_loss(self, images: Tensor, targets: Any) -> Tensor:
        if images.ndim == 4:
            images = images.contiguous(memory_format=self.memory_format)
        images, share = mixed(images, self.settings.augmentation, self.train.preprocessing.layout)
        outputs = changed(self._outputs(images), at_least_float32)
        if self.step == 0:
            every = known_labels(self.train)
            self.lesson.check(changed(outputs, Tensor.detach), targets if every is None else every)
        return self._loss(outputs, images, targets, share)

    def _outputs(self, images: Tensor) -> Any:
        try:
            with self._autocast():
                return plain(self.forward(images), getattr(self.module, "output_names", ()))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise DataError(
                f"A batch must give every batch norm more than one value for each channel, batch_size "
                f"{len(images)} does not.",
                hint="Raise batch_size.",
            ) from error

    def _autocast(self) -> torch.autocast:
        precision = self.settings.precision
        return torch.autocast(self.device.type, _DTYPES[precision], enabled=precision != "fp32")

    def _loss(self, outputs: Any, images: Tensor, targets: Any, share: Tensor) -> Tensor:
        """Return the loss of a batch; `share`, (N,) on the CPU, of each image is its neighbour's, with its label."""
        smoothing = self.settings.label_smoothing
        if share.any():
            hard = mixed_loss(outputs, targets, share, smoothing)
        else:
            hard = self.lesson.training_loss(outputs, targets, smoothing)
        if self.distillation is None:
            return hard
        weight, temperature = self.distillation.weight, self.distillation.temperature
        with torch.no_grad(), self._autocast():
            teacher = self.distillation.teacher
            taught = plain(teacher(images), getattr(teacher, "output_names", ()))
        shapes = [[tuple(one.shape[1:]) for one in each(values)] for values in (outputs, taught)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"The teacher must have outputs of the shapes of the network it teaches, {shapes[0]} an image, it has "
                f"{shapes[1]}."
            )
        soft = self.lesson.distance(outputs, changed(taught, at_least_float32), temperature)
        loss = (1 - weight) * hard + weight * soft
        return loss if self.maps is None else loss + self.distillation.features * self.maps.difference()

    def _set_learning_rate(self) -> None:
        rate = learning_rate(self.settings, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _advance(self, task: Task, speed: float) -> None:
        recent = self.losses[-20:]
        shown = {"loss": f"{sum(recent) / len(recent):.3f}"} if recent else {}
        task.advance(1, **shown, speed=f"{speed:.0f} images/s")

    def _close_epoch(self, number: int, speed: float) -> None:
        loss = sum(self.losses) / len(self.losses)
        self.losses = []
        self._require_finite_weights()
        reached, right = self._measure(self.measured)
        rate = self.optimizer.param_groups[0]["lr"]
        known = [record.validation for record in self.records]
        self.records.append(EpochRecord(number, loss, reached, rate, speed))
        values = {f"validation_{self.metric.name}": reached, "images_per_second": speed}
        self.progress.curve(self.name, self.step, values)
        is_best = not any(self.metric.is_better(one, reached) for one in known)
        if self.settings.keep == "best" and (is_best or self._is_as_good(right)):
            self.best = (number, copy.deepcopy(self.measured.state_dict()))
        if is_best:
            self.best_right = right
        self.progress.note(
            f"epoch {number} of {self.total_epochs}: loss {loss:.4f}, validation {self._say(reached)}, {speed:.0f} "
            "images/s"
        )

    def _is_as_good(self, right: Tensor | None) -> bool:
        """Whether the epoch of the best figure is not shown to be better than one that gets these images right."""
        if right is None or self.best_right is None:
            return False
        return not is_shown_worse(self.best_right.numpy(), right.numpy())

    def _identity(self) -> dict[str, Any]:
        free = ("compiled", "device", "save_minutes")  # what may change from one start to the next
        settings = {key: value for key, value in asdict(self.settings).items() if key not in free}
        if not self.settings.schedule_start:
            del settings["schedule_start"]  # states of older versions do not know it
        teacher = self.distillation
        return {
            **settings,
            "total steps": self.total_steps,
            "training images": len(self.train),
            "validation images": len(self.validation),
            "distillation": None if teacher is None else [teacher.weight, teacher.temperature, teacher.features],
            "hooks": None if self.hooks is None else type(self.hooks).__name__,
            "task": f"{self.lesson.name}, {self.metric.name}",
            **{f"shape of {name}": list(value.shape) for name, value in self.module.state_dict().items()},
        }


def steps_read_together(device: torch.device) -> int:
    """Return of how many steps the loss is read at once: to read it from a GPU means to wait until it is done."""
    return 1 if device.type == "cpu" else 20


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Let the CPU treat denormal numbers, which slow it down many times over, as zero; put back what was set before.

    Only for training: while it lasts the whole process cannot tell a denormal number from zero.
    """
    were_flushed = float(torch.tensor(1e-310, dtype=torch.float64) * 1) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(were_flushed)


@contextmanager
def _explained(batch_size: int) -> Iterator[None]:
    """Say what to do where torch finds no memory, or cannot compile the network."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise StageError(
                f"torch.compile must be able to compile the network, it is not: {str(error).strip().splitlines()[0]}",
                hint="Leave compiled out, or see that a C++ compiler is there.",
            ) from error
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"A training step must fit into memory, batch_size {batch_size} does not.",
            hint="Lower batch_size and raise accumulation by as much: the steps stay as large.",
        ) from error


def _read_state(path: Path) -> io.BytesIO:
    """Return the content of a saved state; torch itself does not notice changed bits in it.

    Raises:
        ValueError: It differs from its digest.
    """
    content = path.read_bytes()
    if not content.startswith(STATE_MARK):  # of an older version, which wrote no digest
        return io.BytesIO(content)
    start = len(STATE_MARK) + hashlib.sha256().digest_size
    if hashlib.sha256(content[start:]).digest() != content[len(STATE_MARK) : start]:
        raise ValueError("it differs from its digest")
    return io.BytesIO(content[start:])


def _optimizer(module: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=decay)
    momentum = settings.momentum
    return torch.optim.SGD(module.parameters(), rate, momentum, weight_decay=decay, nesterov=momentum > 0)


def _differences(saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Name what a saved run was with, where it was not with the same."""
    names = [name for name in {**own, **saved} if saved.get(name) != own.get(name)]
    named = [f"{name} {saved.get(name)} instead of {own.get(name)}" for name in names[:4]]
    return [*named, f"{len(names) - 4} more"] if len(names) > 4 else named


def _statistics(network: nn.Module) -> Iterator[Tensor]:
    """Yield what a network keeps besides parameters and counts: the statistics of batch norms."""
    yield from (buffer for buffer in network.buffers() if buffer.is_floating_point())


def _grouped(batches: Iterator[Batch], each: int, count: int) -> Iterator[list[Batch]]:
    """Yield `count` lists of `each` batches; the last has as many as are left, and there are fewer where none is."""
    for _ in range(count):
        if several := list(islice(batches, each)):
            yield several
