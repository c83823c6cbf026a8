"""Patterns of nodes that stand for one layer or function without an operator in older operator sets.

    Reshape InstanceNormalization Reshape [Mul] [Add]    a group norm, as exporters wrote it before operator set 21
    Reshape Transpose Reshape Gather                     every k-th channel: a channel shuffle that is split at once

Imported node by node, both would compute the same values. Merged into one layer or slice, their channels are prunable.
"""

from collections.abc import Sequence
from operator import getitem

import numpy as np
import onnx_ir as ir
from torch import nn

from compress.onnx_import.operation import Operation
from compress.onnx_import.values import Computed, Fixed


def every_kth_channel(op: Operation, index: int) -> Computed | None:
    """Return every k-th channel where a Gather takes those, starting at `index` modulo k; None for another Gather.

    Args:
        op: Gather of one index along the first axis.
        index: Index that the Gather takes.
    """
    back = _producer(op.node.inputs[0], "Reshape")
    turn = None if back is None else _producer(back.inputs[0], "Transpose")
    split = None if turn is None else _producer(turn.inputs[0], "Reshape")
    if back is None or turn is None or split is None or split.inputs[0] is None:
        return None
    image, pairs, joined = (op.values.find(value) for value in (split.inputs[0], split.outputs[0], back.outputs[0]))
    if not all(isinstance(value, Computed) for value in (image, pairs, joined)):
        return None
    assert isinstance(image, Computed)
    assert isinstance(pairs, Computed)
    assert isinstance(joined, Computed)
    order = turn.attributes.get("perm")
    if image.rank < 3 or pairs.rank != 3 or order is None or tuple(order.value) != (1, 0, 2):
        return None
    count = pairs.shapes[0][1]
    for before, middle, after in zip(image.shapes, pairs.shapes, joined.shapes, strict=True):
        images, width, *sizes = before
        rows = images * width // count
        if width % count or middle[:2] != (rows, count) or after != (count, images, width // count, *sizes):
            return None
    return op.call(getitem, image, (slice(None), slice(index % count or None, None, count)))


def group_norm(op: Operation) -> None:
    """Merge the nodes of a group norm pattern into one layer, the result of its last node; do nothing without a match.

    Args:
        op: InstanceNormalization within the possible pattern.
    """
    split, back = _producer(op.node.inputs[0], "Reshape"), _only_reader(op.node, "Reshape")
    image = None if split is None or split.inputs[0] is None else op.values.find(split.inputs[0])
    groups = op.image()
    if back is None or not isinstance(image, Computed) or image.rank < 3 or groups.rank != 3:
        return
    sizes = image.shapes[0]
    count, width = groups.shapes[0][1], sizes[1]
    fits = groups.shapes[0][0] == sizes[0] and width % count == 0
    if not fits or not _restores(op, back, image):
        return
    last, scale = _channel_constant(op, back, "Mul", width, image.rank)
    last, shift = _channel_constant(op, last, "Add", width, image.rank)
    inner_scale, inner_shift, eps = op.known(1), op.known(2), op.attribute("epsilon", 1e-5)
    weights = [value for value in (scale, shift, inner_scale, inner_shift) if value is not None]

    def make() -> nn.Module:
        layer = nn.GroupNorm(count, width, eps=eps)
        each = np.ones(width, np.float32) if scale is None else scale.array.reshape(-1)
        moved = np.zeros(width, np.float32) if shift is None else shift.array.reshape(-1)
        inside, beside = (np.repeat(value.array, width // count) for value in (inner_scale, inner_shift))
        layer.weight = op.graph.parts.parameter(inner_scale, each * inside)
        layer.bias = op.graph.parts.parameter(inner_shift, each * beside + moved)
        return layer

    op.values.merged[last] = op.layer(make, weights, image, ("group norm", count, width, eps))


def _restores(op: Operation, back: ir.Node, image: Computed) -> bool:
    """Return whether a Reshape restores the shape of the image."""
    shape = None if back.inputs[1] is None else op.values.find(back.inputs[1])
    if not isinstance(shape, Fixed):
        return False
    for target, sizes in zip(shape.arrays, image.shapes, strict=True):
        asked = target.reshape(-1).tolist()
        if len(asked) != len(sizes) or any(
            want not in (-1, have) and not (place == 0 and want in (0, 1))
            for place, (want, have) in enumerate(zip(asked, sizes, strict=True))
        ):
            return False
    return True


def _channel_constant(op: Operation, node: ir.Node, kind: str, width: int, rank: int) -> tuple[ir.Node, Fixed | None]:
    """Return the only reader that combines each channel with a constant, and the constant; else `node` and None."""
    reader = _only_reader(node, kind)
    others = [] if reader is None else [value for value in reader.inputs if value is not node.outputs[0]]
    found = op.values.find(others[0]) if len(others) == 1 and others[0] is not None else None
    if reader is None or not isinstance(found, Fixed) or not found.is_constant:
        return node, None
    shape: Sequence[int] = (1,) * (rank - found.array.ndim) + found.array.shape
    return (reader, found) if tuple(shape) == (1, width, *[1] * (rank - 2)) else (node, None)


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    found = None if value is None else value.producer()
    return found if found is not None and found.op_type == kind else None


def _only_reader(node: ir.Node, kind: str) -> ir.Node | None:
    """Return the only reader of a node's output if it has the operator `kind`, else None."""
    output = node.outputs[0]
    readers = output.consumers()
    is_inner = not output.is_graph_output() and len(output.uses()) == 1
    return readers[0] if is_inner and readers[0].op_type == kind else None
