"""Torch network under construction: a graph of calls (`torch.fx`), with its layers, parameters and constants."""

from collections.abc import Callable, Container, Mapping, Sequence
from operator import getitem
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn
from torch.func import functional_call
from torch.fx.graph import PythonCode

from compress.onnx_import.names import Names, clean, layer_name, value_name
from compress.onnx_import.values import PROBES, BatchSize, Computed, Fixed, Refused

ONNX_VALUE = "onnx_value"  # in the `meta` of a node of the new graph: name of the value in the file


class ImportedNetwork(fx.GraphModule):
    """A network imported from a file. It raises errors of its layers without the extra output of a `GraphModule`."""

    def recompile(self) -> PythonCode:
        """Generate `forward` from the graph."""
        code = super().recompile()
        if "__call__" in vars(type(self)):
            del type(self).__call__
        return code


class Parts:
    """Layers, parameters and buffers of the new network, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, nn.Module | torch.Tensor] = {}
        self._names = Names()
        self._layers: dict[object, str] = {}
        self._shared: dict[tuple[str, tuple[int, ...]], nn.Parameter] = {}

    def layer(self, make: Callable[[], nn.Module], weights: Sequence[Fixed], node: ir.Node, key: object) -> str:
        """Return the name of the layer with these weights and settings, built at its first use.

        Args:
            make: Function that builds the layer with its weights.
            weights: Weights of the layer.
            node: Node of the file that the layer is named after, where no weight names it.
            key: Settings of the layer, for comparison with other nodes.
        """
        names = [weight.name for weight in weights]
        identity = (key, *names)
        if identity not in self._layers:
            wanted = layer_name(names, node.name or "", node.op_type, node.outputs[0].name or "")
            name = self._names.take(wanted)
            self._by_name[name] = make().eval()
            self._layers[identity] = name
        return self._layers[identity]

    def module(self, name: str) -> nn.Module:
        """Return a layer."""
        part = self._by_name[name]
        assert isinstance(part, nn.Module)
        return part

    def parameter(self, weight: Fixed, array: np.ndarray | None = None) -> nn.Parameter:
        """Return a trainable copy of a constant; layers that read the same kernel or matrix share it.

        Biases and other vectors are not shared: ONNX graph optimisers merge constants that happen to be equal, such as
        zero biases.

        Args:
            weight: Constant of the file.
            array: Value in the layer's layout, where that differs from the file's.
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

    def add_buffer(self, value: Fixed) -> tuple[str, torch.Tensor]:
        """Add a constant as a buffer; return its name and the tensor."""
        name = self._names.take(value_name(value.name, f"constant_{clean(value.name)}"))
        tensor = torch.from_numpy(np.array(value.array, copy=True))
        self._by_name[name] = tensor
        return name, tensor

    def assembled(self, used: Container[str]) -> nn.Module:
        """Return one module with the parts in `used` at their paths, in the order in which they were built."""
        root = nn.Module()
        for path, part in self._by_name.items():
            if path not in used:
                continue
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


class NetworkGraph:
    """Graph of the new network, to which operators add calls.

    Args:
        has_open_batch: Whether the file takes any number of images; otherwise it takes 1.
    """

    def __init__(self, has_open_batch: bool) -> None:
        self.has_open_batch = has_open_batch
        self.parts = Parts()
        self._graph = fx.Graph()
        self._inputs: list[fx.Node] = []
        self._constants: dict[str, Computed] = {}
        self._batch: BatchSize | None = None

    def add_input(self, name: str, argument: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Computed:
        """Add an input of the file as an argument, with its shape for each number of images in `PROBES`."""
        node = self._graph.placeholder(argument)
        node.meta[ONNX_VALUE] = name
        self._inputs.append(node)
        return Computed(name, node, tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes))

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
            Computed(name, self._graph.call_function(getitem, (node, index)), tuple(probe[index] for probe in probes))
            for index in range(len(probes[0]))
        ]

    def call_layer(self, layer: str, image: Computed, name: str) -> Computed:
        """Add a call of a layer."""
        part = self.parts.module(layer)
        state = {key: torch.empty_like(value, device="meta") for key, value in part.state_dict().items()}
        with torch.no_grad():
            probes = tuple(_try(functional_call, part, state, probe) for probe in image.probes)
        return Computed(name, self._graph.call_module(layer, (image.node,)), probes)

    def constant(self, value: Fixed) -> Computed:
        """Return a constant as a buffer of the network; it is not trained.

        Raises:
            Refused: The value depends on the number of images in another way than by repetition.
        """
        if value.name not in self._constants:
            self._constants[value.name] = self._buffer(value) if value.is_constant else self._repeated(value)
        return self._constants[value.name]

    def batch_size(self) -> BatchSize:
        """Return the number of images, as an argument of a call."""
        if self._batch is None:
            with self._graph.inserting_after(self._inputs[0]):
                self._batch = BatchSize(self._graph.call_method("size", (self._inputs[0], 0)))
        return self._batch

    def network(self, outputs: Sequence[Computed]) -> fx.GraphModule:
        """Return the network without calls and parts that the outputs do not need; several outputs become a tuple."""
        found = [output.node for output in outputs]
        self._graph.output(found[0] if len(found) == 1 else tuple(found))
        for node in reversed(self._graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self._graph.erase_node(node)
        used = {node.target for node in self._graph.nodes if node.op in ("call_module", "get_attr")}
        return ImportedNetwork(self.parts.assembled(used), self._graph, class_name="ImportedNetwork").eval()

    def _buffer(self, value: Fixed) -> Computed:
        name, tensor = self.parts.add_buffer(value)
        return Computed(value.name, self._graph.get_attr(name), (tensor.to("meta"),) * len(PROBES))

    def _repeated(self, value: Fixed) -> Computed:
        """Return a constant that is the same for each image, repeated for all images."""
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
        node = self._graph.create_node(
            "call_function", function, tuple(_nodes(arguments)), _nodes(dict(settings)), clean(name).replace(".", "_")
        )
        return node, probes


def _try(function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    try:
        return function(*arguments, **settings)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        raise Refused(f"does not fit its inputs: {str(error).strip().splitlines()[0][:200]}") from error


def _replaced(value: Any, index: int) -> Any:
    """Return an argument with each value replaced by its probe for one number of images in `PROBES`."""
    return _map(value, lambda one: one.probes[index])


def _nodes(value: Any) -> Any:
    """Return an argument with each value replaced by its node."""
    return _map(value, lambda one: one.node)


def _map(value: Any, change: Callable[[Computed | BatchSize], Any]) -> Any:
    if isinstance(value, (Computed, BatchSize)):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(one, change) for one in value)
    if isinstance(value, dict):
        return {key: _map(one, change) for key, one in value.items()}
    return value
