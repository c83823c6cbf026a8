"""How does the graph of a file become a torch network?

    node with weights    -> a layer (nn.Conv2d, nn.Linear, ...), a submodule with a name from the file
    node on images       -> a call of a torch function
    node on constants    -> its value, computed once with the evaluator of the ONNX standard

The result is a `torch.fx.GraphModule`: layers, and a plain forward function that can be read (`print(module.code)`).
"""

from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn
from torch.func import functional_call
from torch.fx.graph import PythonCode

from compress.errors import ModelError
from compress.onnx_import.names import Names, clean, layer_name, value_name
from compress.onnx_import.operation import Operation, Result
from compress.onnx_import.operators.table import OPERATORS
from compress.onnx_import.values import PROBES, BatchSize, Computed, Fixed, Refused, Value, evaluate

ONNX_VALUE = "onnx_value"  # in the `meta` of a node of the new graph: which value of the file it computes


class ImportedNetwork(fx.GraphModule):
    """A network out of a file. Its errors are those of its layers; a plain `GraphModule` prints more beside them."""

    def recompile(self) -> PythonCode:
        """Make `forward` out of the graph."""
        code = super().recompile()
        if "__call__" in vars(type(self)):
            del type(self).__call__
        return code


class Builder:
    """Builds one network.

    Args:
        opset: Version of the default operator set.
        has_open_batch: Whether the file takes any number of images; otherwise it takes 1.
    """

    def __init__(self, opset: int, has_open_batch: bool) -> None:
        self.opset, self.has_open_batch = opset, has_open_batch
        self.graph = fx.Graph()
        self.problems: list[tuple[ir.Node, str]] = []
        self.values: dict[str, Value] = {}
        self.merged: dict[ir.Node, Computed] = {}
        self._parts: dict[str, Any] = {}
        self._names = Names()
        self._layers: dict[object, str] = {}
        self._constants: dict[str, Computed] = {}
        self._shared: dict[tuple[str, tuple[int, ...]], nn.Parameter] = {}
        self._unknown: set[str] = set()
        self._batch: BatchSize | None = None

    def add_input(self, name: str, argument: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
        """Add an input of the file as an argument, with its shape for each number of images in `PROBES`."""
        node = self.graph.placeholder(argument)
        node.meta[ONNX_VALUE] = name
        probes = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        self.values[name] = Computed(name, node, probes)

    def add_nodes(self, nodes: Sequence[ir.Node]) -> None:
        """Add nodes in their order; what cannot be built goes to `problems`."""
        for node in nodes:
            names = [value.name or "" for value in node.inputs if value is not None]
            if self._unknown.intersection(names):
                if not _is_supported(node):
                    self._refuse(node, "is not supported")
                self._unknown.update(value.name or "" for value in node.outputs)
                continue
            try:
                self._add(node)
            except Refused as reason:
                self._refuse(node, str(reason))
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
                said = str(error).strip().splitlines() or [""]  # what a translator meets in a node that is not valid
                self._refuse(node, f"is not as the ONNX standard says ({type(error).__name__}: {said[0][:200]})")

    def finish(self, outputs: Sequence[str]) -> fx.GraphModule:
        """Return the network; several outputs become a tuple."""
        found = []
        for name in outputs:
            if name not in self.values:
                raise ModelError(f"Each output of an ONNX file must be computed by a node, '{name}' is not.")
            value = self.values[name]
            if isinstance(value, Fixed):
                value = self.constant(value)
            assert isinstance(value, Computed)
            found.append(value.node)
        self.graph.output(found[0] if len(found) == 1 else tuple(found))
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        used = {node.target for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        parts = {name: part for name, part in self._parts.items() if name in used}
        return ImportedNetwork(_assembled(parts), self.graph, class_name="ImportedNetwork").eval()

    def call(
        self, function: Callable[..., Any], arguments: Sequence[Any], settings: Mapping[str, Any], name: str
    ) -> Computed:
        """Add a call of a torch function with one tensor as its result."""
        node, probes = self._call(function, arguments, settings, name)
        return Computed(name, node, probes)

    def call_several(
        self, function: Callable[..., Any], arguments: Sequence[Any], settings: Mapping[str, Any], name: str
    ) -> list[Computed]:
        """Add a call of a torch function with several tensors as its result."""
        node, probes = self._call(function, arguments, settings, name)
        return [
            Computed(name, self.graph.call_function(getitem, (node, index)), tuple(probe[index] for probe in probes))
            for index in range(len(probes[0]))
        ]

    def call_layer(self, layer: str, image: Computed, name: str) -> Computed:
        """Add a call of a layer."""
        part = self._parts[layer]
        state = {key: torch.empty_like(value, device="meta") for key, value in part.state_dict().items()}
        with torch.no_grad():
            probes = tuple(_try(functional_call, part, state, probe) for probe in image.probes)
        return Computed(name, self.graph.call_module(layer, (image.node,)), probes)

    def layer(self, make: Callable[[], nn.Module], weights: Sequence[Fixed], node: ir.Node, key: object) -> str:
        """Return the name of the layer with these weights and settings, built if there is none yet."""
        identity = (key, *(weight.name for weight in weights))
        if identity not in self._layers:
            names = [weight.name for weight in weights]
            wanted = layer_name(names, node.name or "", node.op_type, node.outputs[0].name or "")
            name = self._names.take(wanted)
            self._parts[name] = make().eval()
            self._layers[identity] = name
        return self._layers[identity]

    def parameter(self, weight: Fixed, array: np.ndarray | None = None) -> nn.Parameter:
        """Return a trainable copy of a constant; layers that read the same kernel or matrix share it.

        Biases and the like are not shared: programs that shrink files let layers read one constant where two happen
        to be equal, such as zeros.

        Args:
            weight: The constant.
            array: Its value as the layer wants it, where that differs.
        """
        values = weight.array if array is None else array
        identity = (weight.name, values.shape)
        is_own = values.ndim < 2 or values.strides != weight.array.strides
        if is_own or identity not in self._shared:
            parameter = nn.Parameter(torch.from_numpy(np.array(values, copy=True)))
            if is_own:
                return parameter
            self._shared[identity] = parameter
        return self._shared[identity]

    def constant(self, value: Fixed) -> Computed:
        """Return a constant as a buffer of the network; it is not trained.

        Raises:
            Refused: It depends on the number of images in another way than by repeating itself.
        """
        if value.name not in self._constants:
            self._constants[value.name] = self._buffer(value) if value.is_constant else self._repeated(value)
        return self._constants[value.name]

    def find(self, value: ir.Value) -> Value:
        """Return what is known of a value so far, None where nothing is."""
        name = value.name or ""
        return self._value(value) if name in self.values or value.const_value is not None else None

    def batch_size(self) -> BatchSize:
        """Return the number of images, as an argument of a call."""
        if self._batch is None:
            image = next(value for value in self.values.values() if isinstance(value, Computed))
            with self.graph.inserting_after(image.node):
                self._batch = BatchSize(self.graph.call_method("size", (image.node, 0)))
        return self._batch

    def _buffer(self, value: Fixed) -> Computed:
        name = self._names.take(value_name(value.name, f"constant_{clean(value.name)}"))
        tensor = torch.from_numpy(np.array(value.array, copy=True))
        self._parts[name] = tensor
        return Computed(value.name, self.graph.get_attr(name), (tensor.to("meta"),) * len(PROBES))

    def _repeated(self, value: Fixed) -> Computed:
        """Return a constant that is the same for each image, as often as there are images."""
        shapes = [array.shape for array in value.arrays]
        axes = [axis for axis in range(len(shapes[0])) if shapes[0][axis] != shapes[-1][axis]]
        one = value.arrays[0].take([0], axes[0]) if len(axes) == 1 else None
        if one is None or any(
            not np.array_equal(np.broadcast_to(one, array.shape), array) or array.shape[axes[0]] != images
            for array, images in zip(value.arrays, PROBES, strict=True)
        ):
            raise Refused(f"'{value.name}' must not depend on the number of images")
        buffer = self._buffer(Fixed.constant(value.name, one))
        sizes: list[object] = [-1] * one.ndim
        sizes[axes[0]] = self.batch_size()
        return self.call(torch.Tensor.expand, (buffer, *sizes), {}, f"{value.name}_repeated")

    def _call(
        self, function: Callable[..., Any], arguments: Sequence[Any], settings: Mapping[str, Any], name: str
    ) -> tuple[fx.Node, tuple[Any, ...]]:
        with torch.no_grad():
            probes = tuple(
                _try(function, *_replaced(arguments, index), **_replaced(dict(settings), index))
                for index in range(len(PROBES))
            )
        node = self.graph.create_node(
            "call_function", function, tuple(_nodes(arguments)), _nodes(dict(settings)), clean(name).replace(".", "_")
        )
        return node, probes

    def _add(self, node: ir.Node) -> None:
        inputs = [None if value is None else self._value(value) for value in node.inputs]
        if node.domain not in ("", "ai.onnx"):
            raise Refused(f"is of the domain '{node.domain}', which is not supported")
        if node.op_type == "If":
            self._add_branch(node, inputs)
            return
        if node in self.merged:
            result: Result = self.merged[node]
        elif any(isinstance(value, Computed) for value in inputs):
            translator = OPERATORS.get(node.op_type)
            if translator is None:
                raise Refused("is not supported")
            result = translator(Operation(node, inputs, self))
        else:
            result = evaluate(node, [value for value in inputs if not isinstance(value, Computed)], self.opset)
        self._keep(node, result)

    def _keep(self, node: ir.Node, result: Result) -> None:
        results = [result] if isinstance(result, (Computed, Fixed)) else list(result)
        for value, output in zip(results, node.outputs, strict=False):
            name = output.name or ""
            if isinstance(value, Computed):
                value = Computed(name, value.node, value.probes)
                value.node.meta.setdefault(ONNX_VALUE, name)
            self.values[name] = value
        for output in node.outputs[len(results) :]:
            if output.uses() or output.is_graph_output():
                raise Refused(f"its output '{output.name}' is not supported")

    def _add_branch(self, node: ir.Node, inputs: Sequence[Value]) -> None:
        """Add the branch of an If whose condition is known."""
        condition = inputs[0]
        if not isinstance(condition, Fixed) or not condition.is_constant:
            raise Refused("depends on the images (control flow), which is not supported")
        branch = node.attributes["then_branch" if condition.array.item() else "else_branch"].as_graph()
        for value in branch.initializers.values():
            self._value(value)
        self.add_nodes(list(branch))
        if any(value.name not in self.values for value in branch.outputs):  # refused already
            self._unknown.update(value.name or "" for value in node.outputs)
            return
        self._keep(node, [self._known(value) for value in branch.outputs])

    def _known(self, value: ir.Value) -> Computed | Fixed:
        found = self._value(value)
        assert found is not None
        return found

    def _value(self, value: ir.Value) -> Value:
        name = value.name or ""
        if name == "":
            return None
        if name not in self.values and value.const_value is not None:
            self.values[name] = Fixed.constant(name, value.const_value.numpy())
        if name not in self.values:
            raise Refused(f"reads '{name}', which no node computes before it")
        return self.values[name]

    def _refuse(self, node: ir.Node, reason: str) -> None:
        self.problems.append((node, reason))
        self._unknown.update(value.name or "" for value in node.outputs)


def _assembled(parts: Mapping[str, nn.Module | torch.Tensor]) -> nn.Module:
    """Return one module that holds parts at their paths, in the order in which they were built."""
    root = nn.Module()
    for path, part in parts.items():
        *parents, name = path.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        if isinstance(part, nn.Module):
            place.add_module(name, part)
        else:
            place.register_buffer(name, part)
    return root


def _is_supported(node: ir.Node) -> bool:
    """Whether a node might be built if its inputs could be."""
    return node.domain in ("", "ai.onnx") and (node.op_type in OPERATORS or node.op_type in ("If", "Constant"))


def _try(function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    try:
        return function(*arguments, **settings)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        raise Refused(f"does not fit its inputs: {str(error).strip().splitlines()[0][:200]}") from error


def _replaced(value: Any, index: int) -> Any:
    """Return an argument as it is for one number of images."""
    return _map(value, lambda one: one.probes[index])


def _nodes(value: Any) -> Any:
    """Return an argument as it goes into the graph."""
    return _map(value, lambda one: one.node)


def _map(value: Any, change: Callable[[Computed | BatchSize], Any]) -> Any:
    if isinstance(value, (Computed, BatchSize)):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(one, change) for one in value)
    if isinstance(value, dict):
        return {key: _map(one, change) for key, one in value.items()}
    return value
