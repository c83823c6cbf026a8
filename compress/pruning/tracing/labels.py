"""Which channel does each place of a value belong to, and how do operations move channels about?

    label       the number of a channel, at least 0; NONE for a place that belongs to no channel, ZERO for padded zeros
    labels      int64, one axis for each axis of the value, of size 1 where the label is the same all along it: a
                feature map (1, C, H, W) has labels (1, C, 1, 1)

An operation that only moves values about is carried out on the labels themselves.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NONE, ZERO = -1, -2


def unlabelled(ndim: int) -> Tensor:
    """Return the labels of a value of `ndim` axes that belongs to no channel."""
    return torch.full([1] * ndim, NONE)


def is_labelled(labels: Tensor) -> bool:
    """Whether any place belongs to a channel."""
    return bool((labels >= 0).any())


def of_channels(labels: Tensor) -> Tensor:
    """Return (n,) the channels that occur."""
    found: Tensor = torch.unique(labels[labels >= 0])
    return found


def along(axis: int, ndim: int, values: Tensor) -> Tensor:
    """Return labels that differ along one axis only.

    >>> along(1, 4, torch.arange(3)).shape
    torch.Size([1, 3, 1, 1])
    """
    return values.reshape([-1 if position == axis else 1 for position in range(ndim)])


def vector(labels: Tensor, axis: int, size: int) -> Tensor | None:
    """Return (size,) the labels along one axis, or None where they differ along another axis, too."""
    if labels.numel() != labels.shape[axis]:
        return None
    return labels.flatten().expand(size) if labels.shape[axis] == 1 else labels.flatten()


def moved(operation: Callable[[Tensor], Tensor], labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the labels of what an operation makes of a value of this shape, which it only moves about."""
    return compact(operation(labels.expand(*shape)))


def compact(labels: Tensor) -> Tensor:
    """Return the same labels with size 1 on each axis along which they are the same."""
    for axis, size in enumerate(labels.shape):
        first = labels.narrow(axis, 0, min(1, size))
        if size > 1 and bool((labels == first).all()):
            labels = first
    return labels.contiguous()


def padded(labels: Tensor, ndim: int) -> Tensor:
    """Return the labels with axes of size 1 put before until there are `ndim`."""
    return labels.reshape([*[1] * (ndim - labels.ndim), *labels.shape])


def joined(pieces: Sequence[Tensor], sizes: Sequence[int], axis: int) -> Tensor:
    """Return the labels of values of these sizes put behind one another along an axis."""
    ndim = max(piece.ndim for piece in pieces)
    others = [max(piece.shape[position] for piece in pieces) for position in range(ndim)]
    whole = []
    for piece, size in zip(pieces, sizes, strict=True):
        shape = list(others)
        shape[axis] = size
        whole.append(piece.expand(shape))
    return compact(torch.cat(whole, axis))
