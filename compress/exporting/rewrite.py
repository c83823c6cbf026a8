"""Rewrites of a network or graph before export: padded shortcuts as convolutions, and half precision.

    padded_shortcuts    every n-th row and column (Slice), then zero channels (Pad): the parameter-free shortcut of
                        CIFAR ResNets, as one convolution with fixed weights. Runtimes keep convolutions in a blocked
                        memory layout; each Slice or Pad costs a change of layout and back.
    half precision      weights and activations in float16, inputs and outputs in float32. Providers with float16
                        kernels (CUDA, TensorRT) then read half the bytes; a processor without them casts back and
                        forth.

The caller measures whether a rewrite is faster.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from compress.errors import ExportFailed, first_line, translated
from compress.onnx_file.counting import FIXED_WEIGHT

Constants = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class _Shortcut:
    """A zero-padded shortcut.

    Attributes:
        source: Name of the value that the shortcut starts from.
        steps: Distance of kept positions along each axis after the channels (rows, columns).
        before: Number of zero channels before the channels of the source.
        after: Number of zero channels behind them.
    """

    source: str
    steps: tuple[int, ...]
    before: int
    after: int


def rewrite_padded_shortcuts(model: ModelProto) -> int:
    """Turn every zero-padded shortcut into a convolution, in place, and return their number."""
    graph = model.graph
    channels = _channels(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) <= 1}
    producers = {name: node for node in graph.node for name in node.output}
    nodes, found = [], 0
    for node in graph.node:
        shortcut = _match_shortcut(node, producers, constants) if node.op_type == "Pad" else None
        if shortcut is None or shortcut.source not in channels:
            nodes.append(node)
            continue
        weight = _fixed_weight(shortcut, *channels[shortcut.source], f"{FIXED_WEIGHT}{node.output[0]}")
        graph.initializer.append(weight)
        shape, name = [1] * len(shortcut.steps), f"fixed_{node.name or node.output[0]}"
        inputs = [shortcut.source, weight.name]
        nodes.append(
            helper.make_node("Conv", inputs, node.output, name=name, kernel_shape=shape, strides=list(shortcut.steps))
        )
        found += 1
    if found:
        del graph.node[:]
        graph.node.extend(nodes)
        _remove_unused(model)
    return found


REWRITES: Mapping[str, Callable[[ModelProto], int]] = {"padded_shortcuts": rewrite_padded_shortcuts}


def guard_padded_pools(model: ModelProto) -> int:
    """Keep runtimes from folding a Pad with zeros into the max pool behind it, in place; return the number of Pads.

    A pool's own padding is minus infinity. Where all values under the kernel are negative, the zero of the Pad is the
    largest. ONNX Runtime's fusion of the two (`Pad_Fusion`, seen in 1.31) then computes another value. The fusion skips
    a Pad with a value other than exactly zero, so the smallest normal number replaces the zero.
    """
    constants = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer if len(tensor.dims) <= 1
    }
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = 0
    for node in model.graph.node:
        if node.op_type != "Pad" or not any(reader.op_type == "MaxPool" for reader in readers.get(node.output[0], ())):
            continue
        mode = next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"constant")
        value = constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros((), np.float32)
        if mode != b"constant" or value is None or value.dtype.kind != "f" or np.any(value != 0):
            continue
        name = f"{node.output[0]}.above_zero"
        tiny = np.array(np.finfo(value.dtype).tiny, value.dtype)
        model.graph.initializer.append(numpy_helper.from_array(tiny, name))
        node.input.extend([""] * (3 - len(node.input)))
        node.input[2] = name
        found += 1
    return found


def apply_rewrites(model: ModelProto, names: Iterable[str]) -> dict[str, int]:
    """Apply rewrites in place and return name -> number of times it was applied."""
    return {name: REWRITES[name](model) for name in names}


def _match_shortcut(pad: NodeProto, producers: Mapping[str, NodeProto], constants: Constants) -> _Shortcut | None:
    """Return the shortcut that ends with a Pad, or None for another Pad."""
    pads = _channel_pads(pad, constants)
    if pads is None:
        return None
    rank, before, after = pads
    source, steps = pad.input[0], (1,) * (rank - 2)
    slicing = producers.get(source)
    if slicing is not None and slicing.op_type == "Slice":
        found = _spatial_steps(slicing, rank, constants)
        if found is None:
            return None
        source, steps = slicing.input[0], found
    return _Shortcut(source, steps, before, after)


def _channel_pads(pad: NodeProto, constants: Constants) -> tuple[int, int, int] | None:
    """Return the rank and the zero channels before and after, for a Pad that only adds zero channels; else None."""
    mode = next((attribute.s for attribute in pad.attribute if attribute.name == "mode"), b"constant")
    amounts = constants.get(pad.input[1])
    has_axes = len(pad.input) > 3 and pad.input[3] != ""
    value = constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
    if mode != b"constant" or amounts is None or has_axes or value is None or np.any(value != 0):
        return None
    rank = len(amounts) // 2
    before, after = (int(amounts[index]) for index in (1, rank + 1))
    others = np.delete(amounts, [1, rank + 1])
    is_channels_only = rank >= 3 and not others.any() and min(before, after) >= 0 and before + after > 0
    return (rank, before, after) if is_channels_only else None


def _spatial_steps(slicing: NodeProto, rank: int, constants: Constants) -> tuple[int, ...] | None:
    """Return the steps along each axis after the channels, for a Slice that takes every n-th position; else None."""
    values = [constants.get(name) for name in slicing.input[1:]]
    if len(values) < 3 or any(value is None for value in values):
        return None
    starts, ends, axes = values[0], values[1], values[2]
    assert starts is not None
    assert ends is not None
    assert axes is not None
    found = values[3] if len(values) > 3 else np.ones(len(axes), np.int64)
    assert found is not None
    axes = axes % rank
    if starts.any() or (ends < np.iinfo(np.int32).max).any() or (axes < 2).any() or (found < 1).any():
        return None
    steps = [1] * rank
    for axis, step in zip(axes, found, strict=True):
        steps[axis] *= int(step)
    return tuple(steps[2:])


def _fixed_weight(shortcut: _Shortcut, channels: int, dtype: np.dtype, name: str) -> onnx.TensorProto:
    """Return a weight (outputs, inputs, 1, ...) that copies each channel to its output position."""
    weight = np.zeros((shortcut.before + channels + shortcut.after, channels), dtype)
    weight[shortcut.before + np.arange(channels), np.arange(channels)] = 1
    return numpy_helper.from_array(weight.reshape(*weight.shape, *[1] * len(shortcut.steps)), name)


def _channels(model: ModelProto) -> dict[str, tuple[int, np.dtype]]:
    """Return value -> size of its second axis and dtype, for floating-point values with a known size."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {}
    for value in (*inferred.input, *inferred.value_info):
        tensor = value.type.tensor_type
        if tensor.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16) and len(tensor.shape.dim) > 2:
            size = tensor.shape.dim[1]
            if size.HasField("dim_value"):
                dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
                found[value.name] = int(size.dim_value), dtype
    return found


def _remove_unused(model: ModelProto) -> None:
    """Remove unused nodes and constants, and their shape entries."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    while True:
        read = {name for node in graph.node for name in node.input} | outputs
        kept = [node for node in graph.node if read.intersection(node.output)]
        if len(kept) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(kept)
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    written = {name for node in graph.node for name in node.output}
    values = [value for value in graph.value_info if value.name in written]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(tensors)
    graph.value_info.extend(values)


HALF_TOLERANCE = 0.05  # of the largest output; ten layers of rounding to 11 bits give some thousandths

_LARGEST = float(np.finfo(np.float16).max)


def in_half_precision(model: ModelProto) -> ModelProto:
    """Return a float16 copy of a float32 model; its inputs and outputs stay float32.

    Args:
        model: Model with its weights; it is not changed.

    Raises:
        ExportFailed: A weight is outside the range of float16, or the graph cannot be converted.
    """
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            largest = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))
            if not largest <= _LARGEST:
                raise ExportFailed(
                    f"Weights must be at most {_LARGEST:.0f} for fp16, '{tensor.name}' has {largest:.3g}.",
                    hint="Set deploy.precision: fp32.",
                )
    copy = ModelProto()
    copy.CopyFrom(model)
    with translated(lambda error: ExportFailed(f"The graph could not be written in fp16: {first_line(error)}")):
        half = ir.from_proto(convert_float_to_float16(copy, keep_io_types=True))
        half.graph.sort()  # the converter puts its casts last
        return ir.to_proto(half)
