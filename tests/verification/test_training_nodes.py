"""Nodes in training mode are found wherever they stand and wherever their flag comes from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from compress.verification.checks import check_denormals
from compress.verification.training_nodes import training_nodes

TRUE, FALSE = (numpy_helper.from_array(np.array(value), "flag") for value in (True, False))


def dropout(*flag: str, name: str = "drop", **attributes: int) -> NodeProto:
    inputs = ["x", "", *flag] if flag else ["x"]
    return helper.make_node("Dropout", inputs, ["y"], name=name, **attributes)


def norm(outputs: int = 1, **attributes: int) -> NodeProto:
    names = ["y", "m", "v", "sm", "sv"][:outputs]
    return helper.make_node("BatchNormalization", ["x", "s", "b", "mean", "var"], names, name="norm", **attributes)


def constant(value: object, output: str = "flag") -> NodeProto:
    return helper.make_node("Constant", [], [output], value=numpy_helper.from_array(np.array(value)))


def value(name: str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, ["N", 3])


def model(nodes: Sequence[NodeProto], tensors: Sequence[TensorProto] = (), opset: int = 18) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", [value("x")], [value("y")], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def branches(*nodes: NodeProto) -> NodeProto:
    one = helper.make_graph(list(nodes), "one", [], [value("y")])
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "other", [], [value("z")])
    return helper.make_node("If", ["flag"], ["out"], then_branch=one, else_branch=other)


def cast_of(source: str) -> NodeProto:
    return helper.make_node("Cast", [source], ["flag"], to=TensorProto.BOOL)


def same(source: str, output: str) -> NodeProto:
    return helper.make_node("Identity", [source], [output])


CASES = [
    ("an initializer", [dropout("flag")], [TRUE], 18, ["drop"]),
    ("an initializer of false", [dropout("flag")], [FALSE], 18, []),
    ("no flag", [dropout()], [], 18, []),
    ("an empty flag", [dropout("")], [], 18, []),
    ("a Constant", [constant(True), dropout("flag")], [], 18, ["drop"]),
    ("a Constant of false", [constant(False), dropout("flag")], [], 18, []),
    ("a chain of Identity", [constant(True, "a"), same("a", "b"), same("b", "flag"), dropout("flag")], [], 18,
     ["drop"]),
    ("a chain to false", [constant(False, "a"), same("a", "b"), same("b", "flag"), dropout("flag")], [], 18, []),
    ("a cast", [constant(1, "a"), cast_of("a"), dropout("flag")], [], 18, ["drop"]),
    ("a cast of zero", [constant(0, "a"), cast_of("a"), dropout("flag")], [], 18, []),
    ("a whole number", [helper.make_node("Constant", [], ["a"], value_int=1), cast_of("a"), dropout("flag")], [], 18,
     ["drop"]),
    ("what cannot be traced", [helper.make_node("ReduceMax", ["x"], ["a"]), cast_of("a"), dropout("flag")], [], 18,
     ["drop"]),
    ("a flag that nothing gives", [dropout("flag")], [], 18, ["drop"]),
    ("a ring", [same("flag", "a"), same("a", "flag"), dropout("flag")], [], 18, ["drop"]),
    ("a branch", [branches(dropout("flag"))], [TRUE], 18, ["drop"]),
    ("a branch with a Constant of its own", [branches(constant(True, "own"), dropout("own"))], [FALSE], 18, ["drop"]),
    ("a branch in a branch", [branches(branches(norm(training_mode=1)))], [FALSE], 18, ["norm"]),
    ("a branch at rest", [branches(dropout("flag"))], [FALSE], 18, []),
    ("batch norm", [norm(3, training_mode=1)], [], 18, ["norm"]),
    ("batch norm at rest", [norm()], [], 18, []),
    ("batch norm before 14", [norm(5)], [], 9, ["norm"]),
    ("batch norm before 14 at rest", [norm()], [], 9, []),
    ("batch norm before 7", [norm()], [], 6, ["norm"]),
    ("batch norm before 7 at rest", [norm(is_test=1)], [], 6, []),
    ("dropout before 12", [dropout()], [], 10, []),
    ("dropout before 7", [dropout()], [], 6, ["drop"]),
    ("dropout before 7 at rest", [dropout(is_test=1)], [], 6, []),
    ("another domain", [helper.make_node("Dropout", ["x", "", "flag"], ["y"], domain="com.example")], [TRUE], 18, []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "tensors", "opset", "expected"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_nodes_in_training_mode_are_found(
    nodes: list[NodeProto], tensors: list[TensorProto], opset: int, expected: list[str], tmp_path: Path
) -> None:
    assert [node.name for node in training_nodes(model(nodes, tensors, opset), tmp_path)] == expected


@pytest.mark.parametrize(("is_training", "count"), [(True, 1), (False, 0)])
def test_a_local_function_is_looked_into(is_training: bool, count: int, tmp_path: Path) -> None:
    """The flag is given to the function by the graph that calls it."""
    calling = helper.make_node("Regularize", ["x", "flag"], ["y"], domain="own")
    one = model([constant(is_training), calling])
    opsets = [helper.make_opsetid("", 18)]
    one.functions.append(helper.make_function("own", "Regularize", ["x", "flag"], ["y"], [dropout("flag")], opsets))
    one.opset_import.append(helper.make_opsetid("own", 1))
    assert len(training_nodes(one, tmp_path)) == count


def test_a_flag_in_a_file_beside_is_read(tmp_path: Path) -> None:
    for value_, count in ((True, 1), (False, 0)):
        tensor = numpy_helper.from_array(np.array(value_), "flag")
        onnx.save_model(
            model([dropout("flag")], [tensor]),
            tmp_path / "m.onnx",
            save_as_external_data=True,
            location=f"{value_}.data",
            size_threshold=0,
        )
        one = onnx.load(tmp_path / "m.onnx", load_external_data=False)
        assert len(training_nodes(one, tmp_path)) == count
    (tmp_path / "False.data").unlink()
    assert len(training_nodes(one, tmp_path)) == 1


TINY = {"float32": 1e-40, "float64": 1e-310}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("place", ["initializer", "Constant", "branch"])
def test_denormals_are_found_in_every_constant(kind: str, place: str, tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.array([1, TINY[kind], 0], kind), "w")
    node = helper.make_node("Constant", [], ["w"], value=tensor)
    nodes = {"initializer": [], "Constant": [node], "branch": [branches(node, same("w", "y"))]}[place]
    tensors = [tensor] if place == "initializer" else []
    onnx.save(model([*nodes, same("x", "y2")], [*tensors, FALSE]), tmp_path / "m.onnx")
    check = check_denormals(tmp_path / "m.onnx")
    assert (check.status, check.value) == ("fail", 1.0)


def test_constants_that_are_looked_at_are_counted(tmp_path: Path) -> None:
    """The smallest numbers of half precision are normal ones in float32, in which a CPU computes them."""
    tensors = [
        numpy_helper.from_array(np.array([1e-7], np.float16), "half"),
        numpy_helper.from_array(np.array([1e-300], np.float64), "double"),
        numpy_helper.from_array(np.array([1e-37], np.float32), "single"),
        numpy_helper.from_array(np.array([1], np.int64), "whole"),
    ]
    number = helper.make_node("Constant", [], ["number"], value_float=2.0)
    onnx.save(model([number, same("x", "y")], tensors), tmp_path / "m.onnx")
    check = check_denormals(tmp_path / "m.onnx")
    assert (check.status, check.detail) == ("pass", "none among 4 floating-point constants")
    few = helper.make_node("Constant", [], ["number"], value_floats=[2.0, 1e-41])
    onnx.save(model([few, same("x", "y")], tensors), tmp_path / "m.onnx")
    assert check_denormals(tmp_path / "m.onnx").value == 1
