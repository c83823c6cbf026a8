"""Operators with weights, each as the equivalent torch layer."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.onnx_import.operation import Operation, Result, operator
from compress.onnx_import.padding import Window, amounts_in_order, read_window
from compress.onnx_import.patterns import group_norm
from compress.onnx_import.values import Computed, Fixed, Refused

_CONVOLUTIONS: tuple[Callable[..., nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[Callable[..., nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_FUNCTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
T = TypeVar("T")


@operator("Conv")
def build_convolution(op: Operation) -> Result:
    """Build nn.Conv1d, nn.Conv2d or nn.Conv3d; uneven padding is a separate operation before it."""
    image = op.image()
    if not isinstance(op.inputs[1], Fixed):
        return _convolve_with_computed(op, image)
    weight, bias = op.known(1), op.known(2) if op.has(2) else None
    axes, groups = weight.array.ndim - 2, op.attribute("group", 1)
    window = read_window(op, image, weight.array.shape[2:])
    image, pads = _padded(op, image, window)

    def make() -> nn.Module:
        outputs, per_group = weight.array.shape[:2]
        layer = _of_rank(_CONVOLUTIONS, axes)(
            per_group * groups, outputs, tuple(weight.array.shape[2:]), window.strides, pads, window.dilations, groups,
            bias is not None,
        )  # fmt: skip
        _fill(op, layer, weight=weight, bias=bias)
        return layer

    return op.layer(make, _given(weight, bias), image, ("Conv", window, pads, groups))


def _convolve_with_computed(op: Operation, image: Computed) -> Result:
    """Build a convolution whose kernel depends on images."""
    kernel = op.image(1)
    sizes = tuple(kernel.size(axis) for axis in range(2, kernel.rank))
    window = read_window(op, image, sizes)
    image, pads = _padded(op, image, window)
    function = _of_rank(_FUNCTIONS, kernel.rank - 2)
    bias = op.image(2) if op.has(2) else None
    return op.call(function, image, kernel, bias, window.strides, pads, window.dilations, op.attribute("group", 1))


@operator("ConvTranspose")
def build_transposed_convolution(op: Operation) -> Result:
    """Build nn.ConvTranspose1d, 2d or 3d; uneven padding is cropped from its output."""
    image, weight, bias = op.image(), op.known(1), op.known(2) if op.has(2) else None
    axes, groups = weight.array.ndim - 2, op.attribute("group", 1)
    window = read_window(op, image, weight.array.shape[2:], transposed=True)
    extra = tuple(op.attribute("output_padding", (0,) * axes))
    inputs, per_group = weight.array.shape[:2]
    even = window.begins == window.ends and all(
        more < max(stride, dilation)
        for more, stride, dilation in zip(extra, window.strides, window.dilations, strict=True)
    )
    pads, more = (window.begins, extra) if even else ((0,) * axes, (0,) * axes)

    def make() -> nn.Module:
        layer = _of_rank(_TRANSPOSED, axes)(
            inputs, per_group * groups, tuple(weight.array.shape[2:]), window.strides, pads, more, groups,
            bias is not None, window.dilations,
        )  # fmt: skip
        _fill(op, layer, weight=weight, bias=bias)
        return layer

    found = op.layer(make, _given(weight, bias), image, ("ConvTranspose", window, pads, more, groups))
    if even:
        return found
    cuts = [(begin, end - one) for begin, end, one in zip(window.begins, window.ends, extra, strict=True)]
    if bias is not None and any(end < 0 for _, end in cuts):
        raise Refused("adds output_padding beyond its stride, which is not supported")
    return op.call(F.pad, found, amounts_in_order([(-begin, -end) for begin, end in cuts]))


@operator("BatchNormalization")
def build_batch_norm(op: Operation) -> Result:
    """Build nn.BatchNorm1d, 2d or 3d."""
    image = op.image()
    weights = [op.known(index) for index in range(1, 5)]
    if op.attribute("training_mode", 0):
        raise Refused("is in training mode")
    if not op.attribute("spatial", 1):
        raise Refused("normalises each position by itself (spatial=0), which is not supported")
    eps, momentum = op.attribute("epsilon", 1e-5), op.attribute("momentum", 0.9)
    scale, bias, mean, variance = weights
    kind = _of_rank(_BATCH_NORMS, max(1, image.rank - 2))

    def make() -> nn.Module:
        layer = kind(scale.array.size, eps=eps, momentum=1 - momentum)
        _fill(op, layer, weight=scale, bias=bias)
        layer.running_mean = torch.from_numpy(mean.array.copy())
        layer.running_var = torch.from_numpy(variance.array.copy())
        return layer

    return op.layer(make, weights, image, ("BatchNormalization", kind, eps, momentum))


@operator("InstanceNormalization")
def build_instance_norm(op: Operation) -> Result:
    """Build nn.InstanceNorm1d, 2d or 3d."""
    image, scale, bias, eps = op.image(), op.known(1), op.known(2), op.attribute("epsilon", 1e-5)
    kind = _of_rank(_INSTANCE_NORMS, image.rank - 2)
    group_norm(op)

    def make() -> nn.Module:
        layer = kind(scale.array.size, eps=eps, affine=True)
        _fill(op, layer, weight=scale, bias=bias)
        return layer

    return op.layer(make, (scale, bias), image, ("InstanceNormalization", kind, eps))


@operator("GroupNormalization")
def build_group_norm(op: Operation) -> Result:
    """Build nn.GroupNorm; before operator set 21 it had one scale a group instead of one a channel."""
    image, scale, bias, eps = op.image(), op.known(1), op.known(2), op.attribute("epsilon", 1e-5)
    groups, channels = op.attribute("num_groups", 1), image.size(1)

    def make() -> nn.Module:
        layer = nn.GroupNorm(groups, channels, eps=eps)
        for name, value in (("weight", scale), ("bias", bias)):
            each = value.array if value.array.size == channels else np.repeat(value.array, channels // groups)
            setattr(layer, name, op.graph.parts.parameter(value, each))
        return layer

    return op.layer(make, (scale, bias), image, ("GroupNormalization", groups, channels, eps))


@operator("LayerNormalization")
def build_layer_norm(op: Operation) -> Result:
    """Build nn.LayerNorm."""
    image, scale, bias = op.image(), op.known(1), op.known(2) if op.has(2) else None
    eps, first = op.attribute("epsilon", 1e-5), image.axis(op.attribute("axis", -1))
    shape = tuple(image.size(axis) for axis in range(first, image.rank))

    def make() -> nn.Module:
        layer = nn.LayerNorm(shape, eps=eps, bias=bias is not None)
        for name, value in (("weight", scale), ("bias", bias)):
            if value is not None:
                setattr(layer, name, op.graph.parts.parameter(value, np.broadcast_to(value.array, shape)))
        return layer

    return op.layer(make, _given(scale, bias), image, ("LayerNormalization", shape, eps))


@operator("PRelu")
def build_prelu(op: Operation) -> Result:
    """Build nn.PReLU for one slope in all or one a channel; else torch.where by sign."""
    image = op.image()
    slope = op.inputs[1]
    if isinstance(slope, Fixed) and (slope.array.size == 1 or _is_by_channel(slope.array, image)):

        def make() -> nn.Module:
            layer = nn.PReLU(slope.array.size)
            layer.weight = op.graph.parts.parameter(slope, slope.array.reshape(-1))
            return layer

        return op.layer(make, (slope,), image, "PRelu")
    below = op.call(torch.mul, image, op.image(1))
    return op.call(torch.where, op.call(torch.lt, image, 0), below, image)


@operator("Gemm")
def build_gemm(op: Operation) -> Result:
    """Build nn.Linear where the second matrix is a constant; else the products and sums of the Gemm."""
    alpha, beta = op.attribute("alpha", 1.0), op.attribute("beta", 1.0)
    image = op.call(torch.t, op.image()) if op.attribute("transA", 0) else op.image()
    transposed = bool(op.attribute("transB", 0))
    second, third = op.inputs[1], op.inputs[2] if op.has(2) else None
    if isinstance(second, Fixed) and _is_bias(third, second.array.shape[0 if transposed else 1]):
        bias = third if isinstance(third, Fixed) else None
        return _linear(op, image, second, bias, transposed=transposed, alpha=alpha, beta=beta)
    matrix = op.call(torch.t, op.image(1)) if transposed else op.image(1)
    product = op.call(torch.matmul, image, matrix)
    if alpha != 1:
        product = op.call(torch.mul, product, alpha)
    if third is None:
        return product
    return op.call(torch.add, product, op.image(2), alpha=beta)


@operator("MatMul")
def build_matmul(op: Operation) -> Result:
    """Build nn.Linear where the second matrix is a constant, with the bias of a following Add; else a product."""
    second = op.inputs[1]
    if not isinstance(second, Fixed) or second.array.ndim != 2:
        return op.call(torch.matmul, op.image(0), op.image(1))
    image = op.image()
    bias = _bias_added_next(op, second.array.shape[1])
    found = _linear(op, image, second, bias, transposed=False)
    if bias is not None:
        op.values.merged[op.node.outputs[0].consumers()[0]] = found
    return found


@operator("Einsum")
def build_einsum(op: Operation) -> Result:
    """Build torch.einsum."""
    equation = op.attribute("equation", "")
    return op.call(torch.einsum, equation, *(op.image(index) for index in range(len(op.inputs))))


def _linear(
    op: Operation,
    image: Computed,
    matrix: Fixed,
    bias: Fixed | None,
    *,
    transposed: bool,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Computed:
    def make() -> nn.Module:
        weight = matrix.array if transposed else matrix.array.T
        weight = weight if alpha == 1 else weight * np.float32(alpha)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        layer.weight = op.graph.parts.parameter(matrix, np.ascontiguousarray(weight))
        if bias is not None:
            values = bias.array if beta == 1 else bias.array * np.float32(beta)
            layer.bias = op.graph.parts.parameter(bias, np.broadcast_to(values.reshape(-1), weight.shape[:1]))
        return layer

    return op.layer(make, _given(matrix, bias), image, ("Linear", transposed, alpha, beta))


def _bias_added_next(op: Operation, width: int) -> Fixed | None:
    """Return the bias that the only reader of a product adds, one number for each output; else None."""
    output = op.node.outputs[0]
    readers = output.consumers()
    if output.is_graph_output() or len(readers) != 1 or readers[0].op_type != "Add" or len(output.uses()) != 1:
        return None
    other = next((value for value in readers[0].inputs if value is not None and value is not output), None)
    found = None if other is None else op.values.find(other)
    is_fixed = isinstance(found, Fixed) and found.is_constant
    return found if isinstance(found, Fixed) and is_fixed and found.array.shape == (width,) else None


def _is_bias(value: Computed | Fixed | None, width: int) -> bool:
    """Return whether the third input of a Gemm is missing, or a constant that is the same for each row."""
    if value is None:
        return True
    return isinstance(value, Fixed) and (
        value.array.size == 1 or (value.array.size == width and value.array.shape[-1] == width)
    )


def _is_by_channel(slope: np.ndarray, image: Computed) -> bool:
    """Return whether a PRelu has one slope for each channel, the second axis of the image."""
    if image.rank < 2 or slope.size != image.shapes[0][1]:
        return False
    shape = (1,) * (image.rank - slope.ndim) + slope.shape
    return shape[1] == slope.size


def _padded(op: Operation, image: Computed, window: Window) -> tuple[Computed, tuple[int, ...]]:
    """Return the image, padded if the padding is uneven, and the even padding for the layer."""
    if window.begins == window.ends:
        return image, window.begins
    pads = amounts_in_order(list(zip(window.begins, window.ends, strict=True)))
    return op.call(F.pad, image, pads), (0,) * len(window.begins)


def _fill(op: Operation, layer: nn.Module, **weights: Fixed | None) -> None:
    for name, value in weights.items():
        if value is not None:
            setattr(layer, name, op.graph.parts.parameter(value))


def _given(*weights: Fixed | None) -> list[Fixed]:
    return [weight for weight in weights if weight is not None]


def _of_rank(kinds: Sequence[T], axes: int) -> T:
    if not 1 <= axes <= len(kinds):
        raise Refused(f"works on {axes} axes besides images and channels; 1, 2 and 3 are supported")
    return kinds[axes - 1]
