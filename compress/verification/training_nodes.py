"""Nodes of a file in training mode: batch norm on batch statistics, active dropout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from compress.errors import attempt
from compress.onnx_file.io import subgraphs

_STANDARD = ("", "ai.onnx")
_FLAG_IN_INPUT, _MODE_IN_ATTRIBUTE = 12, 14  # operator sets of today's form of Dropout and BatchNormalization
_ALWAYS_INFERENCE = 7  # operator set from which Dropout had no flag, until it got one again
_SAME_TRUTH = ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten")

Source: TypeAlias = TensorProto | NodeProto  # origin of a value: a tensor of the file, or a node


def training_nodes(model: ModelProto, folder: Path) -> list[NodeProto]:
    """Return the nodes in training mode, including nodes of subgraphs and local functions.

    A flag that cannot be traced to a constant counts as set, because an input of the file may set it.

    Args:
        model: Model of the file; tensors may be external data.
        folder: Folder of the file and its external data.
    """
    inlined = _inlined(model)
    opset = _opset(inlined.opset_import)
    found = [*_in_graph(inlined.graph, {}, opset, folder)]
    for function in inlined.functions:  # those that could not be inlined
        found += _in_nodes(function.node, {}, _opset(function.opset_import), folder)
    return found


def _inlined(model: ModelProto) -> ModelProto:
    if not model.functions:
        return model
    # an invalid file is not changed: the checker reports it
    return attempt(lambda: onnx.inliner.inline_local_functions(model), lambda _: model)


def _opset(imports: Sequence[onnx.OperatorSetIdProto]) -> int:
    return next((int(entry.version) for entry in imports if entry.domain in _STANDARD), _MODE_IN_ATTRIBUTE)


def _in_graph(graph: GraphProto, outer: Mapping[str, Source], opset: int, folder: Path) -> Iterator[NodeProto]:
    known = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
    yield from _in_nodes(graph.node, known, opset, folder)


def _in_nodes(nodes: Sequence[NodeProto], outer: Mapping[str, Source], opset: int, folder: Path) -> Iterator[NodeProto]:
    known = {**outer, **{output: node for node in nodes for output in node.output}}
    for node in nodes:
        if node.domain in _STANDARD and _is_training(node, known, opset, folder):
            yield node
        for graph in subgraphs(node):
            yield from _in_graph(graph, known, opset, folder)


def _is_training(node: NodeProto, known: Mapping[str, Source], opset: int, folder: Path) -> bool:
    if node.op_type == "BatchNormalization":
        if opset >= _MODE_IN_ATTRIBUTE:
            return bool(_int(node, "training_mode"))
        outputs = [name for name in node.output if name]
        return len(outputs) > 1 or (opset < _ALWAYS_INFERENCE and not _int(node, "is_test"))
    if node.op_type == "Dropout":
        if opset >= _FLAG_IN_INPUT:
            return len(node.input) > 2 and bool(node.input[2]) and _may_be_true(node.input[2], known, folder)
        return opset < _ALWAYS_INFERENCE and not _int(node, "is_test")
    return False


def _may_be_true(name: str, known: Mapping[str, Source], folder: Path) -> bool:
    """Return False only where a value is a constant without a true entry."""
    seen: set[str] = set()
    while name not in seen:
        seen.add(name)
        source = known.get(name)
        if isinstance(source, TensorProto):
            return _holds_true(source, folder)
        if not isinstance(source, NodeProto):
            return True
        if source.op_type == "Constant":
            return _constant_may_be_true(source, folder)
        if source.op_type not in _SAME_TRUTH or not source.input:
            return True
        name = source.input[0]
    return True


def _constant_may_be_true(node: NodeProto, folder: Path) -> bool:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            return _holds_true(attribute.t, folder)
        if attribute.type == AttributeProto.INT:
            return bool(attribute.i)
        if attribute.type == AttributeProto.FLOAT:
            return bool(attribute.f)
    return True


def _holds_true(tensor: TensorProto, folder: Path) -> bool:
    # values that are missing or damaged count as true
    return attempt(lambda: bool(onnx.numpy_helper.to_array(tensor, str(folder)).any()), lambda _: True)


def _int(node: NodeProto, name: str) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), 0)
