"""MACs, weights, nodes and bytes of an ONNX file, counted from the graph without torch.

MACs are the multiply-accumulates for one image in all nodes that compute sums of products, by weights or activations
(`onnx_file/node_macs.py`). `cost/macs.py` counts them in a torch network by other means.

Weights (`params`) are all scalars of floating-point constants with at least one axis, each constant once, except the
running mean and variance of BatchNormalization, which are buffers. Export folds batch norm into the convolution
before it (its scale and bias become one bias a channel), so this number is smaller than the torch network's.

In a quantised graph, an integer constant counts as a weight if DequantizeLinear reads it, or an operator such as
QLinearConv reads it as weight or bias. Scales and zero points do not count. So the counts equal those of the float
file.

Some exporters compute sizes within the graph, for padding or reshaping. Shapes that ONNX's shape inference cannot find
are read from one run in ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

from compress.errors import ModelError, first_line, translated
from compress.onnx_file.io import file_bytes, load_onnx, read_sizes, reading_graph
from compress.onnx_file.node_macs import NodeProduct, find_products, is_counted

__all__ = ["LayerRow", "OnnxCounts", "count_onnx", "file_bytes", "layer_rows"]

Shape = tuple[int, ...]
FIXED_WEIGHT = "compress.fixed."  # prefix of constants of convolutions that stand for slicing and padding
FIXED_BUFFER = "compress_fixed_weight"  # name of the buffers of such convolutions in a torch network
_OF_SHAPES = ("Shape", "Size")
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_INTEGER_LAYERS = {  # operator of integers -> places of weight and bias among its inputs
    "QLinearConv": (3, 8),
    "QLinearMatMul": (3,),
    "QGemm": (3, 6),
}
_HALF_BYTE_TYPES = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)


@dataclass(frozen=True, slots=True)
class OnnxCounts:
    """Size of an ONNX graph.

    Attributes:
        macs: Multiply-accumulates for one image.
        params: Scalars of floating-point constants, quantised or not, without batch-norm statistics.
        layer_weights: Scalars of the constants that one image is multiplied by; a constant used twice, by two nodes or
            in two steps of a recurrent layer, counts twice.
        nodes: Nodes in the graph.
        initializer_bytes: Bytes of all initializers.
    """

    macs: int
    params: int
    layer_weights: int
    nodes: int
    initializer_bytes: int


@dataclass(frozen=True, slots=True)
class LayerRow:
    """Counts of one node.

    Attributes:
        name: Module path of the node's weight where the file has one ("layer1.0.conv1"), else the node's name.
        op: Operator.
        input_shape: Shape of the first input at batch 1.
        output_shape: Shape of the first output at batch 1.
        weights: Scalars of the node's floating-point constants.
        macs: MACs for one image.
        layer_weights: Scalars of the constants that the node multiplies by, as in `OnnxCounts`.
    """

    name: str
    op: str
    input_shape: Shape | None
    output_shape: Shape | None
    weights: int
    macs: int
    layer_weights: int = 0


def count_onnx(path: Path) -> OnnxCounts:
    """Count MACs, weights, nodes and bytes of an ONNX file.

    Args:
        path: The .onnx file; external data is read only where the graph must be run for its shapes.

    Raises:
        ArtifactError: The file is missing or no valid ONNX model.
        ModelError: The shape of a counted node is not known, and the graph cannot be run.
    """
    with reading_graph(path):
        graph = _Graph(load_onnx(path), path)
        return OnnxCounts(
            macs=sum(graph.macs(node) for node in graph.nodes),
            params=sum(math.prod(shape) for shape in graph.weights.values()),
            layer_weights=sum(graph.layer_weights(node) for node in graph.nodes),
            nodes=len(graph.nodes),
            initializer_bytes=sum(_tensor_bytes(tensor) for tensor in graph.model.graph.initializer),
        )


def layer_rows(path: Path) -> list[LayerRow]:
    """Return one row for each node, in the order of the graph.

    Raises:
        ArtifactError: The file is missing or no ONNX model.
        ModelError: The shape of a counted node cannot be inferred.
    """
    with reading_graph(path):
        return _rows(_Graph(load_onnx(path), path))


def rows_of(model: ModelProto) -> list[LayerRow]:
    """Return one row for each node of a model in memory, which is not changed; its local functions must be inlined.

    Raises:
        ModelError: The shape of a counted node cannot be inferred.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    return _rows(_Graph(copy))


def is_fixed_weight(name: str) -> bool:
    """Return whether a constant is the weight of a convolution that stands for slicing and padding."""
    return name.startswith(FIXED_WEIGHT) or name.endswith(f".{FIXED_BUFFER}")


def _rows(graph: _Graph) -> list[LayerRow]:
    return [graph.row(node) for node in graph.nodes]


class _Graph:
    """A model at batch 1 with its shapes, inferred or else observed in a run.

    Args:
        model: Model without external data; it is changed.
        path: The .onnx file; None for a model that is complete in memory.
    """

    def __init__(self, model: ModelProto, path: Path | None = None) -> None:
        self.path, self.has_observed = path, False
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        batch = _fix_batch(model)
        with translated(lambda error: ModelError(f"Shapes of the ONNX graph must be inferable: {first_line(error)}")):
            self.model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        self.batch = batch
        self.nodes: list[NodeProto] = list(self.model.graph.node)
        self.shapes = dict(_shapes(self.model))
        self.constants = _constant_names(self.model)
        self.weights = _weights(self.model)

    def row(self, node: NodeProto) -> LayerRow:
        macs = self.macs(node)  # first: counting may add missing shapes
        return LayerRow(
            name=self._layer_name(node),
            op=node.op_type,
            input_shape=self.shapes.get(node.input[0]) if node.input else None,
            output_shape=self.shapes.get(node.output[0]),
            weights=sum(math.prod(self.weights[name]) for name in set(node.input) if name in self.weights),
            macs=macs,
            layer_weights=self.layer_weights(node),
        )

    def macs(self, node: NodeProto) -> int:
        """Return the MACs of one node for one image; 0 for operators that are not counted."""
        return sum(product.macs for product in self._products(node)) // self.batch

    def layer_weights(self, node: NodeProto) -> int:
        """Return the scalars of the constants that a node multiplies by, counted at each read."""
        total = 0
        for product in self._products(node):
            constants = [name for name in product.operands if name in self.constants]
            if len(constants) == len(product.operands):  # computed beforehand, all but once
                constants = constants[-1:]
            total += product.repeats * sum(math.prod(self._shape(node, name)) for name in constants)
        return total

    def _products(self, node: NodeProto) -> list[NodeProduct]:
        if any(is_fixed_weight(name) for name in node.input):
            return []
        return find_products(node, lambda name: self._shape(node, name))

    def _shape(self, node: NodeProto, name: str) -> Shape:
        if name not in self.shapes and not self.has_observed:
            self._observe(node, name)
        return self.shapes[name]

    def _observe(self, node: NodeProto, name: str) -> None:
        """Run the graph for the missing shapes of all counted nodes; `name` is the value for the error message."""
        self.has_observed = True
        missing = {
            value
            for other in self.nodes
            if is_counted(other)
            for value in (*other.input, *other.output)
            if value and value not in self.shapes
        }
        try:
            self.shapes |= observe_shapes(self._with_weights(), missing)
        except ModelError as error:
            raise ModelError(
                f"The shape of '{name}' must be known to count the MACs of {node.op_type} node '{node.name}'. "
                f"{error.message}",
                hint=error.hint,
            ) from error

    def _with_weights(self) -> ModelProto:
        if self.path is None:
            return self.model
        model = load_onnx(self.path, weights=True)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        _fix_batch(model)
        return model

    def _layer_name(self, node: NodeProto) -> str:
        place = _INTEGER_LAYERS.get(node.op_type, (1,))[0]
        for name in node.input[place : place + 1]:
            if "." in name and (name in self.weights or name.endswith(FIXED_BUFFER)):
                return str(name.rpartition(".")[0])
        return str(node.name or node.output[0])


def _fix_batch(model: ModelProto) -> int:
    """Set open first axes to 1 in place, drop the inferred shapes, and return the batch size."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    sizes = read_sizes(model)
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = 1
        for dim in dims:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    first = inputs[0].type.tensor_type.shape.dim if inputs else []
    return max(1, int(first[0].dim_value)) if first else 1


def _shapes(model: ModelProto) -> Iterator[tuple[str, Shape]]:
    graph = model.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            yield value.name, tuple(int(dim.dim_value) for dim in tensor.shape.dim)
    for initializer in graph.initializer:
        yield initializer.name, tuple(initializer.dims)


def _constant_names(model: ModelProto) -> set[str]:
    """Return the names of all values that do not depend on the values of inputs, such as a transposed weight."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in _OF_SHAPES or all(name in constants for name in node.input if name):
            constants.update(node.output)
    return constants


def _weights(model: ModelProto) -> dict[str, Shape]:
    """Return name -> shape of each weight: a constant with at least one axis, except statistics and scales."""
    statistics = {name for node in model.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:5]}
    tensors = [(tensor.name, tensor) for tensor in model.graph.initializer]
    for node in model.graph.node:
        if node.op_type == "Constant":
            tensors += [(node.output[0], a.t) for a in node.attribute if a.type == AttributeProto.TENSOR]
    rounded = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    scales: set[str] = set()
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scales.update(node.input[1:])
        places = _INTEGER_LAYERS.get(node.op_type, ())
        for place, name in enumerate(node.input[1:] if places else (), 1):
            if place in places:
                rounded[name] = name
            else:
                scales.add(name)
    found = {}
    for name, tensor in tensors:
        is_weight = tensor.data_type in _FLOATS or name in rounded  # known by the name of the float that it becomes
        if is_weight and tensor.dims and name not in statistics | scales and not is_fixed_weight(name):
            is_float = tensor.data_type in _FLOATS
            found[name if is_float else rounded[name]] = tuple(tensor.dims)
    return found


def _tensor_bytes(tensor: TensorProto) -> int:
    count: int = math.prod(tensor.dims)
    if tensor.data_type in _HALF_BYTE_TYPES:
        return (count + 1) // 2
    return int(count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


_SILENT = 4


def observe_shapes(model: ModelProto, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Run a graph on zeros and return the shapes of some of its values.

    Args:
        model: Model with its weights, and without open axes in its inputs; it is not changed.
        names: Names of the values.

    Raises:
        ModelError: An axis of an input is open, or ONNX Runtime cannot run the graph.
    """
    import onnxruntime  # half a second; needed for few files

    zeros, copy = _zeros(model), ModelProto()
    copy.CopyFrom(model)
    wanted = sorted(set(names))
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with translated(lambda error: ModelError(f"The graph must run for its shapes to be seen: {first_line(error)}")):
        session = onnxruntime.InferenceSession(
            copy.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        found = session.run(wanted, zeros)
    return {name: tuple(array.shape) for name, array in zip(wanted, found, strict=True)}


def _zeros(model: ModelProto) -> dict[str, np.ndarray]:
    constants = {tensor.name for tensor in model.graph.initializer}
    arrays = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        if not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            raise ModelError(
                f"Input '{value.name}' must have fixed sizes, one of its axes is open.",
                hint="Export with fixed height and width; only the batch axis may stay open.",
            )
        sizes = [int(dim.dim_value) for dim in tensor.shape.dim]
        arrays[value.name] = np.zeros(sizes, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return arrays
