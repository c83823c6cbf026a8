"""Rules for layers with parameters: convolutions, matrix products, norms."""

import torch
from torch import Tensor

from compress.pruning.tracing.call import Call
from compress.pruning.tracing.facts import where
from compress.pruning.tracing.moving import move
from compress.pruning.tracing.pointwise import give_all
from compress.pruning.tracing.record import NONE, along, is_labelled, unlabelled, vector
from compress.pruning.tracing.watch import Watch


def convolution(watch: Watch, call: Call) -> None:
    """Follow a convolution: it reads its inputs' channels and makes new ones; a depthwise one passes them on."""
    value, weight = call.arguments["input"], call.arguments["weight"]
    parts, transposed = int(call.arguments["groups"]), bool(call.arguments["transposed"])
    labels = watch.labels.of(value)
    inputs = _channels_of(watch, labels, value.shape[1])
    outputs = int(call.result.shape[1])
    if inputs is None:
        watch.facts.freeze(labels, f"a convolution slides along its channels, in {where(watch.place)}")
        inputs = torch.full((value.shape[1],), NONE)
    is_each_alone = parts > 1 and parts == value.shape[1]
    if not watch.labels.is_known(weight):
        _convolution_with_computed_weight(watch, call, inputs, is_each_alone and outputs == parts)
        return
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    if is_each_alone and outputs == parts:
        own = watch.labels.axis(weight, "scale", 0, parts).labels
        watch.facts.join(own, inputs)
    elif is_each_alone and not transposed:
        own = watch.labels.axis(weight, "out", 0, outputs).labels
        watch.facts.require(own, inputs.repeat_interleave(outputs // parts))
    else:
        read = watch.labels.axis(weight, "in", in_dim, value.shape[1], parts)
        watch.facts.join(read.labels, inputs)
        own = watch.labels.axis(weight, "out", out_dim, outputs, parts).labels
        watch.facts.note_layer(call.result, weight)
    _add_bias(watch, call.get("bias"), own)
    watch.labels.give(call.result, along(1, call.result.ndim, own))


def _convolution_with_computed_weight(watch: Watch, call: Call, inputs: Tensor, passes_on: bool) -> None:
    """Follow a convolution with a computed weight: a depthwise one passes channels on, others mix them."""
    weight = call.arguments["weight"]
    own = watch.labels.of(weight)
    along_outputs = vector(own, 0, weight.shape[0])
    if passes_on and along_outputs is not None:
        if is_labelled(own):
            watch.facts.join(along_outputs, inputs)
        watch.labels.give(call.result, along(1, call.result.ndim, inputs))
        return
    watch.facts.freeze(inputs, f"a convolution whose kernel is computed reads its channels, in {where(watch.place)}")
    watch.facts.freeze(own, f"a convolution's kernel is computed from its channels, in {where(watch.place)}")
    watch.labels.give(call.result, unlabelled(call.result.ndim))


def _channels_of(watch: Watch, labels: Tensor, size: int) -> Tensor | None:
    """Return (size,) the labels along axis 1, or None if they differ along other axes only.

    Positions that differ along other axes as well (a vector that was reshaped to a feature map) are tied.
    """
    if labels.shape[1] == 1 or labels.numel() == labels.shape[1]:
        return vector(labels, 1, size)
    first = labels
    for axis in range(labels.ndim):
        first = first if axis == 1 else first.narrow(axis, 0, 1)
    watch.facts.tie(labels, first.expand(labels.shape))
    return first.flatten()


def _add_bias(watch: Watch, bias: Tensor | None, labels: Tensor) -> None:
    if bias is not None:
        own = watch.labels.of_vector(bias)
        if own is None or len(own) != len(labels):
            watch.facts.freeze(labels, f"what is added to it follows no channel, in {where(watch.place)}")
        else:
            watch.facts.join(own, labels)


def matrix_product(watch: Watch, call: Call) -> None:
    """Follow a product with a parameter, as in a linear layer: it reads channels and makes new ones."""
    value, right = call.get("mat1", "self"), call.arguments["mat2"]
    if call.name == "addmm":
        value = call.arguments["mat1"]
    labels = watch.labels.of(value)
    found = watch.labels.weight_behind(right)
    inputs = vector(labels, 1, value.shape[1])
    if found is None or inputs is None:
        for tensor in call.tensors:
            watch.facts.mix(watch.labels.of(tensor), call)
        if found is None:
            watch.labels.give(call.result, unlabelled(2))
            return
        inputs = torch.full((value.shape[1],), NONE)
    weight, out_dim, in_dim = found
    read = watch.labels.axis(weight, "in", in_dim, weight.shape[in_dim])
    watch.facts.join(read.labels, inputs)
    outputs = watch.labels.axis(weight, "out", out_dim, weight.shape[out_dim]).labels
    if call.name == "addmm":
        _add_bias(watch, call.arguments["self"], outputs)
    watch.facts.note_layer(call.result, weight)
    watch.labels.give(call.result, along(1, 2, outputs))


def transpose_matrix(watch: Watch, call: Call) -> None:
    """Follow a transposition; a transposed parameter is still known as that parameter."""
    if watch.labels.is_known(call.first) and call.first.ndim == 2:
        watch.labels.note_transposed(call.result, call.first)
        watch.labels.give(call.result, unlabelled(2))
    else:
        move(watch, call)


def batch_norm(watch: Watch, call: Call) -> None:
    """Follow a norm with statistics of each channel alone: it passes channels on."""
    value = call.arguments["input"]
    labels = watch.labels.of(value)
    channels = _channels_of(watch, labels, value.shape[1])
    own = [t for name in ("weight", "bias", "running_mean", "running_var") if (t := call.get(name)) is not None]
    if channels is None:
        watch.facts.mix(labels, call)
    else:
        for tensor in own:
            along_channels = watch.labels.of_vector(tensor)
            if along_channels is not None:
                watch.facts.join(along_channels, channels)
        if own:
            watch.facts.note_norm(value, own[0])
    give_all(watch, call, labels)


def group_norm(watch: Watch, call: Call) -> None:
    """Follow a norm over groups of channels: only complete groups can be removed."""
    value, parts = call.arguments["input"], int(call.arguments["group"])
    labels = watch.labels.of(value)
    channels = _channels_of(watch, labels, value.shape[1])
    if channels is None:
        watch.facts.mix(labels, call)
    else:
        size = len(channels) // parts
        if parts == 1:
            watch.facts.freeze(
                channels, f"a group norm's statistics are over all its channels, in {where(watch.place)}"
            )
        watch.facts.tie(channels, channels.reshape(parts, size)[:, :1].expand(parts, size).flatten())
        for name in ("weight", "bias"):
            if (tensor := call.get(name)) is not None:
                own = watch.labels.of_vector(tensor)
                if own is not None:
                    watch.facts.join(own, channels)
        watch.trace.norm_groups.append((watch.place, channels))
        if (weight := call.get("weight")) is not None:
            watch.facts.note_norm(value, weight)
    watch.labels.give(call.outputs[0], labels)


def layer_norm(watch: Watch, call: Call) -> None:
    """Follow a norm over channels: removing one changes the others' values, so no channel can be removed."""
    value = call.arguments["input"]
    labels = watch.labels.of(value)
    if any(size > 1 for size in labels.shape[-len(call.arguments["normalized_shape"]) :]):
        watch.facts.freeze(labels, f"a layer norm's statistics are over its channels, in {where(watch.place)}")
    watch.labels.give(call.outputs[0], labels)
