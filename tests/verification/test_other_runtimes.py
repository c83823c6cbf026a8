"""A second opinion on a file, and more places to open it in."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import smallrun
import torch
from exported import PREPROCESSING, exported
from onnx import helper, numpy_helper

import compress.verification.other_runtimes as opinions
from compress.catalog import RUNTIMES
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import ConfigError, ConfigValueError
from compress.onnx_file.io import load_onnx
from compress.verification.gates import Gates
from compress.verification.job import VerificationJob
from compress.verification.measurement import Conditions
from compress.verification.other_runtimes import Also
from compress.verification.runtimes.onnx_reference import OnnxReference
from compress.verification.scope import Scope
from compress.verification.verdict import verify_onnx

EVALUATOR = Also("onnx_reference", "onnx_reference", "CPU")
CUDA = Also("CUDAExecutionProvider", "onnxruntime", "CUDAExecutionProvider")


def make_split(count=12):
    images = np.random.default_rng(3).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return Split("evaluation", ArraySource(images, np.arange(count) % 4, ()), np.arange(count), PREPROCESSING)


def verify(path=None, **changes):
    arguments = {"evaluation": make_split(), "conditions": Conditions(warmup=1, repeats=4), "gates": Gates()}
    return verify_onnx(VerificationJob(path or exported("chain"), **(arguments | changes)))


def check_of(verdict, name):
    return next(check for check in verdict.checks if check.name == name)


def test_the_evaluator_is_asked_about_a_tiny_network():
    verdict = verify()
    check = check_of(verdict, "reference_evaluator")
    assert verdict.passed
    assert check.status == "pass"
    assert 0 <= check.value < check.limit == 1e-3
    assert check.detail.startswith("8 images compared with the ONNX reference evaluator, top-1 agrees on 100.00%; the")
    assert "reference_evaluator" not in verdict.required


def test_an_evaluator_that_disagrees_fails_the_verdict(monkeypatch):
    real = OnnxReference._run
    monkeypatch.setattr(OnnxReference, "_run", lambda self, inputs: {k: v + 0.5 for k, v in real(self, inputs).items()})
    verdict = verify()
    check = check_of(verdict, "reference_evaluator")
    assert (check.status, check.value) == ("fail", pytest.approx(0.5, abs=1e-4))
    assert not verdict.passed


@pytest.mark.parametrize("second_opinion", [False, True])
def test_a_large_network_is_skipped_and_that_fails_only_where_it_was_asked_for(monkeypatch, second_opinion):
    monkeypatch.setattr(opinions, "_EVALUATOR_WORK", 100_000)
    verdict = verify(scope=Scope(second_opinion=second_opinion))
    check = check_of(verdict, "reference_evaluator")
    assert (check.status, check.detail) == (
        "skipped",
        "the network has 276,544 MACs an image, the evaluator is asked for up to 100,000",
    )
    assert verdict.passed is not second_opinion


def test_as_many_images_are_compared_as_there_is_time_for(monkeypatch):
    monkeypatch.setattr(opinions, "_EVALUATOR_WORK", 3 * 276_544)
    assert check_of(verify(), "reference_evaluator").detail.startswith("3 images")


def test_nothing_is_compared_where_the_file_gives_nan(tmp_path: Path):
    model = load_onnx(exported("chain"), weights=True)
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(weight), np.nan), weight.name))
    onnx.save(model, tmp_path / "nan.onnx")
    check = check_of(verify(tmp_path / "nan.onnx"), "reference_evaluator")
    assert check.status == "skipped"
    assert check.detail.startswith("it cannot be had: Output 'logits' of the file must be finite")


def test_an_operator_that_the_evaluator_does_not_know_is_no_failure(tmp_path: Path):
    model = load_onnx(exported("chain"), weights=True)
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = "QuickGelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "gelu.onnx")
    check = check_of(verify(tmp_path / "gelu.onnx"), "reference_evaluator")
    assert check.status == "skipped"
    assert check.detail.startswith("it cannot be had: ")


def test_another_runtime_is_compared_and_timed_beside():
    verdict = verify(scope=Scope(also=(EVALUATOR,)))
    check = check_of(verdict, "also.onnx_reference")
    assert check.status == "pass"
    assert check.detail.startswith("onnx_reference CPU, 1 thread, batch 1: p50 ")
    (stated,) = verdict.details["also"]
    assert stated["p50_ms"] > 0
    assert stated["shipping_p50_ms"] > 0
    assert (stated["label"], stated["status"], stated["max_abs"]) == ("onnx_reference", "pass", check.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("is_required", [False, True])
def test_a_runtime_that_is_not_there_is_skipped_and_that_fails_only_where_it_is_required(is_required):
    wanted = Also(CUDA.label, CUDA.runtime, CUDA.provider, None, is_required)
    verdict = verify(scope=Scope(also=(wanted,)))
    check = check_of(verdict, "also.CUDAExecutionProvider")
    assert check.status == "skipped"
    assert "CUDAExecutionProvider was asked for, but it cannot start on this machine" in check.detail
    assert verdict.passed is not is_required
    assert ("also.CUDAExecutionProvider" in verdict.required) is is_required
    assert verdict.details["also"][0]["reason"] == check.detail


@pytest.mark.parametrize(
    ("wanted", "status", "said"),
    [
        (Also("a", "torch_eager", "CPU"), "fail", "must read ONNX files"),
        (Also("a", "onnxruntime", "CPUExecutionprovider"), "fail", "provider must be one of"),
        (Also("a", "onnx_reference", "CPUExecutionProvider"), "fail", "it offers CPU only"),
        (Also("a", "onnxruntime", "CPUExecutionProvider", 1024), "skipped", "threads must be at most the cores"),
    ],
)
def test_a_place_that_no_machine_has_fails_and_one_that_this_one_has_not_is_skipped(wanted, status, said):
    verdict = verify(scope=Scope(also=(wanted,)))
    check = check_of(verdict, "also.a")
    assert check.status == status
    assert said in check.detail
    assert verdict.details["also"][0]["status"] == status
    assert verdict.passed is (status == "skipped")


def test_a_runtime_whose_package_is_not_installed_is_skipped(monkeypatch):
    monkeypatch.setitem(RUNTIMES._entries, "gone", "no_such_package:Runtime")
    check = check_of(verify(scope=Scope(also=(Also("gone", "gone", "CPU"),))), "also.gone")
    assert check.status == "skipped"
    assert check.detail == "Runtime 'gone' is not available: No module named 'no_such_package'."


@pytest.mark.parametrize(("repeats", "status"), [(4, "pass"), (5, "skipped")])
def test_timed_calls_of_the_evaluator_count_as_work(monkeypatch, repeats, status):
    """Eight images are compared; before the timed calls of two images there is one more."""
    real = OnnxReference.from_file.__func__
    monkeypatch.setattr(
        OnnxReference,
        "from_file",
        classmethod(lambda cls, *args, **kwargs: _limited(real(cls, *args, **kwargs), (8 + (1 + 4) * 2) * 276_544)),
    )
    conditions = Conditions(warmup=1, repeats=repeats, batch_size=2)
    verdict = verify(conditions=conditions, scope=Scope(also=(EVALUATOR,)))
    check = check_of(verdict, "also.onnx_reference")
    assert check.status == status
    assert status == "pass" or "20 images" in check.detail
    shipping = Conditions("onnx_reference", "CPU", warmup=1, repeats=repeats, batch_size=2)
    if status == "pass":
        assert check_of(verify(evaluation=make_split(8), conditions=shipping), "evaluation").status == "pass"
    else:
        with pytest.raises(ConfigValueError, match="20 images"):
            verify(evaluation=make_split(8), conditions=shipping)


def _limited(runtime, largest_work):
    runtime.largest_work = largest_work
    return runtime


def test_another_runtime_that_computes_otherwise_fails(monkeypatch):
    real = OnnxReference._run
    monkeypatch.setattr(OnnxReference, "_run", lambda self, inputs: {k: v * 3 for k, v in real(self, inputs).items()})
    check = check_of(verify(scope=Scope(also=(EVALUATOR,))), "also.onnx_reference")
    assert check.status == "fail"
    assert check.value > check.limit == 1e-3


def test_others_are_not_asked_about_a_file_that_cannot_be_run(tmp_path: Path):
    model = load_onnx(exported("chain"), weights=True)
    model.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "broken.onnx")
    verdict = verify(tmp_path / "broken.onnx", scope=Scope(also=(EVALUATOR,)))
    for name in ("reference_evaluator", "also.onnx_reference"):
        assert check_of(verdict, name).detail == "the file cannot be run on these images"


def test_nodes_and_io_binding_stand_in_the_details():
    verdict = verify(gates=Gates(max_fallback_nodes=0))
    assert check_of(verdict, "max_fallback_nodes").status == "pass"
    providers = verdict.details["providers"]
    assert providers["asked"] == "CPUExecutionProvider"
    assert list(providers["nodes"]) == ["CPUExecutionProvider"]
    assert providers["fell_back"] == []
    assert verdict.details["latency"]["io_binding"] is False
    assert "for all" in check_of(verdict, "provider").detail


def test_the_evaluator_as_the_runtime_that_ships_the_file():
    conditions = Conditions("onnx_reference", "CPU", warmup=1, repeats=2)
    verdict = verify(conditions=conditions, gates=Gates(max_fallback_nodes=0))
    assert check_of(verdict, "provider").detail == "CPU in use, CPU asked for"
    assert check_of(verdict, "max_fallback_nodes").status == "skipped"
    assert not verdict.passed
    for second_opinion in (False, True):
        verdict = verify(conditions=conditions, scope=Scope(second_opinion=second_opinion))
        check = check_of(verdict, "reference_evaluator")
        assert (check.status, verdict.passed) == ("skipped", not second_opinion)
        assert check.detail == "it is the runtime that ships the file, and would be compared with itself"


def test_places_are_read_from_the_pipeline_and_named_once(tmp_path: Path):
    world = smallrun.World(tmp_path)
    (tmp_path / "chain.safetensors").touch()
    np.savez(tmp_path / "train.npz", x=np.zeros((1, 2, 2, 3), np.uint8), y=[0])
    np.savez(tmp_path / "test.npz", x=np.zeros((1, 2, 2, 3), np.uint8), y=[0])
    values = world.values()
    verify_values = values["stages"][-1]
    verify_values["also"] = [
        {"threads": 2},
        {"runtime": "onnx_reference", "provider": "CPU", "required": True},
        {"provider": "X"},
    ]
    config = world.load(values).config.stages[-1]
    assert [one.label for one in config.also] == ["CPUExecutionProvider.2", "onnx_reference", "X"]
    verify_values["also"] = [{"threads": 2}, {"provider": "CPUExecutionProvider", "threads": 2}]
    with pytest.raises(
        ConfigError, match=r"also must name each runtime once; CPUExecutionProvider\.2 is listed 2 times"
    ):
        world.load(values)
    for same in ({}, {"threads": 1}, {"provider": "CPUExecutionProvider"}):
        verify_values["also"] = [{"threads": 2}, same]
        with pytest.raises(ConfigError, match=r"also must name other runtimes than the deployed one; CPUExec"):
            world.load(values)
    verify_values["also"] = [{"runtime": "tensorflow"}]
    with pytest.raises(
        ConfigError,
        match=r"also\[0\].runtime must be one of litert, ncnn, onnx_reference, onnxruntime, openvino, torch_eager",
    ):
        world.load(values)
