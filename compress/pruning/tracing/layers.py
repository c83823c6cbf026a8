"""What do layers with parameters do to channels?"""

import torch
from torch import Tensor

from compress.pruning.tracing.moving import move
from compress.pruning.tracing.pointwise import give_all
from compress.pruning.tracing.record import NONE, along, is_labelled, unlabelled, vector
from compress.pruning.tracing.watch import Call, Watch, where


def convolution(watch: Watch, call: Call) -> None:
    """A convolution: reads its inputs' channels and makes new ones; a depthwise one passes them on."""
    value, weight = call.arguments["input"], call.arguments["weight"]
    parts, transposed = int(call.arguments["groups"]), bool(call.arguments["transposed"])
    labels = watch.labels_of(value)
    inputs = watch.channels_of(labels, value.shape[1])
    outputs = int(call.result.shape[1])
    if inputs is None:
        watch.mix(labels, call)
        inputs = torch.full((value.shape[1],), NONE)
    is_each_alone = parts > 1 and parts == value.shape[1]
    if not watch.is_known(weight):
        _convolution_with_computed_weight(watch, call, inputs, is_each_alone and outputs == parts)
        return
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    if is_each_alone and outputs == parts:
        own = watch.axis(weight, "scale", 0, parts).labels
        watch.join(own, inputs)
    elif is_each_alone and not transposed:
        own = watch.axis(weight, "out", 0, outputs).labels
        watch.require(own, inputs.repeat_interleave(outputs // parts))
    else:
        read = watch.axis(weight, "in", in_dim, value.shape[1], parts)
        watch.join(read.labels, inputs)
        own = watch.axis(weight, "out", out_dim, outputs, parts).labels
        watch.note_direct(call.result, weight)
    _add_bias(watch, call.get("bias"), own)
    watch.give(call.result, along(1, call.result.ndim, own))


def _convolution_with_computed_weight(watch: Watch, call: Call, inputs: Tensor, passes_on: bool) -> None:
    """A depthwise convolution with a weight that is the same for all channels passes them on; others mix them."""
    weight = call.arguments["weight"]
    own = watch.labels_of(weight)
    along_outputs = vector(own, 0, weight.shape[0])
    if passes_on and along_outputs is not None:
        if is_labelled(own):
            watch.join(along_outputs, inputs)
        watch.give(call.result, along(1, call.result.ndim, inputs))
        return
    watch.mix(inputs, call)
    watch.mix(own, call)
    watch.give(call.result, unlabelled(call.result.ndim))


def _add_bias(watch: Watch, bias: Tensor | None, labels: Tensor) -> None:
    if bias is not None:
        own = watch.channel_labels(bias)
        if own is None or len(own) != len(labels):
            watch.freeze(labels, f"what is added to it follows no channel, in {where(watch.place)}")
        else:
            watch.join(own, labels)


def matrix_product(watch: Watch, call: Call) -> None:
    """A product with a parameter, as linear layers are carried out: reads channels and makes new ones."""
    value, right = call.get("mat1", "self"), call.arguments["mat2"]
    if call.name == "addmm":
        value = call.arguments["mat1"]
    labels = watch.labels_of(value)
    found = watch.weight_behind(right)
    inputs = vector(labels, 1, value.shape[1])
    if found is None or inputs is None:
        for tensor in call.tensors:
            watch.mix(watch.labels_of(tensor), call)
        if found is None:
            watch.give(call.result, unlabelled(2))
            return
        inputs = torch.full((value.shape[1],), NONE)
    weight, out_dim, in_dim = found
    read = watch.axis(weight, "in", in_dim, weight.shape[in_dim])
    watch.join(read.labels, inputs)
    outputs = watch.axis(weight, "out", out_dim, weight.shape[out_dim]).labels
    if call.name == "addmm":
        _add_bias(watch, call.arguments["self"], outputs)
    watch.note_direct(call.result, weight)
    watch.give(call.result, along(1, 2, outputs))


def transpose_matrix(watch: Watch, call: Call) -> None:
    """A transposed parameter stays known as that parameter."""
    if watch.is_known(call.first) and call.first.ndim == 2:
        watch.note_transposed(call.result, call.first)
        watch.give(call.result, unlabelled(2))
    else:
        move(watch, call)


def batch_norm(watch: Watch, call: Call) -> None:
    """A norm with statistics of each channel alone: passes channels on."""
    value = call.arguments["input"]
    labels = watch.labels_of(value)
    channels = watch.channels_of(labels, value.shape[1])
    own = [t for name in ("weight", "bias", "running_mean", "running_var") if (t := call.get(name)) is not None]
    if channels is None:
        watch.mix(labels, call)
    else:
        for tensor in own:
            along_channels = watch.channel_labels(tensor)
            if along_channels is not None:
                watch.join(along_channels, channels)
        if own:
            watch.note_norm(value, own[0])
    give_all(watch, call, labels)


def group_norm(watch: Watch, call: Call) -> None:
    """A norm over groups of channels: a whole group of them can go, and nothing less."""
    value, parts = call.arguments["input"], int(call.arguments["group"])
    labels = watch.labels_of(value)
    channels = watch.channels_of(labels, value.shape[1])
    if channels is None:
        watch.mix(labels, call)
    else:
        size = len(channels) // parts
        watch.tie(channels, channels.reshape(parts, size)[:, :1].expand(parts, size).flatten())
        for name in ("weight", "bias"):
            if (tensor := call.get(name)) is not None:
                own = watch.channel_labels(tensor)
                if own is not None:
                    watch.join(own, channels)
        watch.trace.norm_groups.append((watch.place, channels))
        if (weight := call.get("weight")) is not None:
            watch.note_norm(value, weight)
    watch.give(call.outputs[0], labels)


def layer_norm(watch: Watch, call: Call) -> None:
    """A norm over channels: with one of them gone the others' values change, so none can go."""
    value = call.arguments["input"]
    labels = watch.labels_of(value)
    if any(size > 1 for size in labels.shape[-len(call.arguments["normalized_shape"]) :]):
        watch.freeze(labels, f"a layer norm's statistics are over its channels, in {where(watch.place)}")
    watch.give(call.outputs[0], labels)
