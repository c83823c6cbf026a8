"""Pooling and local response normalisation."""

import torch
import torch.nn.functional as F

from compress.onnx_import.operation import Operation, Result, operator
from compress.onnx_import.padding import Window, amounts_in_order, read_window
from compress.onnx_import.values import Computed, Fixed, Refused

_MAX = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_ADAPTIVE = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


@operator("GlobalAveragePool")
def build_global_average(op: Operation) -> Result:
    """Build the mean over all positions."""
    image = op.image()
    _check_axes(image.rank - 2)
    return op.call(_ADAPTIVE[image.rank - 3], image, 1)


@operator("GlobalMaxPool")
def build_global_maximum(op: Operation) -> Result:
    """Build the maximum over all positions."""
    image = op.image()
    return op.call(torch.amax, image, tuple(range(2, image.rank)), True)


@operator("MaxPool")
def build_maximum(op: Operation) -> Result:
    """Build the maximum of each window; uneven padding is a separate operation before it."""
    image, window, ceil = _read(op)
    pads = window.begins
    if window.begins != window.ends or any(2 * pad > size for pad, size in zip(pads, window.sizes, strict=True)):
        image = op.call(F.pad, image, _amounts(window), "constant", float("-inf"))
        pads = (0,) * len(pads)
    function = _MAX[len(pads) - 1]
    return op.call(function, image, window.sizes, window.strides, pads, window.dilations, ceil)


@operator("AveragePool")
def build_average(op: Operation) -> Result:
    """Build the mean of each window; with padding that torch does not support, divide by the share of points inside."""
    image, window, ceil = _read(op)
    if any(dilation != 1 for dilation in window.dilations):
        raise Refused("has dilations, which are not supported")
    padded = bool(op.attribute("count_include_pad", 0))
    function = _AVERAGE[len(window.sizes) - 1]
    even = window.begins == window.ends
    fits = all(2 * pad <= size for pad, size in zip(window.begins, window.sizes, strict=True))
    if even and fits:
        return op.call(function, image, window.sizes, window.strides, window.begins, ceil, padded)
    wide = op.call(F.pad, image, _amounts(window))
    mean = op.call(function, wide, window.sizes, window.strides, (0,) * len(window.sizes), ceil)
    if padded:
        return mean
    sizes = [1, 1, *(image.size(axis) for axis in range(2, image.rank))]
    inside = F.pad(torch.ones(sizes), _amounts(window))
    share = function(inside, window.sizes, window.strides, (0,) * len(window.sizes), ceil)
    counted = op.graph.constant(Fixed.constant(f"{op.output}_points", share.numpy()))
    return op.call(torch.div, mean, counted)


@operator("LpPool")
def build_norm(op: Operation) -> Result:
    """Build the norm of each window."""
    image, window, ceil = _read(op)
    if (
        any((*window.begins, *window.ends))
        or any(dilation != 1 for dilation in window.dilations)
        or len(window.sizes) > 2
    ):
        raise Refused("has padding, dilations or three axes, which is not supported")
    function = (F.lp_pool1d, F.lp_pool2d)[len(window.sizes) - 1]
    return op.call(function, op.call(torch.abs, image), float(op.attribute("p", 2)), window.sizes, window.strides, ceil)


@operator("LRN")
def build_local_response(op: Operation) -> Result:
    """Build the division of each channel by the squares of its neighbours."""
    size = op.attribute("size", 1)
    if size % 2 == 0:
        raise Refused("has an even size, which torch centres otherwise")
    alpha, beta, bias = op.attribute("alpha", 1e-4), op.attribute("beta", 0.75), op.attribute("bias", 1.0)
    return op.call(F.local_response_norm, op.image(), size, alpha, beta, bias)


def _read(op: Operation) -> tuple[Computed, Window, bool]:
    image = op.image()
    _check_axes(image.rank - 2)
    window = read_window(op, image, op.attribute("kernel_shape", ()))
    if op.attribute("storage_order", 0):
        raise Refused("has storage_order 1, which is not supported")
    return image, window, bool(op.attribute("ceil_mode", 0))


def _check_axes(axes: int) -> None:
    if not 1 <= axes <= len(_MAX):
        raise Refused(f"works on {axes} axes besides images and channels; 1, 2 and 3 are supported")


def _amounts(window: Window) -> list[int]:
    return amounts_in_order(list(zip(window.begins, window.ends, strict=True)))
