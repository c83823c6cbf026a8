"""Window of a convolution or pooling over an image: kernel, strides, dilations, padding."""

from collections.abc import Sequence
from dataclasses import dataclass

from compress.onnx_import.operation import Operation
from compress.onnx_import.values import Computed, Refused


@dataclass(frozen=True, slots=True)
class Window:
    """A window over the axes after the channels, with one number for each axis.

    Attributes:
        sizes: Sizes of the kernel.
        strides: Steps between positions.
        dilations: Steps between neighbouring elements of the kernel.
        begins: Padding before each axis.
        ends: Padding behind each axis.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]


def read_window(op: Operation, image: Computed, sizes: Sequence[int], transposed: bool = False) -> Window:
    """Return the window of a convolution or pooling.

    Args:
        op: Node of the convolution or pooling.
        image: Input of the node.
        sizes: Sizes of the kernel.
        transposed: Whether the convolution is transposed, so that padding shortens the output.

    Raises:
        Refused: The mode of padding is not known.
    """
    count = len(sizes)
    strides = tuple(op.attribute("strides", (1,) * count))
    dilations = tuple(op.attribute("dilations", (1,) * count))
    mode = op.attribute("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        pads = tuple(op.attribute("pads", (0,) * 2 * count)) if mode == "NOTSET" else (0,) * 2 * count
        begins, ends = pads[:count], pads[count:]
        if transposed and "output_shape" in op.node.attributes:
            mode = "SAME_LOWER"  # the odd rest goes before, as for this mode
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            _transposed_total(op, image, axis, sizes, strides, dilations)
            if transposed
            else _same_total(image.size(axis + 2), sizes[axis], strides[axis], dilations[axis])
            for axis in range(count)
        ]
        smaller, larger = tuple(total // 2 for total in totals), tuple(total - total // 2 for total in totals)
        begins, ends = (smaller, larger) if mode == "SAME_UPPER" else (larger, smaller)
    elif mode not in ("NOTSET", "VALID"):
        raise Refused(f"has auto_pad '{mode}', which is not supported")
    return Window(tuple(int(size) for size in sizes), strides, dilations, begins, ends)


def amounts_in_order(pads: Sequence[tuple[int, int]]) -> list[int]:
    """Return the padding before and behind each axis in the order of F.pad: the last axis first.

    >>> amounts_in_order([(1, 2), (3, 4)])
    [3, 4, 1, 2]
    """
    return [amount for pair in reversed(pads) for amount in pair]


def _same_total(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Return the total padding for ceil(size / stride) positions."""
    positions = -(-size // stride)
    return max(0, (positions - 1) * stride + (kernel - 1) * dilation + 1 - size)


def _transposed_total(
    op: Operation, image: Computed, axis: int, sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> int:
    """Return the padding by which the output of a transposed convolution is shortened to the given size."""
    size = image.size(axis + 2)
    more = op.attribute("output_padding", (0,) * len(sizes))[axis]
    full = (size - 1) * strides[axis] + (sizes[axis] - 1) * dilations[axis] + 1 + more
    wanted = op.attribute("output_shape", ())
    # the output shape may be given with the images and channels before it
    goal = wanted[len(wanted) - len(sizes) + axis] if wanted else size * strides[axis]
    return int(full - goal)
