"""Values of an ONNX file while a network is built from it.

    Fixed      known without any image: weights, constants, sizes, and everything computed from those alone
    Computed   the output of an operation on images: a node of the new graph, and its shapes

Sizes may depend on the number of images. So every value is computed for two assumed numbers of images, `PROBES`; a
value that differs between the two depends on that number. They are primes, unlikely to be the width of a layer. The
evaluator of the ONNX standard computes each node whose inputs are all known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx

from compress.errors import first_line, translated

PROBES = (11, 13)


class Refused(Exception):
    """Error for a node that cannot be built; its text states the reason without the name of the node."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """A value that does not depend on images.

    Attributes:
        name: Name in the file.
        arrays: Value for each number of images in `PROBES`.
    """

    name: str
    arrays: tuple[np.ndarray, ...]

    @classmethod
    def constant(cls, name: str, array: np.ndarray) -> "Fixed":
        """Return a value that is the same for any number of images; floating-point numbers become float32."""
        kept = as_float32(array)
        return cls(name, (kept,) * len(PROBES))

    @property
    def is_constant(self) -> bool:
        """True if the value is the same for any number of images."""
        first, *others = self.arrays
        return all(other is first or np.array_equal(first, other) for other in others)

    @property
    def array(self) -> np.ndarray:
        """Value for any number of images.

        Raises:
            Refused: The value depends on the number of images.
        """
        if not self.is_constant:
            raise Refused(f"'{self.name}' must not depend on the number of images")
        return self.arrays[0]


@dataclass(frozen=True, slots=True)
class Computed:
    """A value that depends on images.

    Attributes:
        name: Name in the file.
        node: Node of the new graph that computes the value.
        probes: Meta tensor (shape and dtype without data) for each number of images in `PROBES`.
    """

    name: str
    node: fx.Node
    probes: tuple[Tensor, ...]

    @property
    def rank(self) -> int:
        """Number of axes."""
        return self.probes[0].ndim

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape for each number of images in `PROBES`."""
        return tuple(tuple(probe.shape) for probe in self.probes)

    def size(self, axis: int) -> int:
        """Return the size of an axis.

        Raises:
            Refused: The size depends on the number of images.
        """
        first, *others = (shape[axis] for shape in self.shapes)
        if any(other != first for other in others):
            raise Refused(f"axis {axis} of '{self.name}' must not depend on the number of images")
        return first

    def axis(self, axis: int) -> int:
        """Return an axis counted from the front."""
        return axis % self.rank if self.rank else 0


@dataclass(frozen=True, slots=True)
class BatchSize:
    """The number of images, as an argument of a call.

    Attributes:
        node: Node of the new graph that computes it.
        probes: `PROBES`.
    """

    node: fx.Node
    probes: tuple[int, ...] = PROBES


Value = Fixed | Computed | None


class KnownValues:
    """Values of the file that are known so far, by name; constants of the file are known from the start.

    Attributes:
        merged: Last node of a pattern of nodes -> result of the complete pattern.
    """

    def __init__(self) -> None:
        self.merged: dict[ir.Node, Computed] = {}
        self._by_name: dict[str, Value] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Value:
        return self._by_name[name]

    def add(self, name: str, value: Fixed | Computed) -> None:
        """Add a value."""
        self._by_name[name] = value

    def of(self, value: ir.Value) -> Value:
        """Return a value; None for an optional input that is missing.

        Raises:
            Refused: No node has computed the value.
        """
        name = value.name or ""
        if name == "":
            return None
        if name not in self._by_name and value.const_value is not None:
            self._by_name[name] = Fixed.constant(name, value.const_value.numpy())
        if name not in self._by_name:
            raise Refused(f"reads '{name}', which no node computes before it")
        return self._by_name[name]

    def find(self, value: ir.Value) -> Value:
        """Return a value that is known so far, else None."""
        is_known = (value.name or "") in self._by_name or value.const_value is not None
        return self.of(value) if is_known else None


def as_float32(array: np.ndarray) -> np.ndarray:
    """Return floating-point numbers of any precision as float32, and other values unchanged."""
    is_other_float = array.dtype.kind == "f" or array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    return array.astype(np.float32) if is_other_float and array.dtype != np.float32 else array


_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_SAYS_TRAINING = 14  # before this operator set the evaluator and ONNX Runtime differ on what a batch norm computes
_WITH_GRAPHS = ("Loop", "Scan", "SequenceMap")


def evaluate(node: ir.Node, inputs: Sequence[Fixed | None], opset: int) -> list[Fixed]:
    """Return the outputs of a node for each number of images.

    Raises:
        Refused: The node draws random numbers, is control flow, or cannot be computed.
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
    """Return the outputs up to the last one that is used; old exporters name further, unused outputs."""
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

    def refused(error: Exception) -> Refused:
        return Refused(f"cannot be computed: {type(error).__name__}: {first_line(error)[:200]}")

    with translated(refused, Refused), np.errstate(all="ignore"):
        if by_runtime:
            content, providers = model.SerializeToString(), ["CPUExecutionProvider"]
            session: Any = onnxruntime.InferenceSession(content, providers=providers)
            found: list[Any] = session.run(list(proto.output[:1]), feed)
        else:
            found = ReferenceEvaluator(model).run(None, feed)
    return [as_float32(np.asarray(value)) for value in found]
