"""Half precision: what the file holds, what it computes, what refuses it, and where it is kept in mind."""

from dataclasses import replace

import nets
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import PREPROCESSING, SIGNATURE, exported
from onnx import TensorProto

from compress.checkpoint.layout import load_torch_model, save_torch_model
from compress.checkpoint.rebuild import write_weights
from compress.config.schema.data import ArraysSource, DataConfig, PreprocessingConfig
from compress.config.schema.model import LoadConfig
from compress.config.schema.pipeline import ExportConfig
from compress.config.schema.verify import DeployConfig
from compress.cost.conditions import TableConditions, present_conditions
from compress.cost.variants import VariantWriter
from compress.data.from_config import Splits
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import ExportFailed
from compress.exporting.rewrite import apply_rewrites
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, TorchModel
from compress.model.recipe import Recipe
from compress.onnx_file.counting import count_onnx
from compress.onnx_file.io import load_onnx, read_metadata, read_signature
from compress.progress import SilentProgress
from compress.search.context import StageContext
from compress.stages.export import ExportStage
from compress.stages.load import LoadStage
from compress.verification.gates import Gates
from compress.verification.job import VerificationJob
from compress.verification.measurement import Conditions
from compress.verification.verdict import verify_onnx


def _run(path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": nets.images().numpy()})[0]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    path = tmp_path_factory.mktemp("half") / "half.onnx"
    export_onnx(
        nets.build("residual"), SIGNATURE, path, ExportSettings(opset=18, precision="fp16"), preprocessing=PREPROCESSING
    )
    return path


def test_weights_are_half_and_inputs_and_outputs_are_not(half):
    model = load_onnx(half)
    floats = [t.data_type for t in model.graph.initializer if t.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)]
    assert floats
    assert set(floats) == {TensorProto.FLOAT16}
    assert read_signature(model) == SIGNATURE
    assert read_metadata(model).preprocessing == PREPROCESSING
    assert half.stat().st_size < 0.75 * exported("residual").stat().st_size


def test_computes_nearly_the_same_but_not_the_same(half):
    full, rounded = _run(exported("residual")), _run(half)
    assert rounded.dtype == np.float32
    assert 0 < np.abs(full - rounded).max() < 0.01 * np.abs(full).max()


def test_costs_are_those_of_the_whole_precision(half):
    whole = count_onnx(exported("residual"))
    counts = count_onnx(half)
    assert (counts.macs, counts.params) == (whole.macs, whole.params)


def test_variants_of_a_half_file_are_half_and_run(half, tmp_path):
    writer = VariantWriter(load_onnx(half, weights=True))
    assert [site.sizes for site in writer.sites] == [
        site.sizes for site in VariantWriter(load_onnx(exported("residual"), weights=True)).sites
    ]
    variant = writer.write({}, {})
    onnx.save_model(variant, tmp_path / "variant.onnx")
    assert np.isfinite(_run(tmp_path / "variant.onnx")).all()
    assert TensorProto.FLOAT16 in {tensor.data_type for tensor in variant.graph.initializer}


def test_weights_that_float16_cannot_hold_are_refused(tmp_path):
    module = nets.build("chain")
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = 1e5
    with pytest.raises(ExportFailed, match=r"at most 65504 for fp16, 'body.0.0.weight' has \d") as caught:
        export_onnx(module, SIGNATURE, tmp_path / "m.onnx", ExportSettings(opset=18, precision="fp16"))
    assert "fp32" in caught.value.hint
    assert not (tmp_path / "m.onnx").exists()


def test_a_conversion_that_changes_the_network_is_refused(tmp_path, monkeypatch):
    def wrong(model, **_):
        weight = next(t for t in model.graph.initializer if t.name == "head.weight")
        weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
        return model

    monkeypatch.setattr("compress.exporting.rewrite.convert_float_to_float16", wrong)
    with pytest.raises(ExportFailed, match=r"nearly the same in fp16: output 'logits' .* differs by") as caught:
        export_onnx(nets.build("residual"), SIGNATURE, tmp_path / "m.onnx", ExportSettings(opset=18, precision="fp16"))
    assert "fp32" in caught.value.hint


def test_a_conversion_that_fails_is_one_clear_error(tmp_path, monkeypatch):
    def fails(model, **_):
        raise ValueError("no such operator")

    monkeypatch.setattr("compress.exporting.rewrite.convert_float_to_float16", fails)
    with pytest.raises(ExportFailed, match="could not be written in fp16: no such operator"):
        export_onnx(nets.build("chain"), SIGNATURE, tmp_path / "m.onnx", ExportSettings(opset=18, precision="fp16"))


def test_zero_padded_shortcuts_of_a_half_file_are_rewritten_too(tmp_path):
    class Padded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down = torch.nn.Conv2d(3, 8, 3, 1, 1), torch.nn.Conv2d(8, 16, 3, 2, 1)
            self.head = torch.nn.Linear(16, 4)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            x = torch.relu(self.down(x) + torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    path = tmp_path / "m.onnx"
    export_onnx(Padded().eval(), SIGNATURE, path, ExportSettings(opset=18, precision="fp16"))
    model = load_onnx(path, weights=True)
    assert apply_rewrites(model, ["padded_shortcuts"]) == {"padded_shortcuts": 1}
    onnx.save_model(model, tmp_path / "rewritten.onnx")
    assert np.abs(_run(path) - _run(tmp_path / "rewritten.onnx")).max() < 1e-3


def test_a_model_keeps_its_precision_when_stored_and_exported(tmp_path):
    module = nets.build("chain")
    write_weights(module, tmp_path / "baseline.safetensors")
    baseline = Baseline(ModelMetrics(1, 1, 1, {}, {}), exported("chain"), tmp_path / "baseline.safetensors")
    factory = FactorySpec("factory", f"{nets.__file__}:build", {"name": "chain"})
    model = TorchModel(module, factory, Recipe(), SIGNATURE, PREPROCESSING, (), baseline, precision="fp16")
    (tmp_path / "stored").mkdir()
    save_torch_model(model, tmp_path / "stored")
    again = load_torch_model(tmp_path / "stored")
    assert again.precision == "fp16"
    ctx = StageContext(tmp_path, 0, None, SilentProgress())
    written, _ = ExportStage(ExportConfig(stage="export")).run(again, ctx)
    types = {tensor.data_type for tensor in load_onnx(written.path).graph.initializer}
    assert TensorProto.FLOAT16 in types
    assert TensorProto.FLOAT not in types


def test_the_baseline_is_loaded_in_the_precision_of_the_deployment(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.zeros((40, 16, 16, 3), np.uint8), y=np.arange(40) % 4)
    source, preprocessing = (
        ArraysSource(arrays=str(tmp_path / "images.npz")),
        PreprocessingConfig(mean=(0.5,), std=(0.25,)),
    )
    data = Splits(DataConfig(train=source, evaluation=source, calibration=8, validation=8, preprocessing=preprocessing))
    write_weights(nets.build("chain"), tmp_path / "weights.safetensors")
    load = LoadConfig(
        stage="load",
        model={"factory": f"{nets.__file__}:build", "kwargs": {"name": "chain"}},
        weights=str(tmp_path / "weights.safetensors"),
        rewrites="never",
    )
    for deploy, expected in (
        (None, "fp32"),
        (DeployConfig(provider="CUDAExecutionProvider", precision="fp16"), "fp16"),
    ):
        model, _ = LoadStage(load).run(None, StageContext(tmp_path, 0, data, SilentProgress(), deploy))
        assert model.precision == expected
        types = {tensor.data_type for tensor in load_onnx(model.baseline.onnx_path).graph.initializer}
        assert (TensorProto.FLOAT16 in types) == (expected == "fp16")


def test_verification_reads_half_files_and_says_the_limit_that_they_keep(half):
    images = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
    split = Split("evaluation", ArraySource(images, np.arange(24) % 4, ()), np.arange(24), PREPROCESSING)

    def verify(limit):
        verdict = verify_onnx(VerificationJob(
            half, evaluation=split, conditions=Conditions(warmup=1, repeats=4), gates=Gates(parity=limit),
            signature=SIGNATURE, opset=18, reference=nets.build("residual"), baseline_onnx=exported("residual"),
        ))  # fmt: skip
        return verdict, {check.name: check for check in verdict.checks}

    verdict, checks = verify(1e-6)
    assert {name for name, check in checks.items() if check.status == "fail"} == {"parity", "parity_edges"}
    assert checks["reference_evaluator"].limit > 0.01  # rounding is allowed for
    largest = max(checks[name].value for name in ("parity", "parity_edges"))
    verdict, checks = verify(1.001 * largest)
    assert verdict.passed, checks
    assert 1e-6 < largest < 0.05 * verdict.details["parity"]["largest_output"]


def test_tables_of_another_precision_are_told_apart():
    here = present_conditions("onnxruntime", "CUDAExecutionProvider", 1, 1, DeployConfig(precision="fp16").precision)
    other = replace(here, precision="fp32")
    assert here.key != other.key
    assert here.differences(other) == ["precision fp16 here, fp32 in the table"]
    assert TableConditions("cpu", 2, "avx2", "onnxruntime 1.31", "CPUExecutionProvider", 1, 1).precision == "fp32"
