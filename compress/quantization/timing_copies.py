"""INT8 copies of float models for the measurement of milliseconds.

Integer kernels take as long for one set of values as for another. The ranges of the network at full width, from a few
images, therefore serve all its variants.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onnx import ModelProto

from compress.data.splits import Split
from compress.onnx_file.io import read_signature
from compress.progress import SilentProgress
from compress.quantization.calibration import Batches
from compress.quantization.onnx_int8 import Quantization, activation_ranges, matching_nodes, rounded_graph

IMAGES = 8


class TimingCopies:
    """Writer of INT8 copies of the variants of one network.

    Args:
        model: The network at full width, float, with all weights. Its tensors have the names that its variants have.
        split: Calibration images.
        wanted: Settings of the quantisation. The number of images and the method do not change times and are not used.
        excluded: Names of the nodes that stay float.

    Raises:
        ExportFailed: ONNX Runtime cannot quantise the model.
        DataError: There are no calibration images.
    """

    def __init__(self, model: ModelProto, split: Split, wanted: Quantization, excluded: Sequence[str]) -> None:
        (spec,) = read_signature(model).inputs
        fixed = spec.shape[0] if isinstance(spec.shape[0], int) else 1
        images = max(fixed, min(IMAGES, len(split)) // fixed * fixed)
        self._wanted = replace(wanted, method="minmax", images=images)
        self._excluded = list(excluded)
        batches = Batches(model, split, images, SilentProgress())
        with tempfile.TemporaryDirectory() as folder:
            self._ranges = activation_ranges(model, Path(folder), batches, self._wanted)

    def copy(self, variant: ModelProto) -> ModelProto:
        """Return the INT8 copy of a variant.

        Raises:
            ExportFailed: ONNX Runtime cannot quantise the variant.
        """
        return rounded_graph(variant, self._ranges, self._wanted, self._excluded)


def timing_copy(model: ModelProto, split: Split, wanted: Quantization) -> ModelProto:
    """Return the INT8 copy of one model; patterns of `exclude` that match nothing are ignored.

    Raises:
        As `TimingCopies`.
    """
    return TimingCopies(model, split, wanted, matching_nodes(model, wanted.exclude)).copy(model)
