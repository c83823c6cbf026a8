"""INT8 quantisation of a float ONNX file. The only caller of onnxruntime.quantization.

    float.onnx --ranges on calibration images--> graph in INT8 --outputs left in float--> checked --> model.onnx

In a QDQ graph every tensor to be quantised is followed by QuantizeLinear and DequantizeLinear. Values between the two
are integers, and a runtime with integer kernels computes with them. In a QOperator graph the layers themselves are
integer operators (`quantization/qoperator.py`).
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnx import ModelProto, numpy_helper

from compress.catalog import closest
from compress.data.splits import Split
from compress.errors import ExportFailed, NonFinite, StageError, first_line, translated
from compress.exporting.torch_onnx import move_into_place, save_checked
from compress.onnx_file.counting import rows_of
from compress.onnx_file.io import (
    ONE_FILE_LIMIT_BYTES,
    default_opset,
    is_half,
    is_quantized,
    load_onnx,
    model_files,
    read_signature,
    save_onnx,
)
from compress.progress import Progress, SilentProgress
from compress.quantization.calibration import Batches, OneBatch
from compress.quantization.qoperator import free_gemm_outputs, last_nodes

OLDEST_OPSET = 13  # the first in which each channel of a weight may have a scale of its own
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Integer = Literal["int8", "uint8"]
_METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
_HISTOGRAMS = {
    "entropy": {"num_bins": 512, "num_quantized_bins": 128, "symmetric": False},
    "percentile": {"num_bins": 2048, "percentile": 99.999, "symmetric": False},
}
_TYPES = {"int8": "QInt8", "uint8": "QUInt8"}

_SCALES_OF_INPUTS = (1, 4)  # each follows its tensor
_SCALES = {  # operator -> places of scales among its inputs
    "QuantizeLinear": (1,),
    "DequantizeLinear": (1,),
    "QLinearConv": (1, 4, 6),
    "QLinearMatMul": (1, 4, 6),
    "QGemm": (1, 4, 7),
}

Format = Literal["qdq", "qoperator"]


@dataclass(frozen=True, slots=True)
class Quantization:
    """Settings of a quantisation.

    Attributes:
        images: Number of calibration images whose activations determine the ranges.
        method: Range of activations: all values, the range that loses least information, or all but the outermost
            values.
        per_channel: Whether each output channel of a weight has its own scale.
        reduce_range: Whether weights have 7 bits, so that sums do not saturate on processors without VNNI.
        activation_type: Type of activations; "int8" has its zero point at 0.
        weight_type: Type of weights.
        exclude: Patterns of layers or nodes that stay float; * matches any text.
        format: Form of the graph.
    """

    images: int = 256
    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    per_channel: bool = True
    reduce_range: bool = False
    activation_type: Integer = "uint8"
    weight_type: Integer = "int8"
    exclude: tuple[str, ...] = ()
    format: Format = "qdq"


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """Report of a quantised file.

    Attributes:
        layers: Number of layers with quantised weights.
        float_layers: Names of the layers with float weights.
        agreement: Share of the calibration images with the same predicted class from both files.
        size_bytes_before: Bytes of all files of the float model.
        size_bytes_after: Bytes of all files of the quantised model.
        files: Names of the quantised model's files, the .onnx file first.
    """

    layers: int
    float_layers: tuple[str, ...]
    agreement: float
    size_bytes_before: int
    size_bytes_after: int
    files: tuple[str, ...] = field(default=())


def quantize_onnx(
    source: Path, target: Path, split: Split, wanted: Quantization, progress: Progress | None = None
) -> QuantizeReport:
    """Write an INT8 copy of a float file; an existing file is replaced only when the new one passed every check.

    Args:
        source: A float32 .onnx file with one image input, opset 13 or later; it is not changed.
        target: The .onnx file to write.
        split: Calibration images.
        wanted: Settings of the quantisation.
        progress: Receives progress by batch.

    Raises:
        ExportFailed: The file cannot be quantised (opset, half precision, quantised already), ONNX Runtime failed, or
            its result is not valid or has another signature or opset.
        DataError: There are fewer calibration images than requested.
        NonFinite: Outputs are NaN or infinite on calibration images, or a scale is not finite and above 0.
        StageError: A pattern of `exclude` matches nothing, or everything is excluded.
    """
    return Calibrated(source, split, wanted, target.parent, progress).write(target, wanted.format)


class Calibrated:
    """Float file with the ranges of its activations, which can be written in several formats.

    Arguments and errors are those of `quantize_onnx`.

    Args:
        folder: Folder for temporary files.
    """

    def __init__(
        self, source: Path, split: Split, wanted: Quantization, folder: Path, progress: Progress | None = None
    ) -> None:
        self._source, self._wanted = source, wanted
        self._model = load_onnx(source, weights=True)
        _check_can_be_quantized(self._model, source)
        self._excluded = _excluded(self._model, wanted.exclude)
        self._batches = Batches(self._model, split, wanted.images, progress or SilentProgress())
        self._classes = self._batches.classes(source, "float file")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".ranges.", suffix=".tmp") as temporary:
            self._ranges = activation_ranges(self._model, Path(temporary), self._batches, wanted)

    def write(self, target: Path, form: Format) -> QuantizeReport:
        """Write the quantised file in one format, and return the report."""
        model, wanted = self._model, replace(self._wanted, format=form)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as folder:
            rounded = rounded_graph(model, self._ranges, wanted, self._excluded)
            float_layers = _float_layers(rounded, model)
            external = rounded.ByteSize() > ONE_FILE_LIMIT_BYTES
            checked = save_checked(rounded, Path(folder) / "checked" / target.name, external)
            got = self._batches.classes(checked, "quantised file")
            files = move_into_place(checked, target)
        return QuantizeReport(
            layers=len(_layers(model)) - len(float_layers),
            float_layers=float_layers,
            agreement=float((got == self._classes).mean()),
            size_bytes_before=sum(file.stat().st_size for file in model_files(self._source)),
            size_bytes_after=sum(file.stat().st_size for file in files),
            files=tuple(file.name for file in files),
        )


def _check_can_be_quantized(model: ModelProto, path: Path) -> None:
    if is_quantized(model):
        raise ExportFailed(
            f"'{path}' must be a float file to be quantised, it is quantised already.",
            hint="Put one quantize stage into the pipeline, after export.",
        )
    if is_half(model):
        raise ExportFailed(
            f"'{path}' must be in fp32 to be quantised, it is in fp16.", hint="Set deploy.precision: fp32."
        )
    opset = default_opset(model)
    if opset is None or opset < OLDEST_OPSET:
        raise ExportFailed(
            f"'{path}' must have opset {OLDEST_OPSET} or later to be quantised, it has {opset}.",
            hint="Export it with a later opset.",
        )
    if len(read_signature(model).inputs) != 1:
        names = ", ".join(spec.name for spec in read_signature(model).inputs)
        raise ExportFailed(f"'{path}' must have one input, of images, to be quantised, it has {names}.")
    _require_names(model)


def _require_names(model: ModelProto) -> None:
    unnamed = sum(not node.name for node in model.graph.node)
    if unnamed:
        raise ExportFailed(f"Every node of a file must have a name for it to be quantised, {unnamed} have none.")


def _layers(model: ModelProto) -> dict[str, str]:
    """Return node name -> layer name of each node that multiplies by a weight."""
    rows = rows_of(model)
    return {
        node.name: row.name
        for node, row in zip(model.graph.node, rows, strict=True)
        if node.op_type in LAYERS and (row.layer_weights or row.weights)
    }


def _excluded(model: ModelProto, patterns: Sequence[str]) -> list[str]:
    """Return the names of the nodes that match a pattern and stay float."""
    layers, found = _layers(model), set()
    for pattern in patterns:
        matches = set(matching_nodes(model, [pattern]))
        if not matches:
            raise StageError(
                f"exclude pattern '{pattern}' must match a layer or node of the file, it matches none. Layers are "
                f"{', '.join(layers.values())}.",
                hint=closest(pattern, [*layers.values(), *(node.name for node in model.graph.node)]),
            )
        found |= matches
    if layers and found.issuperset(layers):
        raise StageError(
            f"exclude must leave a layer to quantise, it matches all {len(layers)}.",
            hint="Exclude fewer layers, or leave the quantize stage out.",
        )
    return sorted(found)


def matching_nodes(model: ModelProto, patterns: Sequence[str]) -> list[str]:
    """Return the names of the nodes that match a pattern, by their own name or that of their layer, in graph order.

    Raises:
        ExportFailed: A node has no name.
    """
    _require_names(model)
    layers = _layers(model)
    return [
        node.name
        for node in model.graph.node
        if any(fnmatchcase(name, one) for one in patterns for name in {node.name, layers.get(node.name, node.name)})
    ]


def rounded_graph(model: ModelProto, ranges: Any, wanted: Quantization, excluded: Sequence[str]) -> ModelProto:
    """Return the graph that ONNX Runtime quantises, with float outputs and the metadata of the float model.

    Args:
        model: Float model with all weights; it is not changed.
        ranges: Ranges of its activations, from `activation_ranges`.
        wanted: Settings of the quantisation.
        excluded: Names of nodes that stay float.

    Raises:
        ExportFailed: ONNX Runtime failed, or the result has another signature or opset.
        NonFinite: A scale is not finite and above 0.
    """
    from onnxruntime.quantization import QDQQuantizer, QuantizationMode, QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer

    copy = ModelProto()
    copy.CopyFrom(model)
    common = {
        "per_channel": wanted.per_channel,
        "reduce_range": wanted.reduce_range,
        "weight_qType": getattr(QuantType, _TYPES[wanted.weight_type]),
        "activation_qType": getattr(QuantType, _TYPES[wanted.activation_type]),
        "tensors_range": ranges,
        "nodes_to_quantize": [],
        "op_types_to_quantize": _operators(),
        "extra_options": {"ActivationSymmetric": wanted.activation_type == "int8"},  # as TensorRT wants them
    }
    with translated(_not_quantized), _quiet():
        if wanted.format == "qdq":
            quantizer = QDQQuantizer(copy, nodes_to_exclude=list(excluded), **common)
        else:
            mode, apart = QuantizationMode.QLinearOps, [*excluded, *last_nodes(model)]
            quantizer = ONNXQuantizer(copy, mode=mode, static=True, nodes_to_exclude=apart, **common)
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        rounded: ModelProto = quantizer.model.model
    return _finish(rounded, model)


def _operators() -> list[str]:
    """Return the operators that ONNX Runtime can quantise."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QLinearOpsRegistry, *QDQRegistry})


def _not_quantized(error: Exception) -> ExportFailed:
    if isinstance(error, OSError):
        return ExportFailed(f"The quantised file must be writable: {error}")
    return ExportFailed(f"ONNX Runtime could not quantise the file: {first_line(error)}")


def activation_ranges(model: ModelProto, folder: Path, batches: Batches, wanted: Quantization) -> Any:
    """Return the range of every activation, collected batch by batch to limit memory.

    Args:
        model: Float model with all weights.
        folder: Folder for temporary files.
        batches: Calibration images.
        wanted: Settings of the quantisation.

    Raises:
        ExportFailed: ONNX Runtime failed.

    `quantize_static` has two drawbacks. Its histogram for entropy has as many bins as levels, so that no range can be
    chosen. Its percentiles are of absolute values, which wastes half of the levels after a ReLU.
    """
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    source = folder / "source.onnx"  # the calibrator writes beside its input file
    with translated(_not_quantized), _quiet():
        save_onnx(model, source, model.ByteSize() > ONE_FILE_LIMIT_BYTES)
        calibrator = create_calibrator(
            source,
            _operators(),
            augmented_model_path=str(folder / "augmented.onnx"),
            calibrate_method=getattr(CalibrationMethod, _METHODS[wanted.method]),
            use_external_data_format=model.ByteSize() > ONE_FILE_LIMIT_BYTES,
            extra_options=_HISTOGRAMS.get(wanted.method, {}),
        )
        with batches.progress.task("ranges of activations", len(batches.split)) as task:
            for number in range(len(batches)):
                calibrator.collect_data(OneBatch(batches.read(number)))
                task.advance(batches.size)
            return calibrator.compute_data()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress output, warnings and logs of the quantiser; the file itself is checked."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _finish(rounded: ModelProto, original: ModelProto) -> ModelProto:
    """Return the graph with float outputs and the original metadata, after checks of signature, opset and scales."""
    free_gemm_outputs(rounded)
    _free_outputs(rounded)
    del rounded.metadata_props[:]
    rounded.metadata_props.extend(original.metadata_props)
    rounded.producer_name, rounded.producer_version = original.producer_name, original.producer_version
    if read_signature(rounded) != read_signature(original):
        raise ExportFailed("The quantised file must have the inputs and outputs of the float file, it has others.")
    if default_opset(rounded) != default_opset(original):
        raise ExportFailed(
            f"The quantised file must have opset {default_opset(original)}, it has {default_opset(rounded)}."
        )
    constants = {tensor.name: tensor for tensor in rounded.graph.initializer}
    for tensor, scale in _scales(rounded):
        if scale in constants:
            values = numpy_helper.to_array(constants[scale])
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise NonFinite(
                    f"Every scale must be finite and above 0, that of '{tensor}' is {values.min():g}.",
                    hint="Its values are not finite, or all alike; exclude the layer, or look at its weights.",
                )
    return rounded


def _scales(model: ModelProto) -> Iterator[tuple[str, str]]:
    """Yield names of a quantised tensor and of its scale."""
    for node in model.graph.node:
        for place in _SCALES.get(node.op_type, ()):
            if place < len(node.input):
                yield node.input[place - 1] if place in _SCALES_OF_INPUTS else node.output[0], node.input[place]


def _free_outputs(model: ModelProto) -> None:
    """Remove the quantisation of the network's outputs: with 256 values, classes would tie."""
    producers = {name: node for node in model.graph.node for name in node.output}
    for output in model.graph.output:
        last = producers.get(output.name)
        before = producers.get(last.input[0]) if last is not None and last.op_type == "DequantizeLinear" else None
        if last is None or before is None or before.op_type != "QuantizeLinear" or before.input[0] not in producers:
            continue
        inner = before.input[0]
        if sum(inner in node.input for node in model.graph.node) > 1:
            continue
        producer = producers[inner]
        producer.output[list(producer.output).index(inner)] = output.name
        if sum(before.output[0] in node.input for node in model.graph.node) == 1:
            model.graph.node.remove(before)
        model.graph.node.remove(last)
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)
    del model.graph.value_info[:]


def _float_layers(rounded: ModelProto, original: ModelProto) -> tuple[str, ...]:
    """Return the layers whose weights are not quantised.

    Raises:
        ExportFailed: No layer is quantised.
    """
    layers = _layers(original)
    whole = {node.output[0] for node in rounded.graph.node if node.op_type == "DequantizeLinear"}  # in a QDQ graph
    left = tuple(
        layers[node.name]
        for node in rounded.graph.node
        if node.name in layers and not any(name in whole for name in node.input[1:2])
    )
    if len(left) == len(layers):
        raise ExportFailed("At least one layer must be quantised, ONNX Runtime left all of them as they are.")
    return left
