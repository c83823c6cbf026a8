"""What does the file say? Its outputs in its runtime, over real images, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from compress.artifacts import TensorSpec
from compress.data.splits import Split
from compress.errors import CompressError, DataError, ModelError, NonFinite
from compress.progress import Progress, SilentProgress
from compress.verification.feeding import feed, fixed_batch
from compress.verification.metrics import Predictions
from compress.verification.runtimes.base import Runtime

Change = Callable[[np.ndarray, int], np.ndarray]


def predict(
    runtime: Runtime,
    split: Split,
    batch_size: int = 64,
    progress: Progress | None = None,
    *,
    spoil: Change | None = None,
    disturb: Change | None = None,
) -> Predictions:
    """Return the outputs for all images of a split.

    Args:
        runtime: Open; one image input and one (N, K) output. With a fixed batch axis, that size is used instead.
        split: At least one image.
        batch_size: Images at once where the batch axis is open.
        progress: Told about each batch.
        spoil: Changes the uint8 images of a batch, given the place of its first image in the split.
        disturb: Changes what goes into the network, in the same way.

    Raises:
        DataError: The split is empty, a label is K or more, or the data set has another number of classes.
        ModelError: The network is no classifier, or images do not fit its input.
        NonFinite: An output is NaN or infinite.
        ConfigValueError: The runtime is made for less.
    """
    (found,) = predict_each((runtime,), split, batch_size, progress, spoil=spoil, disturb=disturb)
    return found


def predict_each(
    runtimes: Sequence[Runtime],
    split: Split,
    batch_size: int = 64,
    progress: Progress | None = None,
    *,
    spoil: Change | None = None,
    disturb: Change | None = None,
) -> list[Predictions]:
    """Return the outputs of several networks for all images of a split, which are read and changed once.

    Args:
        runtimes: Open, as for `predict`; fixed batch axes are of one size.
        split: As there, and so are the others.
        batch_size: Images at once where every batch axis is open.
        progress: Told about each batch.
        spoil: Changes the uint8 images of a batch.
        disturb: Changes what goes into the networks.

    Raises:
        As `predict`.
    """
    check_not_empty(split)
    widths = []
    for runtime in runtimes:
        with named(runtime):
            runtime.check_work(len(split))
            widths.append(classifier_width(runtime))
            check_labels(split, widths[-1])
    found, done = [np.empty((len(split), width), np.float32) for width in widths], 0
    size = min(batch_size_of(runtime, batch_size) for runtime in runtimes)
    with (progress or SilentProgress()).task(f"predictions on {split.name}", len(split)) as task:
        for images, labels in image_batches(split, size, spoil):
            if disturb is not None:
                images = disturb(images, done)
            for runtime, outputs in zip(runtimes, found, strict=True):
                with named(runtime):
                    outputs[done : done + len(labels)] = classify(runtime, images)
            done += len(labels)
            task.advance(len(labels))
    return [Predictions(outputs, split.labels) for outputs in found]


@contextmanager
def named(runtime: Runtime) -> Iterator[None]:
    """Say in errors whose network it is, where the runtime has an owner."""
    try:
        yield
    except CompressError as error:
        if runtime.owner:
            error.message = f"{runtime.owner}: {error.message}"
        raise


def first_images(split: Split, count: int) -> np.ndarray:
    """Return the first `count` images of a split, prepared; all of a smaller one."""
    return split.preprocessing.normalize(split.read(np.arange(min(count, len(split)))))


def image_batches(
    split: Split, batch_size: int, spoil: Change | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (network input, labels) in order, every image once; the next batch is read while this one is used."""
    chunks = [np.arange(start, min(start + batch_size, len(split))) for start in range(0, len(split), batch_size)]
    labels = split.labels

    def read(positions: np.ndarray) -> np.ndarray:
        images = split.source.read(split.indices[positions])
        return split.preprocessing.normalize(images if spoil is None else spoil(images, int(positions[0])))

    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(read, chunks[0]) if chunks else None
        for number, positions in enumerate(chunks):
            assert pending is not None
            images = pending.result()
            if number + 1 < len(chunks):
                pending = reader.submit(read, chunks[number + 1])
            yield images, labels[positions]


def classify(runtime: Runtime, images: np.ndarray) -> np.ndarray:
    """Return the (N, K) outputs for N images.

    Raises:
        ModelError: The images do not fit the input, or the output is not (N, K).
        NonFinite: An output is NaN or infinite.
    """
    image_input(runtime)
    (outputs,) = runtime.run(feed(runtime, images)).values()
    outputs = outputs[: len(images)]
    if outputs.ndim != 2 or len(outputs) != len(images):
        raise ModelError(
            f"A classifier must return one (N, classes) array, got {outputs.shape} for {len(images)} images."
        )
    if not np.isfinite(outputs).all():
        raise NonFinite(f"Outputs of the network must be finite, got NaN or infinity in a batch of {len(images)}.")
    return outputs


def image_input(runtime: Runtime) -> TensorSpec:
    """Return the one input of a classifier; ModelError when it has more inputs or outputs than one."""
    inputs, outputs = runtime.signature.inputs, runtime.signature.outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(f"A classifier must have one input and one output, got {len(inputs)} and {len(outputs)}.")
    return inputs[0]


def classifier_width(runtime: Runtime) -> int:
    """Return the number K of classes the network tells apart; ModelError when its output is no (N, K) array."""
    image_input(runtime)
    shape = runtime.signature.outputs[0].shape
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise ModelError(f"A classifier must return one (N, classes) array, the model declares {shape}.")
    return shape[1]


def check_image_shape(runtime: Runtime, split: Split) -> None:
    """Raise ModelError when the images of a split, prepared, do not fit the input of an open network."""
    spec = image_input(runtime)
    image = split.preprocessing.normalize(split.read(np.zeros(1, np.int64)))
    wanted = spec.shape
    if len(wanted) != image.ndim:
        raise ModelError(
            f"A classifier must take a batch of images, 4 axes, the model's input '{spec.name}' has {len(wanted)}."
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
    """Raise DataError when there is nothing to measure on."""
    if len(split) == 0:
        raise DataError(f"Split '{split.name}' must hold at least one image to measure on, it holds none.")


def check_labels(split: Split, classes: int) -> None:
    """Raise DataError when labels do not fit a network of that many classes."""
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
