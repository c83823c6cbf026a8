"""Structure of an ONNX file without its weights. No torch.

The copy is a valid ONNX file: zeros of the same shape (ConstantOfShape) replace each weight of a layer, under its name.
A network built from the copy has the same layers, names and shapes; constants from which the graph computes shapes are
kept.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

from compress.onnx_file.dequantize import float_form, is_qdq
from compress.onnx_file.io import CLASSES_KEY, PREPROCESSING_KEY, each_node, load_onnx

_SHAPE_OF = "compress.shape_of."
_LARGE = 64  # elements; weights with fewer are kept
_WEIGHTS: dict[str, tuple[int, ...]] = {
    "BatchNormalization": (1, 2, 3, 4),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "MatMul": (1,),
    "PRelu": (1,),
}


def write_structure(source: Path, target: Path) -> None:
    """Write a copy of an ONNX file without the weights of its layers; copying a copy changes nothing.

    Args:
        source: The .onnx file, or a copy without weights.
        target: The .onnx file to write.

    Raises:
        ArtifactError: The file cannot be read.
        ModelError: It is quantised and has no float form.
    """
    model = load_onnx(source, weights=True)
    if is_qdq(model):
        model = float_form(onnx.inliner.inline_local_functions(model) if model.functions else model)
    graph = model.graph
    replaced = _only_weights(model)
    shapes, makers, kept = [], [], []
    for tensor in graph.initializer:
        if tensor.name not in replaced or np.prod(tensor.dims) < _LARGE:
            kept.append(tensor)
            continue
        zero = helper.make_tensor(
            "value", tensor.data_type, [1], np.zeros(1, helper.tensor_dtype_to_np_dtype(tensor.data_type))
        )
        shape = numpy_helper.from_array(np.array(tensor.dims, np.int64), f"{_SHAPE_OF}{tensor.name}")
        shapes.append(shape)
        makers.append(helper.make_node("ConstantOfShape", [shape.name], [tensor.name], value=zero))
    nodes = [*makers, *graph.node]
    inputs = [value for value in graph.input if value.name not in replaced]
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *shapes])
    graph.input.extend(inputs)
    for entry in [entry for entry in model.metadata_props if entry.key not in (PREPROCESSING_KEY, CLASSES_KEY)]:
        model.metadata_props.remove(entry)
    onnx.save_model(model, target)


def _only_weights(model: ModelProto) -> set[str]:
    """Return the initializers that are only read as weights of layers."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    as_weight: set[str] = set()
    otherwise = {value.name for value in model.graph.output}
    within = Counter(name for node in each_node(model) for name in node.input)
    for node in model.graph.node:
        within.subtract(node.input)
        for index, name in enumerate(node.input):
            (as_weight if index in _WEIGHTS.get(node.op_type, ()) else otherwise).add(name)
    otherwise.update(name for name, count in within.items() if count)  # read in a branch
    return (initializers & as_weight) - otherwise
