"""What does a node come to whose inputs are all known? Computed by the evaluator of the ONNX standard."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper
from onnx.reference import ReferenceEvaluator

from compress.onnx_import.values import PROBES, Fixed, Refused, as_float32

_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_SAYS_TRAINING = 14  # before this operator set the evaluator and ONNX Runtime differ on what a batch norm computes
_WITH_GRAPHS = ("Loop", "Scan", "SequenceMap")


def evaluate(node: ir.Node, inputs: Sequence[Fixed | None], opset: int) -> list[Fixed]:
    """Return the outputs of a node for each number of images.

    Raises:
        Refused: It draws random numbers, or cannot be computed.
    """
    if node.op_type in _RANDOM:
        raise Refused("draws random numbers, which is not supported")
    if node.op_type in _WITH_GRAPHS:
        raise Refused("is control flow, which is not supported")
    plain = all(value is None or value.is_constant for value in inputs)
    made = [
        _run(node, [None if v is None else v.arrays[index] for v in inputs], opset) for index in range(_runs(plain))
    ]
    made = made * len(PROBES) if plain else made
    outputs = [output.name or "" for output in _read(node)]
    return [Fixed(name, tuple(one[index] for one in made)) for index, name in enumerate(outputs)]


def _read(node: ir.Node) -> list[ir.Value]:
    """Return the outputs up to the last one that something reads; old exporters name more of them."""
    used = [index for index, output in enumerate(node.outputs) if output.uses() or output.is_graph_output()]
    return list(node.outputs[: max(used, default=0) + 1])


def _runs(plain: bool) -> int:
    return 1 if plain else len(PROBES)


def _run(node: ir.Node, arrays: Sequence[np.ndarray | None], opset: int) -> list[np.ndarray]:
    proto = ir.to_proto(node)
    assert isinstance(proto, onnx.NodeProto)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in {n: a for n, a in zip(proto.input, arrays, strict=True) if a is not None}.items()
    ]
    by_runtime = node.op_type == "BatchNormalization" and opset < _SAYS_TRAINING
    if not by_runtime:
        del proto.output[len(_read(node)) :]
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output[: 1 if by_runtime else None]]
    graph = helper.make_graph([proto], "one", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    feed = {name: array for name, array in zip(proto.input, arrays, strict=True) if array is not None}
    try:
        with np.errstate(all="ignore"):
            if by_runtime:
                content, providers = model.SerializeToString(), ["CPUExecutionProvider"]
                session: Any = onnxruntime.InferenceSession(content, providers=providers)
                found: list[Any] = session.run(list(proto.output[:1]), feed)
            else:
                found = ReferenceEvaluator(model).run(None, feed)
    except Exception as error:  # the evaluator raises types of its own, and whatever numpy raises
        raise Refused(f"cannot be computed: {type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
    return [as_float32(np.asarray(value)) for value in found]
