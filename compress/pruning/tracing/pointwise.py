"""Rules for elementwise operations, for reductions, and for unknown operations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.pruning.tracing.call import Call
from compress.pruning.tracing.facts import where
from compress.pruning.tracing.record import NONE, ZERO, is_labelled, of_channels, padded, unlabelled
from compress.pruning.tracing.watch import Rule, Watch

_SUMS = ("add", "add_", "sub", "sub_")


def pointwise(watch: Watch, call: Call) -> None:
    """Follow an elementwise operation: values at the same position belong to the same channel."""
    tensors = [tensor for tensor in call.tensors if tensor.numel() > 1 or watch.labels.is_followed(tensor)]
    if not tensors or not call.outputs:
        return
    ndim = max(tensor.ndim for tensor in tensors)
    shapes = [[*[1] * (ndim - tensor.ndim), *tensor.shape] for tensor in tensors]
    labels = [padded(watch.labels.of(tensor), ndim) for tensor in tensors]
    _label_whole_parameters(watch, tensors, labels)
    result = labels[0]
    seen = shapes[0]
    without = [tensor for tensor, own in zip(tensors, labels, strict=True) if not is_labelled(own)]
    strangers = " and ".join(dict.fromkeys(watch.labels.name_of(tensor) for tensor in without))
    for one, shape in zip(labels[1:], shapes[1:], strict=True):
        result = meet(watch, result, seen, one, shape, strangers)
        seen = [max(a, b) for a, b in zip(seen, shape, strict=True)]
    if call.name in _SUMS and sum(is_labelled(one) for one in labels) > 1:
        watch.trace.summed.append(of_channels(result))
    for output in call.outputs:
        watch.labels.give(output, result if output.ndim == ndim else unlabelled(output.ndim))


def _label_whole_parameters(watch: Watch, tensors: Sequence[Tensor], labels: list[Tensor]) -> None:
    """Label a parameter with several dimensions along the dimension on which the other values have channels."""
    dims = {dim for one in labels if is_labelled(one) for dim, size in enumerate(one.shape) if size > 1}
    if len(dims) != 1:
        return
    (dim,) = dims
    for position, tensor in enumerate(tensors):
        own = dim - (labels[position].ndim - tensor.ndim)
        if watch.labels.is_known(tensor) and not is_labelled(labels[position]) and own >= 0 and tensor.shape[own] > 1:
            labels[position] = padded(watch.labels.of_scale(tensor, own), labels[position].ndim)


def meet(
    watch: Watch,
    one: Tensor,
    one_shape: Sequence[int],
    other: Tensor,
    other_shape: Sequence[int],
    strangers: str = "values that follow no channel",
) -> Tensor:
    """Return the labels of two values combined element by element, and record which channels are the same.

    Args:
        watch: Observer that records the facts.
        one: Labels of the first value.
        one_shape: Sizes of the first value.
        other: Labels of the second value.
        other_shape: Sizes of the second value.
        strangers: Name of values without channels, for messages.
    """
    given = is_labelled(one), is_labelled(other)
    one, other = _without_broadcast(watch, one, one_shape, other), _without_broadcast(watch, other, other_shape, one)
    if given != (is_labelled(one), is_labelled(other)):
        strangers = "channels that each weigh several others"
    whole_one, whole_other = torch.broadcast_tensors(one, other)  # type: ignore[no-untyped-call]
    watch.facts.match(whole_one, whole_other)
    for mine, yours, labels, shape in (
        (whole_one, whole_other, one, other_shape),
        (whole_other, whole_one, other, one_shape),
    ):
        varies = [dim for dim, size in enumerate(labels.shape) if size > 1]
        if any(shape[dim] > 1 for dim in varies):
            place = where(watch.place)
            watch.facts.freeze(mine[(mine >= 0) & (yours == NONE)], f"it meets {strangers or 'padding'}, in {place}")
            watch.facts.freeze(mine[(mine >= 0) & (yours == ZERO)], f"it meets channels padded with zeros, in {place}")
    return torch.where(whole_one >= 0, whole_one, torch.where(whole_other >= 0, whole_other, whole_one))


def _without_broadcast(watch: Watch, labels: Tensor, shape: Sequence[int], other: Tensor) -> Tensor:
    """Return a value's labels; freeze and drop them if one of its channels, as in a mask, is broadcast over others."""
    spread = [dim for dim, size in enumerate(other.shape) if size > 1 and shape[dim] == 1]
    if not spread or not is_labelled(labels) or not is_labelled(other):
        return labels
    watch.facts.freeze(labels, f"each of its channels weighs several others, in {where(watch.place)}")
    return unlabelled(labels.ndim)


def glu(watch: Watch, call: Call) -> None:
    """Follow a gated linear unit: one half of an axis is multiplied by the sigmoid of the other half."""
    labels = watch.labels.of(call.first)
    dim = int(call.arguments.get("dim", -1)) % call.first.ndim
    if labels.shape[dim] > 1:
        shape = [*call.result.shape]
        values, gates = labels.split(shape[dim], dim)  # type: ignore[no-untyped-call]
        labels = meet(watch, values, shape, gates, shape)
    give_all(watch, call, labels)


def unpool(watch: Watch, call: Call) -> None:
    """Follow the inverse of a max pooling: values and indices of their places have the same channels."""
    value, places = call.first, call.arguments["indices"]
    labels = meet(watch, watch.labels.of(value), value.shape, watch.labels.of(places), places.shape)
    if any(size > 1 for size in labels.shape[-3 if call.name.endswith("3d") else -2 :]):
        watch.facts.mix(labels, call)
        labels = unlabelled(labels.ndim)
    give_all(watch, call, labels)


def keep(watch: Watch, call: Call) -> None:
    """Follow an operation whose result has the shape and the channels of the first argument."""
    give_all(watch, call, watch.labels.of(call.first))


def give_all(watch: Watch, call: Call, labels: Tensor) -> None:
    """Give every result the same labels."""
    for output in call.outputs:
        watch.labels.give(output, labels if output.ndim == labels.ndim else unlabelled(output.ndim))


def spatial(count: int) -> Rule:
    """Return the rule of an operation along the last `count` axes that keeps all others."""

    def rule(watch: Watch, call: Call) -> None:
        labels = watch.labels.of(call.first)
        if any(size > 1 for size in labels.shape[-count:]):
            watch.facts.mix(labels, call)
            labels = unlabelled(labels.ndim)
        give_all(watch, call, labels)

    return rule


def reduce(watch: Watch, call: Call) -> None:
    """Follow a reduction along some axes, such as a sum, a mean or a maximum."""
    if isinstance(call.arguments.get("other"), Tensor):  # the larger of two values, element by element
        pointwise(watch, call)
        return
    value = call.first
    labels = watch.labels.of(value)
    dims = call.get("dim")
    chosen = range(value.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    axes = {dim % value.ndim for dim in chosen} if value.ndim else set()
    labels = _without_axes(watch, call, labels, axes)
    kept = [axis for axis in range(labels.ndim) if axis not in axes or call.arguments.get("keepdim")]
    reduced = labels.reshape([labels.shape[axis] for axis in kept])
    for output in call.outputs:
        watch.labels.give(output, reduced if output.ndim == reduced.ndim else unlabelled(output.ndim))


def over_axis(watch: Watch, call: Call) -> None:
    """Follow a softmax, a sorting or a running sum: it keeps the shape and mixes along one axis."""
    labels = watch.labels.of(call.first)
    if call.first.ndim:
        _without_axes(watch, call, labels, {int(call.arguments.get("dim", -1)) % call.first.ndim})
    give_all(watch, call, labels)


def _without_axes(watch: Watch, call: Call, labels: Tensor, axes: set[int]) -> Tensor:
    """Return the labels with size 1 along reduced axes; tie the channels that are reduced to one value.

    If channels differ along reduced axes only, all of them are mixed.
    """
    if all(labels.shape[axis] == 1 for axis in axes):
        return labels
    if any(size > 1 for axis, size in enumerate(labels.shape) if axis not in axes):
        first = labels
        for axis in axes:
            first = first.narrow(axis, 0, 1)
        watch.facts.tie(labels, first.expand(labels.shape))
        return first
    watch.facts.mix(labels, call)
    return unlabelled(labels.ndim)


def create(watch: Watch, call: Call) -> None:
    """Follow the creation of a value: it belongs to no channel."""
    for output in call.outputs:
        watch.labels.give(output, unlabelled(output.ndim))


def unknown(watch: Watch, call: Call) -> None:
    """Follow an operation without a rule: no channel that it reads can be removed."""
    for tensor in call.tensors:
        watch.facts.mix(watch.labels.of(tensor), call)
    for output in call.outputs:
        watch.labels.give(output, unlabelled(output.ndim))
