"""Rules for operations that move values: views, slices, concatenation, padding, indexing."""

import torch
from torch import Tensor

from compress.pruning.tracing.call import Call
from compress.pruning.tracing.facts import where
from compress.pruning.tracing.pointwise import meet, unknown
from compress.pruning.tracing.record import (
    NONE,
    ZERO,
    along,
    compact,
    is_labelled,
    joined,
    moved,
    padded,
    unlabelled,
    vector,
)
from compress.pruning.tracing.watch import Watch


def move(watch: Watch, call: Call) -> None:
    """Follow an operation that only moves values, by applying it to the channel labels of its input."""
    labels = watch.labels.of(call.first)
    results = call.outputs
    if not is_labelled(labels):
        for output in results:
            watch.labels.give(output, unlabelled(output.ndim))
        return
    found = call.repeat(labels.expand(call.first.shape))
    for output, one in zip(results, [found] if isinstance(found, Tensor) else found, strict=True):
        watch.labels.give(output, compact(one))


def permute(watch: Watch, call: Call) -> None:
    """Follow a permutation of axes."""
    watch.labels.give(call.result, call.repeat(watch.labels.of(call.first)))


def view(watch: Watch, call: Call) -> None:
    """Follow a reshape: an axis of channels may become several axes, or the other way round."""
    labels = watch.labels.of(call.first)
    if not is_labelled(labels):
        watch.labels.give(call.result, unlabelled(call.result.ndim))
        return
    result = moved(lambda whole: whole.reshape(call.result.shape), labels, call.first.shape)
    watch.labels.give(call.result, result)
    watch.facts.note_size(labels)
    dims = [dim for dim, size in enumerate(result.shape) if size > 1]
    if len(dims) > 1 and sum(size > 1 for size in labels.shape) < len(dims):
        # one axis became several: all but one are assumed to keep their sizes when channels are removed
        is_map = labels.ndim == 2 and result.ndim > 3 and 1 in dims  # a vector became a feature map
        chosen = 1 if is_map else max(dims, key=lambda dim: (result.shape[dim], dim))
        first = _first_along(result, chosen)
        watch.facts.tie(result, first.expand(result.shape))
        watch.facts.note_size(first)
        watch.facts.note_shape(first, call.result.shape, chosen)
        return
    watch.facts.note_size(result)
    for dim in dims:
        watch.facts.note_shape(_first_along(result, dim), call.result.shape, dim)


def _first_along(labels: Tensor, dim: int) -> Tensor:
    """Return the labels along one axis at the first position of all others; the number of axes is kept."""
    for other in range(labels.ndim):
        if other != dim:
            labels = labels.narrow(other, 0, 1)
    return labels


def take_slice(watch: Watch, call: Call) -> None:
    """Follow a slice: equal shares of the channels must lose the same positions."""
    labels, value = watch.labels.of(call.first), call.first
    dim = int(call.arguments.get("dim", 0)) % value.ndim
    if not is_labelled(labels) or labels.shape[dim] == 1:
        watch.labels.give(call.result, labels)
        return
    size, step = value.shape[dim], int(call.arguments.get("step", 1))
    start = int(call.get("start") or 0)
    share = step if step > 1 else call.result.shape[dim]
    watch.labels.give(call.result, compact(call.repeat(labels)))
    if share < size and size % share == 0 and (step > 1 or start % share == 0):
        _tie_shares(watch, labels, dim, step if step > 1 else size // share, is_strided=step > 1)
    watch.facts.note_size(watch.labels.of(call.result))


def _tie_shares(watch: Watch, labels: Tensor, dim: int, shares: int, is_strided: bool) -> None:
    """Tie the labels at the same position of each of several equal shares along an axis."""
    each = labels.shape[dim] // shares
    shape = (each, shares) if is_strided else (shares, each)
    parts = labels.unflatten(dim, shape)  # type: ignore[no-untyped-call]
    axis = dim + 1 if is_strided else dim
    watch.facts.tie(parts, parts.narrow(axis, 0, 1).expand(parts.shape))


def select(watch: Watch, call: Call) -> None:
    """Follow the selection of one position of an axis."""
    labels, value = watch.labels.of(call.first), call.first
    dim = int(call.arguments.get("dim", 0)) % value.ndim
    watch.labels.give(call.result, labels.squeeze(dim) if labels.shape[dim] == 1 else compact(call.repeat(labels)))


def split(watch: Watch, call: Call) -> None:
    """Follow a split along an axis: equal pieces must lose the same positions."""
    labels, value = watch.labels.of(call.first), call.first
    dim = int(call.arguments.get("dim", 0)) % value.ndim
    pieces = call.outputs
    if labels.shape[dim] == 1:
        for piece in pieces:
            watch.labels.give(piece, labels)
        return
    sizes = [piece.shape[dim] for piece in pieces]
    watch.facts.note_size(labels)
    shares: tuple[Tensor, ...] = labels.split(sizes, dim)  # type: ignore[no-untyped-call]
    watch.facts.note_size(*shares)
    for piece, one in zip(pieces, shares, strict=True):
        watch.labels.give(piece, compact(one))
        watch.facts.note_size(one)
    if len(set(sizes)) == 1 and len(sizes) > 1:
        _tie_shares(watch, labels, dim, len(sizes), is_strided=False)


def unbind(watch: Watch, call: Call) -> None:
    """Follow the separation of an axis into its positions."""
    labels = watch.labels.of(call.first)
    dim = int(call.arguments.get("dim", 0)) % call.first.ndim
    for position, piece in enumerate(call.outputs):
        watch.labels.give(piece, compact(labels.select(dim, position if labels.shape[dim] > 1 else 0)))


def squeeze(watch: Watch, call: Call) -> None:
    """Follow the removal of axes of size 1."""
    watch.labels.give(
        call.result, watch.labels.of(call.first).reshape(_without_ones(watch.labels.of(call.first), call))
    )


def _without_ones(labels: Tensor, call: Call) -> list[int]:
    """Return the sizes of the labels along the axes that a squeeze leaves."""
    value = call.first
    dims = call.get("dim")
    chosen = range(value.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % value.ndim for dim in chosen if value.shape[dim] == 1} if value.ndim else set()
    return [size for axis, size in enumerate(labels.shape) if axis not in gone]


def unsqueeze(watch: Watch, call: Call) -> None:
    """Follow the insertion of an axis of size 1."""
    watch.labels.give(call.result, call.repeat(watch.labels.of(call.first)))


def expand(watch: Watch, call: Call) -> None:
    """Follow the repetition of values along axes of size 1."""
    watch.labels.give(call.result, padded(watch.labels.of(call.first), call.result.ndim))


def restride(watch: Watch, call: Call) -> None:
    """Follow new strides of a tensor: its labels are kept if at most one axis is longer than 1, and contiguous.

    Adaptive pooling to a single position sets strides if weights are channels-last, as in squeeze-and-excite blocks.
    """
    labels, value = watch.labels.of(call.first), call.result
    axes = [dim for dim, size in enumerate(value.shape) if size > 1]
    is_kept = labels.ndim == value.ndim and all(
        have in (1, size) for have, size in zip(labels.shape, value.shape, strict=True)
    )
    if is_kept and len(axes) <= 1 and all(value.stride(axis) == 1 for axis in axes):
        watch.labels.give(value, labels)
    else:
        unknown(watch, call)


def concatenate(watch: Watch, call: Call) -> None:
    """Follow a concatenation: along the channels' axis, or along another axis with the same channels."""
    tensors = [t for t in call.arguments["tensors"] if t.numel() or t.ndim > 1]
    dim = int(call.arguments.get("dim", 0)) % call.result.ndim
    labels = [watch.labels.of(tensor) for tensor in tensors]
    if not any(is_labelled(one) for one in labels):
        watch.labels.give(call.result, unlabelled(call.result.ndim))
        return
    if any(
        one.shape[dim] > 1 or tensor.shape[dim] == 1
        for one, tensor in zip(labels, tensors, strict=True)
        if is_labelled(one)
    ):
        watch.labels.give(call.result, joined(labels, [tensor.shape[dim] for tensor in tensors], dim))
        return
    result, seen = labels[0], list(tensors[0].shape)  # side by side along another axis: the channels are the same
    for one, tensor in zip(labels[1:], tensors[1:], strict=True):
        result = meet(watch, result, seen, one, tensor.shape)
    watch.labels.give(call.result, result)


def stack(watch: Watch, call: Call) -> None:
    """Follow a stacking along a new axis of values with the same channels."""
    tensors = call.arguments["tensors"]
    dim = int(call.arguments.get("dim", 0)) % call.result.ndim
    labels = [watch.labels.of(tensor).unsqueeze(dim) for tensor in tensors]
    for one in labels[1:]:
        if one.shape == labels[0].shape:
            watch.facts.match(one, labels[0])
        else:
            watch.facts.mix(one, call)
            watch.facts.mix(labels[0], call)
    watch.labels.give(call.result, labels[0])


def pad(watch: Watch, call: Call) -> None:
    """Follow a padding with zeros or another constant: positions added to a channel axis belong to no channel."""
    labels, amounts = watch.labels.of(call.first), [int(amount) for amount in call.arguments["pad"]]
    if not is_labelled(labels):
        watch.labels.give(call.result, unlabelled(call.result.ndim))
        return
    fill = ZERO if float(call.arguments.get("value", 0)) == 0 else NONE
    for position in range(0, len(amounts), 2):
        dim = labels.ndim - 1 - position // 2
        before, after = amounts[position : position + 2]
        if labels.shape[dim] > 1 and (before or after):
            pads = [0] * (2 * (labels.ndim - dim - 1)) + [before, after]
            labels = torch.nn.functional.pad(labels, pads, value=fill)
            watch.trace.padded.append(watch.place)
    watch.labels.give(call.result, labels)


def index(watch: Watch, call: Call) -> None:
    """Follow indexing with tensors: fixed positions among channels cannot follow a cut."""
    labels, value = watch.labels.of(call.first), call.first
    places = call.get("indices", "index")
    dims = (
        [dim for dim, index in enumerate(places) if index is not None]
        if isinstance(places, (list, tuple))
        else [int(call.arguments["dim"]) % value.ndim]
    )
    if any(dim < labels.ndim and labels.shape[dim] > 1 for dim in dims):
        watch.facts.freeze(labels, f"its channels are picked by fixed positions in {where(watch.place)}")
    move(watch, call)


def columns(watch: Watch, call: Call) -> None:
    """Follow an unfolding: the positions under a kernel become channels."""
    channels = _channels(watch, call)
    if channels is None:
        return
    each = call.result.shape[1] // len(channels)
    watch.labels.give(call.result, along(1, call.result.ndim, channels.repeat_interleave(each)))


def _channels(watch: Watch, call: Call) -> Tensor | None:
    """Return the channels of a feature map; freeze them and return None if its labels differ along other axes."""
    labels = watch.labels.of(call.first)
    channels = vector(labels, 1, call.first.shape[1])
    if channels is None:
        watch.facts.mix(labels, call)
        watch.labels.give(call.result, unlabelled(call.result.ndim))
    return channels


def copy_into(watch: Watch, call: Call) -> None:
    """Follow values written into a part of another tensor: the rest of it is not followed, so all channels freeze."""
    for tensor in call.tensors:
        labels = watch.labels.of(tensor)
        watch.facts.freeze(labels, f"it is written into another tensor in {where(watch.place)}")


def pixel_shuffle(watch: Watch, call: Call) -> None:
    """Follow a pixel shuffle: square blocks of channels become positions, so a block is removed as one."""
    channels = _channels(watch, call)
    if channels is None:
        return
    blocks = channels.reshape(call.result.shape[1], -1)
    watch.facts.tie(blocks, blocks[:, :1].expand(blocks.shape))
    watch.labels.give(call.result, along(1, call.result.ndim, blocks[:, 0]))
