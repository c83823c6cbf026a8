"""Operation: one node of the file with its inputs and the new graph, the argument of each operator's translator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import onnx_ir as ir
from torch import nn

from compress.onnx_import.graph import NetworkGraph
from compress.onnx_import.values import Computed, Fixed, KnownValues, Refused, Value

Result = Computed | Fixed | Sequence[Computed | Fixed]
Translator = Callable[["Operation"], Result]
OPERATORS: dict[str, Translator] = {}
T = TypeVar("T")


def operator(*names: str) -> Callable[[Translator], Translator]:
    """Register the decorated function as the translator of operators of the default domain."""

    def declare(translator: Translator) -> Translator:
        for name in names:
            OPERATORS[name] = translator
        return translator

    return declare


class Operation:
    """One node of the file that processes images.

    Args:
        node: Node of the file.
        inputs: Values of the node's inputs; None for a missing optional input.
        opset: Version of the default operator set.
        graph: Graph of the new network.
        values: All values that are known so far.
    """

    def __init__(
        self, node: ir.Node, inputs: Sequence[Value], opset: int, graph: NetworkGraph, values: KnownValues
    ) -> None:
        self.node, self.inputs, self.opset = node, list(inputs), opset
        self.graph, self.values = graph, values

    @property
    def kind(self) -> str:
        """Name of the operator."""
        return self.node.op_type

    @property
    def output(self) -> str:
        """Name of the first output."""
        return self.node.outputs[0].name or ""

    def attribute(self, name: str, default: T) -> T:
        """Return an attribute with the type of `default`, or `default` where it is missing; lists become tuples."""
        found = self.node.attributes.get(name)
        if found is None:
            return default
        value: Any = found.value
        return cast(T, tuple(value) if isinstance(value, (list, tuple)) else value)

    def has(self, index: int) -> bool:
        """Return whether an input is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def image(self, index: int = 0) -> Computed:
        """Return an input as a value of the new graph; a constant is added to the graph as a buffer."""
        value = self.inputs[index] if self.has(index) else None
        if value is None:
            raise Refused(f"input {index} must be given")
        return value if isinstance(value, Computed) else self.graph.constant(value)

    def known(self, index: int) -> Fixed:
        """Return an input that does not depend on images, such as a weight.

        Raises:
            Refused: The input is missing or depends on images.
        """
        value = self.inputs[index] if self.has(index) else None
        if not isinstance(value, Fixed):
            raise Refused(f"input {index} must be a constant of the file")
        return value

    def array(self, index: int) -> np.ndarray:
        """Return an input that is a constant, for any number of images."""
        return self.known(index).array

    def setting(self, name: str, index: int, default: Any = None) -> Any:
        """Return a setting that is an attribute in older operator sets and an input in newer ones, as plain values."""
        if name in self.node.attributes:
            return self.attribute(name, None)
        return self.array(index).tolist() if self.has(index) else default

    def scalar(self, name: str, index: int) -> Any:
        """Return a setting of one number, also from an array of one element; None where it is not given.

        Raises:
            Refused: The setting has several numbers.
        """
        value = np.asarray(self.setting(name, index), object)
        if value.size != 1:
            raise Refused(f"input {index} ({name}) must be one number, it has {value.size}")
        return value.item()

    def operand(self, index: int) -> Computed | float | int | bool:
        """Return an input of an element-wise operator; a constant of one element becomes a plain number."""
        value = self.inputs[index]
        if isinstance(value, Fixed) and value.is_constant and value.array.size == 1:
            others = [other.rank for other in self.inputs if isinstance(other, Computed)]
            if others and max(others) >= value.array.ndim:
                return cast(float, value.array.item())
        return self.image(index)

    def call(self, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Computed:
        """Add a call of a torch function with one tensor as its result."""
        return self.graph.call(function, arguments, settings, self.output)

    def call_several(self, function: Callable[..., Any], *arguments: Any, **settings: Any) -> list[Computed]:
        """Add a call of a torch function with several tensors as its result."""
        return self.graph.call_several(function, arguments, settings, self.output)

    def layer(self, make: Callable[[], nn.Module], weights: Sequence[Fixed], image: Computed, key: object) -> Computed:
        """Add a call of a torch layer; nodes with the same weights and settings share one.

        Args:
            make: Function that builds the layer with its weights.
            weights: Weights of the layer.
            image: Input of the layer.
            key: Settings of the layer, for comparison with other nodes.
        """
        name = self.graph.parts.layer(make, weights, self.node, key)
        return self.graph.call_layer(name, image, self.output)
