"""Runtimes by themselves: the reference evaluator, where nodes are computed, inputs on a device, half precision."""

import re
from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
from exported import SIGNATURE, exported
from onnx import TensorProto, helper, numpy_helper

from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import ArtifactError, ConfigValueError, ModelError, RuntimeUnavailable
from compress.onnx_file.counting import count_onnx
from compress.onnx_file.io import load_onnx, save_onnx
from compress.verification.checks import check_provider, list_fell_back
from compress.verification.gates import Gates
from compress.verification.measurement import latency_inputs
from compress.verification.parity import parity
from compress.verification.quality import predict
from compress.verification.runtimes.onnx_reference import LARGEST_WORK, OnnxReference
from compress.verification.runtimes.onnx_session import SessionRequest
from compress.verification.runtimes.onnxruntime import OnnxRuntime, placements_in

IMAGES = {"image": nets.images().numpy()}


def make_split(count=8):
    images = np.random.default_rng(3).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return Split("evaluation", ArraySource(images, np.arange(count) % 4, ()), np.arange(count), Preprocessing())


def changed(folder, change, name="chain"):
    model = load_onnx(exported(name), weights=True)
    change(model)
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


# the reference evaluator


def test_evaluator_refuses_another_provider_with_a_hint():
    with (
        pytest.raises(
            RuntimeUnavailable, match=r"CUDAExecutionProvider was asked for, but it offers CPU only"
        ) as caught,
        OnnxReference.from_file(exported("chain"), provider="CUDAExecutionProvider", threads=1),
    ):
        pass
    assert caught.value.hint == "Set provider: CPU."


@pytest.mark.parametrize(("domain", "operator"), [("", "NoSuchOperator"), ("com.microsoft", "FusedConv")])
def test_evaluator_refuses_a_node_that_it_does_not_know(tmp_path, domain, operator):
    def change(model):
        model.graph.node[1].op_type, model.graph.node[1].domain = operator, domain
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    path = changed(tmp_path, change)
    wording = f"must know every operator of '{re.escape(str(path))}', it does not: .*{operator}"
    with pytest.raises(ModelError, match=wording) as caught, OnnxReference(path):
        pass
    assert "none of a runtime's own" in caught.value.hint


def test_evaluator_refuses_a_file_without_its_weights(tmp_path):
    path = tmp_path / "external.onnx"
    save_onnx(load_onnx(exported("linear_head"), weights=True), path, external=True)
    with OnnxReference(path) as whole:
        assert whole.run(IMAGES)["logits"].shape == (4, 4)
    (tmp_path / "external.onnx.data").unlink()
    with (
        pytest.raises(ArtifactError, match=r"have all its weights: .* 'external.onnx.data' are missing"),
        OnnxReference(path),
    ):
        pass


def test_evaluator_reports_a_failure_while_it_runs(tmp_path):
    def change(model):
        bias = model.graph.initializer[1]
        bias.CopyFrom(numpy_helper.from_array(np.zeros(7, np.float32), bias.name))

    with (
        OnnxReference(changed(tmp_path, change)) as runtime,
        pytest.raises(ModelError, match="must run on its input, the ONNX reference evaluator says: "),
    ):
        runtime.run(IMAGES)


def test_evaluator_counts_macs_times_images_before_it_begins():
    macs = count_onnx(exported("chain")).macs
    with OnnxReference(exported("chain"), largest_work=4 * macs) as runtime:
        runtime.check_work(4)
        assert runtime.run(IMAGES)["logits"].shape == (4, 4)
        wording = rf"at most {4 * macs:,} MACs x images to compute, got {8 * macs:,} \({macs:,} MACs x 8 images\)\."
        for refused in (lambda: predict(runtime, make_split()), lambda: parity(runtime, runtime, make_split(), 8)):
            with pytest.raises(ConfigValueError, match=wording) as caught:
                refused()
            assert caught.value.hint.endswith("use runtime: onnxruntime.")
        with pytest.raises(ConfigValueError, match="x 5 images"):
            runtime.run({"image": nets.images(5).numpy()})
    assert OnnxReference(exported("chain")).largest_work == LARGEST_WORK


# where nodes are computed


@pytest.mark.parametrize("name", nets.NAMES)
def test_on_the_cpu_every_node_is_on_the_cpu(name):
    with OnnxRuntime(exported(name)) as runtime:
        placements = runtime.placements({"image": nets.images(1).numpy()})
        assert runtime.run(IMAGES)["logits"].shape == (4, 4)
    assert list(placements) == ["CPUExecutionProvider"]
    assert any(node.startswith("Conv ") for node in placements["CPUExecutionProvider"])
    assert list_fell_back("CPUExecutionProvider", placements) == []


def event(name, provider, operator, kind="Node"):
    return {"cat": kind, "name": name, "dur": 3, "args": {"provider": provider, "op_name": operator}}


RECORDED = (
    {"cat": "Session", "name": "model_run", "dur": 90},
    event("TRTKernel_graph_main_0_kernel_time", "TensorrtExecutionProvider", "TRTKernel_graph_main_0"),
    event("shape_of_fence_before", "CPUExecutionProvider", "Shape"),
    event("shape_of_kernel_time", "CPUExecutionProvider", "Shape"),
    event("conv1_kernel_time", "CUDAExecutionProvider", "Conv"),
    event("conv1_kernel_time", "CUDAExecutionProvider", "Conv"),
    event("conv1_kernel_time", "CUDAExecutionProvider", "Conv", kind="Kernel"),
)


def test_placements_are_read_from_a_profile_each_node_once():
    assert placements_in(RECORDED) == {
        "TensorrtExecutionProvider": ("TRTKernel_graph_main_0 TRTKernel_graph_main_0",),
        "CPUExecutionProvider": ("Shape shape_of",),
        "CUDAExecutionProvider": ("Conv conv1",),
    }
    assert placements_in([{"cat": "Node", "name": "x_kernel_time", "dur": 1}]) == {"unknown": ("? x",)}
    assert placements_in([]) == {}


class InUse:
    provider = provider_in_use = "TensorrtExecutionProvider"
    precision = None


def test_nodes_that_fell_back_are_listed_but_only_a_gate_fails():
    placements = placements_in(RECORDED)
    check = check_provider(InUse(), placements)
    assert (check.status, check.detail) == (
        "pass",
        "TensorrtExecutionProvider in use, TensorrtExecutionProvider asked for; 2 of its 3 nodes fell back: "
        "Shape shape_of, Conv conv1",
    )
    assert check_provider(InUse(), {"TensorrtExecutionProvider": ("a b",)}).detail.endswith(
        "asked for, for all 1 nodes"
    )
    many = {"CPU": tuple(f"Conv {number}" for number in range(9))}
    assert check_provider(InUse(), many).detail.endswith("Conv 5 ...")
    fell_back = list_fell_back("TensorrtExecutionProvider", placements)
    for limit, status in ((1, "fail"), (2, "pass")):
        (gate,) = Gates(max_fallback_nodes=limit).check_fallback(fell_back)
        assert (gate.name, gate.status, gate.value, gate.limit) == ("max_fallback_nodes", status, 2, limit)
        assert gate.detail == "Shape shape_of, Conv conv1"
    (unknown,) = Gates(max_fallback_nodes=0).check_fallback(None)
    assert (unknown.status, unknown.detail) == ("skipped", "the runtime does not say where nodes are computed")
    assert Gates().check_fallback(fell_back) == []


# inputs and outputs on a device


def test_bound_inputs_lie_on_the_device_and_the_call_computes():
    with OnnxRuntime(exported("chain")) as runtime:
        assert not runtime.io_binding
        call = runtime._bind_on("cpu", IMAGES)  # the same path as on a GPU, on the device there is
        for _ in range(3):
            assert call() is None
    assert OnnxRuntime(exported("chain"), "CUDAExecutionProvider").io_binding
    assert OnnxRuntime(exported("chain"), "TensorrtExecutionProvider").io_binding


def test_a_bound_call_that_fails_is_a_model_error(tmp_path):
    with OnnxRuntime(exported("chain")) as runtime:
        call = runtime._bind_on("cpu", {"image": np.zeros((1, 5, 16, 16), np.float32)})
        with pytest.raises(ModelError, match=r"must run on its input, ONNX Runtime says"):
            call()


def test_tensorrt_is_told_the_precision_of_the_file_and_where_engines_go(tmp_path):
    def on(provider, name="chain"):
        return SessionRequest("onnxruntime", exported(name), provider, 1)

    def halve(model):
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float16), "half"))

    def quantize(model):
        model.graph.node.append(helper.make_node("DequantizeLinear", ["a", "b"], ["c"]))

    for change, half, whole in ((None, "False", "False"), (halve, "True", "False"), (quantize, "False", "True")):
        model = load_onnx(exported("chain"), weights=True)
        if change is not None:
            change(model)
        options = on("TensorrtExecutionProvider").provider_options(model)
        assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == (half, whole)
        assert Path(options["trt_engine_cache_path"]).is_dir()
    folders = {
        on("TensorrtExecutionProvider", name).provider_options(model)["trt_engine_cache_path"]
        for name in ("chain", "chain", "residual")
    }
    assert len(folders) == 2  # one for each file
    assert on("CPUExecutionProvider").provider_options(model) == {}


# files that take half precision


def half_input(model):
    """Let the file take float16 and cast it to float32 itself."""
    value = model.graph.input[0]
    inner, value.name = "inner", "image"
    value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "image":
                node.input[index] = inner
    model.graph.node.insert(0, helper.make_node("Cast", ["image"], [inner], to=TensorProto.FLOAT, name="cast"))


def test_a_file_that_takes_half_precision_gets_it(tmp_path):
    split = make_split()
    path = changed(tmp_path, half_input)
    with OnnxRuntime(path) as runtime, OnnxRuntime(exported("chain")) as whole:
        assert runtime.signature.inputs[0].dtype == "float16"
        assert latency_inputs(runtime, split, 2)["image"].dtype == np.float16
        assert np.isfinite(predict(runtime, split).outputs).all()
        assert 0 < parity(runtime, whole, split, 8).max_abs < 0.05
    assert SIGNATURE.inputs[0].dtype == "float32"


def test_a_file_that_takes_bytes_is_refused(tmp_path):
    def change(model):
        half_input(model)
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8

    with OnnxRuntime(changed(tmp_path, change)) as runtime:
        for refused in (lambda: predict(runtime, make_split()), lambda: latency_inputs(runtime, make_split(), 1)):
            with pytest.raises(
                ModelError, match="'image' must take prepared images as floating-point numbers, it takes"
            ):
                refused()
