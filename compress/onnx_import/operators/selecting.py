"""Operators that slice, gather, split, concatenate or pad tensors."""

from operator import getitem
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from compress.onnx_import.operation import Operation, Result, operator
from compress.onnx_import.padding import amounts_in_order
from compress.onnx_import.patterns import every_kth_channel
from compress.onnx_import.reshaping import reshape
from compress.onnx_import.values import Computed, Fixed, Refused

_MODES = {"constant": "constant", "edge": "replicate", "reflect": "reflect", "wrap": "circular"}


@operator("Concat")
def build_concatenation(op: Operation) -> Result:
    """Build a concatenation."""
    given = [index for index in range(len(op.inputs)) if op.has(index)]
    parts = [op.image(index) for index in given]
    axis = parts[0].axis(op.attribute("axis", 1))
    by_image = any(part.shapes[0][0] != part.shapes[1][0] for part in parts)
    if by_image and axis != 0 and not op.graph.has_open_batch:  # constants are there for one image
        parts = [
            op.call(torch.Tensor.expand, part, op.graph.batch_size(), *[-1] * (part.rank - 1))
            if isinstance(op.inputs[index], Fixed) and part.shapes[0][0] == 1
            else part
            for index, part in zip(given, parts, strict=True)
        ]
    return op.call(torch.cat, parts, axis)


@operator("Split")
def build_split(op: Operation) -> Result:
    """Build a split; equal parts are given by their number, so that widths may change."""
    image = op.image()
    axis = image.axis(op.attribute("axis", 0))
    count, size, sizes = len(op.node.outputs), image.size(axis), op.setting("split", 1)
    if sizes is None:
        share = -(-size // count)
        sizes = [min(share, size - share * index) for index in range(count)]
    if len(set(sizes)) == 1 and len(sizes) > 1:
        return op.call_several(torch.chunk, image, len(sizes), axis)
    return op.call_several(torch.split, image, tuple(sizes), axis)


@operator("Slice")
def build_slice(op: Operation) -> Result:
    """Build a range along some axes; a range up to the end of an axis has an open end, so that widths may change."""
    image = op.image()
    starts, ends = op.setting("starts", 1), op.setting("ends", 2)
    axes, steps = op.setting("axes", 3) or range(len(starts)), op.setting("steps", 4) or [1] * len(starts)
    parts: list[slice] = [slice(None)] * image.rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = image.axis(axis)
        size = image.shapes[0][place]
        if step < 0:
            chosen = np.arange(size)[slice(start, None if end < -size else end, step)]
            image = _pick(op, image, place, chosen, image.size(place))
        elif not (image.shapes[0][place] != image.shapes[1][place] and start in (0,) and end >= 2**31 - 1):
            parts[place] = slice(start or None, None if end >= size else end, None if step == 1 else step)
    if all(part == slice(None) for part in parts):
        return image
    while parts[-1] == slice(None):
        parts.pop()
    return op.call(getitem, image, tuple(parts))


@operator("Gather")
def build_gather(op: Operation) -> Result:
    """Build a choice of one index or of several along an axis."""
    if not isinstance(op.inputs[1], Fixed):
        return _gather_by_image(op)
    image = op.image()
    if (whole := _whole(op, image)) is not None:
        return whole
    chosen = op.array(1)
    axis = image.axis(op.attribute("axis", 0))
    if chosen.ndim == 0:
        if axis == 0 and (channels := every_kth_channel(op, int(chosen))) is not None:
            return channels
        return op.call(torch.select, image, axis, int(chosen))
    found = _pick(op, image, axis, chosen.reshape(-1), None)
    return found if chosen.ndim == 1 else op.call(torch.unflatten, found, axis, chosen.shape)


def _whole(op: Operation, image: Computed) -> Computed | None:
    """Return a reshape where a Gather takes every element in order, as exporters write as_strided; else None."""
    arrays = op.known(1).arrays
    if image.rank != 1 or any(
        array.size != size or not np.array_equal(array.reshape(-1), np.arange(size))
        for array, (size,) in zip(arrays, image.shapes, strict=True)
    ):
        return None
    return reshape(op, image, [array.shape for array in arrays])


def _gather_by_image(op: Operation) -> Computed:
    table, chosen = op.image(0), op.image(1)
    if op.attribute("axis", 0) != 0:
        raise Refused("chooses by an index that depends on the images, along another axis than the first")
    return op.call(F.embedding, chosen, table)


def _pick(op: Operation, image: Computed, axis: int, chosen: np.ndarray, size: int | None) -> Computed:
    """Return the entries at some indices along an axis; as a slice where the indices form a range."""
    length = image.shapes[0][axis] if size is None else size
    places = np.where(chosen < 0, chosen + length, chosen).astype(np.int64)
    steps = np.diff(places)
    if len(places) > 1 and (steps == steps[0]).all() and steps[0] > 0:
        end = None if places[-1] + steps[0] >= length else int(places[-1]) + 1
        whole = slice(int(places[0]) or None, end, None if steps[0] == 1 else int(steps[0]))
        return op.call(getitem, image, (*[slice(None)] * axis, whole))
    index = op.graph.constant(Fixed.constant(f"{op.output}_places_{axis}", places))
    return op.call(torch.index_select, image, axis, index)


@operator("GatherElements")
def build_gather_elements(op: Operation) -> Result:
    """Build torch.gather: a choice of single numbers along one axis."""
    image = op.image()
    return op.call(torch.gather, image, image.axis(op.attribute("axis", 0)), op.image(1))


@operator("Pad")
def build_padding(op: Operation) -> Result:
    """Build padding around a tensor."""
    image, mode = op.image(), op.attribute("mode", "constant")
    amounts = op.setting("pads", 1)
    axes = [image.axis(axis) for axis in (op.array(3).tolist() if op.has(3) else range(image.rank))]
    pairs: list[tuple[int, int]] = [(0, 0)] * image.rank
    for place, axis in enumerate(axes):
        pairs[axis] = (amounts[place], amounts[place + len(axes)])
    while pairs and pairs[0] == (0, 0):
        pairs.pop(0)
    if not pairs:
        return image
    if mode == "constant":
        value = op.setting("value", 2, 0.0)
        return op.call(F.pad, image, amounts_in_order(pairs), "constant", _number(value))
    if mode not in _MODES:
        raise Refused(f"has mode '{mode}', which is not supported")
    needed = max(len(pairs), min(image.rank - 2, 3))
    pairs = [(0, 0)] * (needed - len(pairs)) + pairs
    return op.call(F.pad, image, amounts_in_order(pairs), _MODES[mode])


def _number(value: Any) -> float:
    return float(value[0] if isinstance(value, list) else value)
