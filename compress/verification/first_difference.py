"""The node from which on two runtimes disagree, found by bisection over the nodes of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from compress.data.splits import Split
from compress.errors import CompressError
from compress.onnx_file.io import ONE_FILE_LIMIT_BYTES, load_onnx, save_onnx
from compress.verification.parity import parity
from compress.verification.runtimes.base import Runtime

_IMAGES = 2
Open = Callable[[Path], Runtime]


def find_first_difference(path: Path, there: Open, reference: Open, split: Split, limit: float) -> str | None:
    """Return the first node whose output differs between two runtimes, such as "Conv layer1.conv1".

    The file is cut behind a node, and the parts are opened in both runtimes. A difference is taken to stay from the
    node where it begins to the end. It is relative to the largest value of an output.

    Args:
        path: The .onnx file, whose outputs differ.
        there: Function that returns the runtime of a file, not opened yet.
        reference: The same for the runtime that is correct.
        split: Split of at least one image.
        limit: Largest relative difference that counts as none.

    Returns:
        Operator and name of the node; None if the parts of the file cannot be compared.
    """
    model = load_onnx(path, weights=True)
    places = _candidates(model)

    def differs(place: int, folder: Path) -> bool:
        part = folder / f"{place}.onnx"
        save_onnx(_cut_behind(model, place), part, external=model.ByteSize() > ONE_FILE_LIMIT_BYTES)
        with there(part) as one, reference(part) as other:
            result = parity(one, other, split, _IMAGES)
        return result.max_abs > limit * max(result.largest_output, 1e-12)

    try:
        with TemporaryDirectory(prefix="compress-parts-") as folder:
            low, high = -1, len(places) - 1
            if high < 0 or not differs(places[high], Path(folder)):
                return None
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if differs(places[middle], Path(folder)) else (middle, high)
    except CompressError:  # a part that one of them cannot open
        return None
    node = model.graph.node[places[high]]
    return f"{node.op_type} {node.name or node.output[0]}"


def _candidates(model: onnx.ModelProto) -> list[int]:
    """Return the places of nodes with a float output for each image, in the order of the file."""
    kinds = _output_kinds(model)
    places = []
    for place, node in enumerate(model.graph.node):
        kind = kinds.get(node.output[0]) if node.output else None
        if kind is not None and kind.elem_type == onnx.TensorProto.FLOAT and _has_batch(kind, model):
            places.append(place)
    return places


def _output_kinds(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {one.name: one.type.tensor_type for one in (*inferred.value_info, *inferred.output)}


def _has_batch(kind: onnx.TypeProto.Tensor, model: onnx.ModelProto) -> bool:
    """Return whether the first axis of a value is that of the first input."""
    first = model.graph.input[0].type.tensor_type.shape.dim
    dims = kind.shape.dim
    return len(dims) > 1 and len(first) > 0 and dims[0] == first[0]


def _cut_behind(model: onnx.ModelProto, place: int) -> onnx.ModelProto:
    """Return the part of a model that computes the first output of a node."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    name = model.graph.node[place].output[0]
    needed, kept = {name}, []
    for node in reversed(model.graph.node[: place + 1]):
        if needed & set(node.output):
            needed |= {one for one in node.input if one}
            kept.append(node)
    graph = part.graph
    del graph.node[:], graph.output[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.output.append(onnx.ValueInfoProto(name=name, type=onnx.TypeProto(tensor_type=_output_kinds(model)[name])))
    weights = [one for one in graph.initializer if one.name in needed]
    inputs = [one for one in graph.input if one.name in needed]
    del graph.initializer[:], graph.input[:]
    graph.initializer.extend(weights)
    graph.input.extend(inputs)
    return part
