"""Calibration images for INT8 ranges, in batches, and the classes that a file predicts for them."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto

from compress.data.splits import Split
from compress.errors import DataError, ExportFailed, NonFinite, first_line, translated
from compress.onnx_file.io import read_signature
from compress.progress import Progress

_ELEMENTS_AT_ONCE, _IMAGES_AT_ONCE = 2**19, 32


class Batches:
    """Calibration images in batches of equal size, which histograms of activations need.

    Args:
        model: Model with one input for images.
        split: Calibration split.
        images: Number of images, spread evenly over the split.
        progress: Receives progress by batch.

    Raises:
        DataError: The split has fewer images, or `images` is no multiple of the file's fixed batch size.
    """

    def __init__(self, model: ModelProto, split: Split, images: int, progress: Progress) -> None:
        (spec,) = read_signature(model).inputs
        fixed = spec.shape[0] if isinstance(spec.shape[0], int) else None
        if len(split) < images:
            raise DataError(
                f"Quantisation must have the {images} calibration images that it asks for, the split has {len(split)}.",
                hint=f"Set data.calibration: {images}, or images: {len(split)} in the quantize stage.",
            )
        if fixed and images % fixed:
            raise DataError(f"images must be a multiple of the file's fixed batch size {fixed}, got {images}.")
        self.name, self.split, self.progress = spec.name, split.first(images), progress
        self.size = fixed or largest_divisor(images, self._largest(spec.shape))

    @staticmethod
    def _largest(shape: Sequence[int | str]) -> int:
        elements = math.prod(size for size in shape[1:] if isinstance(size, int))
        return max(1, min(_IMAGES_AT_ONCE, _ELEMENTS_AT_ONCE // max(1, elements)))

    def __len__(self) -> int:
        return len(self.split) // self.size

    def read(self, number: int) -> dict[str, np.ndarray]:
        """Return one batch."""
        images = self.split.read(np.arange(number * self.size, (number + 1) * self.size))
        return {self.name: self.split.preprocessing.normalize(images)}

    def classes(self, path: Path, label: str) -> np.ndarray:
        """Return the predicted class of each image, the index of the largest value of the first output.

        Raises:
            NonFinite: An output is NaN or infinite.
            ExportFailed: The file cannot be run.
        """
        import onnxruntime

        options, found = onnxruntime.SessionOptions(), []
        options.log_severity_level = 4
        with self.progress.task(f"{label} on calibration images", len(self.split)) as task:
            with translated(
                lambda error: ExportFailed(f"The {label} must run in ONNX Runtime, which says: {first_line(error)}")
            ):
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for number in range(len(self)):
                with translated(
                    lambda error: ExportFailed(
                        f"The {label} must run on calibration images, ONNX Runtime says: {first_line(error)}",
                        hint="Check data.preprocessing (resize, crop, channels, layout).",
                    )
                ):
                    outputs = session.run(None, self.read(number))
                if not all(np.isfinite(array).all() for array in outputs):
                    raise NonFinite(
                        f"Outputs of the {label} must be finite on calibration images, got NaN or infinity."
                    )
                found.append(outputs[0].reshape(len(outputs[0]), -1).argmax(1))
                task.advance(self.size)
        return np.concatenate(found)


class OneBatch:
    """Reader of one batch for ONNX Runtime's calibrator, which reads until it gets None."""

    def __init__(self, feed: dict[str, np.ndarray]) -> None:
        self.feed: dict[str, np.ndarray] | None = feed

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the batch at the first call, then None."""
        feed, self.feed = self.feed, None
        return feed


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit`.

    >>> largest_divisor(256, 32), largest_divisor(100, 32), largest_divisor(31, 30)
    (32, 25, 1)
    """
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)
