"""Multiply-accumulates of one ONNX node, from its operator and the shapes of its inputs and outputs.

    products = find_products(node, shape_of)      # shape_of("value") -> (1, 3, 16, 16)

Convolutions, matrix products, attention and recurrent layers are counted, of ONNX itself and in ONNX Runtime's fused
and quantised forms. This module and `cost/macs.py` (torch) are independent: each checks the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import NodeProto, helper

Shape = tuple[int, ...]
ShapeOf = Callable[[str], Shape]


@dataclass(frozen=True, slots=True)
class NodeProduct:
    """Sums of products that one node computes.

    Attributes:
        macs: Multiply-accumulates of all images of the batch.
        operands: Names of the values that are multiplied.
        repeats: Number of times that a weight among them is read: the steps of a recurrent layer, else 1.
    """

    macs: int
    operands: tuple[str, ...]
    repeats: int = 1


def find_products(node: NodeProto, shape_of: ShapeOf) -> list[NodeProduct]:
    """Return the products that a node computes; an empty list for an operator that is not counted.

    Args:
        node: Any node.
        shape_of: Function that returns the shape of a value by name; its errors are passed on.
    """
    count = _COUNTS.get(node.op_type) if node.domain in _DOMAINS else None
    return [] if count is None else list(count(node, shape_of))


def is_counted(node: NodeProto) -> bool:
    """Return whether a node's operator is one that multiplies and sums up."""
    return node.domain in _DOMAINS and node.op_type in _COUNTS


def _convolution(weight: int, *, at_input: bool = False) -> _Count:
    """Return the count of a convolution with a weight (outputs, inputs, ...) at input `weight`."""

    def count(node: NodeProto, shape_of: ShapeOf) -> Iterator[NodeProduct]:
        kernel = node.input[weight]
        positions = shape_of(node.input[0] if at_input else node.output[0])
        yield NodeProduct(math.prod(positions) * math.prod(shape_of(kernel)[1:]), (node.input[0], kernel))

    return count


def _product(right: int) -> _Count:
    """Return the count of (..., M, K) @ (..., K, N) with the second matrix at input `right`."""

    def count(node: NodeProto, shape_of: ShapeOf) -> Iterator[NodeProduct]:
        left = shape_of(node.input[0])
        shared = left[-2 if _attribute(node, "transA", 0) and len(left) > 1 else -1]
        macs = math.prod(shape_of(node.output[0])) * shared
        yield NodeProduct(macs, (node.input[0], node.input[right]))

    return count


def _recurrent(node: NodeProto, shape_of: ShapeOf) -> Iterator[NodeProduct]:
    """Count RNN, GRU, LSTM: X (T, N, I), or (N, T, I) with layout 1; W (directions, gates * H, I); R (..., H)."""
    inputs, from_input, from_hidden = node.input[:3]
    first, second, _ = shape_of(inputs)
    steps = second if _attribute(node, "layout", 0) else first
    yield NodeProduct(first * second * math.prod(shape_of(from_input)), (inputs, from_input))
    macs = first * second * math.prod(shape_of(from_hidden))
    yield NodeProduct(macs, (inputs, from_hidden), repeats=steps)


def _attention(node: NodeProto, shape_of: ShapeOf) -> Iterator[NodeProduct]:
    """Count attention of (B, H, L, E) or (B, L, H * E) queries, keys and values; cached keys may come before."""
    query, key, value = node.input[:3]
    places = shape_of(key)[-2]
    if node.domain in _STANDARD and len(node.input) > 4 and node.input[4]:
        places += shape_of(node.input[4])[-2]
    yield NodeProduct(math.prod(shape_of(query)) * places, (query, key))
    yield NodeProduct(math.prod(shape_of(node.output[0])) * places, (query, value))


def _fused_attention(node: NodeProto, shape_of: ShapeOf) -> Iterator[NodeProduct]:
    """Count ONNX Runtime's Attention: projections of (B, L, D) by one weight, then the attention itself."""
    if node.domain in _STANDARD:
        yield from _attention(node, shape_of)
        return
    inputs, weight = node.input[:2]
    images, places, features = shape_of(inputs)
    sizes = _attribute(node, "qkv_hidden_sizes", [shape_of(weight)[1] // 3] * 3)
    yield NodeProduct(images * places * features * sum(sizes), (inputs, weight))
    yield NodeProduct(images * places * places * (sizes[0] + sizes[2]), (inputs, inputs))


def _einsum(node: NodeProto, shape_of: ShapeOf) -> Iterator[NodeProduct]:
    equation = _attribute(node, "equation", b"").decode()
    macs = einsum_macs(equation, [shape_of(name) for name in node.input])
    if macs:
        yield NodeProduct(macs, tuple(node.input))


def einsum_macs(equation: str, shapes: Sequence[Shape]) -> int:
    """Return the multiply-accumulates of an Einsum, taken two operands at a time from the left.

    Indices of one operand alone are summed first. A step without a sum counts as 0.

    >>> einsum_macs("bij,bjk->bik", [(1, 2, 3), (1, 3, 5)]), einsum_macs("i,i->i", [(4,), (4,)])
    (30, 0)
    """
    terms, output = _indices(equation, [len(shape) for shape in shapes])
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for index, size in zip(term, shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    macs = 0
    left = {index: size for index, size in zip(terms[0], shapes[0], strict=True) if size > 1}
    for number, (term, shape) in enumerate(zip(terms[1:], shapes[1:], strict=True), 1):
        right = {index for index, size in zip(term, shape, strict=True) if size > 1}
        needed = {*output, *(index for later in terms[number + 1 :] for index in later)}
        summed = (left.keys() & right) - needed
        kept = (left.keys() | right) & needed
        if summed:
            macs += math.prod(sizes[index] for index in kept | summed)
        left = {index: sizes[index] for index in kept}
    return macs


def _indices(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Return the indices of each operand and of the output; an ellipsis becomes "0", "1" ... from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    most = 0

    def read(term: str, rank: int) -> list[str]:
        nonlocal most
        before, dots, after = term.partition("...")
        count = rank - len(before) - len(after) if dots else 0
        most = max(most, count)
        return [*before, *(str(place) for place in reversed(range(count))), *after]

    terms = [read(term, rank) for term, rank in zip(left.split(","), ranks, strict=True)]
    dotted = [str(place) for place in reversed(range(most))]
    if arrow:
        before, dots, after = right.partition("...")
        return terms, [*before, *(dotted if dots else ()), *after]
    letters = [index for term in terms for index in term if index.isalpha()]
    return terms, [*dotted, *sorted(index for index in set(letters) if letters.count(index) == 1)]


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = (attribute for attribute in node.attribute if attribute.name == name)
    return next((helper.get_attribute_value(attribute) for attribute in found), default)


_Count = Callable[[NodeProto, ShapeOf], Iterator[NodeProduct]]
_STANDARD = ("", "ai.onnx")
_DOMAINS = (*_STANDARD, "com.microsoft")
_COUNTS: dict[str, _Count] = {
    "Conv": _convolution(1),
    "FusedConv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "DeformConv": _convolution(1),
    "ConvTranspose": _convolution(1, at_input=True),
    "Gemm": _product(1),
    "FusedGemm": _product(1),
    "MatMul": _product(1),
    "FusedMatMul": _product(1),
    "MatMulInteger": _product(1),
    "QLinearMatMul": _product(3),
    "QGemm": _product(3),
    "Einsum": _einsum,
    "RNN": _recurrent,
    "GRU": _recurrent,
    "LSTM": _recurrent,
    "Attention": _fused_attention,
    "MultiHeadAttention": _attention,
}
