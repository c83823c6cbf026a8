"""Reading of ONNX files: external weights, bytes of tensors, sizes of open axes."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.cost.latency_table import spread_of
from compress.errors import ArtifactError
from compress.onnx_file.io import (
    SIZES_KEY,
    external_problems,
    is_present,
    read_signature,
    read_sizes,
    require_valid,
    tensor_problems,
)


def model_with(*tensors: TensorProto, sizes: tuple[int | str, ...] = ("batch", 4)) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", [value], [value], list(tensors))
    return helper.make_model(graph)


def outside(location: str, offset: int | None, length: int | None, name: str = "w") -> TensorProto:
    """A tensor whose bytes lie in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    said = {"location": location, "offset": offset, "length": length}
    for key, value in said.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def test_external_weights_must_reach_as_far_as_their_tensors_say(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    (tmp_path / "w.bin").write_bytes(b"\0" * 100)
    model = model_with(outside("w.bin", 0, 90, "a"), outside("w.bin", 60, 40, "b"))
    assert external_problems(model, path) == []
    model = model_with(outside("w.bin", 1200, 34, "a"), outside("w.bin", 60, 40, "b"))
    assert external_problems(model, path) == ["its weights in 'w.bin' must be 1,234 bytes, it has 100"]


def test_external_weights_must_be_files_beside_the_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    (tmp_path / "folder").mkdir()
    model = model_with(outside("gone.bin", None, None), outside("../w.bin", None, None), outside("folder", None, None))
    assert external_problems(model, path) == [
        "its weights must lie in its folder, not in '../w.bin'",
        "its weights in 'folder' must be a file",
        "its weights in 'gone.bin' are missing",
    ]


@pytest.mark.parametrize(
    ("kind", "sizes", "wanted"),
    [
        (TensorProto.FLOAT, [3, 5], 60),
        (TensorProto.DOUBLE, [3], 24),
        (TensorProto.FLOAT16, [3], 6),
        (TensorProto.BOOL, [3], 3),
        (TensorProto.INT4, [3], 2),
        (TensorProto.UINT4, [4], 2),
        (TensorProto.FLOAT, [], 4),
        (TensorProto.FLOAT, [0, 7], 0),
    ],
)
def test_a_tensor_holds_the_bytes_of_its_shape_and_type(kind: int, sizes: list[int], wanted: int) -> None:
    def problems(count: int) -> list[str]:
        return tensor_problems(model_with(TensorProto(name="w", data_type=kind, dims=sizes, raw_data=b"\0" * count)))

    assert problems(wanted) == []
    assert problems(wanted + 1) == [f"tensor 'w' must hold {wanted:,} bytes, it holds {wanted + 1:,}"]


def test_tensors_of_no_known_type_or_size_are_named() -> None:
    said = "tensor '{}' must have a known type and sizes of 0 or more"
    for tensor in (TensorProto(name="w", data_type=77), TensorProto(name="w", data_type=1, dims=[-1])):
        assert tensor_problems(model_with(tensor)) == [said.format("w")]


def test_tensors_within_the_branches_of_a_graph_are_looked_at_too() -> None:
    model = model_with()
    inner = helper.make_graph([], "inner", [], [], [TensorProto(name="deep", data_type=1, dims=[2], raw_data=b"\0")])
    model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner))
    assert tensor_problems(model) == ["tensor 'deep' must hold 8 bytes, it holds 1"]


def test_usual_sizes_of_open_axes_are_read_and_checked() -> None:
    model = model_with()
    assert read_sizes(model) == {}
    helper.set_model_props(model, {SIZES_KEY: json.dumps({"height": 224, "width": 1})})
    assert read_sizes(model) == {"height": 224, "width": 1}
    for damaged in ("{", "[1]", '{"height": 0}', '{"height": 2147483648}', '{"height": "x"}'):
        helper.set_model_props(model, {SIZES_KEY: damaged})
        with pytest.raises(ArtifactError, match=r"metadata 'compress\.sizes' must be JSON of whole numbers: ."):
            read_sizes(model)


def test_files_are_present_or_not_and_impossible_names_are_not(tmp_path: Path) -> None:
    assert is_present(tmp_path)
    for name in ("gone", "x" * 5000, "a\0b"):
        assert not is_present(tmp_path / name)


def test_a_file_that_the_checker_refuses_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = model_with()
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match=r"m\.onnx' must be a valid ONNX model"):
        require_valid(path)


def test_axes_have_their_sizes_or_names() -> None:
    shape = read_signature(model_with(sizes=("n", 0, "height", 2147483647))).inputs[0].shape
    assert shape == ("batch", 0, "height", 2147483647)
    unnamed = model_with(sizes=("n", 3))
    unnamed.graph.input[0].type.tensor_type.shape.dim.add()
    assert read_signature(unnamed).inputs[0].shape == ("batch", 3, "axis2")


def test_scatter_is_half_of_the_range_between_the_quartiles_over_the_median() -> None:
    assert spread_of(np.zeros(4)) == 0.0
    assert spread_of(np.asarray([1.0, 1.0, 2.0, 4.0, 4.0])) == pytest.approx(3 / 4)


def test_a_tensor_that_numpy_wrote_has_no_problem() -> None:
    assert tensor_problems(model_with(numpy_helper.from_array(np.ones((2, 3), np.float32), "w"))) == []
