"""Inputs of a network from the samples of a data set.

A single image input takes the samples unchanged. Several inputs, or one that is not floating-point, are unpacked from
rows that hold all inputs of a sample side by side.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compress.data.packing import is_packed, unpack
from compress.errors import ModelError
from compress.model.artifacts import TensorSpec
from compress.verification.runtimes.base import Runtime


def feed(runtime: Runtime, samples: np.ndarray) -> dict[str, np.ndarray]:
    """Return input name -> array for some samples, repeated until a fixed batch is full.

    Args:
        runtime: Open runtime of the network.
        samples: (N, ...) preprocessed images, or (N, K) rows of all inputs.

    Raises:
        ModelError: The only input takes no images.
        DataError: The rows do not fit the inputs.
    """
    inputs = runtime.signature.inputs
    filled = fill_batch(samples, inputs[0])
    if is_packed(inputs) and (len(inputs) > 1 or filled.ndim == 2):
        return unpack(filled, inputs)
    return {inputs[0].name: as_input(filled, inputs[0])}


def rows_of(inputs: Mapping[str, np.ndarray]) -> int:
    """Return the number of samples in the inputs that `feed` returned, including repeated ones."""
    return len(next(iter(inputs.values())))


def fill_batch(images: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Repeat the last image until a fixed batch is full: the last batch of a split may be smaller."""
    missing = spec.shape[0] - len(images) if isinstance(spec.shape[0], int) else 0
    return np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing > 0 else images


def as_input(images: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Return preprocessed images in the dtype of an input.

    Raises:
        ModelError: The input takes no floating-point numbers.
    """
    if spec.dtype == "bfloat16" or not spec.dtype.startswith("float"):
        raise ModelError(
            f"Input '{spec.name}' must take prepared images as floating-point numbers, it takes {spec.dtype}.",
            hint="Export the network with float32 inputs.",
        )
    return images.astype(spec.dtype, copy=False)


def fixed_batch(runtime: Runtime) -> int | None:
    """Return the fixed batch size of a network; None where the batch axis of its inputs is open."""
    batch = runtime.signature.inputs[0].shape[0]
    return batch if isinstance(batch, int) else None
