"""Operators that reduce axes: sums, means, extremes; and normalisations by a reduction, such as softmax."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.onnx_import.operation import Operation, Result, operator
from compress.onnx_import.reshaping import reshape
from compress.onnx_import.values import Refused

_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceMax": torch.amax,
    "ReduceMean": torch.mean,
    "ReduceMin": torch.amin,
    "ReduceSum": torch.sum,
}
_BEFORE: dict[str, Callable[..., Tensor]] = {
    "ReduceL1": torch.abs,
    "ReduceL2": torch.square,
    "ReduceSumSquare": torch.square,
}
_AFTER: dict[str, Callable[..., Tensor]] = {"ReduceL2": torch.sqrt, "ReduceLogSum": torch.log}
_NORMALISED: dict[str, Callable[..., Tensor]] = {"LogSoftmax": F.log_softmax, "Softmax": F.softmax}
_SOFTMAX_OF_ONE_AXIS = 13  # before this operator set, all axes from the given one on were taken together


@operator(*_REDUCTIONS, *_BEFORE, "ReduceLogSum")
def build_reduction(op: Operation) -> Result:
    """Build a reduction over some axes."""
    image, axes, keep = op.image(), op.setting("axes", 1), bool(op.attribute("keepdims", 1))
    if not axes and op.attribute("noop_with_empty_axes", 0):
        return image
    places = tuple(image.axis(axis) for axis in axes) if axes else tuple(range(image.rank))
    if op.kind in _BEFORE:
        image = op.call(_BEFORE[op.kind], image)
    found = op.call(_REDUCTIONS.get(op.kind, torch.sum), image, places, keep)
    return op.call(_AFTER[op.kind], found) if op.kind in _AFTER else found


@operator("ReduceProd")
def build_product(op: Operation) -> Result:
    """Build a product over some axes, one after the other."""
    image, axes, keep = op.image(), op.setting("axes", 1), bool(op.attribute("keepdims", 1))
    for axis in sorted((image.axis(axis) for axis in axes or range(image.rank)), reverse=True):
        image = op.call(torch.prod, image, axis, keep)
    return image


@operator("ArgMax", "ArgMin")
def build_place_of_extreme(op: Operation) -> Result:
    """Build the index of the largest or smallest number along an axis."""
    if op.attribute("select_last_index", 0):
        raise Refused("has select_last_index, which is not supported")
    image, function = op.image(), torch.argmax if op.kind == "ArgMax" else torch.argmin
    return op.call(function, image, image.axis(op.attribute("axis", 0)), bool(op.attribute("keepdims", 1)))


@operator("TopK")
def build_largest(op: Operation) -> Result:
    """Build the k largest or smallest numbers and their indices."""
    image, count = op.image(), op.setting("k", 1)
    axis, largest = image.axis(op.attribute("axis", -1)), bool(op.attribute("largest", 1))
    return op.call_several(torch.topk, image, int(count[0] if isinstance(count, list) else count), axis, largest, True)


@operator("CumSum")
def build_running_sum(op: Operation) -> Result:
    """Build running sums."""
    if op.attribute("exclusive", 0) or op.attribute("reverse", 0):
        raise Refused("is exclusive or reversed, which is not supported")
    image = op.image()
    return op.call(torch.cumsum, image, image.axis(int(op.array(1).reshape(-1)[0])))


@operator(*_NORMALISED)
def build_softmax(op: Operation) -> Result:
    """Build a softmax along one axis; in older operator sets, over all axes from `axis` on together."""
    image = op.image()
    axis = image.axis(op.attribute("axis", -1 if op.opset >= _SOFTMAX_OF_ONE_AXIS else 1))
    function: Callable[..., Tensor] = _NORMALISED[op.kind]
    others_are_one = all(shape[axis + 1 :] == (1,) * (image.rank - axis - 1) for shape in image.shapes)
    if op.opset >= _SOFTMAX_OF_ONE_AXIS or others_are_one:
        return op.call(function, image, dim=axis)
    flat = reshape(op, image, [(*shape[:axis], math.prod(shape[axis:])) for shape in image.shapes])
    found = op.call(function, flat, dim=axis)
    return op.call(torch.unflatten, found, axis, tuple(image.size(place) for place in range(axis, image.rank)))


@operator("MeanVarianceNormalization")
def build_standardisation(op: Operation) -> Result:
    """Build numbers with mean 0 and variance 1 along some axes."""
    image, axes = op.image(), tuple(op.attribute("axes", (0, 2, 3)))
    if 0 in axes:
        raise Refused("mixes images with each other, which is not supported")
    centred = op.call(torch.sub, image, op.call(torch.mean, image, axes, True))
    deviation = op.call(torch.sqrt, op.call(torch.mean, op.call(torch.square, centred), axes, True))
    return op.call(torch.div, centred, op.call(torch.add, deviation, 1e-9))


@operator("LpNormalization")
def build_unit_length(op: Operation) -> Result:
    """Build numbers of length 1 along an axis."""
    image = op.image()
    power: Any = float(op.attribute("p", 2))
    return op.call(F.normalize, image, power, image.axis(op.attribute("axis", -1)), 0.0)
