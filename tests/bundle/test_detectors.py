"""Bundles of detectors: several outputs, compared by value alone."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from bundles import CPU, Content, make_content, sealed, write_zip

from compress.bundle import check
from compress.bundle.samples import pack_arrays
from compress.tasks import decoders

SCALE = 500.0  # of the first output, as boxes in pixels have it


def two_outputs() -> bytes:
    """Return an ONNX model, (batch, 1, 2, 2) -> boxes (batch, 4) in hundreds and prototypes (batch, 1, 2, 2)."""
    nodes = [
        onnx.helper.make_node("Flatten", ["images"], ["flat"]),
        onnx.helper.make_node("Mul", ["flat", "scale"], ["boxes"]),
        onnx.helper.make_node("Neg", ["images"], ["prototypes"]),
    ]
    values = [("images", ["batch", 1, 2, 2]), ("boxes", ["batch", 4]), ("prototypes", ["batch", 1, 2, 2])]
    source, *targets = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in values
    )
    scale = onnx.numpy_helper.from_array(np.float32(SCALE), "scale")
    graph = onnx.helper.make_graph(nodes, "detector", [source], targets, [scale])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def make_detector(change: float = 0.0, drop: str = "", **promises: Any) -> Content:
    """Return a sealed bundle whose second expected output differs by `change`."""
    model = two_outputs()
    inputs = np.random.default_rng(0).normal(size=(5, 1, 2, 2)).astype(np.float32)
    boxes, prototypes = onnxruntime.InferenceSession(model, providers=[CPU]).run(None, {"images": inputs})
    values = json.loads(make_content(tolerance=1e-6, relative=1e-4, **promises)["model.json"])
    values["task"] = "detection"
    values["signature"]["outputs"] = [
        {"name": name, "shape": ["batch", 4], "dtype": "float32"} for name in ("boxes", "prototypes")
    ]
    arrays = {"inputs": inputs, "expected": boxes, "expected_1": prototypes + np.float32(change)}
    arrays.pop(drop, None)
    content = make_content() | {"model.onnx": model, "model.json": json.dumps(values).encode()}
    return sealed(content | {"samples.npz": pack_arrays(arrays)})


def checked(content: Content, tmp_path: Any, capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, str]:
    """Return the exit code and the line of the outputs."""
    code = check.main([str(write_zip(content, tmp_path / "it.zip")), "--repeats", "2", *map(str, options)])
    lines = capsys.readouterr().out.splitlines()
    return code, next((line for line in lines if " parity " in line), lines[-2])


def test_all_outputs_are_compared(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = checked(make_detector(), tmp_path, capsys)
    assert code == 0
    assert line.startswith("pass     parity     largest difference 0 in 'boxes' (tolerance 0.")
    assert ", 0 in 'prototypes' (tolerance 0.000" in line
    assert "top-1" not in line


def test_each_output_has_a_limit_by_its_size(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = checked(make_detector(change=0.01), tmp_path, capsys)  # within 0.0001 of the first output alone
    assert code == 1
    assert line.startswith("fail     parity ")
    code, _ = checked(make_detector(change=0.01), tmp_path, capsys, "--tolerance", 0.02)
    assert code == 0
    code, _ = checked(make_detector(change=float("nan")), tmp_path, capsys, "--tolerance", 1e9)
    assert code == 1


def test_every_output_needs_its_expected_values(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = checked(make_detector(drop="expected_1"), tmp_path, capsys)
    assert code == 4
    assert "must hold an array 'expected_1' with a batch axis" in line


def test_a_classifier_has_one_output(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    content = make_detector()
    values = json.loads(content["model.json"])
    del values["task"]
    code, line = checked(sealed(content | {"model.json": json.dumps(values).encode()}), tmp_path, capsys)
    assert code == 4
    assert "model.json lacks a value, or has one of another kind" in line


def test_a_model_with_other_outputs_is_refused(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    content = make_detector()
    values = json.loads(content["model.json"])
    values["signature"]["outputs"][1]["name"] = "points"
    code, line = checked(sealed(content | {"model.json": json.dumps(values).encode()}), tmp_path, capsys)
    assert code == 4
    assert "must have the output 'boxes', 'points', it has boxes, prototypes" in line


def test_the_decoder_of_a_bundle_needs_numpy_alone() -> None:
    tree = ast.parse(Path(decoders.__file__).read_bytes())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names}
    assert names == {"collections.abc", "typing", "numpy"}


def test_all_outputs_computed_elsewhere_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = make_detector()
    inputs = np.random.default_rng(0).normal(size=(5, 1, 2, 2)).astype(np.float32)
    mine = tmp_path / "mine.npz"
    right = {"boxes": inputs.reshape(5, 4) * np.float32(SCALE), "prototypes": -inputs}
    np.savez(mine, **right)
    assert checked(content, tmp_path, capsys, "--outputs", mine)[0] == 0
    np.savez(mine, **(right | {"prototypes": -inputs + np.float32(0.01)}))
    code, line = checked(content, tmp_path, capsys, "--outputs", mine)
    assert (code, "0.01 in 'prototypes'" in line) == (1, True)
    np.save(tmp_path / "one.npy", right["boxes"])
    code, line = checked(content, tmp_path, capsys, "--outputs", tmp_path / "one.npy")
    assert (code, "must hold 'prototypes', it holds 'boxes'" in line) == (4, True)
