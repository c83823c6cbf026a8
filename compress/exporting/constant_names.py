"""Names of an exported file's constants: the names of the network's parameters and buffers.

The exporter names a tensor of a module that is registered twice after its last path. It keeps one constant for all
tensors that are equal by chance (fresh batch norms, biases of 0). Code that prunes a file layer by layer needs each
layer's own constants under the layer's first path, the one in `named_modules`.
"""

import ast
from collections.abc import Iterator

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper
from torch import nn

_SCOPES = "pkg.torch.onnx.name_scopes"
_LAYER = {1: "weight", 2: "bias"}
_OPERANDS = {
    "BatchNormalization": {**_LAYER, 3: "running_mean", 4: "running_var"},
    "Conv": _LAYER,
    "ConvTranspose": _LAYER,
    "Gemm": _LAYER,
    "InstanceNormalization": _LAYER,
    "LayerNormalization": _LAYER,
}


def name_constants(model: ModelProto, module: nn.Module) -> None:
    """Give each constant the first name of its tensor, and each layer constants of its own; in place.

    Args:
        model: Model from the exporter, with its notes on the origin of nodes.
        module: The exported network.
    """
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in module.state_dict(keep_vars=True).items()}
    twice = {name: known for name, known in names.items() if name != known}
    folded = {f"{name}_bias": f"{known}_bias" for name, known in twice.items()}  # bias of a folded batch norm
    _rename(model.graph, twice | folded)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for position, name, values in _own_tensors(node, module, first):
            shared = constants.get(node.input[position])
            if shared is None or shared.name == name or tuple(shared.dims) != values.shape:
                continue
            array = numpy_helper.to_array(shared)
            if not np.array_equal(array, values):
                continue
            if name not in constants:
                constants[name] = numpy_helper.from_array(array, name)
                model.graph.initializer.append(constants[name])
            node.input[position] = name
    _drop_unread(model.graph, set(names.values()))


def _rename(graph: GraphProto, names: dict[str, str]) -> None:
    """Rename constants wherever they are read."""
    taken = {tensor.name for tensor in graph.initializer} - {value.name for value in graph.output}
    wanted = {name: known for name, known in names.items() if name in taken and known not in taken}
    for tensor in graph.initializer:
        tensor.name = wanted.get(tensor.name, tensor.name)
    for value in graph.value_info:
        value.name = wanted.get(value.name, value.name)
    _rename_inputs(graph, wanted)


def _rename_inputs(graph: GraphProto, wanted: dict[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [wanted.get(name, name) for name in node.input]
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename_inputs(inner, wanted)


def _own_tensors(node: NodeProto, module: nn.Module, first: dict[int, str]) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yield input position, name and values of each tensor that a node reads from its layer."""
    operands = _OPERANDS.get(node.op_type)
    part = _owner(node, module) if operands is not None else None
    if operands is None or part is None:
        return
    for position, leaf in operands.items():
        tensor = getattr(part, leaf, None)
        if tensor is not None and position < len(node.input) and id(tensor) in first:
            yield position, first[id(tensor)], tensor.detach().cpu().numpy()


def _owner(node: NodeProto, module: nn.Module) -> nn.Module | None:
    """Return the innermost module whose forward made a node; None where the exporter noted no module."""
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    for path in reversed(ast.literal_eval(text)):
        try:
            return module.get_submodule(path) if path else None
        except AttributeError:  # the last scope is the operation itself
            continue
    return None


def _drop_unread(graph: GraphProto, names: set[str]) -> None:
    """Drop tensors of the network that nothing reads any more."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    inner = any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute)
    kept = [tensor for tensor in graph.initializer if tensor.name in read or tensor.name not in names or inner]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)
