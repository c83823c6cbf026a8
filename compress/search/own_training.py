"""Training by the user's code: its context, and checks of the weights that it returns."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from compress.checkpoint.rebuild import load_strict, read_weights
from compress.data.batches import Augmentation, Batch, evaluation_batches, training_batches
from compress.data.splits import Split, Teacher
from compress.errors import ArtifactError, InternalError, ModelError, NonFinite
from compress.model.adapter import as_users_own, example_input
from compress.model.artifacts import TorchModel
from compress.progress import Progress
from compress.search.context import StageContext
from compress.search.teacher import BaselineTeacher
from compress.training.device import training_device
from compress.user_code import import_callable, import_path_of, raise_as

SplitName = Literal["train", "validation"]
_OTHER_STRUCTURE = "Train the weights of the model that is given; leave its layers as they are."


class SplitDataset(Dataset[Any]):
    """Samples of a split as (input, target), prepared for the network; for `torch.utils.data.DataLoader`.

    Args:
        split: The samples.
    """

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, place: int) -> tuple[Tensor, Any]:
        inputs, targets = next(evaluation_batches(self._split.slice(place, place + 1), 1))
        target = targets[0] if not isinstance(targets, Mapping) else {key: one[0] for key, one in targets.items()}
        return inputs[0], target


@dataclass(frozen=True)
class TrainingContext:
    """Data, teacher and folder for the user's training loop.

    Attributes:
        folder: Absolute path of a folder for checkpoints of the loop. It survives a kill, and the same call gets it
            again, until the stage is finished.
        seed: Seed of the pipeline.
        device: GPU if there is one, else the CPU.
    """

    folder: Path
    seed: int
    device: torch.device
    _train: Split
    _validation: Split
    _teacher: Teacher
    _progress: Progress

    @cached_property
    def teacher(self) -> nn.Module:
        """The baseline on `device`, in eval mode and without gradients."""
        return self._teacher.build().to(self.device)  # type: ignore[no-any-return]

    def dataset(self, split: SplitName) -> SplitDataset:
        """Return a split as a data set of (input, target): prepared, not augmented."""
        return SplitDataset(self._validation if split == "validation" else self._train)

    def batches(
        self, split: SplitName, batch_size: int = 128, epoch: int = 0, *, crop_padding: int = 0, flip: bool = False
    ) -> Iterator[Batch]:
        """Yield (inputs, targets) on `device`: training batches shuffled by seed and epoch, validation ones in order.

        Args:
            split: "train" or "validation".
            batch_size: Samples in a batch.
            epoch: Number of the epoch, from 0.
            crop_padding: Pixels of padding before a random crop; training only.
            flip: True mirrors half of the images; training only.
        """
        if split == "validation":
            found = evaluation_batches(self._validation, batch_size)
        else:
            found = training_batches(self._train, batch_size, Augmentation(crop_padding, flip), self.seed, epoch)
        for inputs, targets in found:
            yield inputs.to(self.device), _moved(targets, self.device)

    def log(self, text: str) -> None:
        """Print one sentence."""
        self._progress.note(text)

    def log_metrics(self, step: int, **values: float) -> None:
        """Record values of a step for the training curves."""
        self._progress.curve("own training", step, values)


def train_by_user_code(artifact: TorchModel, reference: str, kwargs: Mapping[str, Any], ctx: StageContext) -> nn.Module:
    """Return the network after training by the user's function `train(model, context, **kwargs)`.

    Args:
        artifact: The slim network.
        reference: Import path of the function, "path/to/file.py:train" or "pkg.module:train".
        kwargs: Keyword arguments of the function.
        ctx: Splits, folder and teacher of the stage.

    Raises:
        ModelError: The function cannot be imported, raises, or returns no network of the same structure.
        NonFinite: A weight is NaN or infinite.
    """
    train = import_callable(reference, "Training")
    what = f"Training '{reference}'"
    given = as_users_own(copy.deepcopy(artifact.module), example_input(artifact.signature)).train()
    folder = (ctx.folder / "own").absolute()  # trainers put relative folders below a folder of their own
    folder.mkdir(exist_ok=True)
    context = TrainingContext(
        folder,
        ctx.seed,
        training_device("auto"),
        ctx.data.train,
        ctx.data.validation,
        ctx.teacher or BaselineTeacher(artifact),
        ctx.progress,
    )
    with ctx.progress.task(f"training by {reference.rpartition(':')[2]}", 1) as task:
        with import_path_of(reference), raise_as(ModelError, f"{what} must train the network"):
            returned = train(given.to(context.device), context, **kwargs)
        task.advance()
    state = returned.state_dict() if isinstance(returned, nn.Module) else returned
    if not isinstance(state, Mapping):
        raise ModelError(
            f"{what} must return the trained network or its state dict, got {type(returned).__name__}.",
            hint="return model",
        )
    return _with_weights(artifact, state, what)


def load_trained(artifact: TorchModel, path: Path) -> nn.Module:
    """Return a copy of the network with weights that were trained elsewhere.

    Args:
        artifact: The slim network.
        path: State dict of the slim network; formats as `weights` of the stage `load`.

    Raises:
        ArtifactError: The file cannot be read, or belongs to another network.
        NonFinite: A weight is NaN or infinite.
    """
    state = read_weights(path, artifact.module.state_dict())
    module = copy.deepcopy(artifact.module)
    load_strict(module, state, f"'{path}'", "These must be weights of the slim network of this run (slim/load.py).")
    return module.eval()


def _with_weights(artifact: TorchModel, state: Mapping[str, Any], what: str) -> nn.Module:
    """Return a copy of the network with given weights, after checks of their names, shapes and finiteness."""
    tensors = {str(name): value.detach().cpu() for name, value in state.items() if isinstance(value, Tensor)}
    module = copy.deepcopy(artifact.module)
    try:
        load_strict(module, tensors, what, _OTHER_STRUCTURE)
    except NonFinite as error:
        raise NonFinite(
            f"{what} must return finite weights: {error.message}", hint="Lower the learning rate."
        ) from error
    except ArtifactError as error:
        raise ModelError(
            f"{what} must return a network of the same structure: {error.message}", hint=error.hint
        ) from error
    if module.training:
        raise InternalError("A slim network is in training mode between stages.")
    return module


def _moved(values: Any, device: torch.device) -> Any:
    if isinstance(values, Tensor):
        return values.to(device)
    if isinstance(values, Mapping):
        return {name: _moved(value, device) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_moved(value, device) for value in values)
    return values
