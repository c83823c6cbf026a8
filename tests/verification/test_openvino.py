"""OpenVINO: precision of the file, devices that are not there, files it refuses, and latency budgets without nodes."""

import sys
from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
from exported import exported
from fixtures import RecordingProgress, make_saved_model, make_splits
from onnx import helper

import compress.search.width_latency as latency
from compress.config.schema.verify import DeployConfig
from compress.cost.conditions import deploy_conditions
from compress.cost.fitted_table import FittedTable
from compress.errors import ArtifactError, NoSuchPlace, PackageMissing, RuntimeUnavailable
from compress.onnx_file.io import load_onnx
from compress.progress import SilentProgress
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import build_cost, layer_axes
from compress.search.context import StageContext
from compress.verification.checks import check_provider
from compress.verification.measurement import Conditions, measure_pair, time_complete
from compress.verification.runtimes.onnx_session import NVIDIA
from compress.verification.runtimes.onnxruntime import OnnxRuntime
from compress.verification.runtimes.openvino import OpenVino

IMAGES = {"image": nets.images().numpy()}
CONDITIONS = Conditions("openvino", "CPU", repeats=4)


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with (
        pytest.raises(PackageMissing, match="Runtime 'openvino' needs the package openvino") as caught,
        OpenVino(exported("chain")),
    ):
        pass
    assert caught.value.hint == "pip install 'openvino>=2025.0'"


def test_only_runtimes_that_time_nodes_have_a_table_of_nodes() -> None:
    assert Conditions().times_nodes
    assert not CONDITIONS.times_nodes
    assert not any(Conditions(provider=provider).times_nodes for provider in NVIDIA)


openvino = pytest.importorskip("openvino")


@pytest.mark.parametrize("name", nets.NAMES)
def test_float32_files_are_computed_in_float32(name: str) -> None:
    path = exported(name)
    with OpenVino(path) as runtime, OnnxRuntime(path) as reference:
        assert runtime.precision == "f32"
        assert check_provider(runtime).detail == "CPU in use, CPU asked for, computes in f32"
        got, wanted = runtime.run(IMAGES), reference.run(IMAGES)
    for output, values in wanted.items():
        np.testing.assert_allclose(got[output], values, atol=1e-4)
    assert runtime.precision is None, "it is closed"


def test_devices_that_are_not_there_are_named() -> None:
    present = openvino.Core().available_devices
    if "NPU" not in present:
        with (
            pytest.raises(RuntimeUnavailable, match="NPU was asked for, but OpenVINO finds"),
            OpenVino(exported("chain"), "NPU"),
        ):
            pass
    with (
        pytest.raises(NoSuchPlace, match="CPUExecutionProvider was asked for") as caught,
        OpenVino(exported("chain"), "CPUExecutionProvider"),
    ):
        pass
    assert caught.value.hint == "Set provider: CPU."


def test_a_file_with_an_operator_that_it_does_not_know_is_refused(tmp_path: Path) -> None:
    model = load_onnx(exported("chain"), weights=True)
    model.graph.node[1].op_type, model.graph.node[1].domain = "NoSuchOperator", "mine"
    model.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="OpenVINO cannot open"), OpenVino(tmp_path / "model.onnx"):
        pass


def test_a_bound_call_computes_what_a_run_does() -> None:
    with OpenVino(exported("chain"), threads=2) as runtime:
        call, before = runtime.bind(IMAGES), runtime.run(IMAGES)
        results = call()
        (values,) = before.values()
        np.testing.assert_allclose(results[0], values, atol=1e-5)


def test_files_are_timed_alone_and_in_turn(tmp_path: Path) -> None:
    split, path = make_splits(tmp_path, 64).calibration, exported("chain")
    found = time_complete(path, split, CONDITIONS, SilentProgress())
    assert min(found.milliseconds) > 0
    assert found.runtime == "openvino"
    assert 0.1 < measure_pair(path, path, split, CONDITIONS).ratio < 10


def test_conditions_of_a_table_name_the_version_of_openvino() -> None:
    conditions = deploy_conditions(DeployConfig(runtime="openvino", provider="CPU"))
    assert conditions.runtime == f"openvino {openvino.__version__.partition('-')[0]}"
    assert deploy_conditions(DeployConfig()).runtime.startswith("onnxruntime ")


def test_a_latency_budget_is_fitted_to_complete_networks(tmp_path: Path) -> None:
    deploy = DeployConfig(runtime="openvino", provider="CPU", repeats=4, variants=8)
    ctx = StageContext(tmp_path, 0, make_splits(tmp_path, 64), RecordingProgress(), deploy, tmp_path / "tables")
    model = make_saved_model("chain", tmp_path)
    groups, _ = find_cuttable(model.module, nets.EXAMPLE)
    levels = {name: (8, group.width) for name, group in groups.items()}
    macs = build_cost(model.module, nets.EXAMPLE, groups, "macs").at
    found = latency.model_latency(model, layer_axes(model.module, groups), levels, deploy, ctx, macs)
    assert isinstance(found.table, FittedTable)
    assert found.predict_ratio({}) > 0
    assert found.time_pair({name: widths[0] for name, widths in levels.items()}).ratio > 0
