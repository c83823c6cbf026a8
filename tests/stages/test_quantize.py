"""The stage quantize, what becomes of its file on disk, and how a quantised file is verified."""

from dataclasses import replace

import nets
import numpy as np
import onnx
import pytest
from exported import SIGNATURE
from fixtures import make_context, make_splits
from onnx import numpy_helper

import compress.stages.quantize as stage_module
from compress.checkpoint.layout import load_artifact, save_artifact
from compress.checkpoint.rebuild import write_weights
from compress.config.schema.pipeline import QuantizeConfig
from compress.config.schema.verify import DeployConfig, VerifyConfig
from compress.cost.conditions import has_vnni
from compress.cost.macs import count_layer_weights, count_macs, count_params
from compress.errors import ArtifactError, DataError
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, OnnxModel, TorchModel
from compress.model.recipe import Recipe
from compress.onnx_file.io import is_quantized, load_onnx, save_onnx
from compress.report.build import StageRun, build_report
from compress.report.model import read_report
from compress.report.page import render_report
from compress.stages.quantize import QuantizeStage
from compress.stages.verify import VerifyStage
from compress.verification.gates import Gates
from compress.verification.job import VerificationJob
from compress.verification.latency import Comparison, LatencyRatio
from compress.verification.measurement import Conditions
from compress.verification.verdict import verify_onnx

SETTINGS = QuantizeConfig(stage="quantize", images=48, reduce_range=has_vnni() is False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("data"), calibration=48, bright=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """What export yields."""
    folder, module = tmp_path_factory.mktemp("whole"), nets.build("residual")
    preprocessing = data.preprocessing
    export_onnx(module, SIGNATURE, folder / "model.onnx", ExportSettings(opset=18), preprocessing=preprocessing)
    write_weights(module, folder / "baseline.safetensors")
    figures = ModelMetrics(count_macs(module, nets.EXAMPLE), count_params(module), 1, {}, {})
    baseline = Baseline(figures, folder / "model.onnx", folder / "baseline.safetensors")
    factory = FactorySpec("factory", f"{nets.__file__}:build", {"name": "residual"})
    model = TorchModel(module, factory, Recipe(), SIGNATURE, preprocessing, (), baseline)
    return OnnxModel(folder / "model.onnx", 18, SIGNATURE, model)


@pytest.fixture(scope="module")
def done(whole, data, tmp_path_factory):
    """What quantize yields, its record, and what was said."""
    ctx, listener = make_context(tmp_path_factory.mktemp("stage"), data)
    artifact, record = QuantizeStage(SETTINGS).run(whole, ctx)
    return artifact, record, listener


def test_the_float_file_is_kept_beside_the_quantised_one(done, whole):
    artifact, record, listener = done
    assert (artifact.path.name, artifact.float_path.name) == ("model.onnx", "float.onnx")
    assert artifact.float_path.read_bytes() == whole.path.read_bytes()
    assert is_quantized(load_onnx(artifact.path))
    assert not is_quantized(load_onnx(artifact.float_path))
    assert replace(artifact, path=whole.path, float_path=None) == whole
    assert (record.layers, record.float_layers, record.images, record.method) == (6, (), 48, "minmax")
    assert listener.notes[-1].startswith("6 layers in INT8, 0 in float, ")
    assert listener.warnings == []


@pytest.mark.parametrize(
    ("ratio", "lost", "chosen"),
    [
        (LatencyRatio(0.9, 0.85, 0.95, 0.02), 0.0, "qoperator"),
        (LatencyRatio(0.97, 0.93, 1.01, 0.02), 0.0, "qdq"),
        (LatencyRatio(1.1, 1.05, 1.15, 0.02), 0.0, "qdq"),
        (LatencyRatio(0.9, 0.85, 0.95, 0.02), 0.1, "qdq"),
    ],
    ids=["faster", "not told apart", "slower", "faster, but less like the float file"],
)
def test_auto_keeps_the_faster_format(whole, data, tmp_path, monkeypatch, ratio, lost, chosen):
    def timed(files, split, conditions, progress):
        assert [any(node.domain for node in load_onnx(path).graph.node) for path in files.values()] == [True, False]
        assert conditions == Conditions()
        return Comparison({}, ratio)

    write = stage_module.Calibrated.write

    def written(calibrated, target, form):
        report = write(calibrated, target, form)
        return replace(report, agreement=report.agreement - lost * (form == "qoperator"))

    monkeypatch.setattr(stage_module, "time_files", timed)
    monkeypatch.setattr(stage_module.Calibrated, "write", written)
    ctx, listener = make_context(tmp_path, data)
    artifact, record = QuantizeStage(SETTINGS.model_copy(update={"format": "auto"})).run(whole, ctx)
    assert (record.format, record.format_ratio) == (chosen, ratio.value)
    assert any(node.domain for node in load_onnx(artifact.path).graph.node) == (chosen == "qoperator")
    assert record.size_bytes_after == artifact.path.stat().st_size
    (said,) = [note for note in listener.notes if note.startswith("latency of QOperator / QDQ: ")]
    assert ("QOperator is kept" in said) == (chosen == "qoperator")
    assert ("agrees with the float file on only" in said) == (lost > 0)
    assert sorted(path.name for path in ctx.folder.glob("*")) == ["float.onnx", "model.onnx"]


def test_a_qoperator_file_is_verified(whole, data, tmp_path):
    ctx, _ = make_context(tmp_path / "stage", data)
    artifact, record = QuantizeStage(SETTINGS.model_copy(update={"format": "qoperator"})).run(whole, ctx)
    assert (record.format, record.format_ratio) == ("qoperator", None)
    ctx, _ = make_context(tmp_path / "verify", data)
    verdict, _ = VerifyStage(VerifyConfig(stage="verify", warmup=1, repeats=2, resources=None)).run(artifact, ctx)
    status = {check.name: check.status for check in verdict.checks}
    assert status["structure"] == status["quantized_agreement"] == "pass"
    assert status["reference_evaluator"] == "skipped"
    assert "fail" not in status.values()


@pytest.fixture(scope="module")
def deployed(whole, data, tmp_path_factory):
    """Artifact and listener of the stage with `deploy.precision: int8`."""
    ctx, listener = make_context(tmp_path_factory.mktemp("deployed"), data, int8=SETTINGS)
    artifact, _ = QuantizeStage(SETTINGS).run(whole, ctx)
    return artifact, listener


def test_the_baseline_is_quantised_too_where_int8_is_deployed(deployed, whole, done):
    artifact, listener = deployed
    assert done[0].int8_baseline_path is None
    assert is_quantized(load_onnx(artifact.int8_baseline_path))
    assert artifact.int8_baseline_path.read_bytes() == artifact.path.read_bytes(), "this network was not slimmed"
    assert listener.notes[-1].startswith("baseline in INT8 alone: ")


def test_a_pattern_of_the_slim_network_alone_is_no_fault_of_the_baseline(whole, data, tmp_path):
    slim = load_onnx(whole.path, weights=True)
    (weight,) = [tensor for tensor in slim.graph.initializer if tensor.name.endswith(".weight")][:1]
    for node in slim.graph.node:
        node.input[:] = ["added.weight" if name == weight.name else name for name in node.input]
    weight.name = "added.weight"
    save_onnx(slim, tmp_path / "slim.onnx", external=False)
    settings = SETTINGS.model_copy(update={"exclude": ("added",)})
    ctx, _ = make_context(tmp_path / "work", data, int8=settings)
    artifact, record = QuantizeStage(settings).run(replace(whole, path=tmp_path / "slim.onnx"), ctx)
    assert record.float_layers == ("added",)
    assert is_quantized(load_onnx(artifact.int8_baseline_path))


def test_the_file_is_timed_beside_the_int8_baseline_and_compared_with_it(deployed, data, tmp_path):
    artifact, _ = deployed
    folder = tmp_path / "artifact"
    folder.mkdir()
    save_artifact(artifact, folder)
    artifact = load_artifact("OnnxModel", folder)
    assert artifact.int8_baseline_path == folder / "int8_baseline.onnx"
    ctx, _ = make_context(tmp_path / "work", data)
    verdict, _ = VerifyStage(VerifyConfig(stage="verify", warmup=1, repeats=2, resources=None)).run(artifact, ctx)
    (check,) = [check for check in verdict.checks if check.name == "int8_alone"]
    assert (check.status, check.value) == ("pass", 0)
    assert check.detail.startswith("the baseline in INT8 alone has top-1 ")
    assert "of its latency" in check.detail
    assert "int8_alone" in verdict.required
    assert verdict.details["latency"]["baseline_file"] == "int8"


def test_external_weights_of_the_float_file_are_kept_under_its_new_name(whole, data, tmp_path):
    path = tmp_path / "model.onnx"
    save_onnx(load_onnx(whole.path, weights=True), path, external=True)
    ctx, _ = make_context(tmp_path / "stage", data)
    artifact, _ = QuantizeStage(SETTINGS).run(replace(whole, path=path), ctx)
    path.unlink()
    (tmp_path / "model.onnx.data").unlink()
    assert (tmp_path / "stage" / "float.onnx.data").is_file()
    again = load_onnx(artifact.float_path, weights=True)
    assert len(again.graph.node) == len(load_onnx(whole.path).graph.node)


def test_artifact_is_the_same_after_a_round_trip(done, tmp_path):
    artifact, _, _ = done
    save_artifact(artifact, tmp_path)
    again = load_artifact("OnnxModel", tmp_path)
    assert (again.path, again.float_path) == (tmp_path / "model.onnx", tmp_path / "float.onnx")
    for name in ("path", "float_path"):
        assert getattr(again, name).read_bytes() == getattr(artifact, name).read_bytes()


def test_an_artifact_without_a_float_file_has_none_after_a_round_trip(whole, tmp_path):
    save_artifact(whole, tmp_path)
    assert load_artifact("OnnxModel", tmp_path).float_path is None


def test_too_few_calibration_images_are_refused(whole, data, tmp_path):
    ctx, _ = make_context(tmp_path / "stage", data)
    with pytest.raises(DataError, match="must have the 256 calibration images that it asks for, the split has 48"):
        QuantizeStage(QuantizeConfig(stage="quantize")).run(whole, ctx)


def test_a_provider_without_integer_kernels_is_warned_of(whole, data, tmp_path):
    ctx, listener = make_context(tmp_path / "stage", data)
    QuantizeStage(SETTINGS).run(whole, replace(ctx, deploy=DeployConfig(provider="CUDAExecutionProvider")))
    (warning,) = listener.warnings
    assert warning.startswith("CUDAExecutionProvider computes quantised networks in float: the file gets smaller, not")


@pytest.mark.parametrize(("vnni", "settings", "count"), [
    (False, {}, 1), (False, {"reduce_range": True}, 0), (False, {"activation_type": "int8"}, 0), (None, {}, 0),
    (True, {}, 0),
])  # fmt: skip
def test_a_processor_that_saturates_is_warned_of(monkeypatch, data, tmp_path, vnni, settings, count):
    monkeypatch.setattr(stage_module, "has_vnni", lambda: vnni)
    ctx, _ = make_context(tmp_path / "stage", data)
    warnings = QuantizeStage(QuantizeConfig(stage="quantize", **settings))._warnings(ctx)
    assert len(warnings) == count
    assert all("set reduce_range: true" in warning for warning in warnings)
    assert has_vnni() in (True, False, None)


def test_a_file_that_agrees_too_little_is_warned_of(whole, data, tmp_path, monkeypatch):
    real = stage_module.Calibrated.write
    monkeypatch.setattr(stage_module.Calibrated, "write", lambda *given: replace(real(*given), agreement=0.5))
    ctx, listener = make_context(tmp_path / "stage", data)
    QuantizeStage(SETTINGS).run(whole, ctx)
    assert listener.warnings[0].startswith("The quantised file gives only 50.0% of the calibration images the class")


# verification


def verify(artifact, data, **changes):
    arguments = {
        "evaluation": data.evaluation,
        "conditions": Conditions(warmup=1, repeats=4),
        "gates": Gates(max_drop={"top1": 0.1}, max_size_mb=1),
        "signature": artifact.signature,
        "opset": 18,
        "reference": artifact.reference.module,
        "baseline_onnx": artifact.reference.baseline.onnx_path,
        "baseline_metrics": artifact.reference.baseline.metrics,
        "float_onnx": artifact.float_path,
    }
    return verify_onnx(VerificationJob(artifact.path, **(arguments | changes)))


def check_of(verdict, name):
    return next(check for check in verdict.checks if check.name == name)


def test_a_quantised_file_passes_and_the_float_file_equals_torch(done, data):
    artifact, _, _ = done
    verdict = verify(artifact, data)
    assert verdict.passed, [check for check in verdict.checks if check.status != "pass"]
    for name in ("macs_agree", "weights_agree", "parity", "parity_edges"):
        assert check_of(verdict, name).detail.endswith(" (of the float file it was quantised from)")
    module = artifact.reference.module
    assert check_of(verdict, "macs_agree").value == count_macs(module, nets.EXAMPLE) == verdict.slim.macs
    assert check_of(verdict, "weights_agree").value == count_layer_weights(module, nets.EXAMPLE)
    assert check_of(verdict, "parity").value < 1e-4
    agreement = check_of(verdict, "quantized_agreement")
    assert (agreement.status, agreement.limit, agreement.unit) == ("pass", None, "share")
    assert 0.8 < agreement.value <= 1
    assert "quantized_agreement" in verdict.required
    assert check_of(verdict, "max_size_mb").value == artifact.path.stat().st_size / 1e6 == verdict.slim.size_bytes / 1e6
    assert check_of(verdict, "reference_evaluator").limit > 1e-3


def test_shares_of_the_drop_say_who_lost_what(done, data):
    artifact, _, _ = done
    slimming, quantize = verify(artifact, data).details["shares"]
    assert (slimming["stage"], slimming["points"]) == ("slimming", 0)  # the baseline is the float file here
    assert quantize["stage"] == "quantize"
    assert quantize["top1_before"] == slimming["top1_after"]
    assert quantize["points"] == pytest.approx(100 * (quantize["top1_after"] - quantize["top1_before"]))
    whole = replace(artifact, path=artifact.float_path, float_path=None)
    assert [share["stage"] for share in verify(whole, data).details["shares"]] == ["slimming"]
    alone = verify(whole, data, baseline_onnx=None, baseline_metrics=None, gates=Gates())
    assert alone.details["shares"] == []


def spoiled(path, folder):
    """Write a copy with one weight that is out of place."""
    model = load_onnx(path, weights=True)
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 4:
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, folder / "spoiled.onnx")
    return folder / "spoiled.onnx"


def test_a_spoiled_float_file_fails_parity_and_a_spoiled_quantised_one_its_gates(done, data, tmp_path):
    artifact, _, _ = done
    verdict = verify(artifact, data, float_onnx=spoiled(artifact.float_path, tmp_path))
    assert check_of(verdict, "parity").status == "fail"
    verdict = verify(
        replace(artifact, path=spoiled(artifact.path, tmp_path)), data, gates=Gates(maximum={"churn": 0.1})
    )
    assert check_of(verdict, "parity").status == "pass"
    assert check_of(verdict, "quantized_agreement").value < 0.9
    assert not verdict.passed
    assert {check.name for check in verdict.checks if check.status == "fail"} == {"max.churn"}


def test_a_float_file_that_fails_or_is_gone_is_no_traceback(done, data, tmp_path):
    artifact, _, _ = done
    model = load_onnx(artifact.float_path, weights=True)
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(tensor), np.nan), tensor.name))
    onnx.save(model, tmp_path / "nan.onnx")
    verdict = verify(artifact, data, float_onnx=tmp_path / "nan.onnx")
    assert {"parity", "quantized_agreement"} <= {check.name for check in verdict.checks if check.status == "fail"}
    with pytest.raises(ArtifactError, match=r"'.*gone.onnx' does not exist"):
        verify(artifact, data, float_onnx=tmp_path / "gone.onnx")


def test_a_quantised_file_that_cannot_be_run_fails_what_it_would_have_been_compared_by(done, data, tmp_path):
    artifact, _, _ = done
    model = load_onnx(artifact.path, weights=True)
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "broken.onnx")
    verdict = verify(replace(artifact, path=tmp_path / "broken.onnx"), data)
    assert check_of(verdict, "quantized_agreement").detail == "the file cannot be run on these images"
    assert not verdict.passed


def test_the_stage_verify_hands_over_the_float_file(done, data, tmp_path):
    artifact, _, _ = done
    ctx, _ = make_context(tmp_path / "stage", data)
    verdict, _ = VerifyStage(VerifyConfig(stage="verify", warmup=1, repeats=4)).run(artifact, ctx)
    assert check_of(verdict, "quantized_agreement").status == "pass"


# the report


def test_report_tells_of_the_rounding_and_of_each_share(done, data):
    artifact, record, _ = done
    stages = [StageRun("prune", "ran", 1.0, {"validation_top1_before": 0.9, "validation_top1_after": 0.8}),
              StageRun("finetune", "ran", 1.0, {"validation_top1_before": 0.8, "chosen_epoch": 2,
                                                "epochs": [{"epoch": 2, "validation_top1": 0.95}]}),
              StageRun("quantize", "ran", 1.0, record)]  # fmt: skip
    report = build_report("demo", verify(artifact, data), stages, {}, {})
    page = render_report(read_report(report))
    assert "Quantisation to INT8" in page
    section = page.partition("<h2>Effect of each stage on top-1")[2].partition("</section>")[0]
    assert section.count("<tr>") == 5
    assert "−10.00" in section
    assert "+15.00" in section
    assert "all stages up to the float file" in section
