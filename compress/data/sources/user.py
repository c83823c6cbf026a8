"""Data set classes of the user, as sources of images and targets.

A data set needs `__len__` and `__getitem__` -> (image, target), as in torch; without targets, it returns the image
alone. An image is a PIL picture, uint8 (H, W, C) or (H, W), a uint8 tensor (C, H, W), or a floating-point (C, H, W)
array that is already prepared and is the network's input. Floating-point arrays of other ranks, such as (1, 128)
signals and (3, 4, 8, 8) clips, are the network's input as well. For a network with several inputs, a sample is a
mapping from their names to arrays, in the order of `model.inputs`; `packing.py` packs them into rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from compress.data.packing import as_row
from compress.data.pixels import SIXTEEN_BITS
from compress.data.sources.annotated import AnnotatedSource
from compress.data.sources.image_files import to_pixels
from compress.errors import DataError
from compress.user_code import import_callable, import_path_of, raise_as

_IMAGE_AXES = 3


def read_own(reference: str, kwargs: Mapping[str, Any]) -> AnnotatedSource:
    """Build the user's data set and check its first entry.

    Args:
        reference: "pkg.module:Class" or "path/file.py:Class".
        kwargs: Keyword arguments of the class.

    Raises:
        ModelError: The reference cannot be imported.
        DataError: The class raises, is empty, or returns no image.
    """
    make, what = import_callable(reference, "Data set"), f"Data set '{reference}'"
    with import_path_of(reference), raise_as(DataError, f"{what} must open and give its first entry"):
        return read_dataset(make(**kwargs), what)


def read_dataset(dataset: Any, what: str) -> AnnotatedSource:
    """Return a data set object as a source of images and targets, after a check of its first entry.

    Args:
        dataset: Object with `__len__` and `__getitem__`.
        what: Name of the data set, as the beginning of messages.

    Raises:
        DataError: The data set raises, is empty, or returns no image.
    """
    with raise_as(DataError, f"{what} must open and give its first entry"):
        count = len(dataset)
        first: Any = dataset[0] if count else None
    if count == 0:
        raise DataError(f"{what} must hold at least one image, it holds none.")
    has_targets = isinstance(first, tuple | list)

    def entry(place: int) -> tuple[Any, Any]:
        with raise_as(DataError, f"{what} must give entry {place}"):
            found = dataset[place]
        if has_targets and (not isinstance(found, tuple | list) or len(found) != 2):
            raise DataError(f"{what} must give (image, target), entry {place} is {_kind(found)}.")
        return (found[0], found[1]) if has_targets else (found, None)

    image = first[0] if isinstance(first, tuple | list) else first
    inputs = {str(name): np.shape(value) for name, value in image.items()} if isinstance(image, Mapping) else {}
    shape = None if inputs else _other_shape(image)

    def sample(place: int) -> np.ndarray:
        found = entry(place)[0]
        if shape is not None:
            return as_row({"x": found}, ["x"], {"x": shape})
        if list(map(len, inputs.values())) == [_IMAGE_AXES]:  # a mapping with one prepared image
            return _one_image(found, inputs, what)
        return as_row(found, list(inputs), inputs) if inputs else as_image(found, what)

    names = getattr(dataset, "classes", ())
    return AnnotatedSource(
        count,
        sample,
        (lambda place: as_target(entry(place)[1])) if has_targets else None,
        tuple(str(name) for name in names) if isinstance(names, Sequence) and not isinstance(names, str) else (),
        known_labels=_known_labels(dataset, count),
        size_hint="Bring them to one size in the data set's __getitem__.",
        inputs=inputs,
        shape=shape,
    )


def as_image(image: Any, what: str = "The data set") -> np.ndarray:
    """Return an image as uint8 (H, W, C), or as float32 (H, W, C) if it is already prepared.

    Raises:
        DataError: The value is no image.
    """
    if isinstance(image, Image.Image):
        return to_pixels(image, image.mode in ("L", *SIXTEEN_BITS), what)
    is_tensor = hasattr(image, "detach")
    values = np.asarray(image.detach().cpu() if is_tensor else image)
    if values.ndim == 2 and values.dtype == np.uint8:
        return values[..., None]
    if values.ndim == 3 and values.dtype == np.uint8:
        return np.ascontiguousarray(values.transpose(1, 2, 0)) if is_tensor else values
    if values.ndim == 3 and np.issubdtype(values.dtype, np.floating):
        return np.ascontiguousarray(values.transpose(1, 2, 0), dtype=np.float32)
    raise DataError(
        f"{what} must give images as uint8 (H, W, C) or floating-point (C, H, W), got {values.dtype} {values.shape}."
    )


def _other_shape(sample: Any) -> tuple[int, ...] | None:
    """Return the shape of a floating-point array that is no image, such as (1, 128) or (3, 4, 8, 8); else None."""
    if isinstance(sample, Image.Image | Mapping):
        return None
    values = np.asarray(sample.detach().cpu() if hasattr(sample, "detach") else sample)
    is_image = values.dtype.kind != "f" or values.ndim in (0, _IMAGE_AXES)
    return None if is_image else values.shape


def _one_image(found: Any, inputs: Mapping[str, tuple[int, ...]], what: str) -> np.ndarray:
    as_row(found, list(inputs), inputs)  # checks names and shape
    return as_image(np.asarray(next(iter(found.values())), np.float32), what)


def as_target(target: Any) -> Any:
    """Return a target with tensors converted to arrays, also in mappings and tuples."""
    if hasattr(target, "detach"):
        return target.detach().cpu().numpy()
    if isinstance(target, Mapping):
        return {name: as_target(value) for name, value in target.items()}
    if isinstance(target, tuple | list):
        return tuple(as_target(value) for value in target)
    return target


def _known_labels(dataset: Any, count: int) -> np.ndarray | None:
    """Return class indices from the attributes that torchvision's data sets have, without reading images."""
    values = getattr(dataset, "targets", None)
    if not isinstance(values, Sequence | np.ndarray) or len(values) != count:
        return None
    labels = np.asarray(values)
    return labels.astype(np.int64) if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer) else None


def _kind(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, tuple | list) else type(value).__name__
