"""Trace of one forward pass, and arithmetic on labels of channels.

    label       the number of a channel, at least 0; NONE for a position without a channel, ZERO for padded zeros
    labels      int64, one axis for each axis of the value, of size 1 if the label is the same all along it: a
                feature map (1, C, H, W) has labels (1, C, 1, 1)

An operation that only moves values is carried out on the labels themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

OUTPUTS = "its channels are the network's outputs"


@dataclass(frozen=True)
class Axis:
    """The outputs ("out"), inputs ("in") or scaled channels ("scale") of a parameter or buffer.

    Attributes:
        tensor: The parameter.
        role: "out", "in" or "scale".
        dim: Dimension of the tensor that the axis runs along.
        size: Number of positions; larger than the dimension for a grouped convolution, which stores one part only.
        start: Label of the first position.
    """

    tensor: Tensor
    role: str
    dim: int
    size: int
    start: int

    @property
    def labels(self) -> Tensor:
        """(size,) labels of the positions on the axis."""
        return torch.arange(self.start, self.start + self.size)

    def slots(self, places: Tensor) -> Tensor:
        """Return the indices along `dim` of the given positions on the axis."""
        return places % self.tensor.shape[self.dim]


@dataclass(frozen=True)
class Sized:
    """Module whose code contains, or may contain, a number of channels.

    Attributes:
        module: Module path.
        labels: For each number in a row, the labels of the channels that it counts.
    """

    module: str
    labels: tuple[Tensor, ...]


@dataclass(frozen=True)
class Shaped:
    """Module whose code contains, or may contain, the sizes of a value.

    Attributes:
        module: Module path.
        shape: Sizes of the value.
        dim: Axis of the channels.
        labels: Labels of the channels along that axis.
    """

    module: str
    shape: tuple[int, ...]
    dim: int
    labels: Tensor


@dataclass(frozen=True)
class Counted:
    """Multiply-accumulates (MACs) that depend on numbers of channels.

    Attributes:
        module: Path of the module whose code multiplies.
        macs: MACs with all channels.
        labels: For each number of channels that `macs` is proportional to, the labels of these channels; two at most.
    """

    module: str
    macs: int
    labels: tuple[Tensor, ...]


@dataclass
class Trace:
    """Facts about channels that one forward pass revealed.

    Attributes:
        axes: Axes of parameters, in the order of their labels.
        same: Pairs of labels of one channel, each (2, n).
        tied: Pairs of labels that are removed together, each (2, n).
        frozen: Labels that cannot be removed, each with the reason.
        behind: Weight of a layer, and parameter of the norm that reads the layer's outputs directly, each with the path
            of the module whose code uses it.
        norm_groups: Module path of each group norm, with the labels of the channels it normalises.
        sized: Modules whose code may contain numbers of channels.
        shaped: Modules whose code may contain the sizes of values.
        padded: Paths of the modules whose code pads a channel axis.
        summed: Labels of the channels of each sum of two feature maps.
        maps: Module path -> (C,) labels of the channels of the feature map that it returned last.
        counted: Products whose MACs depend on numbers of channels.
        multiplied: `id` of each parameter that values are multiplied by.
    """

    axes: list[Axis] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    tied: list[Tensor] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    behind: list[tuple[tuple[Tensor, str], tuple[Tensor, str]]] = field(default_factory=list)
    norm_groups: list[tuple[str, Tensor]] = field(default_factory=list)
    sized: list[Sized] = field(default_factory=list)
    shaped: list[Shaped] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)
    summed: list[Tensor] = field(default_factory=list)
    maps: dict[str, Tensor] = field(default_factory=dict)
    counted: list[Counted] = field(default_factory=list)
    multiplied: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        """Number of labels."""
        return self.axes[-1].start + self.axes[-1].size if self.axes else 0


NONE, ZERO = -1, -2


def unlabelled(ndim: int) -> Tensor:
    """Return the labels of a value of `ndim` axes that belongs to no channel."""
    return torch.full([1] * ndim, NONE)


def is_labelled(labels: Tensor) -> bool:
    """Return whether any position belongs to a channel."""
    return bool((labels >= 0).any())


def of_channels(labels: Tensor) -> Tensor:
    """Return (n,) the distinct labels of channels, ascending."""
    found: Tensor = torch.unique(labels[labels >= 0])
    return found


def along(axis: int, ndim: int, values: Tensor) -> Tensor:
    """Return labels that differ along one axis only.

    >>> along(1, 4, torch.arange(3)).shape
    torch.Size([1, 3, 1, 1])
    """
    return values.reshape([-1 if position == axis else 1 for position in range(ndim)])


def vector(labels: Tensor, axis: int, size: int) -> Tensor | None:
    """Return (size,) the labels along one axis, or None if they differ along another axis, too."""
    if labels.numel() != labels.shape[axis]:
        return None
    return labels.flatten().expand(size) if labels.shape[axis] == 1 else labels.flatten()


def moved(operation: Callable[[Tensor], Tensor], labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the labels after an operation that only moves values, applied to a value of the given shape."""
    return compact(operation(labels.expand(*shape)))


def compact(labels: Tensor) -> Tensor:
    """Return the same labels with size 1 on each axis along which they are the same."""
    for axis, size in enumerate(labels.shape):
        first = labels.narrow(axis, 0, min(1, size))
        if size > 1 and bool((labels == first).all()):
            labels = first
    return labels.contiguous()


def padded(labels: Tensor, ndim: int) -> Tensor:
    """Return the labels with leading axes of size 1, `ndim` axes in all."""
    return labels.reshape([*[1] * (ndim - labels.ndim), *labels.shape])


def joined(pieces: Sequence[Tensor], sizes: Sequence[int], axis: int) -> Tensor:
    """Return the labels of values of these sizes, concatenated along an axis."""
    ndim = max(piece.ndim for piece in pieces)
    others = [max(piece.shape[position] for piece in pieces) for position in range(ndim)]
    whole = []
    for piece, size in zip(pieces, sizes, strict=True):
        shape = list(others)
        shape[axis] = size
        whole.append(piece.expand(shape))
    return compact(torch.cat(whole, axis))
