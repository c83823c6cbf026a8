"""The training loop: seeded, resumable, with the best epoch chosen on validation.

One call of `fit` is a run of optimiser steps, split into epochs; after each epoch the primary metric is measured on
the validation split. The complete state is saved atomically after each epoch, every few minutes and on Ctrl-C. Random
numbers depend on the seed, the epoch and the step alone. A killed run therefore resumes from the last state and ends
with the same weights as an undisturbed run (same thread count, CPU).

    settings    hyperparameters, number of steps, result
    learner     network, optimiser, averages of the weights: one step
    distributed several processes, whose gradients are averaged
    losses      loss of a batch; losses of the steps so far
    epochs      validation after each epoch, choice of the epoch
    state       the saved state on disk
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice

import torch
from torch import nn

from compress.data.batches import Batch, random_seed, training_batches
from compress.errors import (
    ArtifactError,
    ConfigValueError,
    DataError,
    ModelError,
    OutOfMemory,
    StageError,
    is_out_of_memory,
)
from compress.model.tensors import detach_stored
from compress.progress import Progress, SilentProgress
from compress.training.batch_norm import reestimate_batch_norm, synced_batch_norms
from compress.training.device import flushed_denormals, moved, placed, require_precision, training_device
from compress.training.distributed import (
    current_ranks,
    data_parallel,
    is_lost,
    rank_lost,
    wait_for_all,
)
from compress.training.epochs import EpochLog
from compress.training.fake_quantization import FakeQuantization
from compress.training.hooks import TrainingHooks
from compress.training.interrupts import deferred_interrupts
from compress.training.learner import Learner
from compress.training.losses import BatchLoss, LossLog, loss_sync_interval
from compress.training.memory_format import set_common_format, set_memory_format
from compress.training.settings import (
    Distillation,
    FitResult,
    FitSettings,
    TrainingData,
    learning_rate,
    plan_steps,
)
from compress.training.state import StateFile, identify
from compress.training.teacher_outputs import TeacherOutputs

VOTE_STEPS = 20  # steps from one vote of several processes on Ctrl-C and saving to the next
_STATISTICS_IMAGES = 2048


def fit(
    module: nn.Module,
    data: TrainingData,
    settings: FitSettings,
    distillation: Distillation | None = None,
    state_file: StateFile | None = None,
    progress: Progress | None = None,
    hooks: TrainingHooks | None = None,
) -> FitResult:
    """Train `module` in place and leave it in eval mode.

    Args:
        module: Network on the CPU; it comes back there.
        data: Images to learn from and to choose the epoch on.
        settings: Hyperparameters.
        distillation: Teacher, or None.
        state_file: File that an interrupted run resumes from; None for a run that cannot resume.
        progress: Receives progress by step and epoch.
        hooks: Hooks of a method, called in each step, or None.

    Raises:
        NonFinite: The loss is NaN or infinite; the message names the step. The last saved state stays.
        OutOfMemory: A batch does not fit into memory.
        KeyboardInterrupt: On Ctrl-C, after the present step is finished and the state saved.
        DataError: Labels do not fit the outputs, a split is empty, or batches are too small for batch norm.
        ModelError: No parameter requires a gradient, or outputs do not fit the task.
        ConfigValueError: Mixup or CutMix is set, but the targets are no class indices.
        StageError: The device is not available, it has no instructions for the precision, or the network cannot be
            compiled.
        RankLost: Another process of a joint training has ended, or does not answer.
        ArtifactError: The saved state belongs to another run.
    """
    _require_trainable(module, data, settings)
    require_precision(settings.precision, training_device(settings.device))
    run = None
    try:
        with _translated_errors(settings.batch_size):
            run = TrainingRun(module, data, settings, distillation, state_file, progress or SilentProgress(), hooks)
            return run.complete()
    finally:
        del run
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # the runtime that times the file needs memory as well


class TrainingRun:
    """State of one call of `fit`; arguments as in `fit`.

    Attributes:
        step: Number of finished optimiser steps.
    """

    def __init__(
        self,
        module: nn.Module,
        data: TrainingData,
        settings: FitSettings,
        distillation: Distillation | None,
        state_file: StateFile | None,
        progress: Progress,
        hooks: TrainingHooks | None = None,
    ) -> None:
        self.settings, self.distillation, self.progress = settings, distillation, progress
        self.device, self.ranks = training_device(settings.device), current_ranks()
        networks = (module,) if distillation is None else (module, distillation.teacher)
        memory_format = set_common_format(networks, data.train)
        self.data = TrainingData(*placed(data, self.device))
        self.plan = plan_steps(data.train, settings)
        self.learner = Learner(module, settings, hooks, self.device, self.ranks)
        self.loss = BatchLoss(module, data.train, settings, distillation, self.device, memory_format)
        self.teacher_outputs = self._teacher_outputs()
        interval = 1 if hooks is not None else loss_sync_interval(self.device)
        self.curve = partial(progress.curve, "training" if state_file is None else state_file.path.stem)
        self.losses = LossLog(settings, self.plan.total, interval, self.curve)
        size = None if self.device.type == "cpu" else settings.batch_size  # known to fit into a GPU's memory
        self.epochs = EpochLog(self.data.validation, size, settings.keep == "best", self.ranks, progress)
        self.step, self.saved_at, self.state_file = 0, time.monotonic(), state_file
        self.identity = identify(module, data, settings, distillation, hooks)

    def _teacher_outputs(self) -> TeacherOutputs | None:
        """Let the loss read outputs of the teacher that earlier trainings have kept; None where none are used."""
        taught = self.distillation
        if taught is None or taught.folder is None or taught.features or self.device.type != "cpu":
            return None
        settings = {
            **{name: getattr(self.settings, name) for name in ("seed", "batch_size", "precision")},
            "augmentation": asdict(self.settings.augmentation),
            "part": [self.ranks.rank, self.ranks.size],
        }
        outputs = TeacherOutputs(self.loss.taught, taught.teacher, taught.folder, settings, self.progress.warn)
        self.loss.teach = outputs
        return outputs

    @property
    def networks(self) -> list[nn.Module]:
        """All networks that compute on the device."""
        teachers = [] if self.distillation is None else [self.distillation.teacher]
        baselines = {split.original() for split in self.data if split.original is not None}
        averages = (average.module for average in self.learner.averages)
        return [self.learner.module, *teachers, *baselines, *averages]

    def complete(self) -> FitResult:
        """Resume from the saved state, train to the end and return the result."""
        if self.ranks.size > 1:
            self.progress.note(f"{self.ranks.size} processes train together, each on its part of every batch")
        wait_for_all()  # work before a training may take longer than its timeout
        with moved(self.networks, self.device):
            self._restore()
            self.learner.give_optimizer()
            with flushed_denormals(), self.surroundings(), deferred_interrupts() as is_interrupted:
                while len(self.epochs.records) < self.plan.epochs:
                    self._train_epoch(is_interrupted)
            result = self._finish()
            detach_stored(self.learner.module)
        if self.state_file is not None and self.ranks.rank == 0:
            self.state_file.finish()
        return result

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Average gradients over the ranks; record feature maps and synchronise batch norms, if the settings ask so."""
        is_synced = self.settings.sync_batch_norm and self.ranks.size > 1
        synced = synced_batch_norms(self.learner.module, self.ranks) if is_synced else nullcontext()
        with (
            synced,
            self.loss.watching_maps(),
            data_parallel(self.learner.module, self.loss, self.ranks) as self._parallel_loss,
        ):
            yield

    def rounding(self) -> AbstractContextManager[object]:
        """Return the context manager of forward passes in the next step: with layers in 8 bits near the end."""
        rounding = self.settings.rounding
        if rounding is None or self.step < self.plan.total - self.plan.last(self.settings.rounded_ratio):
            return nullcontext()
        networks = (self.learner.module, *(average.module for average in self.learner.averages))
        return FakeQuantization(rounding, {weight for network in networks for weight in rounding.floats(network)})

    def train_step(self, batches: Sequence[Batch]) -> None:
        """Take one step on the mean loss of one batch, or of several; within `surroundings`."""
        self.loss.rounding = self.rounding()
        self.learner.begin_step(self.step, learning_rate(self.settings, self.step, self.plan.total))
        value = torch.zeros((), device=self.device)
        for number, (images, targets) in enumerate(batches, 1):
            loss = self._parallel_loss(images, targets, self.step == 0, syncs=number == len(batches)) / len(batches)
            value = value + loss.detach()
            self.learner.backward(loss)
        value = self.learner.average(value)
        self.losses.check_in_step(value, self.step + 1)
        tail = self.plan.last(self.settings.average_ratio)
        self.learner.end_step(self.step, is_in_tail=self.step >= self.plan.total - tail)
        self.step += 1
        self.losses.add(value, self.step)

    def _train_epoch(self, is_interrupted: Callable[[], bool]) -> None:
        """Run one epoch, or the rest of a started epoch or of the steps, then measure on validation."""
        self.learner.module.train()
        settings, ranks, epoch = self.settings, self.ranks, len(self.epochs.records)
        first = epoch * self.plan.per_epoch
        steps = min(self.plan.per_epoch, self.plan.total - first)
        done = self.step - first
        batches = training_batches(
            self.data.train,
            settings.batch_size,
            settings.augmentation,
            settings.seed,
            epoch,
            done * settings.accumulation,
            (ranks.rank, ranks.size),
        )
        rank = (ranks.rank,) if ranks.size > 1 else ()  # each rank draws its own random numbers
        images_seen, started = 0, time.perf_counter()
        if self.teacher_outputs is not None:
            self.teacher_outputs.open_epoch(epoch)
        with (
            torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device]),
            self.progress.task(f"epoch {epoch + 1} of {self.plan.epochs}", steps) as task,
        ):
            if done:
                task.advance(done)
            for several in _grouped(batches, settings.accumulation, steps - done):
                # dropout and mixing draw the same after a resume
                torch.manual_seed(random_seed(settings.seed, "step", self.step, *rank))
                self.train_step(several)
                images_seen += ranks.size * sum(len(images) for images, _ in several)
                speed = images_seen / (time.perf_counter() - started)
                task.advance(1, **self.losses.fields(), speed=f"{speed:.0f} images/s")
                if ranks.size == 1 or self.step % VOTE_STEPS == 0:
                    self._save_when_due(is_interrupted())
            self.losses.read(self.step)
        if self.teacher_outputs is not None:
            self.teacher_outputs.close_epoch()
        self._close_epoch(images_seen / (time.perf_counter() - started))
        self._save_when_due(is_interrupted(), is_due=True)

    def _close_epoch(self, speed: float) -> None:
        loss = self.losses.close_epoch()
        self.learner.require_finite_weights(self.step, self.plan.total)
        with self.rounding():
            record = self.epochs.close(self.learner.measured, loss, self.learner.rate, speed)
        name, reached = self.epochs.metric.name, record.validation
        self.curve(self.step, {f"validation_{name}": reached, "images_per_second": speed})
        self.progress.note(
            f"epoch {record.epoch} of {self.plan.epochs}: loss {loss:.4f}, validation {self.epochs.show(reached)}, "
            f"{speed:.0f} images/s"
        )

    def _save_when_due(self, is_interrupted: bool, is_due: bool = False) -> None:
        """Save the state if it is due; end the run after Ctrl-C on any rank."""
        is_due = is_due or time.monotonic() - self.saved_at >= 60 * self.settings.save_minutes
        is_interrupted, is_due = (votes > 0 for votes in self.ranks.total([float(is_interrupted), float(is_due)]))
        if self.state_file is not None and (is_interrupted or is_due):
            self._save(self.state_file)
        if is_interrupted:
            if self.state_file is not None:
                self.progress.note(f"Training stopped after step {self.step} of {self.plan.total}; it can go on there.")
            raise KeyboardInterrupt

    def _save(self, file: StateFile) -> None:
        """Write everything that a later process resumes from, on rank 0."""
        self.losses.read(self.step)
        self.learner.require_finite_weights(self.step, self.plan.total)
        self.saved_at = time.monotonic()
        if self.ranks.rank == 0:
            run = {"identity": self.identity, "step": self.step, "losses": self.losses.values}
            file.write({**run, **self.learner.state_dict(), **self.epochs.state_dict()})

    def _restore(self) -> None:
        """Resume from the saved state, if there is one; raise ArtifactError if ranks resume at different steps."""
        if self.state_file is not None:
            self._load(self.state_file)
        others = self.ranks.total([self.step])[0] - self.step
        if self.ranks.any(others != (self.ranks.size - 1) * self.step):
            raise ArtifactError(
                f"All processes must read the same training state, this one goes on after step {self.step}, others "
                "elsewhere.",
                hint="Keep the run folder on a file system that all machines see alike.",
            )

    def _load(self, file: StateFile) -> None:
        state = file.read(self.identity, self.progress.warn)
        if state is None:
            return
        self.learner.load_state_dict(state)
        self.epochs.load_state_dict(state)
        self.step, self.losses.values = state["step"], state["losses"]
        reached = f"epoch {len(self.epochs.records)} of {self.plan.epochs}"
        if self.losses.values:
            reached = f"step {self.step} of {self.plan.total}"
        self.progress.note(f"Training goes on after {reached}.")

    def _finish(self) -> FitResult:
        """Load the chosen weights into the network, contiguous and in eval mode, and return the result."""
        learner, epochs = self.learner, self.epochs
        chosen, weights = epochs.best or (len(epochs.records), learner.measured.state_dict())
        reached, is_averaged = None, False
        if learner.tail is not None:
            average = learner.tail.module
            reestimate_batch_norm(average, self.data.train.first(_STATISTICS_IMAGES), self.progress)
            with self.rounding():
                reached, _ = epochs.measure(average)
            steps = self.plan.last(self.settings.average_ratio)
            self.progress.note(f"average of the last {steps} steps: validation {epochs.show(reached)}")
            best = epochs.records[chosen - 1].validation
            is_averaged = self.settings.keep == "last" or epochs.metric.is_better(reached, best)
            if is_averaged:
                chosen, weights = len(epochs.records), average.state_dict()
        learner.module.load_state_dict(weights)
        set_memory_format(learner.module, torch.contiguous_format)
        learner.module.eval()
        return FitResult(tuple(epochs.records), chosen, self.step, reached, is_averaged)


def _require_trainable(module: nn.Module, data: TrainingData, settings: FitSettings) -> None:
    """Check that images, settings and network fit together; raises as `fit` does."""
    train, validation = data
    for split in data:
        if len(split) == 0:
            raise DataError(f"Split '{split.name}' must hold at least one image to train, it holds none.")
    ranks = current_ranks()
    if min(settings.batch_size, len(train)) % ranks.size or len(validation) < ranks.size:
        raise DataError(
            f"batch_size must be divisible by the number of processes ({ranks.size}) and each must have an image to "
            f"validate on, got batches of {min(settings.batch_size, len(train))} and {len(validation)} images."
        )
    augmentation = settings.augmentation
    if (augmentation.mixup or augmentation.cutmix) and not train.objective.can_mix:
        raise ConfigValueError(
            f"augmentation.mixup and augmentation.cutmix must be 0 where targets are no class indices, got "
            f"{augmentation.mixup:g} and {augmentation.cutmix:g}.",
            hint=f"the task is {train.task.name}{', learned without labels' if train.original is not None else ''}",
        )
    if augmentation.policy != "none" and train.original is None and train.task.is_spatial:
        raise ConfigValueError(
            f"augmentation.policy must be none for the task {train.task.name}, got {augmentation.policy}: its "
            "operations move pixels, but not masks and boxes.",
            hint="resized_crop, flip and erasing keep masks and boxes in place.",
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ModelError("The network must have a parameter that requires a gradient to be trained, it has none.")


@contextmanager
def _translated_errors(batch_size: int) -> Iterator[None]:
    """Raise errors that name the remedy if memory runs out or torch cannot compile the network."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_lost(error):
            raise rank_lost(error) from error
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


def _grouped(batches: Iterator[Batch], each: int, count: int) -> Iterator[list[Batch]]:
    """Yield `count` lists of `each` batches; the last list may be shorter, and there are fewer if batches run out."""
    for _ in range(count):
        if several := list(islice(batches, each)):
            yield several
