"""Export: one checked file that is what was asked for, or an error and the old file."""

import logging
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import onnx
import onnxslim
import pytest
import torch
import torch.nn.functional as F
from exported import CLASSES, PREPROCESSING, SIGNATURE, exported, exported_with_report
from fixtures import RecordingProgress
from onnx import numpy_helper
from torch import nn

from compress.config.schema.pipeline import ExportConfig
from compress.errors import ExportFailed
from compress.exporting import torch_onnx
from compress.exporting.settings import ExportSettings, exported_signature
from compress.exporting.simplify import simplify_onnx
from compress.exporting.torch_onnx import export_onnx
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, Signature, TensorSpec, TorchModel
from compress.model.recipe import Recipe
from compress.onnx_file.counting import count_onnx
from compress.onnx_file.io import file_bytes, load_onnx, read_signature, read_sizes
from compress.search.context import StageContext
from compress.stages.export import ExportStage
from compress.verification.runtimes.onnxruntime import OnnxRuntime


class DependsOnValues(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class DependsOnBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)[:, :4]


class ComplexNumbers(nn.Module):
    def forward(self, x):
        values = torch.view_as_complex(x[:, :2].permute(0, 2, 3, 1).contiguous())
        return F.pad(values, (1, 1)).abs().mean((1, 2))[:, None].expand(-1, 4)


def torch_model(module):
    figures = ModelMetrics(1, 1, 1, {"top1": 1.0}, {"p50": 1.0})
    baseline = Baseline(figures, exported("chain"), exported("chain"))
    factory = FactorySpec("factory", "nets:chain")
    return TorchModel(module, factory, Recipe(), SIGNATURE, PREPROCESSING, CLASSES, baseline)


def test_exports_one_valid_file_with_open_batch():
    path, report = exported_with_report("residual")
    model = load_onnx(path)
    onnx.checker.check_model(path, full_check=True)
    assert report.files == ("residual.onnx",)
    assert report.size_bytes == path.stat().st_size == file_bytes(path)
    assert report.opset == 18
    assert report.simplified
    assert report.nodes_after == len(model.graph.node) <= report.nodes_before
    assert read_signature(model) == SIGNATURE
    assert model.producer_name == "compress"


def test_file_tells_nothing_of_the_machine_it_was_made_on():
    path = exported("chain")
    content = path.read_bytes()
    for text in (os.path.dirname(nets.__file__), os.path.dirname(torch.__file__), "stack_trace", "nets._Head"):
        assert text.encode() not in content, text


def test_training_flags_survive_and_denormals_are_flushed(tmp_path):
    module = nets.build("linear_head")
    module.fc2.train()
    flags = [part.training for part in module.modules()]
    with torch.no_grad():
        module.fc1.weight[0, :5] = 1e-40
        module.fc1.weight[1, 0] = 1.2e-38  # the smallest normal number is 1.1755e-38
    path = tmp_path / "m.onnx"
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report = export_onnx(module, SIGNATURE, path, ExportSettings(opset=18, simplify=False))
    assert [part.training for part in module.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert report.denormals_flushed == 5
    assert (report.simplified, report.simplify_note) == (False, "not asked for")
    weights = {t.name: numpy_helper.to_array(t) for t in load_onnx(path).graph.initializer}
    assert (weights["fc1.weight"][0, :5] == 0).all()
    assert weights["fc1.weight"][1, 0] != 0


def test_stage_writes_two_files_with_fixed_batch_when_asked(tmp_path):
    config = ExportConfig(stage="export", opset=20, dynamic_batch=False, external_data=True)
    progress = RecordingProgress()
    model, record = ExportStage(config).run(torch_model(nets.build("chain")), StageContext(tmp_path, 0, None, progress))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"] == [*record.files]
    assert model.path == tmp_path / "model.onnx"
    assert (model.opset, record.opset) == (20, 20)
    assert model.signature == exported_signature(SIGNATURE, dynamic_batch=False)
    assert model.signature.inputs[0].shape == (1, 3, 16, 16)
    assert read_signature(load_onnx(model.path)) == model.signature
    assert record.size_bytes == file_bytes(model.path)
    assert "2 files" in progress.notes[0]
    assert progress.warnings == []


@pytest.mark.parametrize(
    ("module", "wording", "hint"),
    [
        (
            DependsOnValues(),
            r"torch could not export the network to ONNX \(opset 18\): .*data-dependent",
            "torch.where",
        ),
        (ComplexNumbers(), "torch could not export the network to ONNX", "Fourier transforms outside"),
        (
            DependsOnBatch(),
            r"outputs logits float32 \(batch, 4\), torch wrote logits float32 \(2, 4\): .* fixes the size of batch",
            "dynamic_batch",
        ),
    ],
)
def test_refused_export_is_one_quiet_error_and_keeps_the_old_file(tmp_path, capfd, module, wording, hint):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ExportFailed, match=wording) as caught:
            export_onnx(module, SIGNATURE, path, ExportSettings(opset=18))
    assert hint in caught.value.hint
    assert capfd.readouterr() == ("", "")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert logging.root.manager.disable == level


class Unprintable(nn.Sequential):
    """As the autoencoder of torchxrayvision without trained weights."""

    def __repr__(self):
        return self.weights


class UnprintableInside(nn.Sequential):
    pass


def test_a_network_that_cannot_be_printed_is_exported(tmp_path):
    own = Unprintable.__repr__
    for module in (Unprintable(nn.Flatten()), UnprintableInside(Unprintable(nn.Flatten()))):
        signature = Signature((TensorSpec("input", ("batch", 1, 2, 2)),), (TensorSpec("output", ("batch", 4)),))
        export_onnx(module.eval(), signature, tmp_path / "m.onnx", ExportSettings(opset=18))
        with pytest.raises(AttributeError, match="weights"):
            repr(module)
    assert (Unprintable.__repr__, "__repr__" in vars(UnprintableInside)) == (own, False)


def test_another_opset_than_asked_for_is_refused(tmp_path, monkeypatch):
    model = onnx.load(exported("chain"))
    monkeypatch.setattr(torch_onnx, "run_exporter", lambda *_: model)
    with pytest.raises(ExportFailed, match="must have opset 20, torch wrote opset 18"):
        export_onnx(nets.build("chain"), SIGNATURE, tmp_path / "m.onnx", ExportSettings(opset=20))


def test_external_data_is_forced_for_many_weights_and_removed_when_not_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_onnx, "run_exporter", lambda *_: onnx.load(exported("chain")))
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    (tmp_path / ".m.onnx.abc.tmp" / "exported").mkdir(parents=True)  # as a killed run leaves it
    monkeypatch.setattr(torch_onnx, "ONE_FILE_LIMIT_BYTES", 1000)
    report = export_onnx(nets.build("chain"), SIGNATURE, path, ExportSettings(opset=18))
    assert report.files == ("m.onnx", "m.onnx.data")
    assert report.size_bytes == path.stat().st_size + data.stat().st_size
    assert report.simplified
    monkeypatch.undo()
    monkeypatch.setattr(torch_onnx, "run_exporter", lambda *_: onnx.load(exported("chain")))
    report = export_onnx(nets.build("chain"), SIGNATURE, path, ExportSettings(opset=18))
    assert report.files == ("m.onnx",)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_invalid_graph_is_refused(tmp_path, monkeypatch):
    broken = onnx.load(exported("chain"))
    broken.graph.node[1].op_type = "NoSuchOperator"
    monkeypatch.setattr(torch_onnx, "run_exporter", lambda *_: broken)
    with pytest.raises(ExportFailed, match=r"exported ONNX file is not valid: .*NoSuchOperator"):
        export_onnx(nets.build("chain"), SIGNATURE, tmp_path / "m.onnx", ExportSettings(opset=18))
    assert list(tmp_path.iterdir()) == []


def _with_scaled_weight(model):
    tensor = next(t for t in model.graph.initializer if t.name == "head.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    return model


def _with_renamed_output(model):
    model.graph.node[-1].output[0] = model.graph.output[0].name = "other"
    return model


def _with_unknown_operator(model):
    model.graph.node[0].op_type = "NoSuchOperator"
    return model


@pytest.mark.parametrize(
    ("damage", "wording"),
    [
        (_with_scaled_weight, "output 'logits' of the rewritten graph differs by"),
        (_with_renamed_output, "onnxslim changed the inputs, outputs or opset"),
        (_with_unknown_operator, "the rewritten graph could not be run: .*NoSuchOperator"),
        (lambda _: 1 / 0, "onnxslim failed: division by zero"),
    ],
)
def test_wrong_simplification_is_not_kept(tmp_path, monkeypatch, damage, wording):
    path = tmp_path / "m.onnx"
    path.write_bytes(exported("chain").read_bytes())
    monkeypatch.setattr(onnxslim, "slim", lambda model, **_: damage(model))
    slim, note = simplify_onnx(path, SIGNATURE, external=False)
    assert slim is None
    assert re.search(wording, note)


def test_stage_says_when_the_graph_was_not_simplified(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_onnx, "run_exporter", lambda *_: onnx.load(exported("chain")))
    monkeypatch.setattr(onnxslim, "slim", lambda model, **_: _with_scaled_weight(model))
    progress = RecordingProgress()
    context = StageContext(tmp_path, 0, None, progress)
    model, record = ExportStage(ExportConfig(stage="export")).run(torch_model(nets.build("chain")), context)
    assert record.simplified is False
    assert progress.warnings == [f"The graph was not simplified: {record.simplify_note}."]
    kept, wanted = (
        {tensor.name: tensor.raw_data for tensor in load_onnx(path).graph.initializer}
        for path in (model.path, exported("chain"))
    )
    assert kept == wanted


def test_open_axes_besides_the_batch_are_refused(tmp_path):
    signature = Signature((TensorSpec("image", ("batch", 3, "height", 16)),), SIGNATURE.outputs)
    with pytest.raises(ExportFailed, match="Input 'image' must have fixed sizes after the batch axis"):
        export_onnx(nets.build("chain"), signature, tmp_path / "m.onnx", ExportSettings(opset=18))


def test_exported_signature_opens_or_fixes_only_the_first_axis():
    fixed = exported_signature(SIGNATURE, dynamic_batch=False)
    assert fixed.outputs == (replace(SIGNATURE.outputs[0], shape=(1, 4)),)
    assert exported_signature(fixed, dynamic_batch=True) == SIGNATURE


class _Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(self.conv(x), size=x.shape[2:], mode="bilinear")


def test_axes_of_the_image_stay_open_and_outputs_follow_them(tmp_path: Path) -> None:
    module = _Segmenter().eval()
    signature = Signature((TensorSpec("image", ("batch", 3, 16, 24)),), (TensorSpec("out", ("batch", 4, 16, 24)),))
    path = tmp_path / "model.onnx"
    export_onnx(module, signature, path, ExportSettings(opset=18, open_axes={2: "height", 3: "width"}))
    model = onnx.load(path)
    assert read_signature(model).inputs[0].shape == ("batch", 3, "height", "width")
    assert read_sizes(model) == {"height": 16, "width": 24}
    assert count_onnx(path).macs == 8 * 12 * 4 * 27
    for height, width in ((16, 24), (32, 40), (18, 15)):
        image = torch.randn(2, 3, height, width)
        with OnnxRuntime(path) as runtime:
            (got,) = runtime.run({"image": image.numpy()}).values()
        assert np.allclose(got, module(image).detach().numpy(), atol=1e-5)


def test_an_output_that_follows_must_be_what_was_asked_where_it_is_fixed(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("image", ("batch", 3, 16, 24)),), (TensorSpec("out", ("batch", 5, 16, 24)),))
    with pytest.raises(ExportFailed, match=r"must have the outputs out float32 \(batch, 5, 16, 24\)"):
        export_onnx(
            _Segmenter().eval(),
            signature,
            tmp_path / "m.onnx",
            ExportSettings(opset=18, open_axes={2: "height", 3: "width"}),
        )
