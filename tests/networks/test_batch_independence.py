"""Networks and files whose output for an image depends on the other images of its batch are found and named."""

from dataclasses import replace

import nets
import numpy as np
import pytest
import smallrun
import torch
from exported import PREPROCESSING, SIGNATURE, exported
from onnx import TensorProto, helper, save_model
from torch import nn

from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import ModelError
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.networks.batch_independence import require_batch_independence
from compress.verification.batching import BATCH_INDEPENDENT, batch_difference, check_batch, quality_batch
from compress.verification.gates import Gates
from compress.verification.job import VerificationJob
from compress.verification.measurement import Conditions
from compress.verification.runtimes.onnxruntime import OnnxRuntime
from compress.verification.scope import Scope
from compress.verification.verdict import verify_onnx

IMAGES = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32))


class Sharing(nn.Module):
    """Divides by the mean over the batch."""

    def __init__(self, share=True):
        super().__init__()
        self.a, self.f, self.share = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), share

    def forward(self, x):
        x = self.a(x).relu()
        x = x / x.mean() if self.share else x / x.mean((1, 2, 3), keepdim=True)
        return self.f(x.mean((2, 3)))


class OwnStatistics(nn.Module):
    """Has a batch norm that keeps no statistics, before or after the pooling."""

    def __init__(self, is_pooled=False):
        super().__init__()
        self.a, self.f, self.is_pooled = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), is_pooled
        self.n = (
            nn.BatchNorm1d(8, track_running_stats=False) if is_pooled else nn.BatchNorm2d(8, track_running_stats=False)
        )

    def forward(self, x):
        x = self.a(x)
        return self.f(self.n(x.mean((2, 3))) if self.is_pooled else self.n(x).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "wording", "hint"),
    [
        (Sharing(), "first in what layer 'f' reads", "no mean, sum or norm over the first axis"),
        (OwnStatistics(), r"first in layer 'n' \(BatchNorm2d\)", "track_running_stats=True"),
        (OwnStatistics(is_pooled=True), "layer 'n', which refuses one image", "track_running_stats=True"),
    ],
)
def test_networks_that_mix_images_are_refused_by_the_place(network, wording, hint):
    with pytest.raises(ModelError, match=wording) as caught:
        require_batch_independence(network.eval(), IMAGES)
    assert "must not depend on the other images of its batch" in caught.value.message
    assert hint in caught.value.hint


def test_networks_that_do_not_mix_are_let_through_and_left_as_they_were():
    for network in (nets.build("chain"), nets.build("residual"), Sharing(share=False)):
        network.train()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        require_batch_independence(network, IMAGES)
        assert network.training
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_one_image_says_nothing():
    require_batch_independence(Sharing().eval(), IMAGES[:1])


def test_rounding_is_not_taken_for_mixing():
    """A cubed sum that cancels rounds by the size of its batch in float32; in float64 it does not."""

    class Rounding(nn.Module):
        def forward(self, x):
            offset = 3e-4 * len(x) if x.dtype == torch.float32 else 0.0
            return x.mean((2, 3)) + offset

    network = Rounding().eval()
    require_batch_independence(network, IMAGES)


@pytest.mark.parametrize(("size", "is_refused"), [(2e-4, False), (2e-3, True)])
def test_where_float64_cannot_be_asked_more_is_put_down_to_rounding(size, is_refused):
    class Stubborn(nn.Module):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise RuntimeError("float32 only")
            values = torch.ones(len(x), 4)
            return values + size * (len(x) > 1)

    if is_refused:
        with pytest.raises(ModelError, match=r"differs by 0\.002 of the largest value"):
            require_batch_independence(Stubborn().eval(), IMAGES)
    else:
        require_batch_independence(Stubborn().eval(), IMAGES)


def test_load_refuses_such_a_network(tmp_path):
    world = smallrun.make_world(tmp_path)
    (tmp_path / "mixing.py").write_text(
        "import nets, torch\n"
        "def mixing():\n"
        "    network = nets.chain()\n"
        "    network.register_forward_hook(lambda module, args, output: output - output.mean(0))\n"
        "    return network\n"
    )
    values = world.values()
    values["stages"][0]["model"] = {"factory": f"{tmp_path / 'mixing.py'}:mixing"}
    done = world.call("run", values, "--quiet")
    assert done.exit_code == 3, done.stderr
    assert "must not depend on the other images of its batch" in done.stderr


# files


def make_split(count=40):
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (count, 16, 16, 3), np.uint8)
    return Split("evaluation", ArraySource(images, random.integers(0, 4, count), ()), np.arange(count), PREPROCESSING)


@pytest.fixture(scope="module")
def mixing(tmp_path_factory):
    """A file that takes the mean of the batch from the logits."""
    value = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4]),
    ]
    weights = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "weights"], ["own"]),
        helper.make_node("ReduceMean", ["own", "first"], ["shared"], keepdims=1),
        helper.make_node("Sub", ["own", "shared"], ["logits"]),
    ]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
        helper.make_tensor("first", TensorProto.INT64, [1], [0]),
        helper.make_tensor("weights", TensorProto.FLOAT, [3, 4], weights.ravel()),
    ]
    graph = helper.make_graph(nodes, "mixing", value[:1], value[1:], constants)
    path = tmp_path_factory.mktemp("mixing") / "mixing.onnx"
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_a_file_that_mixes_images_is_measured_as_it_is_deployed(mixing):
    split = make_split()
    with OnnxRuntime(mixing) as session:
        assert batch_difference(session, split) > 0.1
        assert quality_batch(session, mixing, split, Conditions(batch_size=1)) == 1
        assert quality_batch(session, mixing, split, Conditions(batch_size=8)) == 8
        alone = check_batch(session, mixing, split, Conditions(batch_size=1))
        several = check_batch(session, mixing, split, Conditions(batch_size=8))
    assert (alone.status, several.status) == ("pass", "fail")
    assert "quality is measured on one at a time" in alone.detail
    assert several.value > several.limit == 1e-3


def test_a_file_that_does_not_mix_is_measured_in_large_batches():
    split, path = make_split(), exported("chain")
    with OnnxRuntime(path) as session:
        assert batch_difference(session, split) < 1e-5
        assert quality_batch(session, path, split, Conditions()) == 256
        assert check_batch(session, path, split, Conditions(batch_size=8)).status == "pass"
        assert check_batch(session, path, make_split(1), Conditions()).status == "skipped"


def test_a_file_with_a_fixed_batch_is_compared_with_copies_of_one_image(tmp_path, mixing):
    import onnx

    model = onnx.load(mixing)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    path = tmp_path / "fixed.onnx"
    onnx.save(model, path)
    with OnnxRuntime(path) as session:
        assert batch_difference(session, make_split()) > 0.1
    single = replace(SIGNATURE, inputs=(replace(SIGNATURE.inputs[0], shape=(1, 3, 16, 16)),))
    export_onnx(nets.build("chain"), single, tmp_path / "one.onnx", ExportSettings(opset=18, dynamic_batch=False))
    with OnnxRuntime(tmp_path / "one.onnx") as session:
        assert batch_difference(session, make_split()) is None


def test_the_verdict_has_the_quality_of_the_deployed_batch_size(mixing):
    """One image alone minus the mean of itself: all classes tie, the first one is chosen."""
    split = make_split()
    verdict = verify_onnx(
        VerificationJob(
            mixing,
            evaluation=split,
            conditions=Conditions(warmup=1, repeats=5),
            gates=Gates(),
            scope=Scope(batch_sizes=()),
            baseline_onnx=mixing,
        )
    )
    assert verdict.slim.quality["top1"] == np.mean(split.labels == 0)
    assert verdict.baseline.quality["top1"] == np.mean(split.labels == 0)
    (check,) = [check for check in verdict.checks if check.name == BATCH_INDEPENDENT]
    assert check.status == "pass"
