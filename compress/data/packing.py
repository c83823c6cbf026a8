"""Packing of several inputs of a network into one array, a float32 row for each sample.

    image (N, 3, 8, 8) float32 ─┐
    mask  (N, 10)      int64   ─┴─ pack ──> (N, 202) float32 ── unpack ──> the inputs

All code between the data and the network (splits, batches, repairs, training) then handles one array, as for images.
float32 represents integers exactly up to 2^24; larger ones are refused.

Unpacked inputs have the strides of a newly made tensor of the same shape. `Tensor.contiguous()` leaves the strides of
axes of size 1 unchanged, so a permuted batch of one-channel images keeps channels-last strides. PyTorch then computes
in channels-last, and `x.view(x.size(0), -1)` of a feature map fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from compress.errors import DataError

if TYPE_CHECKING:  # an ONNX file is verified without torch
    from torch import Tensor

LARGEST_WHOLE = 2**24
_IMAGE_AXES = 4  # including the batch axis


class Part(Protocol):
    """One input: name, shape with the batch axis first, numpy dtype."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int | str, ...]: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def high(self) -> int | None: ...  # noqa: D102


def is_packed(parts: Sequence[Part]) -> bool:
    """Return whether inputs are packed into rows: several inputs, or one that is no floating-point image."""
    return len(parts) > 1 or any(
        part.dtype not in ("float32", "float16", "bfloat16") or len(part.shape) != _IMAGE_AXES for part in parts
    )


def part_sizes(part: Part) -> tuple[int, ...]:
    """Return the sizes of one sample.

    Raises:
        DataError: A size is open.
    """
    sizes = tuple(size for size in part.shape[1:] if isinstance(size, int))
    if len(sizes) != len(part.shape) - 1:
        raise DataError(f"Input '{part.name}' must have fixed sizes after the batch axis to be packed, {part.shape}.")
    return sizes


def row_width(parts: Sequence[Part]) -> int:
    """Return the number of values in the row of a sample."""
    return sum(math.prod(part_sizes(part)) for part in parts)


def pack(values: Mapping[str, np.ndarray], parts: Sequence[Part]) -> np.ndarray:
    """Return one row for each sample.

    Args:
        values: Input name -> (N, ...) array.
        parts: The inputs, in the order of the row.

    Returns:
        (N, K) float32.

    Raises:
        DataError: An input is missing or has another shape, or an integer is beyond 2^24.
    """
    missing = [part.name for part in parts if part.name not in values]
    if missing:
        raise DataError(
            f"Samples must have the inputs {', '.join(part.name for part in parts)}, {', '.join(missing)} is missing."
        )
    count = len(values[parts[0].name])
    rows = np.empty((count, row_width(parts)), np.float32)
    start = 0
    for part in parts:
        array, sizes = np.asarray(values[part.name]), part_sizes(part)
        if array.shape != (count, *sizes):
            raise DataError(f"Input '{part.name}' must have shape {(count, *sizes)}, got {array.shape}.")
        _check_whole(part.name, array)
        end = start + math.prod(sizes)
        rows[:, start:end] = array.reshape(count, -1)
        start = end
    return rows


def as_row(
    values: Mapping[str, Any], names: Sequence[str], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> np.ndarray:
    """Return the inputs of one sample as a row.

    Args:
        values: Input name -> array or tensor.
        names: Names of all inputs, in the order of the row.
        shapes: Input name -> required shape.

    Returns:
        (K,) float32.

    Raises:
        DataError: `values` is no mapping of these names, an input has another shape, or an integer is beyond 2^24.
    """
    if not isinstance(values, Mapping) or [str(name) for name in values] != list(names):
        got = ", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
        raise DataError(f"Each sample must be a mapping of {', '.join(names)}, in this order, got {got}.")
    arrays = [np.asarray(value) for value in values.values()]
    for name, array in zip(names, arrays, strict=True):
        if shapes is not None and array.shape != shapes[name]:
            raise DataError(
                f"Input '{name}' must have the same shape in each sample, got {shapes[name]} and {array.shape}."
            )
        _check_whole(name, array)
    return np.concatenate([array.astype(np.float32).reshape(-1) for array in arrays])


def _check_whole(name: str, array: np.ndarray) -> None:
    """Raise DataError if float32 cannot represent the integers of an array exactly."""
    if array.dtype.kind in "iu" and array.size and max(-int(array.min()), int(array.max())) > LARGEST_WHOLE:
        raise DataError(
            f"Whole numbers of input '{name}' must be within {LARGEST_WHOLE:,}, got "
            f"{int(array.min()):,} to {int(array.max()):,}."
        )


def unpack(rows: np.ndarray, parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """Return the inputs from rows of `pack`, each in its own dtype.

    Raises:
        DataError: The rows are not as wide as the inputs together.
    """
    width = row_width(parts)
    if rows.ndim != 2 or rows.shape[1] != width:
        names = ", ".join(part.name for part in parts)
        raise DataError(
            f"The network takes several inputs ({names}): a sample must be a row of {width} numbers, got an array of "
            f"shape {rows.shape}.",
            hint="Give a data set of your own that has all inputs.",
        )
    found, start = {}, 0
    for part in parts:
        sizes = part_sizes(part)
        end = start + math.prod(sizes)
        found[part.name] = np.ascontiguousarray(rows[:, start:end].reshape(len(rows), *sizes)).astype(part.dtype)
        start = end
    return found


def draw(part: Part, sizes: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """Return random values for an input: normal numbers, integers below `high` (0 if it is unknown), or booleans.

    Args:
        part: Input to draw values for.
        sizes: Shape of the array, with the batch first.
        generator: Random generator.
    """
    if part.dtype == "bool":
        return generator.integers(0, 2, sizes).astype(bool)
    if part.dtype.startswith(("int", "uint")):
        return generator.integers(0, part.high or 1, sizes).astype(part.dtype)
    return generator.standard_normal(sizes).astype(part.dtype)


def standard_strides(tensor: Tensor) -> Tensor:
    """Return a tensor with the strides of a newly made tensor; the same object if it has them already.

    >>> import torch
    >>> images = torch.zeros(2, 28, 28, 1).permute(0, 3, 1, 2)
    >>> images.contiguous().stride(), standard_strides(images).stride()
    ((784, 1, 28, 1), (784, 784, 28, 1))
    """
    import torch

    if tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
