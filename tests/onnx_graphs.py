"""Small ONNX files written node by node, for the tests of the import."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

Shape = Sequence[int | str]


def node(
    operator: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), name: str = "", **attributes: Any
) -> NodeProto:
    """Return a node; its first input is "x" and its output "y" where a test does not say otherwise."""
    return helper.make_node(operator, list(inputs), list(outputs), name or f"{operator}_{outputs[0]}", **attributes)


def weights(**shapes: Sequence[int]) -> dict[str, np.ndarray]:
    """Return seeded normal numbers of the given shapes."""
    random = np.random.default_rng(7)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make(
    nodes: Sequence[NodeProto],
    constants: Mapping[str, np.ndarray] | None = None,
    *,
    inputs: Mapping[str, Shape] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 21,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """Return a model that takes "x", (N, 4, 6, 6), where a test does not say otherwise."""
    taken = [
        helper.make_tensor_value_info(name, kind, shape) for name, shape in (inputs or {"x": ("N", 4, 6, 6)}).items()
    ]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(
        list(nodes), "small", taken, [onnx.ValueInfoProto(name=name) for name in outputs], tensors
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    is_plain = all(one.domain == "" for one in nodes)
    return onnx.shape_inference.infer_shapes(model) if is_plain else model


def write(path: Path, model: onnx.ModelProto) -> Path:
    """Write a model."""
    onnx.save_model(model, path)
    return path
