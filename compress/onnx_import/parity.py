"""Parity of an imported network with its file in ONNX Runtime, down to the first node that differs.

The relative error of an output is the largest difference over the largest value, over all images compared. The limit is
1e-5; where weights or values of the file are in half precision, 5e-3, since the network computes in float32.

Some networks have larger rounding errors: ONNX Runtime with FastestDet is 1.3e-5 away from float64 on some images.
Hence, where an output exceeds the limit, the network is computed in float64 as well. Three times its rounding error is
added to the limit (network and ONNX Runtime round differently), up to 1e-4 in all.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx

from compress.data.packing import standard_strides
from compress.errors import ModelError, NonFinite, attempt, first_line, translated
from compress.onnx_file.io import each_tensor
from compress.onnx_import.graph import ONNX_VALUE
from compress.onnx_import.preconditions import Source
from compress.onnx_import.values import as_float32

TOLERANCE = 1e-5
HALF_TOLERANCE = 5e-3
MOST_TOLERANCE = 1e-4
ROUNDINGS = 3
IMAGES = 2
_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_SILENT = 4
Feed = dict[str, np.ndarray]


def require_parity(module: fx.GraphModule, source: Source, images: Sequence[np.ndarray] | None = None) -> float:
    """Compare a network with the file on random images, and on given ones.

    Args:
        module: The imported network.
        source: File that it was imported from.
        images: One array (N, ...) for each input; None for random images only.

    Returns:
        The largest relative error of an output.

    Raises:
        ModelError: An output differs; the message names the first node that does.
        NonFinite: ONNX Runtime returns NaN or infinity.
    """
    tolerance, largest = _tolerance(source), 0.0
    session = _session(source, None)
    feeds = [_random(source)] if images is None else [_random(source), _given(source, images)]
    for feed in feeds:
        found = dict(zip(source.outputs, _outputs(module, _tensors(source, feed)), strict=True))
        for name, want in _run(session, source, feed, found).items():
            have = found[name]
            if not np.isfinite(want).all():
                raise NonFinite(
                    f"Output '{name}' of '{source.path}' must be finite, ONNX Runtime gives NaN or infinity."
                )
            error = relative_error(have, want)
            largest = max(largest, error)
            limit = tolerance if error <= tolerance else _with_rounding(tolerance, module, source, feed, name, have)
            if error > limit:
                raise ModelError(
                    f"The network imported from '{source.path}' must equal the file within {limit:.2g} of the "
                    f"largest value, output '{name}' is off by {error:.2g}{_where(module, source, feed, limit)}."
                )
    return largest


def rounding_error(source: Source, images: Sequence[np.ndarray] | None = None) -> float | None:
    """Return the largest relative difference of a quantised file to its float form; None for other files.

    Args:
        source: The file.
        images: One array (N, ...) for each input; None for random images.

    Raises:
        ModelError: ONNX Runtime cannot run the file.
    """
    if not source.is_float_form:
        return None
    feed = _random(source) if images is None else _given(source, images)
    wanted = dict.fromkeys(source.outputs, np.zeros(()))
    exact = _run(_session(source, None), source, feed, wanted)
    rounded = _run(_session(replace(source, is_float_form=False), None), source, feed, wanted)
    return max(relative_error(rounded[name], exact[name]) for name in source.outputs)


def _with_rounding(
    tolerance: float, module: fx.GraphModule, source: Source, feed: Feed, name: str, found: np.ndarray
) -> float:
    """Return a tolerance widened by the float32 rounding error of an output of the network."""
    doubles = [value.double() if value.is_floating_point() else value for value in _tensors(source, feed)]
    try:
        exact = _outputs(copy.deepcopy(module).double(), doubles)[source.outputs.index(name)]
    except RuntimeError:  # the network casts to float32 itself, so that its rounding error is not known
        return tolerance
    rounding = relative_error(found, exact)
    return max(tolerance, min(tolerance + ROUNDINGS * rounding, MOST_TOLERANCE))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference over the largest expected value; infinity where shapes differ or a value is NaN.

    >>> relative_error(np.array([1.0, 4.0]), np.array([2.0, 4.0]))
    0.25
    """
    if found.shape != expected.shape:
        return float("inf")
    if found.size == 0:
        return 0.0
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)
    scale = np.abs(expected.astype(np.float64)).max(initial=0.0)
    error = float(difference / scale) if scale else float(difference)
    return error if np.isfinite(error) else float("inf")


def _where(module: fx.GraphModule, source: Source, feed: Feed, tolerance: float) -> str:
    """Return a clause on the first node that differs for one image, or else for several images at once."""
    single = {
        spec.name: feed[spec.name][:1] if source.carries_images(spec) else feed[spec.name] for spec in source.inputs
    }
    differing = next(_differing(module, source, single, tolerance), None)
    if differing is not None:
        node, error = differing
        return f"; the first that differs is {node} (by {error:.2g})"
    several = next(_differing(module, source, feed, tolerance), None)
    place = f"; the first that differs is {several[0]}" if several is not None else ""
    return f". For one image it is right, for {IMAGES} at once it is not: the file is made for one{place}"


def _differing(module: fx.GraphModule, source: Source, feed: Feed, tolerance: float) -> Iterator[tuple[str, float]]:
    """Yield each node of the file whose value differs and its relative error, in order."""
    values = _values(module, source, feed)
    nodes = {output: node for node in source.model.graph.node for output in node.output}
    values = {name: value for name, value in values.items() if name in nodes}
    session = _session(source, list(values))
    for name, want in _run(session, source, feed, values).items():
        error = relative_error(values[name], want)
        if error > tolerance:
            node = nodes[name]
            yield f"{node.op_type} '{node.name or name}'", error


def _values(module: fx.GraphModule, source: Source, feed: Feed) -> dict[str, np.ndarray]:
    """Return value name -> array of the network, for every value of the file that the network computes."""
    found: dict[str, np.ndarray] = {}

    class _Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor) and ONNX_VALUE in n.meta:
                found[n.meta[ONNX_VALUE]] = value.numpy().copy()
            return value

    with torch.no_grad():
        _Recorder(module).run(*_tensors(source, feed))
    return found


def _outputs(module: fx.GraphModule, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    with torch.no_grad():
        found = module(*inputs)
    return [value.numpy() for value in (found if isinstance(found, tuple) else (found,))]


def _tensors(source: Source, feed: Feed) -> list[Tensor]:
    return [standard_strides(torch.from_numpy(as_float32(feed[spec.name]))) for spec in source.inputs]


def _run(session: Any, source: Source, feed: Feed, wanted: Mapping[str, np.ndarray]) -> Feed:
    """Return values by ONNX Runtime; a file for one image runs once for each image.

    Args:
        session: Open session of the file.
        source: The file.
        feed: Input name -> array.
        wanted: Name of each value -> the network's array, whose shape determines the joining of single images.
    """
    names = list(wanted)
    with translated(lambda error: ModelError(f"ONNX Runtime must be able to run '{source.path}': {first_line(error)}")):
        if source.has_open_batch:
            found = session.run(names, feed)
            return {name: as_float32(value) for name, value in zip(names, found, strict=True)}
        count = max(feed[spec.name].shape[0] for spec in source.inputs if source.carries_images(spec))
        runs = [session.run(names, _one_of(source, feed, index)) for index in range(count)]
    each = zip(names, zip(*runs, strict=True), strict=True)
    return {name: as_float32(_joined(values, wanted[name].shape)) for name, values in each}


def _joined(values: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Return the values of single images joined along a new axis if that has the shape, else along the first axis."""
    stacked = np.stack(values)
    return stacked if stacked.shape == shape or stacked.ndim == 1 else np.concatenate(values)


def _one_of(source: Source, feed: Mapping[str, np.ndarray], index: int) -> Feed:
    return {
        spec.name: feed[spec.name][index : index + 1] if source.carries_images(spec) else feed[spec.name]
        for spec in source.inputs
    }


def _random(source: Source) -> Feed:
    """Return random images: normally distributed, or 0 and 1 where an input holds whole numbers."""
    generator = np.random.default_rng(0)
    feed = {}
    for spec in source.inputs:
        (shape,) = source.shapes(spec, [IMAGES])
        is_float = np.dtype(spec.dtype).kind == "f"
        values = generator.standard_normal(shape) if is_float else generator.integers(0, 2, shape)
        feed[spec.name] = values.astype(spec.dtype)
    return feed


def _given(source: Source, images: Sequence[np.ndarray]) -> Feed:
    if len(images) != len(source.inputs):
        raise ModelError(f"'{source.path}' has {len(source.inputs)} inputs, got values for {len(images)}.")
    for spec, array in zip(source.inputs, images, strict=True):
        if as_float32(np.zeros(1, spec.dtype)).dtype.kind != "f" and array.dtype.kind == "f":
            raise ModelError(
                f"Input '{spec.name}' of '{source.path}' takes {spec.dtype}, images are given as prepared float32 "
                "numbers.",
                hint="Export the network without the Cast, Sub and Div that prepare images inside, and say what they "
                "did in data.preprocessing (scale, mean, std).",
            )
        (wanted,) = source.shapes(spec, [len(array)])
        if array.shape != wanted:
            raise ModelError(
                f"'{source.path}' takes images of shape {wanted[1:]}, got {array.shape[1:]} for '{spec.name}'.",
                hint="Check data.preprocessing (resize, crop, channels, layout).",
            )
    return {spec.name: array.astype(spec.dtype) for spec, array in zip(source.inputs, images, strict=True)}


def _session(source: Source, outputs: Sequence[str] | None) -> Any:
    """Open the file; with `outputs`, open a copy that returns inner values too, without graph optimisations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    model: str | bytes = source.model.SerializeToString() if source.is_float_form else str(source.path)
    telling = onnx.ModelProto()
    if outputs is not None:
        telling.CopyFrom(source.model)
        there = {value.name for value in telling.graph.output}
        telling.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in there)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        model = telling.SerializeToString()

    def otherwise(error: Exception) -> Any:
        if onnx.TensorProto.DOUBLE in _weight_types(source):  # ONNX Runtime has no convolutions in double precision
            return ReferenceEvaluator(source.model if outputs is None else telling)
        raise ModelError(f"ONNX Runtime must be able to open '{source.path}': {first_line(error)}") from error

    providers = ["CPUExecutionProvider"]
    return attempt(lambda: onnxruntime.InferenceSession(model, options, providers=providers), otherwise)


def _tolerance(source: Source) -> float:
    return HALF_TOLERANCE if _weight_types(source).intersection(_HALF) else TOLERANCE


def _weight_types(source: Source) -> set[int]:
    return {tensor.data_type for tensor in each_tensor(source.model)}
