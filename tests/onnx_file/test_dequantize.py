"""Float form of a QDQ graph: weights and activations of the file without rounding, with the Relus it leaves out."""

from collections import Counter

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from compress.errors import ModelError
from compress.onnx_file.dequantize import float_form, is_qdq

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
SCALES = RANDOM.uniform(0.002, 0.01, 4).astype(np.float32)
IMAGES = RANDOM.normal(size=(2, 3, 8, 8)).astype(np.float32)


def make(nodes: list, constants: dict[str, np.ndarray], outputs: tuple[str, ...] = ("y",)) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def both(value: str, scale: str, zero: str = "") -> list:
    """Q and DQ of a value."""
    inputs = [scale, zero] if zero else [scale]
    return [
        helper.make_node("QuantizeLinear", [value, *inputs], [f"{value}_q"], f"{value}_q"),
        helper.make_node("DequantizeLinear", [f"{value}_q", *inputs], [f"{value}_dq"], f"{value}_dq"),
    ]


def convolution(value: str = "x_dq", output: str = "c") -> list:
    return [
        helper.make_node("DequantizeLinear", ["conv.weight_quantized", "ws", "wz"], ["w"], "w", axis=0),
        helper.make_node("Conv", [value, "w"], [output], "conv"),
    ]


CONSTANTS = {
    "conv.weight_quantized": WEIGHT, "ws": SCALES, "wz": np.zeros(4, np.int8),
    "xs": np.float32(0.04), "xz": np.uint8(128), "cs": np.float32(0.03), "cz": np.uint8(0),
}  # fmt: skip


def run(model: ModelProto) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": IMAGES})[0]
    return result


def kinds(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_weights_are_those_of_the_integers_and_a_relu_comes_back() -> None:
    nodes = [*both("x", "xs", "xz"), *convolution(), *both("c", "cs", "cz"), helper.make_node("Neg", ["c_dq"], ["y"])]
    model = make(nodes, CONSTANTS)
    before = model.SerializeToString()
    found = float_form(model)
    assert model.SerializeToString() == before
    assert is_qdq(model)
    assert not is_qdq(found)
    assert kinds(found) == ["Conv", "Relu", "Neg"]
    (weight,) = found.graph.initializer
    assert weight.name == "conv.weight"
    assert np.array_equal(numpy_helper.to_array(weight), WEIGHT.astype(np.float32) * SCALES[:, None, None, None])
    exact, rounded = run(found), run(model)
    assert 0 < np.abs(exact - rounded).max() < 1
    assert exact.max() == 0, "negative values are gone, as in the file"


@pytest.mark.parametrize(
    ("scale", "zero", "kind"),
    [
        (np.float32(6 / 255), np.uint8(0), "Clip"),
        (np.float32(5.9 / 255), np.uint8(0), "Relu"),
        (np.float32(0.02), np.uint8(3), None),
        (np.float32(0.02), np.int8(-128), "Relu"),
        (np.float32(0.02), np.int8(0), None),
        (np.float32(0.02), None, "Relu"),  # uint8 with the zero point 0 by default
    ],
)
def test_the_range_says_which_activation_is_left_out(
    scale: np.float32, zero: np.generic | None, kind: str | None
) -> None:
    constants = {**CONSTANTS, "cs": scale} | ({} if zero is None else {"cz": zero})
    pair = both("c", "cs", "" if zero is None else "cz")
    model = make([*both("x", "xs", "xz"), *convolution(), *pair, helper.make_node("Neg", ["c_dq"], ["y"])], constants)
    found = float_form(model)
    assert kinds(found) == ["Conv", *([kind] if kind else []), "Neg"]
    if kind == "Clip":
        assert run(found).min() >= -6


def test_values_that_are_never_negative_get_no_second_relu() -> None:
    nodes = [
        *both("x", "xs", "xz"), *convolution(), helper.make_node("Relu", ["c"], ["r"]), *both("r", "cs", "cz"),
        helper.make_node("MaxPool", ["r_dq"], ["m"], kernel_shape=[2, 2]), *both("m", "cs", "cz"),
        helper.make_node("Add", ["m_dq", "m_dq"], ["a"]), *both("a", "cs", "cz"),
        helper.make_node("Sub", ["a_dq", "m_dq"], ["s"]), *both("s", "cs", "cz"),
        helper.make_node("Neg", ["s_dq"], ["y"]),
    ]  # fmt: skip
    assert kinds(float_form(make(nodes, CONSTANTS))) == ["Conv", "Relu", "MaxPool", "Add", "Sub", "Relu", "Neg"]


def test_images_whose_range_starts_at_0_get_no_relu() -> None:
    nodes = [*both("x", "xs", "cz"), *convolution(), helper.make_node("Neg", ["c"], ["y"])]
    assert kinds(float_form(make(nodes, CONSTANTS))) == ["Conv", "Neg"]


def test_weights_rounded_by_nodes_keep_their_rounded_values() -> None:
    """As in files of networks trained for the rounding."""
    weight = RANDOM.normal(size=(4, 3, 3, 3)).astype(np.float32)
    inputs = ["ws", "wz"]
    nodes = [
        helper.make_node("QuantizeLinear", ["weight", *inputs], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", *inputs], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    model = make(nodes, {"weight": weight, "ws": SCALES, "wz": np.zeros(4, np.int8)})
    found = float_form(model)
    (kept,) = found.graph.initializer
    scale = SCALES[:, None, None, None]
    wanted = np.clip(np.rint(weight / scale), -128, 127) * scale
    np.testing.assert_allclose(numpy_helper.to_array(kept), wanted, rtol=1e-6)
    np.testing.assert_allclose(run(found), run(model), atol=1e-5)


def test_a_rounded_output_keeps_its_name() -> None:
    model = make([*convolution("x"), *both("c", "cs", "xz")], CONSTANTS, ("c_dq",))
    found = float_form(model)
    assert kinds(found) == ["Conv", "Identity"]
    assert [value.name for value in found.graph.output] == ["c_dq"]
    assert np.abs(run(found) - run(model)).max() < 0.03 * 128


def _integers_go_on() -> ModelProto:
    nodes = [*both("x", "xs", "xz")[:1], helper.make_node("MaxPool", ["x_q"], ["m"], "pool", kernel_shape=[2, 2])]
    nodes.append(helper.make_node("DequantizeLinear", ["m", "xs", "xz"], ["y"]))
    return make(nodes, CONSTANTS)


def _scale_is_computed() -> ModelProto:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["s"], keepdims=0),
        *both("x", "s"),
        helper.make_node("Neg", ["x_dq"], ["y"]),
    ]
    return make(nodes, {})


def _output_of_integers() -> ModelProto:
    model = make(both("x", "xs", "xz")[:1], CONSTANTS, ("x_q",))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
    return model


def _activations_by_channel() -> ModelProto:
    return make([*both("x", "ws", "wz"), helper.make_node("Neg", ["x_dq"], ["y"])], CONSTANTS)


def _within_a_branch() -> ModelProto:
    branch = helper.make_graph(
        both("x", "xs", "xz"), "one", [], [helper.make_tensor_value_info("x_dq", TensorProto.FLOAT, None)]
    )
    nodes = [
        helper.make_node("If", ["yes"], ["b"], then_branch=branch, else_branch=branch), *both("b", "xs", "xz"),
        helper.make_node("Neg", ["b_dq"], ["y"]),
    ]  # fmt: skip
    return make(nodes, {**CONSTANTS, "yes": np.array(True)})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_integers_go_on, "MaxPool 'pool' must read floats, 'x_q' is made of integers"),
        (_scale_is_computed, "QuantizeLinear 'x_q' must have a constant scale, it is computed"),
        (_output_of_integers, "Outputs of the network must be float, 'x_q' is made of integers"),
        (_activations_by_channel, "QuantizeLinear 'x_q' must have one scale for activations, not 4"),
        (_within_a_branch, "Roundings within a branch"),
    ],
)
def test_other_roundings_are_refused_with_the_node(build: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        float_form(build())  # type: ignore[operator]


def test_shared_integers_with_two_scales_are_two_weights() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["v_quantized", "s1"], ["a"]),
        helper.make_node("DequantizeLinear", ["v_quantized", "s2"], ["b"]),
        helper.make_node("Mul", ["x", "a"], ["p"]),
        helper.make_node("Mul", ["p", "b"], ["y"]),
    ]
    model = make(nodes, {"v_quantized": np.full(8, 4, np.uint8), "s1": np.float32(0.5), "s2": np.float32(0.25)})
    found = float_form(model)
    assert Counter(float(numpy_helper.to_array(one)[0]) for one in found.graph.initializer) == {2.0: 1, 1.0: 1}
    np.testing.assert_allclose(run(found), 2 * IMAGES, rtol=1e-6)
