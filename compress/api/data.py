"""Data of the user's own in memory: loaders, data sets and arrays as splits.

    loader of batches | data set | arrays  ──entries──> AnnotatedSource ──carve──> LoaderSplits

Samples are `inputs`, `(inputs..., target)` or mappings, as the network takes them: floating-point and prepared already.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from compress.data.from_config import AS_IT_IS, build_split, classes_of, has_targets
from compress.data.preprocessing import Preprocessing
from compress.data.sources.annotated import AnnotatedSource
from compress.data.sources.user import read_dataset
from compress.data.splits import Split, Teacher, carve
from compress.errors import ConfigValueError, DataError, InternalError
from compress.tasks.base import Task
from compress.tasks.classification import CLASSIFICATION
from compress.tasks.from_config import guarded, scalar
from compress.user_code import raise_as

Loss = Callable[..., Tensor]
SEED = 0  # of the split into training and validation samples, so that every call splits alike
MOST_VALIDATION, _VALIDATION_PART = 2000, 10


class LossTask(Task):
    """Task of a loss function of the user's own: the mean loss is the metric.

    Args:
        loss: Takes outputs and targets of a batch, returns the mean loss.
    """

    name = "own"
    metric, higher_is_better, is_share, label = "loss", False, False, "loss"

    def __init__(self, loss: Loss) -> None:
        what = f"Loss '{getattr(loss, '__name__', type(loss).__name__)}'"
        self._loss = scalar(guarded(loss, what), what)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean loss of a batch."""
        value: Tensor = self._loss(outputs, targets)
        return value

    def metrics(self, outputs: Any, targets: Any) -> dict[str, float]:
        """Return the mean loss over images, from arrays."""
        with torch.no_grad():
            return {"loss": float(self._loss(_tensors(outputs), _tensors(targets)))}


class LoaderSplits:
    """Splits of data in memory.

    Args:
        data: `DataLoader`, data set or arrays of samples: inputs, or (inputs..., target). Used for training and
            calibration; validation samples are split off if `validation` is None.
        names: Names of the network's inputs.
        task: Task of the network; None to derive it from the targets.
        validation: Loader, data set or arrays of validation images; None to carve them out of `data`.

    Raises:
        DataError: There is no sample, or a sample does not have the inputs that the network takes.
        ConfigValueError: The task cannot be derived: targets are no class indices.
    """

    def __init__(self, data: Any, names: Sequence[str], task: Task | None, validation: Any = None) -> None:
        self.teacher: Teacher | None = None
        self._source = open_source(data, names, "data")
        self._validation = None if validation is None else open_source(validation, names, "validation")
        self.task = task or derive_task(self._source)

    @property
    def preprocessing(self) -> Preprocessing:
        """None: samples are prepared already."""
        return AS_IT_IS

    @cached_property
    def train(self) -> Split:
        """All samples that are not for validation."""
        return self._part("train")

    @cached_property
    def calibration(self) -> Split:
        """The same samples as for training."""
        return self._part("calibration")

    @cached_property
    def validation(self) -> Split:
        """Samples by which the best epoch, repairs and numbers of blocks are chosen."""
        if self._validation is None:
            return self._part("validation")
        return self._with_baseline(build_split("validation", self._validation, AS_IT_IS, self.task))

    @property
    def evaluation(self) -> Split:
        """Not part of this data: `compress.verify` has its own."""
        raise InternalError("Evaluation images were asked for before verification.")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, or ()."""
        return self._source.classes

    def check_classes(self) -> None:
        """Do nothing: there are no evaluation images yet."""

    def _part(self, name: str) -> Split:
        whole = build_split(name, self._source, AS_IT_IS, self.task)
        indices = self._indices["validation" if name == "validation" else "train"]
        return self._with_baseline(Split(name, whole.source, indices, whole.preprocessing, whole.task))

    @cached_property
    def _indices(self) -> dict[str, np.ndarray]:
        count = len(self._source)
        if self._validation is not None:
            return {"train": np.arange(count)}
        if count < 2:
            raise DataError(f"data must hold at least 2 samples, it holds {count}.")
        size = min(MOST_VALIDATION, max(1, count // _VALIDATION_PART))
        return carve(classes_of(self._source, self.task), {"validation": size}, SEED)

    def _with_baseline(self, split: Split) -> Split:
        if not self.task.learns_from_original and has_targets(self._source):
            return split
        return Split(split.name, split.source, split.indices, split.preprocessing, split.task, lambda: self._baseline)

    @cached_property
    def _baseline(self) -> Any:
        if self.teacher is None:
            raise InternalError("The baseline was asked for before there is one.")
        return self.teacher.build()


def resolve_task(loss: Loss | None, task: Task | None) -> Task | None:
    """Return the task that a loss or a task object states; None if the targets have to tell it.

    Raises:
        ConfigValueError: Both are given, or one is of another kind.
    """
    if loss is not None and task is not None:
        raise ConfigValueError("loss and task must not both be given: a task has a loss of its own.")
    if task is not None:
        if not isinstance(task, Task):
            raise ConfigValueError(f"task must be a compress.Task, got {type(task).__name__}.")
        return task
    if loss is None:
        return None
    if not callable(loss):
        raise ConfigValueError(f"loss must be a function of outputs and targets, got {type(loss).__name__}.")
    if loss is torch.nn.functional.cross_entropy or isinstance(loss, torch.nn.CrossEntropyLoss):
        return None
    return LossTask(loss)


def derive_task(source: AnnotatedSource) -> Task:
    """Return classification for whole numbers as targets, and for samples without targets.

    Raises:
        ConfigValueError: Targets are of another kind.
    """
    if not source.has_targets:
        return CLASSIFICATION
    first = source.read_targets(np.zeros(1, np.int64))
    if isinstance(first, np.ndarray) and first.ndim == 1 and np.issubdtype(first.dtype, np.integer):
        return CLASSIFICATION
    got = f"{first.dtype} {first.shape[1:]}" if isinstance(first, np.ndarray) else type(first[0]).__name__
    raise ConfigValueError(
        f"loss or task must be given where targets are not class indices, got targets of {got}.",
        hint="loss=torch.nn.functional.mse_loss, or task=a compress.Task of your own",
    )


def open_source(data: Any, names: Sequence[str], what: str) -> AnnotatedSource:
    """Return samples of a loader, a data set or arrays.

    Args:
        data: What the user gave.
        names: Names of the network's inputs.
        what: Name of the argument, for messages.

    Raises:
        DataError: There is no sample, or one is not as the network takes it.
    """
    if data is None:
        raise ConfigValueError(f"{what} must be given: channels are scored, and the result is measured, on samples.")
    return read_dataset(_entries(data, tuple(names), what), what)


class _Entries:
    """A data set of (inputs, target), or of inputs alone, in one form.

    Attributes:
        classes: As the data set names them.
        targets: Class indices, where the data set has them without its images.
    """

    def __init__(self, dataset: Any, names: tuple[str, ...], what: str) -> None:
        self._dataset, self._names, self._what = dataset, names, what
        self.classes = getattr(dataset, "classes", ())
        self.targets = getattr(dataset, "targets", None)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: int) -> Any:
        inputs, target = divide(self._dataset[place], self._names, f"{self._what}: sample {place}")
        for name, value in inputs.items():
            _check_values(value, f"{self._what}: sample {place}", name)
        first = inputs[self._names[0]]
        found = first if len(self._names) == 1 and _is_floating(first) else inputs
        return found if target is None else (found, target)


def _entries(data: Any, names: tuple[str, ...], what: str) -> _Entries:
    if isinstance(data, DataLoader):
        is_random_access = not isinstance(data.dataset, IterableDataset) and hasattr(data.dataset, "__getitem__")
        if is_random_access and data.collate_fn is default_collate:
            return _Entries(data.dataset, names, what)
    elif isinstance(data, (tuple, Tensor, np.ndarray)):
        arrays = data if isinstance(data, tuple) else (data,)
        if not all(isinstance(one, (Tensor, np.ndarray)) for one in arrays):
            kinds = ", ".join(type(one).__name__ for one in arrays)
            raise DataError(f"{what} must be a loader, a data set or a tuple of tensors, got a tuple of {kinds}.")
        return _Entries(_Rows([_batch(arrays, names, what)]), names, what)
    elif not isinstance(data, (list, Mapping)) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _Entries(data, names, what)
    if isinstance(data, (Mapping, str)) or not isinstance(data, Iterable):
        raise DataError(
            f"{what} must be an iterable of batches, a data set or a tuple of tensors, got {type(data).__name__}."
        )
    with raise_as(DataError, f"{what} must give its batches"):
        batches = [_batch(batch, names, what) for batch in data]
    return _Entries(_Rows(batches), names, what)


def divide(found: Any, names: Sequence[str], what: str) -> tuple[dict[str, Any], Any]:
    """Return inputs by name, and the target or None, of a sample or a batch.

    Args:
        found: One input, (inputs..., target), or a mapping.
        names: Names of the network's inputs.
        what: Beginning of messages.

    Raises:
        DataError: It has other entries.
    """
    if isinstance(found, Mapping):
        if missing := [name for name in names if name not in found]:
            raise DataError(
                f"{what} must hold {', '.join(names)}, {', '.join(missing)} is missing; it holds "
                f"{', '.join(map(str, found))}.",
                hint="Name the keys as the parameters of forward, or give tuples (inputs..., target).",
            )
        rest = {key: value for key, value in found.items() if key not in names}
        target = None if not rest else next(iter(rest.values())) if len(rest) == 1 else rest
        return {name: found[name] for name in names}, target
    values = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    if len(values) not in (len(names), len(names) + 1):
        raise DataError(f"{what} must hold {', '.join(names)} and perhaps a target, got {len(values)} values.")
    return dict(zip(names, values, strict=False)), values[len(names)] if len(values) > len(names) else None


class _Rows:
    """Samples of batches that are held in memory."""

    def __init__(self, batches: Sequence[tuple[dict[str, Any], Any, int]]) -> None:
        self._batches = batches
        self._places = [(number, row) for number, batch in enumerate(batches) for row in range(batch[2])]
        found = [batch[1] for batch in batches]
        if found and all(isinstance(one, Tensor) and one.ndim == 1 and not one.is_floating_point() for one in found):
            self.targets = torch.cat(found).cpu().numpy()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> Any:
        number, row = self._places[place]
        inputs, target, _ = self._batches[number]
        sample = {name: value[row] for name, value in inputs.items()}
        return sample if target is None else {**sample, "compress target": _row(target, row)}


def _batch(found: Any, names: tuple[str, ...], what: str) -> tuple[dict[str, Any], Any, int]:
    inputs, target = divide(found, names, f"{what}: a batch")
    tensors = {name: torch.as_tensor(value).detach().cpu() for name, value in inputs.items()}
    counts = {len(value) if value.ndim else 0 for value in tensors.values()}
    if isinstance(target, np.ndarray):
        target = torch.as_tensor(target)
    if isinstance(target, (Tensor, list, tuple)):
        counts.add(len(target))
    if len(counts) != 1:
        raise DataError(f"{what}: inputs and targets of a batch must have the same number of samples, got {counts}.")
    return tensors, target, counts.pop()


def _row(values: Any, place: int) -> Any:
    if isinstance(values, Mapping):
        return {name: _row(value, place) for name, value in values.items()}
    return values[place]


def _check_values(value: Any, what: str, name: str) -> None:
    """Refuse a sample that is not prepared, or not finite."""
    kind = getattr(value, "dtype", None)
    if kind is None or kind in (torch.uint8, np.uint8):
        got = type(value).__name__ if kind is None else "uint8"
        raise DataError(
            f"{what} must be as the network takes it, a floating-point tensor, '{name}' is {got}.",
            hint="Convert and normalise in the data set, such as by torchvision.transforms.ToTensor().",
        )
    finite = torch.isfinite(value).all() if isinstance(value, Tensor) else np.isfinite(value).all()
    if not finite:
        raise DataError(f"{what} must be finite, '{name}' holds NaN or infinity.")


def _is_floating(value: Any) -> bool:
    return bool(value.is_floating_point()) if isinstance(value, Tensor) else value.dtype.kind == "f"


def _tensors(values: Any) -> Any:
    if isinstance(values, np.ndarray):
        return torch.from_numpy(values)
    if isinstance(values, Mapping):
        return {name: _tensors(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_tensors(value) for value in values)
    return values
