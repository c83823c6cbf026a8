"""Multiply-accumulates of one torch operation, from its operands.

    macs = constant * product of the sizes of some axes

Counted are convolutions, matrix products, attention and recurrent layers, in the form in which PyTorch's dispatcher
carries them out. Biases, norms, activations, pooling and products without a sum are not.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Sized = tuple[Tensor, int]  # a tensor and one of its axes


@dataclass(frozen=True, slots=True)
class Product:
    """Sums of products that one operation computes.

    Attributes:
        macs: Multiply-accumulates.
        operands: The two tensors that are multiplied; weights come last.
        axes: The axes whose sizes `macs` is proportional to, each once.
    """

    macs: int
    operands: tuple[Tensor, Tensor]
    axes: tuple[Sized, ...]


def find_products(name: str, arguments: Mapping[str, Any], result: Any) -> tuple[Product, ...]:
    """Return the products that an operation computes; none for an operation that is not counted.

    Args:
        name: PyTorch's, without its namespace: "convolution", "addmm".
        arguments: By their names in the operation's schema.
        result: What it returned.
    """
    count = _COUNTS.get(name)
    return () if count is None else tuple(count(arguments, result))


def is_depthwise_call(groups: int, inputs: int) -> bool:
    """Whether a convolution reads each channel on its own."""
    return groups > 1 and groups == inputs


def _convolution(arguments: Mapping[str, Any], result: Tensor) -> Iterator[Product]:
    image, weight = arguments["input"], arguments["weight"]
    transposed, groups = bool(arguments["transposed"]), int(arguments["groups"])
    positions = image if transposed else result
    axes: tuple[Sized, ...] = ((result, 1), (image, 1))
    if is_depthwise_call(groups, image.shape[1]) and (not transposed or groups == result.shape[1]):
        axes = axes[:1]  # the number of groups follows the channels
    yield Product(positions.numel() * weight[0].numel(), (image, weight), axes)


def _deformable(arguments: Mapping[str, Any], result: Tensor) -> Iterator[Product]:
    image, weight = arguments["input"], arguments["weight"]
    yield Product(result.numel() * weight[0].numel(), (image, weight), ((result, 1), (image, 1)))


def _matrices(first: str, second: str) -> Callable[[Mapping[str, Any], Any], Iterator[Product]]:
    """Return the count of (..., M, K) @ (..., K, N), either of which may be a vector."""

    def count(arguments: Mapping[str, Any], result: Any) -> Iterator[Product]:
        left, right = arguments[first], arguments[second]
        columns = right.shape[-1] if right.ndim > 1 else 1
        axes = [(left, axis) for axis in range(left.ndim)]
        if right.ndim > 1:
            axes.append((result, result.ndim - 1))
        yield Product(left.numel() * columns, (left, right), tuple(axes))

    return count


def _attention(arguments: Mapping[str, Any], result: Any) -> Iterator[Product]:
    """(B, H, L, E) queries, (B, H, S, E) keys, (B, H, S, V) values."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    pairs, places = query.numel() // query.shape[-1], key.shape[-2]
    rows = tuple((query, axis) for axis in range(3))
    yield Product(pairs * places * query.shape[-1], (query, key), (*rows, (query, 3), (key, 2)))
    yield Product(pairs * places * value.shape[-1], (query, value), (*rows, (key, 2), (value, 3)))


def _recurrent(arguments: Mapping[str, Any], result: Any) -> Iterator[Product]:
    """One direction of one layer over (T, N, I) inputs; each step multiplies the hidden state anew."""
    inputs, from_input, from_hidden = arguments["input"], arguments["weight0"], arguments["weight1"]
    steps, images = inputs.shape[:2]
    yield Product(steps * images * from_input.numel(), (inputs, from_input), ((inputs, 2), (from_input, 0)))
    for _ in range(steps):
        yield Product(images * from_hidden.numel(), (inputs, from_hidden), ((from_hidden, 0), (from_hidden, 1)))


def _bilinear(arguments: Mapping[str, Any], result: Any) -> Iterator[Product]:
    """(N, I), (O, I, J) and (N, J) to (N, O), the form that `torch.nn.functional.bilinear` asks for."""
    left, weight, right = (arguments[name] for name in ("i1", "i2", "i3"))
    if (arguments["expand1"], arguments["expand2"], arguments["sumdim"]) != ([1, 3], [0], [2, 3]):
        return
    rows, (outputs, _, columns) = left.shape[0], weight.shape
    yield Product(rows * weight.numel(), (left, weight), ((left, 0), (weight, 0), (left, 1), (right, 1)))
    yield Product(rows * outputs * columns, (left, right), ((left, 0), (weight, 0), (right, 1)))


_COUNTS: dict[str, Callable[[Mapping[str, Any], Any], Iterator[Product]]] = {
    "convolution": _convolution,
    "deform_conv2d": _deformable,
    "mm": _matrices("self", "mat2"),
    "addmm": _matrices("mat1", "mat2"),
    "bmm": _matrices("self", "mat2"),
    "baddbmm": _matrices("batch1", "batch2"),
    "addbmm": _matrices("batch1", "batch2"),
    "mv": _matrices("self", "vec"),
    "addmv": _matrices("mat", "vec"),
    "dot": _matrices("self", "tensor"),
    "vdot": _matrices("self", "other"),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "mkldnn_rnn_layer": _recurrent,
    "_trilinear": _bilinear,
}
