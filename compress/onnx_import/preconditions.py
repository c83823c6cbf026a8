"""Preconditions of an import, checked before the graph of a file is built node by node.

corrupt, external weights, operator set too old or too new   refused here, or converted
local functions                                              inlined
quantised                                                    a QDQ graph gets its float form, others are refused
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
import onnx.version_converter
from onnx import ModelProto

from compress.errors import ArtifactError, ModelError, first_line, translated
from compress.model.artifacts import TensorSpec
from compress.onnx_file.dequantize import float_form, is_qdq
from compress.onnx_file.io import default_opset, each_node, load_onnx, read_inputs, require_beside, tensor_problems
from compress.onnx_import.values import PROBES

OLDEST_OPSET = 7  # older ones broadcast by attributes
_MODERN_OPSET = 13
_QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")
_SHOWN = 6
_FLOAT = "Give the float file that it was made from; the stage 'quantize' rounds the slim network at the end."


@dataclass(frozen=True, slots=True)
class Source:
    """A file that is ready to be built node by node.

    Attributes:
        path: The .onnx file.
        model: Content of the file, weights included.
        opset: Version of the default operator set.
        inputs: Inputs without weights; the first axis is "batch" or 1, followed by the sizes of one image.
        outputs: Names of the outputs.
        has_open_batch: Whether the file takes any number of images; otherwise it takes 1.
        is_float_form: Whether the file is quantised, and `model` is its float form.
    """

    path: Path
    model: ModelProto
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    has_open_batch: bool
    is_float_form: bool = False

    def shapes(self, spec: TensorSpec, numbers: Iterable[int] = PROBES) -> list[tuple[int, ...]]:
        """Return the shape of an input for each number of images in `numbers`."""
        sizes = tuple(int(size) for size in spec.shape[1:])
        return [(number, *sizes) if self.carries_images(spec) else (int(spec.shape[0]), *sizes) for number in numbers]

    def carries_images(self, spec: TensorSpec) -> bool:
        """Return whether the first axis of an input is the batch axis."""
        return spec.shape[0] == ("batch" if self.has_open_batch else 1)


def read_source(path: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> Source:
    """Read a file and check that it can be imported.

    Args:
        path: The .onnx file.
        shapes: Input name -> shape of one image, for inputs with open sizes.

    Raises:
        ArtifactError: The file is missing, corrupt, or has weights outside its folder.
        ModelError: The file is quantised and no QDQ graph, has an unsupported operator set, or its inputs have no fixed
            sizes.
    """
    require_beside(load_onnx(path), path)
    model = load_onnx(path, weights=True)
    if problems := tensor_problems(model):
        raise ArtifactError(f"'{path}' must be a valid ONNX model: {'; '.join(problems[:_SHOWN])}.")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    is_float_form = is_qdq(model)
    if is_float_form:
        model = _float_form(model, path)
    _check_float(model, path)
    model = _up_to_date(model, path)
    taken = read_inputs(model)
    _check_names(shapes or {}, taken, path)
    inputs = tuple(_with_sizes(spec, (shapes or {}).get(spec.name), path) for spec in taken)
    has_open_batch = any(spec.shape[0] == "batch" for spec in inputs)
    if not has_open_batch and not any(spec.shape[0] == 1 for spec in inputs):
        raise ModelError(
            f"'{path}' must take any number of images at once, or one, it takes "
            f"{', '.join(str(spec.shape[0]) for spec in inputs) or 'no input'}.",
            hint="Export it with an open batch axis.",
        )
    outputs = tuple(value.name for value in model.graph.output)
    return Source(path, model, default_opset(model) or 0, inputs, outputs, has_open_batch, is_float_form)


def _float_form(model: ModelProto, path: Path) -> ModelProto:
    try:
        return float_form(model)
    except ModelError as error:
        raise ModelError(
            f"'{path}' is quantised and cannot be read as a float network: {error.message}", hint=_FLOAT
        ) from error


def _check_float(model: ModelProto, path: Path) -> None:
    found = Counter(
        node.op_type for node in each_node(model) if node.op_type in _QUANTISED or "QLinear" in node.op_type
    )
    if found:
        raise ModelError(
            f"'{path}' must be a network in floating point, it is quantised: "
            f"{', '.join(f'{count} {name}' for name, count in found.most_common())}.",
            hint=_FLOAT,
        )


def _up_to_date(model: ModelProto, path: Path) -> ModelProto:
    opset, newest = default_opset(model), onnx.defs.onnx_opset_version()
    if opset is None:
        raise ModelError(f"'{path}' must say which version of the ONNX operators it uses, it names none.")
    if opset > newest:
        raise ModelError(
            f"'{path}' must use operator set {newest} or an older one, it uses {opset}.",
            hint="Install a newer onnx package, or export the network with an older operator set.",
        )
    if opset >= OLDEST_OPSET:
        return model
    with translated(
        lambda error: ModelError(
            f"'{path}' must use operator set {OLDEST_OPSET} or newer, it uses {opset} and cannot be converted: "
            f"{first_line(error)}",
            hint=f"Export the network again with operator set {_MODERN_OPSET} or newer.",
        )
    ):
        return onnx.version_converter.convert_version(model, _MODERN_OPSET)


def _with_sizes(spec: TensorSpec, given: Sequence[int] | None, path: Path) -> TensorSpec:
    """Return an input with the sizes of one image filled in.

    Raises:
        ModelError: Sizes are open and not given, or the given sizes do not fit the file.
    """
    if not spec.shape:
        raise ModelError(f"Input '{spec.name}' of '{path}' must have an axis for images, it is a single number.")
    sizes = tuple(spec.shape[1:])
    if given is not None:
        fits = len(given) == len(sizes) and all(
            isinstance(size, str) or size == new for size, new in zip(sizes, given, strict=True)
        )
        if not fits:
            raise ModelError(
                f"model.inputs must fit '{path}': '{spec.name}' has the shape {_text(spec.shape)}, "
                f"got {_text(given)} for one image."
            )
        return TensorSpec(spec.name, (spec.shape[0], *given), spec.dtype)
    if any(isinstance(size, str) for size in sizes):
        raise ModelError(
            f"Input '{spec.name}' of '{path}' must have fixed sizes besides the number of images, "
            f"it has {_text(spec.shape)}.",
            hint=f"Say how large images are, such as model.inputs: {{{spec.name}: [3, 224, 224]}}.",
        )
    return spec


def _check_names(shapes: Mapping[str, Sequence[int]], inputs: Sequence[TensorSpec], path: Path) -> None:
    known = [spec.name for spec in inputs]
    if unknown := sorted(set(shapes) - set(known)):
        raise ModelError(
            f"model.inputs must name inputs of '{path}', which are {', '.join(known[:_SHOWN])}; "
            f"{', '.join(unknown)} is none."
        )


def _text(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"
