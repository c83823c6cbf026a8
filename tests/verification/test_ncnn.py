"""ncnn: float32 weights, devices that are not there, files that it refuses, images of other sizes."""

import importlib.machinery
import sys
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from exported import exported
from fixtures import make_splits
from onnx import TensorProto, helper, numpy_helper

import compress.formats.ncnn as conversion
from compress.config.schema.verify import DeployConfig
from compress.cost.conditions import deploy_conditions
from compress.errors import ArtifactError, NoSuchPlace, PackageMissing, RuntimeUnavailable
from compress.formats.ncnn import convert_to_ncnn
from compress.onnx_file.io import load_onnx
from compress.progress import SilentProgress
from compress.verification.checks import check_provider
from compress.verification.measurement import Conditions, measure_pair, time_complete
from compress.verification.other_runtimes import Also, check_also
from compress.verification.runtimes.ncnn import Ncnn
from compress.verification.runtimes.onnxruntime import OnnxRuntime

IMAGES = {"image": nets.images().numpy()}
CONDITIONS = Conditions("ncnn", "CPU", repeats=4)


def test_both_packages_are_named_where_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.machinery.PathFinder.find_spec
    gone = ("ncnn", "pnnx")
    for name in gone:
        monkeypatch.delitem(sys.modules, name, raising=False)
    find = lambda name, *rest: None if name in gone else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", find)
    with pytest.raises(PackageMissing, match="Runtime 'ncnn' needs the packages ncnn and pnnx") as caught:
        Ncnn(exported("chain")).__enter__()
    assert caught.value.hint == "pip install 'ncnn>=1.0.20250503'; pip install 'pnnx>=20250530'"
    with pytest.raises(PackageMissing, match="Conversion for ncnn needs the package pnnx"):
        convert_to_ncnn(exported("chain"), Path(), [(3, 16, 16)])


ncnn = pytest.importorskip("ncnn")
pytest.importorskip("pnnx")


@pytest.mark.parametrize("name", nets.NAMES)
def test_weights_stay_float32(name: str) -> None:
    with Ncnn(exported(name)) as runtime, OnnxRuntime(exported(name)) as reference:
        assert check_provider(runtime).detail == "CPU in use, CPU asked for, computes in f32"
        got, wanted = runtime.run(IMAGES), reference.run(IMAGES)
    for output, values in wanted.items():
        np.testing.assert_allclose(got[output], values, atol=1e-5)  # with float16 weights 1e-3
    assert runtime.precision is None, "it is closed"


def test_devices_that_are_not_there_are_named() -> None:
    if not ncnn.get_gpu_count():
        with pytest.raises(RuntimeUnavailable, match="Vulkan was asked for, but ncnn finds no GPU with Vulkan"):
            Ncnn(exported("chain"), "Vulkan").__enter__()
    with pytest.raises(NoSuchPlace, match="CUDA was asked for, but it offers CPU and Vulkan only") as caught:
        Ncnn(exported("chain"), "CUDA").__enter__()
    assert caught.value.hint == "Set provider: CPU."


def changed(folder: Path, change: Any) -> Path:
    model = load_onnx(exported("chain"), weights=True)
    change(model)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_an_operator_that_it_does_not_know_is_named(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(one for one in model.graph.node if one.op_type == "Relu")
        node.op_type = "NoSuchOperator"
        node.domain = "mine"
        model.opset_import.append(helper.make_opsetid("mine", 1))

    with pytest.raises(ArtifactError, match=r"(ncnn cannot open|pnnx cannot convert) '.*NoSuchOperator"):
        Ncnn(changed(tmp_path, change)).__enter__()


@pytest.mark.parametrize(
    ("change", "stated"),
    [
        (lambda kind: setattr(kind, "elem_type", TensorProto.FLOAT16), r"is float16 \("),
        (lambda kind: setattr(kind.shape.dim[0], "dim_value", 4), r"is float32 \(4, 3, 16, 16\)"),
    ],
)
def test_inputs_that_it_cannot_take_are_named(tmp_path: Path, change: Any, stated: str) -> None:
    path = changed(tmp_path, lambda model: change(model.graph.input[0].type.tensor_type))
    with pytest.raises(
        ArtifactError, match=f"must have float32 inputs with an open batch axis.*'image' of .* {stated}"
    ):
        Ncnn(path).__enter__()


def test_open_axes_of_the_image_take_any_size(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        for place, name in ((2, "height"), (3, "width")):
            model.graph.input[0].type.tensor_type.shape.dim[place].dim_param = name

    path = changed(tmp_path, change)
    with Ncnn(path) as runtime, OnnxRuntime(path) as reference:
        for size in (16, 24):
            images = {"image": np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32)}
            np.testing.assert_allclose(runtime.run(images)["logits"], reference.run(images)["logits"], atol=1e-5)


def test_weights_in_a_second_file_are_found(tmp_path: Path) -> None:
    model = load_onnx(exported("chain"), weights=True)
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    before = {one.name for one in tmp_path.iterdir()}
    with Ncnn(tmp_path / "m.onnx") as runtime, OnnxRuntime(exported("chain")) as reference:
        np.testing.assert_allclose(runtime.run(IMAGES)["logits"], reference.run(IMAGES)["logits"], atol=1e-5)
    assert {one.name for one in tmp_path.iterdir()} == before


def test_a_conversion_that_hangs_or_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="pnnx cannot convert"):
        convert_to_ncnn(changed(tmp_path, lambda model: model.graph.initializer.pop()), tmp_path, [(3, 16, 16)])
    program = tmp_path / "pnnx"
    program.write_text("#!/bin/sh\nsleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(conversion, "_program", lambda: str(program))
    monkeypatch.setattr(conversion, "LIMIT_S", 0.2)
    with pytest.raises(ArtifactError, match=r"pnnx must convert '.*' within 0\.2 s, it did not"):
        convert_to_ncnn(exported("chain"), tmp_path, [(3, 16, 16)])
    program.write_text("#!/bin/sh\necho no such thing >&2; exit 3\n")
    with pytest.raises(ArtifactError, match=r"pnnx cannot convert '.*': no such thing"):
        convert_to_ncnn(exported("chain"), tmp_path, [(3, 16, 16)])
    program.chmod(0o644)
    with pytest.raises(ArtifactError, match="The program pnnx cannot be started: Permission denied"):
        convert_to_ncnn(exported("chain"), tmp_path, [(3, 16, 16)])


def test_files_are_timed_alone_and_in_turn(tmp_path: Path) -> None:
    split, path = make_splits(tmp_path, 64).calibration, exported("chain")
    found = time_complete(path, split, CONDITIONS, SilentProgress())
    assert min(found.milliseconds) > 0
    assert found.runtime == "ncnn"
    assert 0.1 < measure_pair(path, path, split, CONDITIONS).ratio < 10
    assert not CONDITIONS.times_nodes
    assert deploy_conditions(DeployConfig(runtime="ncnn", provider="CPU")).runtime.startswith("ncnn 1.")


def test_a_difference_is_reported_with_the_node_where_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that changes one weight stands for a converter with an error."""
    real, path = conversion.convert_to_ncnn, exported("residual")
    model = load_onnx(path, weights=True)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    wrong = convolutions[len(convolutions) // 2]

    def convert(given: Path, folder: Path, sizes: Any) -> conversion.NcnnFiles:
        changed = load_onnx(given, weights=True)
        for weight in changed.graph.initializer:
            if weight.name == wrong.input[1]:
                weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
        onnx.save(changed, tmp_path / given.name)
        return real(tmp_path / given.name, folder, sizes)

    monkeypatch.setattr("compress.verification.runtimes.ncnn.convert_to_ncnn", convert)
    split = make_splits(tmp_path, 64).calibration
    wanted = Also("ncnn", "ncnn", "CPU")
    check, stated = check_also(wanted, path, split, Conditions(repeats=4), 1e-3, SilentProgress())
    assert check.status == "fail"
    label = f"Conv {wrong.name or wrong.output[0]}"
    assert check.detail.endswith(f"; it begins at {label}")
    assert stated["first_difference"] == label
    monkeypatch.setattr("compress.verification.runtimes.ncnn.convert_to_ncnn", real)
    check, stated = check_also(wanted, path, split, Conditions(repeats=4), 1e-3, SilentProgress())
    assert (check.status, "first_difference" in stated) == ("pass", False)
