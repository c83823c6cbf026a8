"""QOperator graphs: layers are single integer operators (QLinearConv, QGemm, QLinearAdd), without rounding between.

ONNX Runtime has such operators in a domain of its own, so that no other runtime reads these files. Its CPU provider
turns a QDQ graph into much the same operators when it opens the file, but not always into all of them.
"""

from collections.abc import Iterator

from onnx import ModelProto, NodeProto

_GEMM_OUTPUT = 7  # place of the scale of the outputs among the inputs of QGemm; the zero point follows
_SHAPES_ONLY = frozenset(
    ("Concat", "Flatten", "Gather", "Identity", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose",
     "Unsqueeze")
)  # fmt: skip


def last_nodes(model: ModelProto) -> list[str]:
    """Return the names of the nodes that must stay float, so that the outputs of the network are float.

    These are the last node before each output, and those that change only the shape of its result. A Gemm directly
    before an output may be quantised: QGemm returns floats as well.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    found: list[str] = []
    for output in model.graph.output:
        node = producers.get(output.name)
        if node is not None and node.op_type != "Gemm":
            found += [one.name for one in _up_to_computation(node, producers)]
    return list(dict.fromkeys(found))


def _up_to_computation(node: NodeProto, producers: dict[str, NodeProto]) -> Iterator[NodeProto]:
    """Yield a node and, where it changes only shapes, the nodes before it up to those that compute values."""
    yield node
    if node.op_type in _SHAPES_ONLY:
        for name in node.input:
            if name in producers:
                yield from _up_to_computation(producers[name], producers)


def free_gemm_outputs(model: ModelProto) -> None:
    """Let each QGemm before an output of the network return floats, in place."""
    producers = {name: node for node in model.graph.node for name in node.output}
    for output in model.graph.output:
        last = producers.get(output.name)
        gemm = producers.get(last.input[0]) if last is not None and last.op_type == "DequantizeLinear" else None
        if last is None or gemm is None or gemm.op_type != "QGemm":
            continue
        if sum(gemm.output[0] in node.input for node in model.graph.node) > 1:
            continue
        del gemm.input[_GEMM_OUTPUT:]
        gemm.output[0] = output.name
        model.graph.node.remove(last)
