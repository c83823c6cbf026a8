"""Shapes in an ONNX graph that its operators do not tell, seen by running it once in ONNX Runtime.

Some exporters compute sizes within the graph, for padding or reshaping, and inference from the operators ends there.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import ModelProto

from compress.errors import ModelError
from compress.onnx_file.io import first_line

_SILENT = 4


def observe_shapes(model: ModelProto, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Run a graph on zeros and return the shapes of some of its values.

    Args:
        model: With its weights, and without open axes in its inputs; it is not changed.
        names: Of the values.

    Raises:
        ModelError: An axis of an input is open, or ONNX Runtime cannot run the graph.
    """
    import onnxruntime  # half a second; needed for few files

    zeros, copy = _zeros(model), ModelProto()
    copy.CopyFrom(model)
    wanted = sorted(set(names))
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            copy.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        found = session.run(wanted, zeros)
    except Exception as error:  # ONNX Runtime and protobuf raise types of their own
        raise ModelError(f"The graph must run for its shapes to be seen: {first_line(error)}") from error
    return {name: tuple(array.shape) for name, array in zip(wanted, found, strict=True)}


def _zeros(model: ModelProto) -> dict[str, np.ndarray]:
    constants = {tensor.name for tensor in model.graph.initializer}
    arrays = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        if not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            raise ModelError(
                f"Input '{value.name}' must have fixed sizes, one of its axes is open.",
                hint="Export with fixed height and width; only the batch axis may stay open.",
            )
        sizes = [int(dim.dim_value) for dim in tensor.shape.dim]
        arrays[value.name] = np.zeros(sizes, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return arrays
