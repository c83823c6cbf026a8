"""Operators that change the shape or axis order of a tensor."""

import math

import numpy as np
import torch

from compress.onnx_import.operation import Operation, Result, operator
from compress.onnx_import.reshaping import open_shapes, reshape
from compress.onnx_import.values import PROBES, Fixed, Refused


@operator("Reshape")
def build_reshape(op: Operation) -> Result:
    """Build a change of shape."""
    image = op.image()
    asked = [array.reshape(-1).tolist() for array in op.known(1).arrays]
    shapes = open_shapes(image, asked, bool(op.attribute("allowzero", 0)), op.graph.has_open_batch)
    return reshape(op, image, shapes)


@operator("Flatten")
def build_flatten(op: Operation) -> Result:
    """Build a matrix: the axes before `axis` become rows, the others columns."""
    image, axis = op.image(), op.attribute("axis", 1)
    axis = axis + image.rank if axis < 0 else axis
    return reshape(op, image, [(math.prod(shape[:axis]), math.prod(shape[axis:])) for shape in image.shapes])


@operator("Squeeze")
def build_squeeze(op: Operation) -> Result:
    """Build the removal of axes of size 1."""
    image, axes = op.image(), op.setting("axes", 1)
    if axes is None:
        axes = [axis for axis in range(image.rank) if all(shape[axis] == 1 for shape in image.shapes)]
    gone = sorted(image.axis(axis) for axis in axes)
    if any(image.size(axis) != 1 for axis in gone):
        raise Refused("takes away an axis that is not of size 1")
    for axis in reversed(gone):
        image = op.call(torch.squeeze, image, axis)
    return image


@operator("Unsqueeze")
def build_unsqueeze(op: Operation) -> Result:
    """Build new axes of size 1."""
    image, axes = op.image(), op.setting("axes", 1)
    rank = image.rank + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        image = op.call(torch.unsqueeze, image, axis)
    return image


@operator("Transpose")
def build_transpose(op: Operation) -> Result:
    """Build another order of axes."""
    image = op.image()
    return op.call(torch.permute, image, tuple(op.attribute("perm", tuple(reversed(range(image.rank))))))


@operator("Expand")
def build_expand(op: Operation) -> Result:
    """Build repetition along axes of size 1."""
    image, shape = op.image(), op.known(1)
    wanted = [
        np.broadcast_shapes(have, tuple(array.tolist())) for have, array in zip(image.shapes, shape.arrays, strict=True)
    ]
    new = len(wanted[0]) - image.rank
    sizes: list[object] = [1] * len(wanted[0])
    for axis, found in enumerate(zip(*wanted, strict=True)):
        have = None if axis < new else [one[axis - new] for one in image.shapes]
        if have == list(found):
            sizes[axis] = -1
        elif len(set(found)) == 1:
            sizes[axis] = found[0]
        elif found == PROBES:
            sizes[axis] = op.graph.batch_size()
        else:
            raise Refused("depends on the number of images in a way that is not supported")
    return op.call(torch.Tensor.expand, image, *sizes)


@operator("Tile")
def build_tile(op: Operation) -> Result:
    """Build repetition of a complete tensor along each axis."""
    return op.call(torch.tile, op.image(), tuple(op.array(1).tolist()))


@operator("Shape")
def build_shape(op: Operation) -> Result:
    """Return the shape, a known value."""
    image = op.image()
    start, end = op.attribute("start", 0), op.attribute("end", image.rank)
    return Fixed(op.output, tuple(np.array(shape[start:end], np.int64) for shape in image.shapes))


@operator("Size")
def build_size(op: Operation) -> Result:
    """Return the number of elements, a known value."""
    return Fixed(op.output, tuple(np.array(math.prod(shape), np.int64) for shape in op.image().shapes))


@operator("DepthToSpace")
def build_depth_to_space(op: Operation) -> Result:
    """Build blocks of pixels out of channels."""
    image, block, mode = op.image(), op.attribute("blocksize", 1), op.attribute("mode", "DCR")
    if mode == "CRD":
        return op.call(torch.pixel_shuffle, image, block)
    split = op.call(torch.unflatten, image, 1, (block, block, -1))
    ordered = op.call(torch.permute, split, (0, 3, 4, 1, 5, 2))
    return op.call(torch.flatten, op.call(torch.flatten, ordered, 4, 5), 2, 3)


@operator("SpaceToDepth")
def build_space_to_depth(op: Operation) -> Result:
    """Build channels out of blocks of pixels."""
    image, block = op.image(), op.attribute("blocksize", 1)
    rows = op.call(torch.unflatten, image, 2, (-1, block))
    split = op.call(torch.unflatten, rows, 4, (-1, block))
    ordered = op.call(torch.permute, split, (0, 3, 5, 1, 2, 4))
    return op.call(torch.flatten, ordered, 1, 3)
