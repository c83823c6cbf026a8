"""Resize and Upsample, by torch's interpolation where it is equivalent, else by fixed weights for each axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from compress.onnx_import.operation import Operation, Result, operator
from compress.onnx_import.values import Computed, Fixed, Refused

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}
_CENTRED = ("half_pixel", "pytorch_half_pixel")


@dataclass(frozen=True, slots=True)
class _Resize:
    """Settings of a Resize, for the axes after the channels.

    Attributes:
        mode: "nearest", "linear" or "cubic".
        place: Mapping of output positions to input positions (`coordinate_transformation_mode`).
        rounding: Rounding of positions for "nearest" (`nearest_mode`).
        before: Sizes of the input.
        after: Sizes of the output.
        scales: Scales in the file, or the ratios of sizes.
        coefficient: Coefficient a of cubic convolution.
    """

    mode: str
    place: str
    rounding: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    scales: tuple[float, ...]
    coefficient: float


@operator("Resize", "Upsample")
def build_resize(op: Operation) -> Result:
    """Build a resize of images."""
    image = op.image()
    asked = _read(op, image)
    if asked.before == asked.after and asked.scales == (1.0,) * len(asked.after):
        return image
    mode = _torch_mode(asked, image.rank)
    if mode is not None:
        aligned = asked.place == "align_corners" if mode != "nearest" else None
        whole = tuple(float(scale) for scale in asked.scales)
        if all(scale == int(scale) for scale in whole) and not aligned:
            return op.call(F.interpolate, image, scale_factor=whole, mode=mode, align_corners=aligned)
        return op.call(F.interpolate, image, size=asked.after, mode=mode, align_corners=aligned)
    for axis in range(len(asked.after)):
        if asked.before[axis] != asked.after[axis] or asked.scales[axis] != 1:
            image = _along(op, image, axis, asked)
    return image


def _read(op: Operation, image: Computed) -> _Resize:
    opset, rank = op.opset, image.rank
    is_old = op.kind == "Upsample" or opset < 11
    for name in ("antialias", "exclude_outside"):
        if op.attribute(name, 0):
            raise Refused(f"has {name}, which is not supported")
    if op.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Refused("keeps the aspect ratio, which is not supported")
    axes = [image.axis(axis) for axis in op.attribute("axes", tuple(range(rank)))]
    scales = op.setting("scales", 1) if is_old else _list(op, 2)
    sizes = [] if is_old else _list(op, 3, image)
    before, after, ratios = list(image.shapes[0]), list(image.shapes[0]), [1.0] * rank
    for place, axis in enumerate(axes):
        if scales:
            ratios[axis] = float(scales[place])
            after[axis] = math.floor(before[axis] * ratios[axis])
        elif axis == 0 and not op.graph.has_open_batch:
            continue  # the size in the file is its own number of images
        elif sizes[place] != before[axis]:
            after[axis] = int(sizes[place])
            ratios[axis] = after[axis] / before[axis]
    if before[:2] != after[:2]:
        raise Refused("changes the size of the axes of images or channels, which is not supported")
    spatial = [image.size(axis) for axis in range(2, rank)]
    return _Resize(
        op.attribute("mode", "nearest"),
        "asymmetric" if is_old else op.attribute("coordinate_transformation_mode", "half_pixel"),
        "floor" if is_old else op.attribute("nearest_mode", "round_prefer_floor"),
        tuple(spatial),
        tuple(after[2:]),
        tuple(ratios[2:]),
        op.attribute("cubic_coeff_a", -0.75),
    )


def _list(op: Operation, index: int, image: Computed | None = None) -> list[float]:
    """Return an input as a list; [] where it is missing or empty."""
    if not op.has(index):
        return []
    value = op.known(index)
    if image is not None and not value.is_constant:
        return [float(size) for size in value.arrays[0].tolist()]
    return [float(size) for size in value.array.reshape(-1).tolist()]


def _torch_mode(asked: _Resize, rank: int) -> str | None:
    """Return the equivalent mode of F.interpolate, or None."""
    is_whole = all(scale == int(scale) for scale in asked.scales)
    exact = all(math.isclose(b * s, a) for b, a, s in zip(asked.before, asked.after, asked.scales, strict=True))
    if rank not in _LINEAR or not exact:
        return None
    if asked.mode == "nearest" and is_whole:
        floors = asked.place == "asymmetric" and asked.rounding == "floor"
        centred = asked.place in _CENTRED and asked.rounding in ("round_prefer_floor", "round_prefer_ceil")
        return "nearest" if floors or centred else None
    if asked.mode != "linear":
        return None
    fits = asked.place in ("align_corners", "half_pixel")
    return _LINEAR[rank] if fits or (asked.place == "pytorch_half_pixel" and min(asked.after) > 1) else None


def _along(op: Operation, image: Computed, axis: int, asked: _Resize) -> Computed:
    """Return an image resized along one axis; each new position is a fixed mixture of old positions."""
    weights = _weights(axis, asked)
    name = f"{op.output}_axis_{axis}"
    if ((weights == 0) | (weights == 1)).all() and (weights.sum(1) == 1).all():
        index = op.graph.constant(Fixed.constant(name, weights.argmax(1).astype(np.int64)))
        return op.call(torch.index_select, image, axis + 2, index)
    matrix = op.graph.constant(Fixed.constant(name, weights.astype(np.float32)))
    moved = op.call(torch.movedim, image, axis + 2, -1)
    return op.call(torch.movedim, op.call(torch.matmul, moved, op.call(torch.t, matrix)), -1, axis + 2)


def _weights(axis: int, asked: _Resize) -> np.ndarray:
    """Return (new, old) weights: the share of each old position in each new one."""
    before, after = asked.before[axis], asked.after[axis]
    places = _places(axis, asked)
    weights = np.zeros((after, before))
    for row, place in enumerate(places):
        for old, share in _shares(place, asked):
            weights[row, min(max(old, 0), before - 1)] += share
    return weights


def _places(axis: int, asked: _Resize) -> Sequence[float]:
    before, after, scale = asked.before[axis], asked.after[axis], asked.scales[axis]
    index = np.arange(after, dtype=np.float64)
    if asked.place == "asymmetric":
        return list(index / scale)
    if asked.place == "align_corners":
        return list(index * (before - 1) / (after - 1)) if after > 1 else [0.0]
    if asked.place == "pytorch_half_pixel" and after == 1:
        return [0.0]
    if asked.place in _CENTRED:
        return list((index + 0.5) / scale - 0.5)
    raise Refused(f"has coordinate_transformation_mode '{asked.place}', which is not supported")


def _shares(place: float, asked: _Resize) -> list[tuple[int, float]]:
    """Return pairs of an old position and its share in the value at `place`."""
    if asked.mode == "nearest":
        return [(_rounded(place, asked.rounding), 1.0)]
    low = math.floor(place)
    part = place - low
    if asked.mode == "linear":
        return [(low, 1 - part), (low + 1, part)]
    if asked.mode != "cubic":
        raise Refused(f"has mode '{asked.mode}', which is not supported")
    return [(low + step, _cubic(abs(part - step), asked.coefficient)) for step in (-1, 0, 1, 2)]


def _cubic(distance: float, a: float) -> float:
    """Return the weight of cubic convolution. Source: Keys 1981, "Cubic Convolution Interpolation"."""
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a


def _rounded(place: float, how: str) -> int:
    if how == "floor":
        return math.floor(place)
    if how == "ceil":
        return math.ceil(place)
    if how == "round_prefer_floor":
        return math.ceil(place - 0.5)
    if how == "round_prefer_ceil":
        return math.floor(place + 0.5)
    raise Refused(f"has nearest_mode '{how}', which is not supported")
