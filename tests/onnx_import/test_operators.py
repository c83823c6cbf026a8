"""Every operator that can be imported computes what ONNX Runtime computes, for one image and for several."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from onnx_graphs import make, node, weights, write

from compress.onnx_import.importer import import_onnx
from compress.onnx_import.operators.table import OPERATORS
from compress.onnx_import.parity import relative_error

I64 = np.int64


def ints(*values: int) -> np.ndarray:
    return np.array(values, I64)


def unary(operator: str, opset: int = 21, **attributes) -> ModelProto:
    return make([node(operator, ["x"], **attributes)], opset=opset)


def positive(operator: str) -> ModelProto:
    """Numbers above 1 go in."""
    return make(
        [node("Abs", ["x"], ["a"]), node("Add", ["a", "one"], ["b"]), node(operator, ["b"])], {"one": np.float32(1.5)}
    )


def small(operator: str) -> ModelProto:
    """Numbers between -1 and 1 go in."""
    return make([node("Tanh", ["x"], ["a"]), node(operator, ["a"])])


def binary(operator: str, constant: np.ndarray, swapped: bool = False) -> ModelProto:
    return make([node(operator, ["c", "x"] if swapped else ["x", "c"])], {"c": constant})


def logical(operator: str) -> ModelProto:
    nodes = [
        node("Greater", ["x", "zero"], ["a"]),
        node("Less", ["x", "one"], ["b"]),
        node(operator, ["a", "b"], ["c"]) if operator != "Not" else node("Not", ["a"], ["c"]),
        node("Cast", ["c"], to=TensorProto.FLOAT),
    ]
    return make(nodes, {"zero": np.float32(0), "one": np.float32(1)})


def conv(shape, x=("N", 4, 6, 6), bias=True, **attributes) -> ModelProto:
    constants = weights(w=shape, b=(shape[0],)) if bias else weights(w=shape)
    return make([node("Conv", ["x", "w", "b"][: 2 + bias], **attributes)], constants, inputs={"x": x})


def transposed(shape, x=("N", 4, 6, 6), **attributes) -> ModelProto:
    constants = weights(w=shape, b=(shape[1] * attributes.get("group", 1),))
    return make([node("ConvTranspose", ["x", "w", "b"], **attributes)], constants, inputs={"x": x})


def pool(operator: str, kernel=(3, 3), x=("N", 4, 7, 7), opset: int = 21, **attributes) -> ModelProto:
    return make([node(operator, ["x"], kernel_shape=kernel, **attributes)], inputs={"x": x}, opset=opset)


def reduced(operator: str, opset: int = 21, axes=(2, 3), **attributes) -> ModelProto:
    before = [node("Abs", ["x"], ["a"]), node("Add", ["a", "one"], ["b"])]
    constants = {"one": np.float32(0.1)}
    if opset >= 18 or (operator == "ReduceSum" and opset >= 13):
        nodes = [*before, node(operator, ["b", "axes"], **attributes)]
        return make(nodes, {**constants, "axes": ints(*axes)}, opset=opset)
    return make([*before, node(operator, ["b"], axes=list(axes), **attributes)], constants, opset=opset)


def resized(scales=None, sizes=None, opset: int = 21, x=("N", 4, 6, 6), **attributes) -> ModelProto:
    constants = {}
    names = ["x", "", "scales" if scales else "", "sizes" if sizes else ""]
    if scales:
        constants["scales"] = np.array(scales, np.float32)
    if sizes:
        constants["sizes"] = ints(*sizes)
    while names[-1] == "":
        names.pop()
    return make([node("Resize", names, **attributes)], constants, opset=opset, inputs={"x": x})


def with_constants(
    operator: str, opset: int = 21, x=("N", 4, 6, 6), outputs=("y",), attributes=None, **constants
) -> ModelProto:
    return make(
        [node(operator, ["x", *constants], outputs, **(attributes or {}))],
        constants,
        opset=opset,
        inputs={"x": x},
        outputs=outputs,
    )


def batch_norm(x=("N", 4, 6, 6), opset: int = 21) -> ModelProto:
    constants = weights(s=(4,), b=(4,), m=(4,)) | {"v": np.linspace(0.5, 2, 4).astype(np.float32)}
    return make(
        [node("BatchNormalization", ["x", "s", "b", "m", "v"], epsilon=1e-3)], constants, inputs={"x": x}, opset=opset
    )


def group_norm(opset: int) -> ModelProto:
    width = 4 if opset >= 21 else 2
    return make(
        [node("GroupNormalization", ["x", "s", "b"], num_groups=2)], weights(s=(width,), b=(width,)), opset=opset
    )


def gemm(c=(5,), x=("N", 4), **attributes) -> ModelProto:
    shape = (5, 4) if attributes.get("transB") else (4, 5)
    constants = weights(w=shape, c=c) if c is not None else weights(w=shape)
    return make([node("Gemm", ["x", "w", "c"][: 3 if c is not None else 2], **attributes)], constants, inputs={"x": x})


def through_shape() -> ModelProto:
    """The batch size is read off the image, as exporters do it."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "first"], ["n"], axis=0),
        node("Unsqueeze", ["n", "axes"], ["n1"]),
        node("Concat", ["n1", "rest"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["r"]),
        node("Size", ["x"], ["elements"]),
        node("Cast", ["elements"], ["as_float"], to=TensorProto.FLOAT),
        node("Div", ["as_float", "as_float"], ["unit"]),
        node("Mul", ["r", "unit"]),
    ]
    return make(nodes, {"first": np.array(0, I64), "axes": ints(0), "rest": ints(2, -1)})


def joined(operator: str, count: int = 3, **attributes) -> ModelProto:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Neg", ["x"], ["b"]),
        node(operator, ["x", "a", "b"][:count], **attributes),
    ]
    return make(nodes)


def chosen() -> ModelProto:
    nodes = [node("Greater", ["x", "zero"], ["where"]), node("Where", ["where", "x", "other"])]
    return make(nodes, {"zero": np.float32(0.2), "other": np.full((1, 4, 1, 1), -3, np.float32)})


def whole_numbers(operator: str) -> ModelProto:
    """Whole numbers go in and are divided."""
    nodes = [
        node("Mul", ["x", "ten"], ["a"]),
        node("Cast", ["a"], ["b"], to=TensorProto.INT64),
        node(operator, ["b", "three"], ["c"]),
        node("Cast", ["c"], to=TensorProto.FLOAT),
    ]
    return make(nodes, {"ten": np.float32(10), "three": np.array(3, I64)})


def arg(operator: str) -> ModelProto:
    return make([node(operator, ["x"], ["a"], axis=1, keepdims=0), node("Cast", ["a"], to=TensorProto.FLOAT)])


def gathered_elements() -> ModelProto:
    nodes = [node("ArgMax", ["x"], ["a"], axis=1, keepdims=1), node("GatherElements", ["x", "a"], axis=1)]
    return make(nodes)


def embedded() -> ModelProto:
    nodes = [node("ArgMax", ["x"], ["a"], axis=1, keepdims=0), node("Gather", ["table", "a"])]
    return make(nodes, weights(table=(4, 3)))


def nans(operator: str) -> ModelProto:
    nodes = [
        node("Greater", ["x", "zero"], ["big"]),
        node("Where", ["big", "x", "odd"], ["a"]),
        node(operator, ["a"], ["b"]),
        node("Cast", ["b"], to=TensorProto.FLOAT),
    ]
    return make(nodes, {"zero": np.float32(0), "odd": np.float32(np.nan if operator == "IsNaN" else np.inf)})


def repeated() -> ModelProto:
    """A constant is repeated for each image, and put beside it."""
    nodes = [
        node("Shape", ["x"], ["n"], start=0, end=1),
        node("Concat", ["n", "rest"], ["shape"], axis=0),
        node("Expand", ["token", "shape"], ["tokens"]),
        node("Concat", ["tokens", "x"], axis=1),
    ]
    return make(nodes, weights(token=(1, 2, 6, 6)) | {"rest": ints(2, 6, 6)})


def expanded() -> ModelProto:
    nodes = [
        node("ReduceMean", ["x", "axes"], ["m"]),
        node("Shape", ["x"], ["s"]),
        node("Expand", ["m", "s"]),
    ]
    return make(nodes, {"axes": ints(2, 3)})


def einsum() -> ModelProto:
    return make([node("Einsum", ["x", "w"], equation="bchw,dc->bdhw")], weights(w=(3, 4)))


def matmul(x=("N", 5, 4), bias=None) -> ModelProto:
    constants = weights(w=(4, 3))
    nodes = [node("MatMul", ["x", "w"], ["p" if bias else "y"])]
    if bias:
        constants |= weights(b=bias)
        nodes.append(node("Add", ["b", "p"]))
    return make(nodes, constants, inputs={"x": x})


def matmul_of_images() -> ModelProto:
    return make([node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]), node("MatMul", ["x", "t"])])


def condition(value: bool) -> ModelProto:
    """A branch that a constant chooses."""

    def branch(operator: str):
        inner = helper.make_node(operator, ["x"], [f"{operator}_out"])
        out = helper.make_tensor_value_info(f"{operator}_out", TensorProto.FLOAT, None)
        return helper.make_graph([inner], operator, [], [out])

    chosen_by = node("If", ["c"], ["y"], then_branch=branch("Relu"), else_branch=branch("Neg"))
    return make([chosen_by], {"c": np.array(value)})


def kernel_of_image() -> ModelProto:
    nodes = [
        node("ReduceMean", ["x", "axes"], ["k"], keepdims=1),
        node("Conv", ["x", "k"], kernel_shape=[1, 1]),
    ]
    return make(nodes, {"axes": ints(0, 2, 3)})


UNARY = [
    "Abs",
    "Atan",
    "Asinh",
    "Ceil",
    "Cos",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "LogSoftmax",
    "Mish",
    "Neg",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softmax",
    "Softplus",
    "Softsign",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
    "Celu",
    "Flatten",
    "Dropout",
    "Transpose",
    "Cosh",
    "Sinh",
]
CHANNEL = np.linspace(-1, 3, 4).astype(np.float32).reshape(1, 4, 1, 1)
CASES: dict[str, ModelProto] = {
    **{name: unary(name) for name in UNARY},
    **{name: positive(name) for name in ("Sqrt", "Log", "Reciprocal", "Acosh")},
    **{name: small(name) for name in ("Acos", "Asin", "Atanh")},
    **{
        f"{name} by channel": binary(name, CHANNEL)
        for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum")
    },
    **{f"{name} scalar": binary(name, np.array([2], np.float32)) for name in ("Add", "Sub", "Mul", "Div", "Pow")},
    **{f"{name} swapped": binary(name, np.float32(2), swapped=True) for name in ("Add", "Sub", "Mul", "Pow")},
    **{f"{name} raises rank": binary(name, np.ones((1, 1, 1, 1, 1), np.float32)) for name in ("Mul",)},
    **{name: logical(name) for name in ("And", "Or", "Xor", "Not")},
    **{name: joined(name) for name in ("Max", "Min", "Mean", "Sum")},
    "Div swapped": make([node("Exp", ["x"], ["e"]), node("Div", ["c", "e"])], {"c": np.float32(2)}),
    "Div whole": whole_numbers("Div"),
    "Mod whole": whole_numbers("Mod"),
    "Mod": make([node("Mod", ["x", "c"], fmod=1)], {"c": np.float32(0.3)}),
    **{
        f"{name} then Cast": make(
            [node(name, ["x", "c"], ["b"]), node("Cast", ["b"], to=TensorProto.FLOAT)], {"c": np.float32(0.1)}
        )
        for name in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal")
    },
    "IsNaN": nans("IsNaN"),
    "IsInf": nans("IsInf"),
    "Where": chosen(),
    "CastLike": make([node("Greater", ["x", "c"], ["b"]), node("CastLike", ["b", "x"])], {"c": np.float32(0.1)}),
    "Clip": with_constants("Clip", low=np.float32(-0.5), high=np.float32(0.7)),
    "Clip 6": make([node("Clip", ["x"], min=0.0, max=6.0)], opset=7),
    "Clip one side": make([node("Clip", ["x", "", "high"])], {"high": np.float32(0.5)}),
    "Clip nothing": make([node("Clip", ["x"])]),
    "Gelu tanh": unary("Gelu", approximate="tanh"),
    "HardSigmoid of torch": unary("HardSigmoid", alpha=1 / 6),
    "Selu other": unary("Selu", alpha=1.2, gamma=2.0),
    "Swish": unary("Swish", 24, alpha=1.5),
    "PRelu one": with_constants("PRelu", slope=np.array([0.3], np.float32)),
    "PRelu by channel": with_constants("PRelu", slope=CHANNEL[0]),
    "PRelu by column": with_constants("PRelu", slope=weights(s=(6,))["s"]),
    "Conv": conv((5, 4, 3, 3), pads=[1, 1, 1, 1]),
    "Conv without bias": conv((5, 4, 3, 3), bias=False, strides=[2, 2]),
    "Conv uneven": conv((5, 4, 3, 3), pads=[0, 1, 2, 1], strides=[2, 1]),
    "Conv dilated groups": conv((6, 2, 3, 2), group=2, dilations=[2, 1]),
    "Conv depthwise": conv((8, 1, 3, 3), group=4),
    "Conv same upper": conv((5, 4, 3, 4), auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv same lower": conv((5, 4, 2, 3), auto_pad="SAME_LOWER"),
    "Conv valid": conv((5, 4, 3, 3), auto_pad="VALID"),
    "Conv 1-D": conv((5, 4, 3), x=("N", 4, 9), pads=[1, 0]),
    "Conv 3-D": conv((5, 4, 3, 2, 1), x=("N", 4, 5, 5, 5), strides=[1, 2, 1]),
    "ConvTranspose": transposed((4, 5, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    "ConvTranspose uneven": transposed((4, 5, 3, 3), strides=[2, 2], pads=[0, 1, 1, 0]),
    "ConvTranspose groups": transposed((4, 2, 3, 3), group=2, dilations=[2, 1]),
    "ConvTranspose shape": transposed((4, 5, 3, 3), strides=[2, 2], output_shape=[12, 12]),
    "ConvTranspose same": transposed((4, 5, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    "ConvTranspose 1-D": transposed((4, 5, 4), x=("N", 4, 9), strides=[2]),
    "ConvTranspose 3-D": transposed((4, 2, 2, 2, 2), x=("N", 4, 3, 3, 3)),
    "BatchNormalization": batch_norm(),
    "BatchNormalization of rows": batch_norm(("N", 4)),
    "BatchNormalization 1-D": batch_norm(("N", 4, 5)),
    "BatchNormalization 3-D": batch_norm(("N", 4, 3, 3, 3)),
    "BatchNormalization old": batch_norm(opset=9),
    "InstanceNormalization": make([node("InstanceNormalization", ["x", "s", "b"])], weights(s=(4,), b=(4,))),
    "GroupNormalization": group_norm(21),
    "GroupNormalization by group": group_norm(18),
    "LayerNormalization": make([node("LayerNormalization", ["x", "s", "b"], axis=-1)], weights(s=(6,), b=(6,))),
    "LayerNormalization two axes": make([node("LayerNormalization", ["x", "s"], axis=2)], weights(s=(6, 6))),
    "Gemm": gemm(transB=1),
    "Gemm scaled": gemm(alpha=0.5, beta=2.0),
    "Gemm without bias": gemm(c=None),
    "Gemm of a scalar": gemm(c=(1,), transB=1),
    "Gemm of a row": gemm(c=(1, 5)),
    "MatMul": matmul(),
    "MatMul with bias": matmul(bias=(3,)),
    "MatMul of images": matmul_of_images(),
    "MatMul of a stack": make([node("MatMul", ["x", "w"])], weights(w=(1, 4, 6, 2))),
    "Einsum": einsum(),
    "MaxPool": pool("MaxPool", strides=[2, 2], pads=[1, 1, 1, 1]),
    "MaxPool ceil": pool("MaxPool", kernel=(2, 2), strides=[2, 2], ceil_mode=1),
    "MaxPool uneven": pool("MaxPool", strides=[2, 2], pads=[0, 0, 1, 1]),
    "MaxPool dilated": pool("MaxPool", dilations=[2, 1]),
    "MaxPool same": pool("MaxPool", strides=[2, 2], auto_pad="SAME_UPPER"),
    "MaxPool wide padding": pool("MaxPool", kernel=(2, 2), pads=[1, 1, 1, 1]),
    "MaxPool 1-D": pool("MaxPool", kernel=(3,), x=("N", 4, 9)),
    "MaxPool 3-D": pool("MaxPool", kernel=(2, 2, 2), x=("N", 4, 4, 4, 4)),
    "AveragePool": pool("AveragePool", strides=[2, 2], pads=[1, 1, 1, 1]),
    "AveragePool counts padding": pool("AveragePool", pads=[1, 1, 1, 1], count_include_pad=1),
    "AveragePool ceil": pool("AveragePool", kernel=(2, 2), strides=[2, 2], ceil_mode=1),
    "AveragePool ceil padded": pool("AveragePool", strides=[3, 3], pads=[1, 1, 1, 1], x=("N", 4, 6, 6), ceil_mode=1),
    "AveragePool uneven": pool("AveragePool", strides=[2, 2], pads=[0, 0, 1, 1]),
    "AveragePool uneven counts": pool("AveragePool", strides=[2, 2], pads=[0, 0, 1, 1], count_include_pad=1),
    "AveragePool same": pool("AveragePool", strides=[2, 2], auto_pad="SAME_LOWER", x=("N", 4, 6, 6)),
    "AveragePool 1-D": pool("AveragePool", kernel=(3,), x=("N", 4, 9)),
    "AveragePool 3-D": pool("AveragePool", kernel=(2, 2, 2), x=("N", 4, 4, 4, 4)),
    "GlobalAveragePool 1-D": make([node("GlobalAveragePool", ["x"])], inputs={"x": ("N", 4, 9)}),
    "LpPool": pool("LpPool", kernel=(2, 2), strides=[2, 2]),
    "LRN": unary("LRN", size=3, alpha=0.5, beta=0.6, bias=1.5),
    "Concat": joined("Concat", axis=1),
    "Concat last": joined("Concat", axis=-1),
    "Concat constant": make([node("Concat", ["x", "c"], axis=2)], weights(c=(1, 4, 1, 6)), inputs={"x": (1, 4, 6, 6)}),
    "Split": make([node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2), node("Sub", ["a", "b"])]),
    "Split sizes": make(
        [node("Split", ["x", "s"], ["a", "b"], axis=1), node("Concat", ["b", "a"], axis=1)], {"s": ints(1, 3)}
    ),
    "Split uneven": make(
        [node("Split", ["x"], ["a", "b", "c"], axis=3, num_outputs=3), node("Concat", ["c", "a"], axis=3)],
        inputs={"x": ("N", 4, 6, 8)},
    ),
    "Split old": make(
        [node("Split", ["x"], ["a", "b"], axis=1, split=[3, 1]), node("Concat", ["b", "a"], axis=1)], opset=11
    ),
    "Slice": with_constants("Slice", starts=ints(1, 0), ends=ints(3, -1), axes=ints(1, 2)),
    "Slice steps": with_constants(
        "Slice", starts=ints(0, 1), ends=ints(2**31 - 1, 9), axes=ints(2, 3), steps=ints(2, 3)
    ),
    "Slice backwards": with_constants("Slice", starts=ints(-1), ends=ints(-(2**31)), axes=ints(1), steps=ints(-1)),
    "Slice old": make([node("Slice", ["x"], starts=[1], ends=[3], axes=[1])], opset=9),
    "Slice everything": with_constants("Slice", starts=ints(0), ends=ints(2**31 - 1), axes=ints(0)),
    "Gather one": make([node("Gather", ["x", "i"], axis=1)], {"i": np.array(2, I64)}),
    "Gather several": make([node("Gather", ["x", "i"], axis=1)], {"i": ints(3, 0, -2)}),
    "Gather a range": make([node("Gather", ["x", "i"], axis=1)], {"i": ints(0, 2)}),
    "Gather in two axes": make([node("Gather", ["x", "i"], axis=2)], {"i": np.array([[0, 1], [5, 2]], I64)}),
    "Gather by image": embedded(),
    "GatherElements": gathered_elements(),
    "Pad": with_constants("Pad", pads=ints(0, 0, 1, 2, 0, 0, 0, 1), value=np.float32(1.5)),
    "Pad channels": with_constants("Pad", pads=ints(0, 1, 0, 0, 0, 2, 0, 0)),
    "Pad reflect": with_constants("Pad", pads=ints(0, 0, 1, 2, 0, 0, 3, 1), attributes={"mode": "reflect"}),
    "Pad edge": with_constants("Pad", pads=ints(0, 0, 0, 2, 0, 0, 0, 1), attributes={"mode": "edge"}),
    "Pad old": make([node("Pad", ["x"], pads=[0, 0, 1, 1, 0, 0, 1, 1], value=2.0)], opset=9),
    "Pad cuts": with_constants("Pad", pads=ints(0, 0, -1, 0, 0, 0, 0, -2)),
    "Pad of axes": make([node("Pad", ["x", "p", "", "a"])], {"p": ints(1, 2), "a": ints(3)}),
    **{
        name: reduced(name)
        for name in (
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
        )
    },
    "ReduceMean old": reduced("ReduceMean", 11, axes=(-1,), keepdims=0),
    "ReduceSum 13": reduced("ReduceSum", 13, keepdims=0),
    "ReduceMean nothing": make([node("ReduceMean", ["x"], noop_with_empty_axes=1)]),
    "ArgMax": arg("ArgMax"),
    "ArgMin": arg("ArgMin"),
    "TopK": make([node("TopK", ["x", "k"], ["y", "places"], axis=1)], {"k": ints(2)}),
    "CumSum": with_constants("CumSum", axis=np.array(1, I64)),
    "Softmax by channel": unary("Softmax", axis=1),
    "Softmax old": unary("Softmax", 11, axis=1),
    "Softmax old last": unary("Softmax", 11, axis=3),
    "LogSoftmax old": unary("LogSoftmax", 9),
    "MeanVarianceNormalization": unary("MeanVarianceNormalization", axes=[2, 3]),
    "LpNormalization": unary("LpNormalization", axis=1),
    "Reshape": with_constants("Reshape", shape=ints(0, 2, 2, 36)),
    "Reshape to rows": with_constants("Reshape", shape=ints(0, -1)),
    "Reshape of all": with_constants("Reshape", shape=ints(-1, 6)),
    "Reshape mixed": with_constants("Reshape", shape=ints(0, 3, 48)),
    "Reshape through Shape": through_shape(),
    "Flatten after 2": unary("Flatten", axis=2),
    "Flatten from the end": unary("Flatten", axis=-3),
    "Squeeze": make([node("GlobalMaxPool", ["x"], ["m"]), node("Squeeze", ["m", "a"])], {"a": ints(2, -1)}),
    "Squeeze all": make([node("GlobalMaxPool", ["x"], ["m"]), node("Squeeze", ["m"])], inputs={"x": (1, 4, 6, 6)}),
    "Squeeze old": make([node("GlobalMaxPool", ["x"], ["m"]), node("Squeeze", ["m"], axes=[3])], opset=11),
    "Unsqueeze": with_constants("Unsqueeze", axes=ints(1, -1)),
    "Unsqueeze old": make([node("Unsqueeze", ["x"], axes=[2])], opset=11),
    "Transpose": unary("Transpose", perm=[0, 2, 3, 1]),
    "Expand": expanded(),
    "Expand a constant": repeated(),
    "Tile": with_constants("Tile", repeats=ints(1, 2, 1, 3)),
    "DepthToSpace": unary("DepthToSpace", blocksize=2),
    "DepthToSpace CRD": unary("DepthToSpace", blocksize=2, mode="CRD"),
    "SpaceToDepth": unary("SpaceToDepth", blocksize=2),
    "If true": condition(True),
    "If false": condition(False),
    "Resize nearest": resized([1, 1, 2, 2], coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    "Resize nearest default": resized([1, 1, 2, 3]),
    "Resize nearest ceil": resized([1, 1, 1.5, 1.7], nearest_mode="ceil", coordinate_transformation_mode="asymmetric"),
    "Resize nearest down": resized([1, 1, 0.5, 0.5], nearest_mode="round_prefer_ceil"),
    "Resize linear": resized([1, 1, 2, 2], mode="linear"),
    "Resize linear sizes": resized(sizes=[1, 4, 9, 7], x=(1, 4, 6, 6), mode="linear"),
    "Resize corners": resized([1, 1, 2, 2], mode="linear", coordinate_transformation_mode="align_corners"),
    "Resize linear asymmetric": resized([1, 1, 2, 2], mode="linear", coordinate_transformation_mode="asymmetric"),
    "Resize linear odd": resized([1, 1, 1.3, 0.7], mode="linear"),
    "Resize of torch": resized([1, 1, 2, 2], mode="linear", coordinate_transformation_mode="pytorch_half_pixel"),
    "Resize cubic": resized([1, 1, 2, 1.5], mode="cubic"),
    "Resize 1-D": resized([1, 1, 2], x=("N", 4, 9), mode="linear"),
    "Resize 10": make(
        [node("Resize", ["x", "s"], mode="nearest")], {"s": np.array([1, 1, 2, 2], np.float32)}, opset=10
    ),
    "Resize same": resized([1, 1, 1, 1]),
    "Upsample": make([node("Upsample", ["x", "s"], mode="linear")], {"s": np.array([1, 1, 2, 2], np.float32)}, opset=9),
}


def compare(path: Path, model: ModelProto) -> torch.fx.GraphModule:
    """Import a model and hold the network to ONNX Runtime for one and for three images."""
    module = import_onnx(write(path, model))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name, shape = session.get_inputs()[0].name, session.get_inputs()[0].shape
    random = np.random.default_rng(3)
    for images in (1, 3) if isinstance(shape[0], str) else (1,):
        array = random.standard_normal([images, *shape[1:]]).astype(np.float32)
        found = module(torch.from_numpy(array))
        found = found[0] if isinstance(found, tuple) else found
        wanted = session.run(None, {name: array})[0]
        wanted = wanted.reshape(found.shape) if images == 1 else wanted
        assert relative_error(found.detach().numpy(), wanted) < 1e-5
    return module


@pytest.mark.parametrize("case", CASES)
def test_operator_computes_what_onnx_runtime_does(case, tmp_path):
    compare(tmp_path / "small.onnx", CASES[case])


def test_every_operator_has_a_case():
    tried = {one.op_type for model in CASES.values() for one in model.graph.node}
    assert set(OPERATORS) <= tried


def test_kernel_that_depends_on_images_is_a_function(tmp_path):
    path = write(
        tmp_path / "small.onnx", make([node("Conv", ["x", "k"])], inputs={"x": (1, 4, 6, 6), "k": (3, 4, 1, 1)})
    )
    module = import_onnx(path)
    image, kernel = torch.randn(1, 4, 6, 6), torch.randn(3, 4, 1, 1)
    assert torch.equal(module(image, kernel), torch.nn.functional.conv2d(image, kernel))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (unary("LRN", size=2), "even size"),
        (pool("AveragePool", kernel=(2, 2), dilations=[2, 2]), "dilations"),
        (unary("ArgMax", select_last_index=1), "select_last_index"),
        (unary("MeanVarianceNormalization"), "mixes images"),
        (resized([1, 2, 1, 1]), "images or channels"),
        (resized([1, 1, 0.5, 0.5], mode="linear", antialias=1), "antialias"),
        (make([node("CumSum", ["x", "a"], reverse=1)], {"a": np.array(1, I64)}), "reversed"),
    ],
    ids=["LRN", "AveragePool", "ArgMax", "MeanVarianceNormalization", "Resize axes", "Resize antialias", "CumSum"],
)
def test_settings_that_torch_does_not_have_are_refused_with_the_reason(model, reason, tmp_path):
    from compress.errors import ModelError

    with pytest.raises(ModelError, match=reason):
        import_onnx(write(tmp_path / "small.onnx", model))
