"""Float form of a QDQ graph: the network that computes in float what an INT8 file computes with rounded values.

    weight, integers          -> weight - zero point, times scale, as float32
    weight, rounded by nodes  -> its rounded values
    Q and DQ of a value       -> the value itself, without rounding
    Q whose range starts at 0 -> the value after a Relu, or a Clip to [0, 6]: programs that quantise leave these out,
                                 since integers saturate there

The second input of Q and DQ is the scale, the third the zero point.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from compress.errors import ModelError
from compress.onnx_file.io import each_node

_ROUND, _READ = "QuantizeLinear", "DequantizeLinear"
_SUFFIX = "_quantized"  # of weights in files of ONNX Runtime
_SIX, _NEAR = 6.0, 0.005  # upper end of ReLU6, and how near a range must end to it
_AT_LEAST_0 = frozenset(("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Abs", "Exp", "Sqrt"))
_KEEPS_SIGN = frozenset(
    ("Add", "AveragePool", "Concat", "DepthToSpace", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "Identity",
     "MaxPool", "Mul", "ReduceMean", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze")
)  # fmt: skip


def is_qdq(model: ModelProto) -> bool:
    """Return whether a graph rounds values by QuantizeLinear or DequantizeLinear, in itself and not in a branch."""
    return any(node.op_type in (_ROUND, _READ) for node in model.graph.node)


def float_form(model: ModelProto) -> ModelProto:
    """Return the float form of a QDQ graph; the model is not changed.

    Args:
        model: Model with all weights, without local functions.

    Raises:
        ModelError: A rounding is not of a form above: its scale is computed, or integers go on into another node.
    """
    inner = Counter(node.op_type for node in each_node(model))
    outer = Counter(node.op_type for node in model.graph.node)
    if any(inner[name] != outer[name] for name in (_ROUND, _READ)):
        raise ModelError("Roundings within a branch (If, Loop, Scan) cannot be left out.")
    converter = _Converter(_constants(model.graph))
    nodes = list(converter.nodes(model.graph))
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    read = {name for node in each_node(result) for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read and tensor.name not in converter.weights]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in converter.weights.items())
    return result


@dataclass
class _Converter:
    """State of one conversion.

    Attributes:
        constants: Constant -> its array.
        weights: New float constants.
        renamed: Value of the file -> value of the float form.
        rounded: Output of a QuantizeLinear -> the float value that it rounds.
        at_least_0: Values that are never negative.
    """

    constants: Mapping[str, np.ndarray]
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)
    at_least_0: set[str] = field(default_factory=set)

    def nodes(self, graph: GraphProto) -> Iterator[NodeProto]:
        """Yield the nodes of the float form."""
        images = {value.name for value in graph.input}
        outputs = {value.name for value in graph.output}
        for node in graph.node:
            if node.op_type == _ROUND:
                yield from self._round(node, images)
            elif node.op_type == _READ:
                self._read(node)
                if node.output[0] in outputs:
                    yield helper.make_node("Identity", [self.renamed[node.output[0]]], [node.output[0]], node.name)
            else:
                yield self._plain(node)
        if lost := [name for name in self.rounded if name in outputs]:
            raise ModelError(f"Outputs of the network must be float, '{lost[0]}' is made of integers.")

    def _plain(self, node: NodeProto) -> NodeProto:
        """Return a node with the inputs of the float form."""
        if taken := [name for name in node.input if name in self.rounded]:
            raise ModelError(f"{node.op_type} '{node.name}' must read floats, '{taken[0]}' is made of integers.")
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [self.renamed.get(name, name) for name in node.input]
        values = [name for name in copy.input if name and name not in self.constants]
        if node.op_type in _AT_LEAST_0 or (node.op_type in _KEEPS_SIGN and self._is_at_least_0(copy, values)):
            self.at_least_0.update(copy.output)
        return copy

    def _is_at_least_0(self, node: NodeProto, values: list[str]) -> bool:
        numbers = [self.constants[name] for name in node.input if name in self.constants]
        is_shape = node.op_type not in ("Add", "Mul")  # whose constants are sizes, axes or pads
        return set(values) <= self.at_least_0 and (is_shape or all((array >= 0).all() for array in numbers))

    def _round(self, node: NodeProto, images: set[str]) -> Iterator[NodeProto]:
        """Take a QuantizeLinear out; yield the activation that its range stands for."""
        value = node.input[0]
        scale, zero = self._scale_of(node)
        if value in self.constants:
            low, high = _limits(zero)
            whole = np.clip(np.rint(self.constants[value] / scale) + zero.astype(np.float32), low, high)
            self.constants = {**self.constants, node.output[0]: whole}
            return
        value = self.renamed.get(value, value)
        self.rounded[node.output[0]] = value
        low, high = _limits(zero)
        starts_at_0 = zero.dtype.kind in "iu" and zero.size == 1 and float(zero.reshape(-1)[0]) == low
        if not starts_at_0 or value in images or value in self.at_least_0:
            return
        upper, after = float((high - low) * scale.reshape(-1)[0]), f"{value}_after_rounding"
        name = node.name or node.output[0]
        if abs(upper - _SIX) < _NEAR * _SIX:
            ends = [f"{after}_{end}" for end in ("low", "high")]
            self.weights |= {end: np.array(limit, np.float32) for end, limit in zip(ends, (0.0, _SIX), strict=True)}
            yield helper.make_node("Clip", [value, *ends], [after], name)
        else:
            yield helper.make_node("Relu", [value], [after], name)
        self.rounded[node.output[0]] = after
        self.at_least_0.add(after)

    def _read(self, node: NodeProto) -> None:
        """Take a DequantizeLinear out, with its weight, if it reads one, in float."""
        value, output = node.input[0], node.output[0]
        if value in self.rounded:
            self.renamed[output] = self.rounded[value]
            return
        if value not in self.constants:
            raise ModelError(f"{_READ} '{node.name}' must read a weight or rounded floats, it reads '{value}'.")
        scale, zero = self._scale_of(node)
        weight = (self.constants[value].astype(np.float32) - zero.astype(np.float32)) * scale
        name = value.removesuffix(_SUFFIX) if value.endswith(_SUFFIX) else output
        if name in self.constants or (name in self.weights and not np.array_equal(self.weights[name], weight)):
            name = output  # integers that are read with another scale, or beside a float of the same name
        self.weights[name], self.renamed[output] = weight, name

    def _scale_of(self, node: NodeProto) -> tuple[np.ndarray, np.ndarray]:
        """Return scale and zero point, in a shape that fits the tensor."""
        if any(name and name not in self.constants for name in node.input[1:3]):
            raise ModelError(f"{node.op_type} '{node.name}' must have a constant scale, it is computed.")
        scale = self.constants[node.input[1]].astype(np.float32)
        has_zero = len(node.input) > 2 and node.input[2]
        zero = self.constants[node.input[2]] if has_zero else np.zeros_like(scale, np.uint8)
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if attributes.get("block_size"):
            raise ModelError(
                f"{node.op_type} '{node.name}' must have a scale for a tensor or a channel, not for a block."
            )
        if scale.ndim == 1 and scale.size > 1:
            tensor = self.constants.get(node.input[0])
            if tensor is None:
                raise ModelError(f"{node.op_type} '{node.name}' must have one scale for activations, not {scale.size}.")
            axis = attributes.get("axis", 1) % tensor.ndim
            shape = [-1 if place == axis else 1 for place in range(tensor.ndim)]
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        return scale, zero


def _limits(zero: np.ndarray) -> tuple[float, float]:
    """Return the least and the largest value of the type of a zero point."""
    if zero.dtype.kind not in "iu":
        return -np.inf, np.inf
    limits = np.iinfo(zero.dtype)
    return float(limits.min), float(limits.max)


def _constants(graph: GraphProto) -> dict[str, np.ndarray]:
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for one in node.attribute:
                if one.name == "value":
                    found[node.output[0]] = numpy_helper.to_array(one.t)
    return found
