"""LiteRT: float32 results, files that it refuses, a conversion in a process of its own."""

import sys
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from exported import exported
from fixtures import make_splits
from onnx import TensorProto, helper

import compress.catalog as catalog
import compress.formats.litert as conversion
from compress.config.schema.verify import DeployConfig
from compress.cost.conditions import deploy_conditions
from compress.errors import ArtifactError, NoSuchPlace, PackageMissing
from compress.formats.litert import convert_to_litert
from compress.onnx_file.io import load_onnx
from compress.progress import SilentProgress
from compress.verification.checks import check_provider
from compress.verification.measurement import Conditions, measure_pair, time_complete
from compress.verification.runtimes.litert import LiteRt
from compress.verification.runtimes.onnxruntime import OnnxRuntime

IMAGES = {"image": nets.images().numpy()}
CONDITIONS = Conditions("litert", "CPU", repeats=4)


def test_packages_are_named_where_they_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = catalog.find_spec
    gone = ("ai_edge_litert", "litert_torch")
    monkeypatch.setattr(catalog, "find_spec", lambda name: None if name in gone else real(name))
    with pytest.raises(PackageMissing, match="Runtime 'litert' needs the package ai_edge_litert") as caught:
        LiteRt(exported("chain")).__enter__()
    assert caught.value.hint == "pip install 'ai-edge-litert>=2.3'"
    with pytest.raises(PackageMissing, match="Conversion for LiteRT needs the package litert_torch") as caught:
        convert_to_litert(exported("chain"), tmp_path)
    assert caught.value.hint == "pip install 'litert-torch>=0.10'"


def test_another_provider_is_refused() -> None:
    with pytest.raises(NoSuchPlace, match="GPU was asked for, but it offers CPU only"):
        LiteRt(exported("chain"), "GPU").__enter__()


def test_a_conversion_that_hangs_or_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program stands for the interpreter of Python that converts."""
    monkeypatch.setattr(conversion, "require_packages", lambda *_: None)
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nsleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(conversion, "LIMIT_S", 0.2)
    with pytest.raises(ArtifactError, match=r"litert-torch must convert '.*' within 0\.2 s, it did not"):
        convert_to_litert(exported("chain"), tmp_path)
    monkeypatch.setattr(conversion, "LIMIT_S", 60)
    for text, why in (
        ("echo 'compress: no such operator' >&2; echo noise >&2; exit 1", "no such operator"),
        ("echo Killed >&2; exit 137", "Killed"),
        ("exit 3", "its process ended with exit code 3"),
    ):
        program.write_text(f"#!/bin/sh\n{text}\n")
        with pytest.raises(ArtifactError, match=f"litert-torch cannot convert '.*': {why}$"):
            convert_to_litert(exported("chain"), tmp_path)


pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_torch")


def changed(folder: Path, change: Any) -> Path:
    model = load_onnx(exported("chain"), weights=True)
    change(model)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("name", nets.NAMES)
def test_results_are_those_of_float32(name: str) -> None:
    with LiteRt(exported(name)) as runtime, OnnxRuntime(exported(name)) as reference:
        assert check_provider(runtime).detail == "CPU in use, CPU asked for, computes in f32"
        got, wanted = runtime.run(IMAGES), reference.run(IMAGES)
    for output, values in wanted.items():
        np.testing.assert_allclose(got[output], values, atol=1e-5)
    assert runtime.precision is None, "it is closed"


def test_an_operator_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(one for one in model.graph.node if one.op_type == "Relu")
        node.op_type, node.domain = "NoSuchOperator", "mine"
        model.opset_import.append(helper.make_opsetid("mine", 1))

    with pytest.raises(ArtifactError, match=r"litert-torch cannot convert '.*': .*must consist of operators"):
        LiteRt(changed(tmp_path, change)).__enter__()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kind: setattr(kind, "elem_type", TensorProto.FLOAT16), r"float32 inputs.* is float16 \("),
        (
            lambda kind: setattr(kind.shape.dim[0], "dim_value", 4),
            r"float32 inputs.*\(4, 3, 16, 16\)",
        ),
        (lambda kind: setattr(kind.shape.dim[2], "dim_param", "height"), "must have fixed sizes but for the batch"),
    ],
)
def test_inputs_that_it_cannot_take_are_named(tmp_path: Path, change: Any, message: str) -> None:
    path = changed(tmp_path, lambda model: change(model.graph.input[0].type.tensor_type))
    with pytest.raises(ArtifactError, match=message):
        LiteRt(path).__enter__()


def test_files_are_timed_alone_and_in_turn(tmp_path: Path) -> None:
    split, path = make_splits(tmp_path, 64).calibration, exported("chain")
    found = time_complete(path, split, CONDITIONS, SilentProgress())
    assert min(found.milliseconds) > 0
    assert found.runtime == "litert"
    assert 0.1 < measure_pair(path, path, split, CONDITIONS).ratio < 10
    assert not CONDITIONS.times_nodes
    assert deploy_conditions(DeployConfig(runtime="litert", provider="CPU")).runtime.startswith("litert 2.")
