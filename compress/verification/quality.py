"""Outputs of a file in its runtime over real images, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from compress.data.packing import is_packed
from compress.data.splits import Split
from compress.errors import CompressError, DataError, ModelError, NonFinite
from compress.model.artifacts import TensorSpec
from compress.progress import Progress, SilentProgress
from compress.tasks.base import Facts, joined
from compress.tasks.classification import Classification
from compress.tasks.outputs import check_finite, picked, plain
from compress.verification.metrics import Predictions
from compress.verification.runtimes.base import Runtime
from compress.verification.samples import feed, fixed_batch, rows_of
from compress.verification.task_metrics import Measured

Change = Callable[[np.ndarray, int], np.ndarray]
ROW_AXES = 2  # of samples that hold all inputs of a network side by side
Found = Predictions | Measured


def predict(
    runtime: Runtime,
    split: Split,
    batch_size: int = 64,
    progress: Progress | None = None,
    *,
    corrupt: Change | None = None,
    perturb: Change | None = None,
    original: Runtime | None = None,
) -> Found:
    """Return the predictions of a network for all images of a split.

    Args:
        runtime: Open runtime of the network. With a fixed batch axis, its size replaces `batch_size`.
        split: Split of at least one image, with the task.
        batch_size: Images at once where the batch axis is open.
        progress: Receives progress by batch.
        corrupt: Function that corrupts the uint8 images of a batch; takes the images and the index of the first one.
        perturb: Function that adds noise to the inputs of the network; takes the same arguments.
        original: Open runtime of the baseline, whose outputs are the targets of images without labels; by default
            `runtime`.

    Raises:
        DataError: The split is empty, or has targets outside the network's outputs.
        ModelError: The network does not fit the task, or images do not fit its input.
        NonFinite: An output is NaN or infinite.
        ConfigValueError: The runtime would take too long for so many images.
    """
    (found,) = predict_each(
        (runtime,), split, batch_size, progress, corrupt=corrupt, perturb=perturb, original=original or runtime
    )
    return found


def predict_each(
    runtimes: Sequence[Runtime],
    split: Split,
    batch_size: int = 64,
    progress: Progress | None = None,
    *,
    corrupt: Change | None = None,
    perturb: Change | None = None,
    original: Runtime | None = None,
) -> list[Found]:
    """Return the predictions of several networks for all images of a split, which are read and changed once.

    Args:
        runtimes: Open runtimes, as in `predict`; fixed batch axes must have one size.
        split: Split of at least one image, with the task.
        batch_size: Images at once where every batch axis is open.
        progress: Receives progress by batch.
        corrupt: Function that corrupts the uint8 images of a batch, as in `predict`.
        perturb: Function that adds noise to the inputs of the networks, as in `predict`.
        original: Open runtime of the baseline, as in `predict`; by default the last of `runtimes`.

    Raises:
        As `predict`.
    """
    check_not_empty(split)
    if not isinstance(split.task, Classification):
        changes = (corrupt, perturb)
        return _measure_each(runtimes, split, batch_size, progress or SilentProgress(), changes, original)
    widths = []
    for runtime in runtimes:
        with named(runtime):
            runtime.check_work(len(split))
            widths.append(classifier_width(runtime))
            check_labels(split, widths[-1])
    found, done = [np.empty((len(split), width), np.float32) for width in widths], 0
    size = min(batch_size_of(runtime, batch_size) for runtime in runtimes)
    with (progress or SilentProgress()).task(f"predictions on {split.name}", len(split)) as task:
        for images, _ in image_batches(split, size, corrupt):
            if perturb is not None:
                images = perturb(images, done)
            for runtime, outputs in zip(runtimes, found, strict=True):
                with named(runtime):
                    outputs[done : done + len(images)] = classify(runtime, images)
            done += len(images)
            task.advance(len(images))
    return [Predictions(outputs, split.labels) for outputs in found]


def _measure_each(
    runtimes: Sequence[Runtime],
    split: Split,
    batch_size: int,
    progress: Progress,
    changes: tuple[Change | None, Change | None],
    original: Runtime | None,
) -> list[Found]:
    """Return the measurements of several networks in a task other than classification."""
    (corrupt, perturb), judged, teacher = changes, split.task, original or runtimes[-1]
    size, done = min(batch_size_of(runtime, batch_size) for runtime in runtimes), 0
    facts: list[list[Facts]] = [[] for _ in runtimes]
    for runtime in runtimes:
        with named(runtime):
            runtime.check_work(len(split))
    with progress.task(f"{judged.main.words} on {split.name}", len(split)) as task:
        for images, targets in image_batches(split, size, corrupt, with_targets=judged.needs_targets):
            if perturb is not None:
                images = perturb(images, done)
            returned = {teacher: respond(teacher, images)} if not judged.needs_targets else {}
            wanted = targets if judged.needs_targets else returned[teacher]
            for runtime, kept in zip(runtimes, facts, strict=True):
                with named(runtime):
                    outputs = returned[runtime] if runtime in returned else respond(runtime, images)
                    judged.check(outputs, wanted)
                    kept.append(judged.facts(outputs, wanted))
            done += len(images)
            task.advance(len(images))
    return [Measured(judged, joined(kept)) for kept in facts]


def respond(runtime: Runtime, images: np.ndarray) -> Any:
    """Return the output of a network for N images: one array, or a dictionary of several by name.

    Raises:
        ModelError: The images do not fit the input, or an output does not have one entry for each image.
        NonFinite: An output is NaN or infinite.
    """
    inputs = feed(runtime, images)
    outputs = runtime.run(inputs)
    count = rows_of(inputs)
    for name, values in outputs.items():
        if values.ndim == 0 or len(values) != count:
            raise ModelError(f"Output '{name}' must have an entry for each of {count} images, got {values.shape}.")
    found = picked(dict(outputs), slice(0, len(images)))
    check_finite(found)
    return plain(found)


def check_task(runtime: Runtime, split: Split) -> None:
    """Check that an open network takes the images of a split and returns outputs that fit its task.

    Raises:
        ModelError: The images do not fit, or the outputs do not fit the task.
        DataError: The targets lie outside the network's outputs.
        NonFinite: An output is NaN or infinite.
    """
    check_image_shape(runtime, split)
    positions = np.arange(batch_size_of(runtime, 1)) % len(split)
    images = split.preprocessing.normalize(split.read(positions))
    outputs = respond(runtime, images)
    split.task.check(outputs, split.read_targets(positions) if split.task.needs_targets else outputs)


@contextmanager
def named(runtime: Runtime) -> Iterator[None]:
    """Prefix errors with the owner of the network, where the runtime has one."""
    try:
        yield
    except CompressError as error:
        if runtime.owner:
            error.message = f"{runtime.owner}: {error.message}"
        raise


def first_images(split: Split, count: int) -> np.ndarray:
    """Return the first `count` preprocessed images of a split; all images of a smaller one."""
    return split.preprocessing.normalize(split.read(np.arange(min(count, len(split)))))


def image_batches(
    split: Split, batch_size: int, corrupt: Change | None = None, with_targets: bool = False
) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield (network input, targets) in order, every image once; the next batch is read while this one is used.

    Targets are None unless `with_targets` is True.
    """
    chunks = [np.arange(start, min(start + batch_size, len(split))) for start in range(0, len(split), batch_size)]

    def read(positions: np.ndarray) -> tuple[np.ndarray, Any]:
        images = split.source.read(split.indices[positions])
        inputs = split.preprocessing.normalize(images if corrupt is None else corrupt(images, int(positions[0])))
        return inputs, split.read_targets(positions) if with_targets else None

    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(read, chunks[0]) if chunks else None
        for number in range(len(chunks)):
            assert pending is not None
            found = pending.result()
            if number + 1 < len(chunks):
                pending = reader.submit(read, chunks[number + 1])
            yield found


def classify(runtime: Runtime, images: np.ndarray) -> np.ndarray:
    """Return the (N, K) outputs for N images.

    Raises:
        ModelError: The images do not fit the input, or the output is not the (N, K) that the file declares.
        NonFinite: An output is NaN or infinite.
    """
    width = classifier_width(runtime)
    inputs = feed(runtime, images)
    (outputs,) = runtime.run(inputs).values()
    count = rows_of(inputs)
    if outputs.ndim != 2 or len(outputs) != count:
        raise ModelError(f"A classifier must return one (N, classes) array, got {outputs.shape} for {count} images.")
    outputs = outputs[: len(images)]  # a last batch was filled up
    if not np.isfinite(outputs).all():
        raise NonFinite(f"Outputs of the network must be finite, got NaN or infinity in a batch of {len(images)}.")
    if outputs.shape[1] != width:
        raise ModelError(
            f"A classifier must return as many values for each image as its file declares, {width}, "
            f"got {outputs.shape[1]}.",
            hint="The shape of the output that the file declares is wrong: export the network again.",
        )
    return outputs


def image_input(runtime: Runtime) -> TensorSpec:
    """Return the first input of a network, the one for images."""
    return runtime.signature.inputs[0]


def classifier_width(runtime: Runtime) -> int:
    """Return the number K of classes of a network; raises ModelError where its output is no (N, K) array."""
    inputs, outputs = runtime.signature.inputs, runtime.signature.outputs
    if not inputs or len(outputs) != 1:
        raise ModelError(f"A classifier must have inputs and one output, got {len(inputs)} and {len(outputs)}.")
    shape = runtime.signature.outputs[0].shape
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise ModelError(f"A classifier must return one (N, classes) array, the model declares {shape}.")
    return shape[1]


def check_image_shape(runtime: Runtime, split: Split) -> None:
    """Raise ModelError when the preprocessed images of a split do not fit the input of an open network."""
    spec = image_input(runtime)
    image = split.preprocessing.normalize(split.read(np.zeros(1, np.int64)))
    inputs, outputs = runtime.signature.inputs, runtime.signature.outputs
    if is_packed(inputs) and image.ndim <= ROW_AXES:
        return  # unpacking checks the rows
    if len(inputs) > 1:
        raise ModelError(f"A classifier must have one input and one output, got {len(inputs)} and {len(outputs)}.")
    wanted = spec.shape
    if len(wanted) != image.ndim:
        raise ModelError(
            f"A network must take a batch of images, 4 axes, the model's input '{spec.name}' has {len(wanted)}."
        )
    if any(isinstance(want, int) and want != size for want, size in zip(wanted[1:], image.shape[1:], strict=True)):
        sizes = " x ".join(str(size) for size in wanted[1:])
        raise ModelError(
            f"Images of split '{split.name}' must be {sizes} after preprocessing for the input '{spec.name}', got "
            f"{' x '.join(str(size) for size in image.shape[1:])}.",
            hint="preprocessing has resize, crop, layout and channels",
        )


def batch_size_of(runtime: Runtime, wanted: int) -> int:
    """Return `wanted` where the batch axis is open, else the fixed size."""
    return fixed_batch(runtime) or wanted


def check_not_empty(split: Split) -> None:
    """Raise DataError when a split has no images."""
    if len(split) == 0:
        raise DataError(f"Split '{split.name}' must hold at least one image to measure on, it holds none.")


def check_labels(split: Split, classes: int) -> None:
    """Raise DataError when labels or class names do not fit a network with `classes` classes."""
    labels = split.labels
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        wrong = int(labels.max()) if int(labels.max()) >= classes else int(labels.min())
        raise DataError(
            f"Labels must be from 0 to {classes - 1} (the model has {classes} classes), got label {wrong} "
            f"in split '{split.name}'."
        )
    names = split.source.classes
    if names and len(names) != classes:
        raise DataError(
            f"Model and data set must have the same number of classes, got {classes} and {len(names)}.",
            hint="The order of the class names decides what a label means; it must be the model's.",
        )
