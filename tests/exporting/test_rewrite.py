"""Zero-padded shortcuts become convolutions that compute the same; what only looks like one is left alone."""

from dataclasses import replace

import nets
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import SIGNATURE, exported
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import compress.exporting.rewrite as rewrite
import compress.search.export as exporting
from compress.config.schema.verify import DeployConfig
from compress.cost.macs import count_macs, count_params
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import ConfigValueError, InternalError
from compress.exporting.rewrite import guard_padded_pools
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.artifacts import Signature, TensorSpec
from compress.onnx_file.counting import count_onnx
from compress.onnx_file.io import load_onnx
from compress.progress import SilentProgress
from compress.search.context import StageContext
from compress.verification.runtimes.onnxruntime import OnnxRuntime


class _ZeroPadded(nn.Module):
    """Two blocks with parameter-free shortcuts, one that halves the image and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.flat, self.head = nn.Conv2d(16, 20, 3, 1, 1), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.down(x) + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        x = torch.relu(self.flat(x) + nn.functional.pad(x, (0, 0, 0, 0, 0, 4)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return _ZeroPadded().eval()


def _operators(path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_shortcuts_become_convolutions_that_compute_the_same(network, tmp_path):
    plain, rewritten = tmp_path / "plain.onnx", tmp_path / "rewritten.onnx"
    assert export_onnx(network, SIGNATURE, plain, ExportSettings(opset=18)).rewrites == {}
    report = export_onnx(network, SIGNATURE, rewritten, ExportSettings(opset=18, rewrites=("padded_shortcuts",)))
    assert report.rewrites == {"padded_shortcuts": 2}
    assert {"Slice", "Pad"} <= set(_operators(plain))
    assert not {"Slice", "Pad"} & set(_operators(rewritten))
    assert _operators(rewritten).count("Conv") == _operators(plain).count("Conv") + 2
    images = nets.images().numpy()
    first, second = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": images})[0]
        for path in (plain, rewritten)
    )
    assert np.abs(first - second).max() < 1e-6


def test_fixed_weights_are_no_part_of_macs_and_params(network, tmp_path):
    path = tmp_path / "rewritten.onnx"
    export_onnx(network, SIGNATURE, path, ExportSettings(opset=18, rewrites=("padded_shortcuts",)))
    counts = count_onnx(path)
    assert (counts.macs, counts.params) == (count_macs(network, nets.EXAMPLE), count_params(network))


@pytest.mark.parametrize("name", ["residual", "concat"])
def test_networks_without_such_shortcuts_are_left_as_they_are(name):
    model = onnx.load(exported(name))
    before = model.SerializeToString()
    assert rewrite.apply_rewrites(model, rewrite.REWRITES) == {"padded_shortcuts": 0}
    assert model.SerializeToString() == before


def _padding(pads: list[int], starts=(0, 0), steps=(2, 2), axes=(2, 3), value: float = 0.0, mode: str = "constant"):
    """A model of one Slice and one Pad."""
    far = 2**63 - 1
    constants = {
        "starts": np.array(starts),
        "ends": np.full(len(axes), far),
        "axes": np.array(axes),
        "steps": np.array(steps),
        "pads": np.array(pads),
        "value": np.array(value, np.float32),
    }
    nodes = [
        helper.make_node("Slice", ["x", "starts", "ends", "axes", "steps"], ["sliced"]),
        helper.make_node("Pad", ["sliced", "pads", "value"], ["y"], mode=mode),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in
              (("x", [1, 4, 8, 8]), ("y", [None] * 4))]  # fmt: skip
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "padding", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": images})[0]


CHANNELS = [0, 1, 0, 0, 0, 3, 0, 0]


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({}, 1),
        ({"axes": (-2, -1)}, 1),
        ({"steps": (1, 3)}, 1),
        ({"pads": [0, 0, 0, 0, 0, 4, 0, 0]}, 1),
        ({"pads": [0, 1, 1, 0, 0, 3, 0, 0]}, 0),
        ({"pads": [0, -1, 0, 0, 0, 3, 0, 0]}, 0),
        ({"pads": [0] * 8}, 0),
        ({"value": 1.0}, 0),
        ({"mode": "edge"}, 0),
        ({"starts": (1, 0)}, 0),
        ({"axes": (1, 3)}, 0),
    ],
)
def test_only_what_slices_space_and_pads_channels_with_zeros_is_rewritten(changes, places):
    model = _padding(**{"pads": CHANNELS, **changes})
    images = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    before = _run(model, images)
    assert rewrite.rewrite_padded_shortcuts(model) == places
    assert [node.op_type for node in model.graph.node] == (["Conv"] if places else ["Slice", "Pad"])
    onnx.checker.check_model(model, full_check=True)
    assert np.array_equal(_run(model, images), before)


def test_a_slice_that_others_read_stays():
    model = _padding(CHANNELS)
    model.graph.output.append(helper.make_tensor_value_info("sliced", TensorProto.FLOAT, [None] * 4))
    assert rewrite.rewrite_padded_shortcuts(model) == 1
    assert sorted(node.op_type for node in model.graph.node) == ["Conv", "Slice"]
    onnx.checker.check_model(model, full_check=True)


def test_a_rewrite_that_changes_the_network_is_never_written(network, tmp_path, monkeypatch):
    def wrong(model: onnx.ModelProto) -> int:
        weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
        return 1

    monkeypatch.setattr(rewrite, "REWRITES", {"wrong": wrong})
    path = tmp_path / "model.onnx"
    with pytest.raises(InternalError, match="Rewriting wrong changed the network"):
        export_onnx(network, SIGNATURE, path, ExportSettings(opset=18, rewrites=("wrong",)))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ctx(tmp_path):
    images = np.zeros((8, 16, 16, 3), np.uint8)
    split = Split("calibration", ArraySource(images, np.arange(8) % 4), np.arange(8), Preprocessing())
    return StageContext(tmp_path, 0, type("Data", (), {"calibration": split}), SilentProgress())  # type: ignore[arg-type]


@pytest.mark.parametrize(("ratio", "is_kept"), [(0.9, True), (0.99, False), (1.1, False)])
def test_a_rewrite_is_kept_where_it_measures_faster(network, tmp_path, ctx, monkeypatch, ratio, is_kept):
    path = tmp_path / "baseline.onnx"
    export_onnx(network, SIGNATURE, path, ExportSettings(opset=18))
    timed = []

    def measure(rewritten, reference, *_others):
        timed.append((_operators(rewritten).count("Conv"), _operators(reference).count("Conv")))
        return ratio

    monkeypatch.setattr(exporting, "measure_ratio", measure)
    (record,) = exporting.try_rewrites(path, SIGNATURE, "measured", ctx)
    expected = {"rewrite": "padded_shortcuts", "places": 2, "speedup": pytest.approx(1 / ratio), "is_kept": is_kept}
    assert record.to_dict() == expected
    assert timed == [(5, 3)]
    assert [file.name for file in tmp_path.iterdir()] == ["baseline.onnx"], "what was timed is cleared away"


def test_policies_that_do_not_measure(network, tmp_path, ctx, monkeypatch):
    path = tmp_path / "baseline.onnx"
    export_onnx(network, SIGNATURE, path, ExportSettings(opset=18))
    monkeypatch.setattr(exporting, "measure_ratio", None)
    (record,) = exporting.try_rewrites(path, SIGNATURE, "always", ctx)
    assert (record.is_kept, record.speedup) == (True, None)
    assert exporting.try_rewrites(path, SIGNATURE, "never", ctx) == []


def test_real_calls_give_a_ratio(network, tmp_path, ctx):
    path = tmp_path / "baseline.onnx"
    export_onnx(network, SIGNATURE, path, ExportSettings(opset=18))
    (record,) = exporting.try_rewrites(path, SIGNATURE, "measured", ctx)
    assert 0.01 < record.speedup < 100
    assert record.is_kept == (record.speedup > exporting.WORTH_IT)


def test_nothing_is_measured_for_another_machine(network, tmp_path, ctx):
    path = tmp_path / "baseline.onnx"
    export_onnx(network, SIGNATURE, path, ExportSettings(opset=18))
    foreign = replace(ctx, deploy=DeployConfig(table="device.json", accept_foreign_table=True))
    with pytest.raises(ConfigValueError, match="rewrites must be always or never with a table of another machine"):
        exporting.try_rewrites(path, SIGNATURE, "measured", foreign)
    assert exporting.try_rewrites(path, SIGNATURE, "always", foreign)[0].is_kept


class _PaddedPool(nn.Module):
    """Zeros around a map of negative values, then the largest under each kernel: zero along the border."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        nn.init.constant_(self.conv.bias, -10.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.max_pool2d(torch.nn.functional.pad(self.conv(x), (1, 1, 1, 1)), 3, 2).flatten(1)


@pytest.mark.parametrize("simplify", [True, False])
def test_zeros_padded_before_a_max_pool_stay_zeros_in_the_runtime(tmp_path, simplify):
    module, images = _PaddedPool().eval(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = module(images).detach()
    assert expected.max() == 0
    signature = Signature(
        (TensorSpec("images", ("batch", 3, 8, 8)),), (TensorSpec("logits", ("batch", *expected.shape[1:])),)
    )
    path = tmp_path / "pool.onnx"
    export_onnx(module, signature, path, ExportSettings(opset=18, simplify=simplify))
    with OnnxRuntime(path) as runtime:
        got = runtime.run({"images": images.numpy()})["logits"]
    assert np.allclose(got, expected.numpy(), atol=1e-5)
    model = load_onnx(path, weights=True)
    assert guard_padded_pools(model) == 0, "it is done once"
