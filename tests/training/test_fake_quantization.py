"""Quantisation-aware training: rounding as in the INT8 file, straight-through gradients, and the last steps only."""

from dataclasses import replace

import nets
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from exported import SIGNATURE
from fixtures import make_context, make_saved_model, make_splits
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from compress.config.schema.pipeline import QuantizeConfig
from compress.config.schema.training import FinetuneConfig
from compress.data.splits import Split
from compress.errors import ConfigValueError
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.quantization.onnx_int8 import Quantization, quantize_onnx
from compress.stages.finetune import FinetuneStage
from compress.training.fake_quantization import FakeQuantization, Int8Rounding, round_tensor
from compress.training.loop import fit
from compress.training.settings import FitSettings, TrainingData


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("data"), 64)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), st.booleans(), st.sampled_from([2, 4, 7, 8]))
def test_values_are_rounded_to_the_nearest_level(values, is_signed, bits):
    given = torch.tensor(values)
    found = round_tensor(given, bits, is_signed=is_signed)
    low, high = min(0.0, *values), max(0.0, *values)
    levels = 2**bits - (2 if is_signed else 1)
    step = (2 * max(-low, high) if is_signed else high - low) / levels
    assert len(found.unique()) <= levels + 1
    # a zero point is a whole number, which moves an end of the range by up to half a step
    assert (found - given).abs().max() <= step * (0.5 if is_signed else 1.0) + 1e-4
    assert round_tensor(torch.cat([given, torch.zeros(1)]), bits, is_signed=is_signed)[-1] == 0


def test_each_output_channel_has_its_own_range():
    weight = torch.tensor([[1.0, 0.30], [100.0, 30.0]])
    whole = round_tensor(weight, 8, is_signed=True)
    apart = round_tensor(weight, 8, is_signed=True, axis=0)
    assert (apart[0] - weight[0]).abs().max() < 0.005
    assert (whole[0] - weight[0]).abs().max() > 0.1


def test_gradients_pass_through():
    values = torch.tensor([0.1, 0.5, 1.0], requires_grad=True)
    round_tensor(values, 8, is_signed=False).sum().backward()
    assert values.grad.tolist() == [1, 1, 1]


class _Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 2)
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(self.up(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("name", ["conv", "up", "linear"])
def test_layers_compute_with_rounded_weights_and_inputs(name):
    torch.manual_seed(0)
    layer, rounding = getattr(_Layers(), name), Int8Rounding()
    images = torch.rand(2, 4 if name == "up" else 3, *(() if name == "linear" else (5, 5)))
    function, axis = {"conv": (F.conv2d, 0), "up": (F.conv_transpose2d, 1), "linear": (F.linear, 0)}[name]
    expected = function(
        round_tensor(images, 8, is_signed=False), round_tensor(layer.weight, 8, is_signed=True, axis=axis), layer.bias
    )
    with FakeQuantization(rounding):
        found = layer(images)
    assert torch.equal(found, expected)
    whole = layer(images)
    assert not torch.equal(found, whole)
    with FakeQuantization(rounding, {id(layer.weight)}):
        assert torch.equal(layer(images), whole)


def test_excluded_layers_stay_float():
    module = _Layers()
    floats = Int8Rounding(exclude=("lin*",)).floats(module)
    assert floats == {id(module.linear.weight)}
    part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert Int8Rounding(exclude=("part*",)).floats(nn.ModuleDict({"part": part})) == {id(part[0].weight)}


def test_weights_are_rounded_as_in_the_file(data, tmp_path):
    module = nets.build("chain")
    export_onnx(module, SIGNATURE, tmp_path / "float.onnx", ExportSettings(opset=18), preprocessing=data.preprocessing)
    quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", data.calibration, Quantization(images=32))
    graph = onnx.load(tmp_path / "int8.onnx").graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    floats = {one.name: numpy_helper.to_array(one) for one in onnx.load(tmp_path / "float.onnx").graph.initializer}
    compared = 0
    for node in graph.node:
        name = node.input[0].removesuffix("_quantized")
        if node.op_type != "DequantizeLinear" or name not in floats or floats[name].ndim < 2:
            continue
        whole, scale = constants[node.input[0]].astype(np.float64), constants[node.input[1]].astype(np.float64)
        in_file = whole * scale.reshape(-1, *[1] * (whole.ndim - 1))
        ours = round_tensor(torch.from_numpy(floats[name].copy()), 8, is_signed=True, axis=0).numpy()
        np.testing.assert_allclose(ours, in_file, atol=1e-5 * np.abs(in_file).max())
        compared += 1
    assert compared >= 3


def _train(data, module, **changes):
    train = Split("train", data.train.source, np.resize(data.train.indices, 64), data.preprocessing)
    wanted = FitSettings(steps=4, batch_size=16, keep="last", learning_rate=0.01, device="cpu", **changes)
    return fit(module, TrainingData(train, data.validation), wanted)


def test_only_the_last_steps_are_rounded(data, monkeypatch):
    rounded = []
    original = FakeQuantization.__enter__

    def entered(self):
        rounded.append(self)
        return original(self)

    monkeypatch.setattr(FakeQuantization, "__enter__", entered)
    _train(data, nets.build("chain"), rounding=Int8Rounding(), rounded_ratio=0.5)
    assert len(rounded) == 2 + 1, "two of four steps, and the validation after them"
    rounded.clear()
    _train(data, nets.build("chain"))
    assert rounded == []


def test_training_for_the_rounding_lowers_the_error_of_the_rounded_network(data):
    torch.manual_seed(1)
    start = nets.build("chain")
    with torch.no_grad():  # one large weight a layer leaves few levels for the others
        for part in start.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.view(len(part.weight), -1)[:, 0] *= 30
    rounding = Int8Rounding(per_channel=False)
    images, labels = torch.rand(64, 3, 16, 16), torch.arange(64) % 4

    def loss(module, is_rounded):
        module.train()
        context = FakeQuantization(rounding) if is_rounded else torch.enable_grad()
        with context:
            return F.cross_entropy(module(images), labels)

    results = []
    for is_rounded in (True, False):
        module = nets.build("chain")
        module.load_state_dict(start.state_dict())
        optimizer = torch.optim.SGD(module.parameters(), 0.02, momentum=0.9)
        for _ in range(60):
            optimizer.zero_grad()
            loss(module, is_rounded).backward()
            optimizer.step()
        results.append(loss(module, True).item())
    assert results[0] < results[1]


def test_the_stage_takes_the_rounding_of_the_pipeline(data, tmp_path):
    model = make_saved_model("chain", tmp_path)
    config = FinetuneConfig(
        stage="finetune", steps=4, batch_size=32, learning_rate=0.001, device="cpu", quantization_aware=1.0
    )
    ctx, _ = make_context(tmp_path / "without", data)
    with pytest.raises(ConfigValueError, match="quantization_aware needs a quantize stage"):
        FinetuneStage(config).run(model, ctx)
    seen = []
    quantize = QuantizeConfig(stage="quantize", per_channel=False, exclude=("head",))
    ctx, _ = make_context(tmp_path / "with", data, quantize)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "compress.training.loop.FakeQuantization",
            lambda rounding, floats: seen.append((rounding, len(floats))) or FakeQuantization(rounding, floats),
        )
        trained, record = FinetuneStage(config).run(model, ctx)
    assert seen[0] == (replace(Int8Rounding(), per_channel=False, exclude=("head",)), 1)
    assert record.chosen_epoch == len(record.epochs)
    pairs = zip(trained.module.parameters(), model.module.parameters(), strict=True)
    assert not any(torch.equal(after, before) for after, before in pairs if after.ndim > 1)
