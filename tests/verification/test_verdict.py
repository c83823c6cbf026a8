"""Verification of a file: runtimes, parity, top-1, latency, gates, verdict."""

import subprocess
import sys
from dataclasses import replace

import nets
import numpy as np
import onnx
import pytest
import torch
from exported import PREPROCESSING, SIGNATURE, exported
from onnx import helper, numpy_helper

from compress.config.schema.verify import GatesConfig, VerifyConfig
from compress.cost.macs import count_params
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import (
    ArtifactError,
    ConfigValueError,
    DataError,
    InternalError,
    ModelError,
    NonFinite,
    RuntimeUnavailable,
)
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, OnnxModel, Signature, TensorSpec, TorchModel
from compress.model.recipe import Recipe
from compress.model.stage_records import VerifyRecord
from compress.onnx_file.io import load_onnx, save_onnx
from compress.progress import SilentProgress
from compress.search.context import StageContext
from compress.stages.verify import VerifyStage
from compress.training.evaluate import evaluate_quality
from compress.verification.checks import check_edges
from compress.verification.gates import Gates
from compress.verification.job import VerificationJob
from compress.verification.latency import LatencyRatio, LatencySample
from compress.verification.measurement import Conditions, available_cores, measure_onnx
from compress.verification.metrics import Estimate
from compress.verification.parity import edge_parity, parity
from compress.verification.quality import predict, predict_each, respond
from compress.verification.resources import Resources
from compress.verification.runtimes.base import Runtime
from compress.verification.runtimes.onnxruntime import OnnxRuntime
from compress.verification.runtimes.torch_eager import TorchEager
from compress.verification.scope import Scope
from compress.verification.verdict import verify_onnx

QUICK = Conditions(warmup=1, repeats=20)


def make_split(count=40, labels=None, classes=(), side=16):
    generator = np.random.default_rng(3)
    images = generator.integers(0, 256, (count, side, side, 3), np.uint8)
    labels = generator.integers(0, 4, count) if labels is None else np.asarray(labels)
    return Split("evaluation", ArraySource(images, labels, classes), np.arange(count), PREPROCESSING)


class FakeRuntime(Runtime):
    """Computes with a function; the signature is given."""

    name = "fake"

    def __init__(self, function, signature=SIGNATURE):
        super().__init__("fake")
        self.function, self.given, self.batches = function, signature, []

    @property
    def provider_in_use(self):
        return "fake"

    def _open(self):
        return self.given

    def _run(self, inputs):
        (images,) = inputs.values()
        self.batches.append(len(images))
        return self.function(images)

    def _close(self):
        pass


def scores_of(images):
    return {"logits": images.mean((2, 3))[:, [0, 1, 2, 0]] * np.float32([1, 2, 3, 4])}


def verify(path, **wanted):
    return verify_onnx(VerificationJob(path, **wanted))


def checks_of(verdict):
    return {check.name: check for check in verdict.checks}


def fixed_batch(signature, size):
    inputs = tuple(replace(spec, shape=(size, *spec.shape[1:])) for spec in signature.inputs)
    return Signature(inputs, tuple(replace(spec, shape=(size, *spec.shape[1:])) for spec in signature.outputs))


def changed(tmp_path, change, name="chain"):
    """Write a copy of an exported net with a change made to it."""
    model = load_onnx(exported(name), weights=True)
    change(model)
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    return path


def set_weight(model, name, function):
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(function(numpy_helper.to_array(tensor)).astype(np.float32), name))


# runtimes


@pytest.mark.parametrize(
    ("provider", "wording", "hint"),
    [
        ("CPUExecutionprovider", "provider must be one of .*CPUExecutionProvider, got", "did you mean 'CPUExec"),
        ("OpenVINOExecutionProvider", "OpenVINOExecutionProvider was asked for, but this build offers .*only", ""),
    ],
)
def test_unknown_and_absent_providers_are_named(provider, wording, hint):
    with pytest.raises(RuntimeUnavailable, match=wording) as caught, OnnxRuntime(exported("chain"), provider):
        pass
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_provider_without_a_gpu_is_unavailable_and_quiet(provider, capfd):
    with (
        pytest.raises(RuntimeUnavailable, match=f"{provider} was asked for, but .*CPUExecutionProvider"),
        OnnxRuntime(exported("chain"), provider),
    ):
        pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "wording"),
    [(None, "does not exist"), (b"garbage " * 9, "must be a readable ONNX model")],
)
def test_missing_and_corrupt_files_cannot_be_opened(tmp_path, content, wording):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=wording), OnnxRuntime(path):
        pass


def test_model_that_the_runtime_refuses_is_an_artifact_error(tmp_path, capfd):
    path = changed(tmp_path, lambda model: setattr(model.graph.node[1], "op_type", "NoSuchOperator"))
    with (
        pytest.raises(ArtifactError, match=r"must be a model that ONNX Runtime can open: .*NoSuchOp"),
        OnnxRuntime(path),
    ):
        pass
    assert capfd.readouterr() == ("", "")


def test_a_closed_runtime_cannot_be_used():
    runtime = OnnxRuntime(exported("chain"))
    with pytest.raises(InternalError, match="must be opened in a `with` block"):
        runtime.run({})


def test_torch_eager_does_not_open_files():
    with pytest.raises(RuntimeUnavailable, match="'torch_eager' must read ONNX files"):
        TorchEager.from_file(exported("chain"), provider="CPU", threads=1)


def test_missing_output_is_an_error():
    with FakeRuntime(lambda images: {"other": images}) as runtime, pytest.raises(ModelError, match="outputs logits"):
        runtime.run({"image": np.zeros((1, 3, 16, 16), np.float32)})


# top-1


def test_top1_equals_that_of_torch():
    split = make_split(50)
    with OnnxRuntime(exported("residual")) as runtime:
        assert predict(runtime, split, batch_size=16).hits.mean() == evaluate_quality(nets.build("residual"), split)


def test_top1_counts_every_image_once_with_open_and_fixed_batches():
    split = make_split(10)
    labels = scores_of(PREPROCESSING.normalize(split.source.images))["logits"].argmax(1)
    split = make_split(10, labels=np.where(np.arange(10) < 7, labels, (labels + 1) % 4))
    for signature, batches in ((SIGNATURE, [4, 4, 2]), (fixed_batch(SIGNATURE, 1), [1] * 10),
                               (fixed_batch(SIGNATURE, 4), [4, 4, 4])):  # fmt: skip
        with FakeRuntime(scores_of, signature) as runtime:
            assert predict(runtime, split, batch_size=4).hits.mean() == 0.7
            assert runtime.batches == batches


@pytest.mark.parametrize(
    ("split", "function", "error", "wording"),
    [
        (make_split(0), scores_of, DataError, "'evaluation' must hold at least one image"),
        (make_split(2, [0, 4]), scores_of, DataError, r"from 0 to 3 \(the model has 4 classes\), got label 4"),
        (make_split(2, [0, -1]), scores_of, DataError, "got label -1"),
        (make_split(2, [0, 1], tuple("abcde")), scores_of, DataError, "same number of classes, got 4 and 5"),
        (make_split(2, side=8), scores_of, ModelError, r"shape \(batch, 3, 16, 16\), got \(2, 3, 8, 8\)"),
        (make_split(2), lambda x: {"logits": x[:, :, 0, 0] * np.nan}, NonFinite, "NaN or infinity in a batch of 2"),
        (make_split(2), lambda x: {"logits": x}, ModelError, r"one \(N, classes\) array, got \(2, 3, 16, 16\)"),
        (make_split(2), lambda x: {"logits": x.sum()}, ModelError, r"one \(N, classes\) array, got \(\) for 2 images"),
        (make_split(2), lambda x: {"logits": np.repeat(x[:, 0, 0, :4], 2, 0)}, ModelError, r"\(4, 4\) for 2 images"),
        (make_split(2), lambda x: {"logits": x[:1, 0]}, ModelError, r"array, got \(1, 16, 16\) for 2 images"),
        (make_split(2), lambda x: {"logits": x[:1, 0, 0]}, ModelError, r"array, got \(1, 16\) for 2 images"),
        (make_split(2), lambda x: {"logits": x[:, 0, 0, :8]}, ModelError, "as its file declares, 4, got 8"),
    ],
)
def test_top1_refuses_what_it_cannot_measure(split, function, error, wording):
    with FakeRuntime(function) as runtime, pytest.raises(error, match=wording):
        predict(runtime, split)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_outputs_of_any_task_have_one_row_for_each_image(rows):
    images = np.zeros((2, 3, 16, 16), np.float32)
    with (
        FakeRuntime(lambda x: {"logits": np.zeros((rows, 4), np.float32)}) as runtime,
        pytest.raises(ModelError, match=rf"'logits' must have an entry for each of 2 images, got \({rows}, 4\)"),
    ):
        respond(runtime, images)


def test_the_network_that_fails_is_named_where_it_has_an_owner():
    def give_nan(images):
        return {"logits": np.full((len(images), 4), np.nan, np.float32)}

    for owner, said in (
        ("Baseline 'base.onnx'", r"^Baseline 'base\.onnx': Outputs of the network"),
        ("", "^Outputs of"),
    ):
        with FakeRuntime(scores_of) as good, FakeRuntime(give_nan) as bad:
            bad.owner = owner
            with pytest.raises(NonFinite, match=said):
                predict_each((good, bad), make_split(4))


def test_top1_needs_a_classifier():
    two = Signature(SIGNATURE.inputs, (*SIGNATURE.outputs, TensorSpec("mask", ("batch", 4))))
    with (
        FakeRuntime(scores_of, two) as runtime,
        pytest.raises(ModelError, match="inputs and one output, got 1 and 2"),
    ):
        predict(runtime, make_split(2))
    dense = Signature(SIGNATURE.inputs, (TensorSpec("logits", ("batch", 4, 16, 16)),))
    with FakeRuntime(scores_of, dense) as runtime, pytest.raises(ModelError, match="the model declares"):
        predict(runtime, make_split(2))


# parity


def test_parity_of_an_export_is_close_and_says_how_close():
    split = make_split(40)
    with OnnxRuntime(exported("chain")) as runtime, TorchEager(nets.build("chain"), SIGNATURE) as reference:
        result = parity(runtime, reference, split, samples=33, batch_size=8)
    assert result.samples == 33
    assert 0 <= result.quantiles["p50"] <= result.quantiles["p99"] <= result.max_abs <= result.smallest_tolerance < 1e-4
    assert 0 < result.mean_abs <= result.max_abs
    assert result.top1_agreement == 1.0


def test_parity_measures_the_largest_and_mean_difference_over_all_samples():
    def shifted(images):
        outputs = scores_of(images)["logits"].copy()
        outputs[-1, 2] += 0.5
        return {"logits": outputs}

    with FakeRuntime(shifted) as runtime, FakeRuntime(scores_of) as reference:
        result = parity(runtime, reference, make_split(10), samples=64, batch_size=5)
    assert result.samples == 10
    assert result.max_abs == pytest.approx(0.5, abs=1e-6)
    assert result.mean_abs == pytest.approx(0.5 * 2 / 40, abs=1e-6)
    assert result.smallest_tolerance >= result.max_abs


def test_parity_leaves_out_images_that_only_fill_a_fixed_batch():
    signature = fixed_batch(SIGNATURE, 4)
    with FakeRuntime(scores_of, signature) as runtime, FakeRuntime(scores_of) as reference:
        result = parity(runtime, reference, make_split(6), samples=6)
    assert (result.samples, result.max_abs, runtime.batches) == (6, 0.0, [4, 4])


@pytest.mark.parametrize(
    ("function", "error", "wording"),
    [
        (lambda x: {"logits": scores_of(x)["logits"][:, :3]}, ModelError, r"shape \(2, 4\) as in the reference"),
        (lambda x: {"logits": scores_of(x)["logits"] / 0}, NonFinite, "'logits' of the file must be finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_parity_refuses_outputs_that_cannot_be_compared(function, error, wording):
    with FakeRuntime(function) as runtime, FakeRuntime(scores_of) as reference, pytest.raises(error, match=wording):
        parity(runtime, reference, make_split(2), samples=2)


def test_parity_refuses_an_unmatched_output_and_an_empty_split():
    other = Signature(SIGNATURE.inputs, (TensorSpec("scores", ("batch", 4)),))
    renamed = FakeRuntime(lambda x: {"scores": scores_of(x)["logits"]}, other)
    with renamed, FakeRuntime(scores_of) as reference:
        with pytest.raises(ModelError, match="Outputs must be named logits as in the reference, got scores"):
            parity(renamed, reference, make_split(2), samples=2)
        with pytest.raises(DataError, match="must hold at least one image"):
            parity(renamed, reference, make_split(0), samples=2)


# gates

SAMPLE = LatencySample((0.8, 0.9, 1.0, 1.1, 1.2))
RATIO = LatencyRatio(1 / 1.5, 1 / 1.55, 1 / 1.45, 0.01)


@pytest.mark.parametrize(
    ("gates", "status", "value"),
    [
        (Gates(min_speedup=1.5), "pass", 1.5),
        (Gates(min_speedup=1.51), "fail", 1.5),
        (Gates(min_speedup=1.5, judge_by="bound"), "inconclusive", 1.5),
        (Gates(min_speedup=1.4, judge_by="bound"), "pass", 1.5),
        (Gates(max_latency_ms=1.0), "pass", 1.0),
        (Gates(max_latency_ms=0.9), "fail", 1.0),
        (Gates(max_latency_ms=1.0, judge_by="bound"), "inconclusive", 1.0),
        (Gates(max_size_mb=2.0), "pass", 2.0),
        (Gates(max_size_mb=1.9), "fail", 2.0),
        (Gates(max_macs=30), "pass", 30),
        (Gates(max_params=19), "fail", 20),
        (Gates(max_params=19, judge_by="bound"), "fail", 20),
    ],
)
def test_each_gate_of_speed_and_size_holds_its_own_figure_to_its_limit(gates, status, value):
    size = gates.check_size(ModelMetrics(30, 20, 2_000_000, {}, {}))
    (check,) = gates.check_speed(SAMPLE, RATIO, "onnxruntime, 1 thread") + size
    assert (check.name,) == gates.asked
    assert (check.status, check.value) == (status, pytest.approx(value))
    assert "onnxruntime, 1 thread" in check.detail or check.name.startswith(("max_size", "max_macs", "max_params"))


def test_a_speed_up_near_its_limit_is_measured_for_longer():
    assert Gates(min_speedup=1.4).is_close_to_speed(RATIO)
    assert Gates(min_speedup=1.65).is_close_to_speed(RATIO)
    for gates in (Gates(min_speedup=1.2), Gates(min_speedup=1.8), Gates()):
        assert not gates.is_close_to_speed(RATIO)


def test_gates_that_cannot_be_measured_are_skipped():
    gates = Gates(min_speedup=1.0, max_latency_ms=1.0)
    assert [check.status for check in gates.check_speed(SAMPLE, None, "")] == ["skipped", "pass"]
    assert gates.check_speed(SAMPLE, None, "")[0].detail == "no baseline file to time"
    assert [check.status for check in gates.check_speed(None, None, "")] == ["skipped", "skipped"]
    (check,) = Gates(max_macs=5).check_size(ModelMetrics(0, 0, 9, {}, {}))
    assert (check.status, check.detail) == ("skipped", "it could not be counted")


def test_limits_on_slower_calls_need_enough_of_them():
    gates = Gates(max_quantile_ms={"p90": 2.0, "p99": 2.0})
    many = LatencySample(tuple(np.linspace(1, 2, 50)))
    ninety, slowest = gates.check_speed(many, None, "1 thread")
    assert (ninety.name, ninety.status, ninety.value) == ("max_quantile_ms.p90", "pass", pytest.approx(1.9))
    assert (slowest.status, slowest.detail) == ("skipped", "there were too few calls to know it")
    assert gates.asked == ("max_quantile_ms.p90", "max_quantile_ms.p99")


def test_shares_of_the_baseline_are_held_to_their_limits():
    slim, baseline = ModelMetrics(30, 20, 500, {}, {"p95": 1.0}), ModelMetrics(60, 80, 1000, {}, {"p95": 4.0})
    resources = Resources(peak_memory_bytes={"slim": 9, "baseline": 10})
    limits = {"macs": 0.5, "params": 0.2, "size": 0.5, "p95": 0.3, "memory": 0.8, "energy": 0.9}
    found = Gates(max_ratio=limits).check_ratios(slim, baseline, resources)
    assert [check.status for check in found] == ["pass", "fail", "pass", "pass", "fail", "skipped"]
    assert [check.value for check in found] == [0.5, 0.25, 0.5, 0.25, 0.9, None]
    assert {check.status for check in Gates(max_ratio=limits).check_ratios(slim, None, resources)} == {"skipped"}
    judged = Gates(max_ratio={"memory": 1.0}, judge_by="bound").check_ratios(slim, baseline, resources)[0]
    assert (judged.status, judged.detail) == ("pass", "9 against 10; no interval is known, so it is judged by itself")


def test_a_loss_on_one_distribution_is_held_to_its_limit():
    gates = Gates(max_drop_on={"jpeg 3": 0.05, "jpeg 4": 0.05})
    kept, unknown = gates.check_quality(OWN, {**CHANGES, "on.jpeg 3": Estimate(0.04, 0.02, 0.06)})
    assert (kept.name, kept.status, kept.value) == ("max_drop_on.jpeg 3", "pass", 0.04)
    assert (unknown.status, unknown.detail) == ("skipped", "no such distribution was looked at, only jpeg 3")


OWN = {
    "top1": Estimate(0.9, 0.88, 0.92, "900 of 1,000 images"),
    "worst_class": Estimate(0.7),
    "calibration_error": Estimate(0.04),
}
CHANGES = {
    "drop.top1": Estimate(0.9173 - 0.9073, 0.002, 0.018, "12 images lost"),  # 0.010000000000000009
    "rise.calibration_error": Estimate(0.02),
    "churn": Estimate(0.05, 0.04, 0.065),
}


@pytest.mark.parametrize(
    ("gates", "name", "status"),
    [
        (Gates(max_drop={"top1": 0.01}), "max_drop.top1", "pass"),
        (Gates(max_drop={"top1": 0.0099}), "max_drop.top1", "fail"),
        (Gates(max_drop={"top1": 0.01}, judge_by="bound"), "max_drop.top1", "inconclusive"),
        (Gates(max_drop={"top1": 0.018}, judge_by="bound"), "max_drop.top1", "pass"),
        (Gates(max_rise={"calibration_error": 0.02}), "max_rise.calibration_error", "pass"),
        (Gates(max_rise={"calibration_error": 0.019}), "max_rise.calibration_error", "fail"),
        (Gates(minimum={"top1": 0.9}), "min.top1", "pass"),
        (Gates(minimum={"top1": 0.91}), "min.top1", "fail"),
        (Gates(minimum={"top1": 0.9}, judge_by="bound"), "min.top1", "inconclusive"),
        (Gates(minimum={"top1": 0.88}, judge_by="bound"), "min.top1", "pass"),
        (Gates(minimum={"worst_class": 0.7}, judge_by="bound"), "min.worst_class", "pass"),
        (Gates(maximum={"churn": 0.05}), "max.churn", "pass"),
        (Gates(maximum={"churn": 0.05}, judge_by="bound"), "max.churn", "inconclusive"),
        (Gates(maximum={"calibration_error": 0.039}), "max.calibration_error", "fail"),
    ],
)
def test_each_gate_of_quality_holds_its_own_figure_to_its_limit(gates, name, status):
    (check,) = gates.check_quality(OWN, CHANGES)
    assert (check.name,) == gates.asked == (name,)
    kind, _, figure = name.partition(".")
    estimate = {**OWN, **CHANGES}[{"max_drop": "drop.", "max_rise": "rise."}.get(kind, "") + figure]
    assert (check.status, check.value, check.unit) == (status, estimate.value, "share")


def test_a_distance_is_no_share():
    gates = Gates(maximum={"softmax_distance": 0.1})
    for changes in ({"softmax_distance": Estimate(0.07)}, None):
        assert gates.check_quality(OWN, changes)[0].unit == ""


def test_a_limit_within_the_noise_is_said_to_be():
    (close,), (far,) = (Gates(max_drop={"top1": limit}).check_quality(OWN, CHANGES) for limit in (0.015, 0.03))
    assert close.detail == (
        "12 images lost; with 95 % confidence from 0.0020 to 0.0180, on both sides of the limit: noise may have decided"
    )
    assert far.detail == "12 images lost; with 95 % confidence from 0.0020 to 0.0180"


def test_quality_that_cannot_be_measured_is_skipped():
    gates = Gates(max_drop={"top1": 0.01}, minimum={"top1": 0.5, "top5": 0.5}, maximum={"churn": 0.1})
    by_name = {check.name: check for check in gates.check_quality(OWN, None)}
    assert [by_name[name].status for name in ("max_drop.top1", "min.top5", "max.churn")] == ["skipped"] * 3
    assert by_name["min.top1"].status == "pass"
    assert by_name["max.churn"].detail == "no baseline file to compare with"
    assert by_name["min.top5"].detail == "the network has no more than five classes"
    assert {check.status for check in gates.check_quality(None, None)} == {"skipped"}
    nan = {"top1": Estimate(float("nan"), float("nan"), float("nan"))}
    for gate in (Gates(minimum={"top1": 0.5}), Gates(minimum={"top1": 0.5}, judge_by="bound")):
        assert gate.check_quality(nan, None)[0].status == "fail"


# verdict


@pytest.fixture(scope="module")
def split():
    """40 images whose labels are what the chain network says, but for the last 4."""
    plain = make_split(40)
    with OnnxRuntime(exported("chain")) as runtime:
        outputs = runtime.run({"image": PREPROCESSING.normalize(plain.source.images)})["logits"].argmax(1)
    return make_split(40, np.where(np.arange(40) < 36, outputs, (outputs + 1) % 4))


def test_good_file_passes_every_check(split):
    before = evaluate_quality(nets.build("residual"), split)
    baseline = ModelMetrics(7, 8, 9, {"top1": before}, {"p50": 99.0})
    verdict = verify(
        exported("chain"), evaluation=split, conditions=QUICK, scope=Scope(parity_samples=16),
        signature=SIGNATURE, opset=18,
        reference=nets.build("chain"), baseline_onnx=exported("residual"), baseline_metrics=baseline,
        gates=Gates(
            max_drop={"top1": 0.06}, maximum={"churn": 1.0}, min_speedup=0.001, max_latency_ms=1000, max_size_mb=1
        ),
    )  # fmt: skip
    assert verdict.passed, verdict.checks
    assert list(checks_of(verdict)) == [
        "structure", "preprocessing", "denormals", "macs_agree", "weights_agree",
        "baseline_preprocessing", "provider", "classifier",
        "parity", "parity_edges", "evaluation", "repeatable", "batch_independent", "reference_evaluator",
        "baseline_agrees", "max_drop.top1",
        "max.churn", "min_speedup", "max_latency_ms", "max_size_mb",
    ]  # fmt: skip
    assert set(verdict.required) == set(checks_of(verdict)) - {
        "batch_independent",
        "preprocessing",
        "baseline_preprocessing",
        "baseline_agrees",
        "reference_evaluator",
    }
    assert verdict.slim.quality["top1"] == 0.9
    assert set(verdict.slim.quality) == {"top1", "calibration_error"}  # of one class there is no image
    assert checks_of(verdict)["max_drop.top1"].value == pytest.approx(before - 0.9)
    assert verdict.slim.macs == 276544
    assert verdict.slim.params == count_params(nets.build("chain"))
    assert verdict.slim.size_bytes == exported("chain").stat().st_size
    assert (verdict.baseline.macs, verdict.baseline.quality["top1"]) == (7, before)
    quality = verdict.details["quality"]
    assert sum(quality["images_by_class"]) == 40
    pairs = zip(quality["slim_by_class"], quality["images_by_class"], strict=True)
    assert sum(share * count for share, count in pairs if count) == pytest.approx(36)
    assert quality["slim"]["top1"]["low"] < 0.9 < quality["slim"]["top1"]["high"]
    assert quality["changes"]["churn"]["value"] == checks_of(verdict)["max.churn"].value > 0
    assert 0 < verdict.baseline.latency_ms["p50"] < 99
    latency, compared = verdict.details["latency"], verdict.details["parity"]
    assert len(latency["baseline_ms"]) == len(latency["slim_ms"]) >= 2 * 8
    assert latency["ratio"]["low"] < latency["ratio"]["value"] < latency["ratio"]["high"]
    assert checks_of(verdict)["min_speedup"].value == pytest.approx(1 / latency["ratio"]["value"])
    assert (latency["threads"], latency["batch_size"], latency["warmup"]) == (1, 1, 1)
    assert (compared["samples"], compared["top1_agreement"]) == (16, 1.0)
    assert verdict.details["evaluation"] == {"images": 40}
    images = quality["worst_images"]
    assert all(one["label"] != one["predicted"] for one in images)
    shares = (np.array(quality[f"{network}_by_class"], float) for network in ("baseline", "slim"))
    losses = np.subtract(*shares)
    assert {one["class"] for one in images} <= set(np.flatnonzero(losses > 0).tolist())


def test_file_alone_is_verified_without_reference(split):
    verdict = verify(exported("chain"), evaluation=split, conditions=QUICK, gates=Gates(max_size_mb=1))
    checks = checks_of(verdict)
    assert verdict.passed
    assert {one["index"] for one in verdict.details["quality"]["worst_images"]} == {36, 37, 38, 39}
    assert (checks["parity"].status, checks["macs_agree"].status) == ("skipped", "skipped")
    assert verdict.baseline is None
    assert verdict.slim.params == 3780


def test_gate_without_baseline_fails_the_verdict(split):
    verdict = verify(exported("chain"), evaluation=split, conditions=QUICK, gates=Gates(min_speedup=1.0))
    assert checks_of(verdict)["min_speedup"].status == "skipped"
    assert not verdict.passed


def test_baseline_that_is_only_a_file_is_measured(split):
    verdict = verify(
        exported("chain"), evaluation=split, conditions=QUICK, gates=Gates(max_drop={"top1": 1.0}),
        baseline_onnx=exported("residual"),
    )  # fmt: skip
    assert verdict.passed
    assert verdict.baseline.macs == 2469952
    assert verdict.baseline.quality["top1"] == evaluate_quality(nets.build("residual"), split)


def test_other_weights_than_the_references_fail_parity_and_say_what_would_pass(split, tmp_path):
    path = changed(tmp_path, lambda model: set_weight(model, "head.weight", lambda w: w * 1.5))
    verdict = verify(
        path, evaluation=split, conditions=QUICK, gates=Gates(parity=1e-3), reference=nets.build("chain"),
        scope=Scope(parity_samples=64),
    )  # fmt: skip
    check = checks_of(verdict)["parity"]
    assert (check.status, check.limit) == ("fail", 1e-3)
    assert check.value > 1e-3
    assert "all 40 images (64 asked)" in check.detail
    assert "the smallest limit that passes is" in check.detail
    assert not verdict.passed


def test_another_network_than_the_reference_fails_macs_and_parity(split):
    verdict = verify(
        exported("residual"), evaluation=split, conditions=QUICK, gates=Gates(), reference=nets.build("chain")
    )
    checks = checks_of(verdict)
    assert {checks[name].status for name in ("macs_agree", "weights_agree", "parity", "parity_edges")} == {"fail"}
    assert "ONNX graph 2,469,952, torch 276,544" in checks["macs_agree"].detail


def test_nan_weights_fail_evaluation(split, tmp_path):
    path = changed(tmp_path, lambda model: set_weight(model, "head.weight", lambda w: w * np.nan))
    verdict = verify(
        path, evaluation=split, conditions=QUICK, gates=Gates(max_drop={"top1": 1.0}), reference=nets.build("chain")
    )
    checks = checks_of(verdict)
    assert (checks["evaluation"].status, checks["parity"].status) == ("fail", "fail")
    assert checks["max_drop.top1"].status == "skipped"
    assert "must be finite" in checks["evaluation"].detail
    assert not verdict.passed


def test_unusual_inputs_are_compared_one_by_one():
    """A network that is wrong for a white image, and one that is wrong in large batches."""

    def wrong_when_bright(images):
        return {"logits": scores_of(images)["logits"] + (images.min() > 0)}

    def wrong_when_many(images):
        return {"logits": scores_of(images)["logits"] + 2.0 * (len(images) == 8)}

    split = make_split(5)
    for function, broken in ((wrong_when_bright, "white image"), (wrong_when_many, "batch 8")):
        with FakeRuntime(function) as runtime, FakeRuntime(scores_of) as reference:
            found = edge_parity(runtime, reference, split, 8)
        assert list(found) == ["black image", "white image", "batch 1", "batch 3", "batch 8"]
        assert found.pop(broken) >= 1.0
        assert set(found.values()) == {0.0}
    assert (check_edges({"a": 0.5, "b": 0.1}, 0.4).status, check_edges({"a": 0.5}, 0.5).status) == ("fail", "pass")
    assert check_edges({"a": 0.5, "b": 0.125}, 0.4).detail == "a 0.5, b 0.12"
    with FakeRuntime(scores_of, fixed_batch(SIGNATURE, 2)) as fixed, FakeRuntime(scores_of) as reference:
        assert list(edge_parity(fixed, reference, split, 8)) == ["black image", "white image"]
        assert fixed.batches == [2, 2]


def test_denormal_weights_are_counted(split, tmp_path):
    def shrink(model):
        set_weight(model, "head.weight", lambda w: np.where(np.arange(w.size).reshape(w.shape) < 3, 1e-40, w))

    verdict = verify(changed(tmp_path, shrink), evaluation=split, conditions=QUICK, gates=Gates())
    check = checks_of(verdict)["denormals"]
    assert (check.status, check.value, check.limit) == ("fail", 3.0, 0.0)
    assert not verdict.passed


def test_weights_that_are_not_multiplied_by_are_told_from_those_that_are(split):
    reference = nets.build("chain")
    verdict = verify(exported("chain"), evaluation=split, conditions=QUICK, gates=Gates(), reference=reference)
    check = checks_of(verdict)["weights_agree"]
    kernels = [part.weight for part in reference.modules() if isinstance(part, (torch.nn.Conv2d, torch.nn.Linear))]
    assert (check.status, check.value) == ("pass", sum(weight.numel() for weight in kernels))


def _wrong_opset(model):
    model.opset_import[0].version = 19


def _training_batch_norm(model):
    channels = 16
    names = [f"extra_{part}" for part in ("scale", "bias", "mean", "var")]
    for name in names:
        model.graph.initializer.append(numpy_helper.from_array(np.ones(channels, np.float32), name))
    last_relu = [node for node in model.graph.node if node.op_type == "Relu"][-1]
    inner, last_relu.output[0] = last_relu.output[0], "before_norm"
    norm = helper.make_node(
        "BatchNormalization", ["before_norm", *names], [inner, "mean_out", "var_out"], name="norm", training_mode=1
    )
    model.graph.node.insert(list(model.graph.node).index(last_relu) + 1, norm)


def _other_input_name(model):
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "image":
                node.input[index] = "pixels"
    model.graph.input[0].name = "pixels"


@pytest.mark.parametrize(
    ("change", "wording"),
    [
        (_wrong_opset, "opset must be 18, got 19"),
        (_training_batch_norm, "node 'norm' (BatchNormalization) is in training mode"),
        (_other_input_name, "inputs must be image float32 (batch, 3, 16, 16), got pixels"),
    ],
)
def test_structure_names_what_is_wrong(split, tmp_path, change, wording):
    path = changed(tmp_path, change)
    verdict = verify(path, evaluation=split, conditions=QUICK, gates=Gates(), signature=SIGNATURE, opset=18)
    check = checks_of(verdict)["structure"]
    assert check.status == "fail"
    assert wording in check.detail
    assert not verdict.passed


def test_missing_external_data_fails_and_leaves_nothing_passed_by_default(split, tmp_path):
    path = tmp_path / "m.onnx"
    save_onnx(load_onnx(exported("chain")), path, external=True)
    (tmp_path / "m.onnx.data").unlink()
    verdict = verify(
        path, evaluation=split, conditions=QUICK, gates=Gates(max_latency_ms=9), reference=nets.build("chain")
    )
    checks = checks_of(verdict)
    assert checks["structure"].detail == "its weights in 'm.onnx.data' are missing"
    assert checks["provider"].status == "fail"
    assert {checks[name].status for name in ("parity", "evaluation", "max_latency_ms")} == {"skipped"}
    assert not verdict.passed


def test_errors_that_are_not_the_files_fault_are_raised(split, tmp_path):
    arguments = {"evaluation": split, "conditions": QUICK, "gates": Gates()}
    with pytest.raises(ArtifactError, match="does not exist"):
        verify(tmp_path / "none.onnx", **arguments)
    with pytest.raises(RuntimeUnavailable, match="NoSuch"):
        verify(exported("chain"), **{**arguments, "conditions": replace(QUICK, provider="NoSuch")})
    with pytest.raises(RuntimeUnavailable, match="'torch_eager' must read ONNX files"):
        verify(exported("chain"), **{**arguments, "conditions": replace(QUICK, runtime="torch_eager")})
    with pytest.raises(DataError, match="at least one image"):
        verify(exported("chain"), **{**arguments, "evaluation": make_split(0)})
    with pytest.raises(DataError, match="got label 9"):
        verify(exported("chain"), **{**arguments, "evaluation": make_split(2, [0, 9])})


def test_batch_size_must_fit_a_fixed_batch(split, tmp_path):
    def fix(model):
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1
        del model.graph.value_info[:]

    path = changed(tmp_path, fix)
    arguments = {"evaluation": split, "gates": Gates()}
    with pytest.raises(
        ConfigValueError, match=r"verify\.batch_size must be 1, the fixed batch size of the file, got 2"
    ):
        verify(path, conditions=replace(QUICK, batch_size=2), **arguments)
    verdict = verify(path, conditions=QUICK, **arguments)
    assert verdict.slim.quality["top1"] == 0.9


def test_measure_onnx_gives_the_baselines_figures(split):
    figures = measure_onnx(exported("chain"), split, QUICK, reference=nets.build("chain"))
    assert (figures.macs, figures.params, figures.quality) == (276544, 3820, {"top1": 0.9})
    assert figures.size_bytes == exported("chain").stat().st_size
    assert set(figures.latency_ms) >= {"p50", "p90", "p95"}


@pytest.mark.usefixtures("two_cores")
def test_stage_takes_limits_and_baseline_from_config_and_artifact(split, tmp_path):
    class Data:
        evaluation = split

    before = evaluate_quality(nets.build("residual"), split)
    figures = ModelMetrics(2469952, 9876, 42312, {"top1": before}, {"p50": 1.0})
    torch_model = TorchModel(
        nets.build("chain"), FactorySpec("factory", "nets:chain"), Recipe(), SIGNATURE, PREPROCESSING, (),
        Baseline(figures, exported("residual"), tmp_path),
    )  # fmt: skip
    config = VerifyConfig(
        stage="verify", warmup=1, repeats=20, parity_samples=8, threads=2, batch_size=2,
        gates=GatesConfig(
            max_drop={"top1": 1.0}, max_rise={"calibration_error": 1.0}, min={"top1": 0.95}, max={"churn": 1.0},
            max_size_mb=3.0,
        ),
    )  # fmt: skip
    model = OnnxModel(exported("chain"), 18, SIGNATURE, torch_model)
    verdict, record = VerifyStage(config).run(model, StageContext(tmp_path, 0, Data(), SilentProgress()))
    checks = checks_of(verdict)
    assert record == VerifyRecord()
    assert [name for name, check in checks.items() if check.status == "fail"] == ["min.top1"]
    assert (checks["min.top1"].value, checks["min.top1"].limit) == (0.9, 0.95)
    limits = {"max_drop.top1": 1.0, "max_rise.calibration_error": 1.0, "max.churn": 1.0}
    assert {name: checks[name].limit for name in limits} == limits
    assert checks["max_size_mb"].limit == 3.0
    assert (verdict.details["latency"]["threads"], verdict.details["latency"]["batch_size"]) == (2, 2)
    assert verdict.details["parity"]["samples"] == 8


def test_verifying_a_file_alone_does_not_import_torch():
    code = (
        "import sys; import compress.verification.verdict, compress.verification.measurement; "
        "import compress.verification.runtimes.onnxruntime; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_more_threads_than_cores_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigValueError, match=r"threads must be at most the cores of this machine"):
        Conditions(threads=available_cores() + 1).open(tmp_path / "any.onnx")
