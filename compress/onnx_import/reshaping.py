"""Changes of shape in a form that stays valid for other widths and any number of images.

The axes of both shapes are matched in the smallest groups of equal size. A group that joins axes becomes `flatten`. A
group that divides an axis becomes `unflatten` with one open size. Unchanged axes appear in neither:

    (B, C, H, W) -> (B, 2, C/2, H, W)   unflatten(1, (2, -1))
    (B, C, H, W) -> (B, C*H*W)          flatten(1, 3)
"""

import math
from collections.abc import Sequence

import torch

from compress.onnx_import.operation import Operation
from compress.onnx_import.values import PROBES, Computed, Refused

Shape = tuple[int, ...]
Group = tuple[int, int, int, int]


def reshape(op: Operation, image: Computed, wanted: Sequence[Shape]) -> Computed:
    """Add the nodes that reshape a value, and return the reshaped value.

    Args:
        op: The Reshape-like node that is being imported.
        image: Value to reshape.
        wanted: New shape for each number of images in `PROBES`.

    Raises:
        Refused: The shape depends on the number of images in more than one axis, or does not fit.
    """
    shapes = [tuple(shape) for shape in wanted]
    for before, after in zip(image.shapes, shapes, strict=True):
        if math.prod(before) != math.prod(after):
            raise Refused(f"gives {before} the shape {after}")
    if list(image.shapes) == shapes:
        return image
    groups = _groups(image.shapes[0], shapes[0])
    if groups is None or groups != _groups(image.shapes[1], shapes[1]) or any(_is_both(group) for group in groups):
        return op.call(torch.reshape, image, _with_open_axis(shapes))
    for start, end, first, last in reversed(groups):
        if end - start > 1 and last - first == 1:
            image = op.call(torch.flatten, image, start, end - 1)
        elif end - start == 1 and last - first > 1:
            sizes = _with_open_axis([shape[first:last] for shape in shapes], _written_as_open(op, first, last))
            image = op.call(torch.unflatten, image, start, sizes)
    return image


def open_shapes(image: Computed, asked: Sequence[Sequence[int]], allow_zero: bool, has_open_batch: bool) -> list[Shape]:
    """Return the shape that a Reshape produces, for each number of images in `PROBES`.

    A file made for one image holds the sizes of one image, so the batch axis of the new shape must be found. It is the
    first of these that exists: an axis computed from the number of images; one copied from the batch axis; the first
    axis if its size is 1; the axis given as -1. Otherwise it is the first axis, as the batch is outermost in memory.

    Args:
        image: Value to reshape.
        asked: Requested sizes for each number of images; -1 is inferred, 0 copies.
        allow_zero: Whether 0 means a size of 0.
        has_open_batch: Whether the file is made for any number of images.
    """
    if has_open_batch or image.shapes[0] == image.shapes[1]:
        pairs = zip(image.shapes, asked, strict=True)
        return [_resolved(shape, target, allow_zero) for shape, target in pairs]
    single = tuple(_of_one(sizes) for sizes in zip(*image.shapes, strict=True))
    target = [_of_one(sizes) for sizes in zip(*asked, strict=True)]
    found = _resolved(single, target, allow_zero)
    moving = [axis for axis, sizes in enumerate(zip(*asked, strict=True)) if len(set(sizes)) > 1]
    copied = [
        axis
        for axis, size in enumerate(target)
        if size == 0 and not allow_zero and image.shapes[0][axis] != image.shapes[1][axis]
    ]
    left = [axis for axis, size in enumerate(target) if size == -1]
    first = [0] if found and found[0] == 1 else []
    axis = (moving or copied or first or left or [0])[0]
    if not found:
        raise Refused("makes one number of a whole image")
    return [tuple(size * images if place == axis else size for place, size in enumerate(found)) for images in PROBES]


def _of_one(sizes: Sequence[int]) -> int:
    """Return the size for one image."""
    if len(set(sizes)) == 1:
        return int(sizes[0])
    if any(size % images for size, images in zip(sizes, PROBES, strict=True)):
        raise Refused("depends on the number of images in a way that is not supported")
    return int(sizes[0]) // PROBES[0]


def _resolved(shape: Shape, target: Sequence[int], allow_zero: bool) -> Shape:
    sizes = [shape[axis] if size == 0 and not allow_zero else int(size) for axis, size in enumerate(target)]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = math.prod(shape) // known if known else 0
    return tuple(sizes)


def _groups(before: Shape, after: Shape) -> list[Group] | None:
    """Return groups (start, end, first, last): axes [start, end) of one shape equal axes [first, last) of the other."""
    groups, i, j = [], 0, 0
    while i < len(before) and j < len(after):
        start, first, left, right = i, j, before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(before):
                left, i = left * before[i], i + 1
            elif right < left and j < len(after):
                right, j = right * after[j], j + 1
            else:
                return None
        groups.append((start, i, first, j))
    if not groups:
        return None
    start, _, first, _ = groups[-1]
    groups[-1] = (start, len(before), first, len(after))  # the rest has size 1
    return groups


def _is_both(group: Group) -> bool:
    start, end, first, last = group
    return end - start > 1 and last - first > 1


def _written_as_open(op: Operation, first: int, last: int) -> int | None:
    """Return the axis of a Reshape with size -1, counted from `first`; None without one from `first` to `last`."""
    if op.kind != "Reshape":
        return None
    sizes = op.known(1).arrays[0].tolist()
    places = [axis for axis in range(first, min(last, len(sizes))) if sizes[axis] == -1]
    return places[0] - first if places else None


def _with_open_axis(shapes: Sequence[Shape], preferred: int | None = None) -> tuple[int, ...]:
    """Return sizes with -1 at the axis that depends on the number of images, else at the preferred or last axis."""
    moving = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if len(moving) > 1:
        raise Refused("depends on the number of images in more than one axis")
    axis = moving[0] if moving else preferred if preferred is not None else len(shapes[0]) - 1
    return tuple(-1 if place == axis else size for place, size in enumerate(shapes[0]))
