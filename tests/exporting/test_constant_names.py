"""Constants of an exported file bear the names of the network's own tensors, and each layer has its own."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from compress.cost.macs import count_params
from compress.cost.variants import VariantWriter
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.artifacts import Signature, TensorSpec
from compress.onnx_file.counting import count_onnx, rows_of
from compress.onnx_file.io import load_onnx
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import build_cost, layer_axes

EXAMPLE = torch.zeros(1, 3, 8, 8)
SIGNATURE = Signature((TensorSpec("x", ("batch", 3, 8, 8)),), (TensorSpec("y", ("batch", 4)),))


class _Branches(nn.Module):
    """Three branches concatenated, normalised before they are read, as in a DenseNet."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.left, self.right, self.small = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(3, 16, 1), nn.Conv2d(3, 8, 1)
        self.norm, self.join = nn.BatchNorm2d(32), nn.Conv2d(32, 24, 1)
        self.again, self.last = nn.BatchNorm2d(24), nn.Conv2d(24, 32, 1)
        self.fresh, self.head = nn.BatchNorm2d(32), nn.Linear(32, 4)
        for name in names:  # the same modules under a second name
            self.add_module(f"also_{name}", getattr(self, name))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(torch.cat([self.left(x), self.right(x), self.small(x)], 1)))
        x = torch.relu(self.again(torch.relu(self.join(x))))
        return self.head(torch.relu(self.fresh(torch.relu(self.last(x)))).mean((2, 3)))


def _network(names: tuple[str, ...] = (), is_trained: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = _Branches(names)
        if is_trained:
            for norm in (module.norm, module.again, module.fresh):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module.eval()


def _exported(module: nn.Module, folder, simplify: bool = True):
    path = folder / "network.onnx"
    export_onnx(module, SIGNATURE, path, ExportSettings(opset=18, simplify=simplify))
    return path


TWICE = ("left", "norm", "join", "head")


@pytest.mark.parametrize("simplify", [True, False])
def test_a_layer_registered_twice_is_named_by_its_first_path(tmp_path, simplify):
    model = load_onnx(_exported(_network(TWICE), tmp_path, simplify), weights=True)
    names = {tensor.name for tensor in model.graph.initializer}
    assert {"left.weight", "norm.weight", "norm.running_var", "join.weight", "head.bias"} <= names
    assert not [name for name in names if name.startswith("also_")]


@pytest.mark.parametrize("simplify", [True, False])
def test_constants_that_are_equal_by_chance_stay_with_their_layers(tmp_path, simplify):
    module = _network(is_trained=False)
    model = load_onnx(_exported(module, tmp_path, simplify), weights=True)
    norms = [list(node.input[1:]) for node in model.graph.node if node.op_type == "BatchNormalization"]
    leaves = ("weight", "bias", "running_mean", "running_var")
    assert norms == [[f"{layer}.{leaf}" for leaf in leaves] for layer in ("norm", "again", "fresh")]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    state = module.state_dict()
    assert all(np.array_equal(constants[name], state[name]) for names in norms for name in names)
    assert count_onnx(tmp_path / "network.onnx").params == count_params(module)


@pytest.mark.parametrize("names", [(), TWICE], ids=["once", "twice"])
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "fresh"])
def test_a_concat_network_can_be_narrowed_in_its_file(tmp_path, names, is_trained):
    module = _network(names, is_trained)
    groups, _ = find_cuttable(module, EXAMPLE)
    axes, cost = layer_axes(module, groups), build_cost(module, EXAMPLE, groups, "macs")
    writer = VariantWriter(load_onnx(_exported(module, tmp_path), weights=True))
    widths = {name: group.width // 2 for name, group in groups.items()}
    variant = writer.write(axes.sizes(widths), axes.sizes({}))
    assert len(groups) == 5
    assert sum(row.macs for row in rows_of(variant)) == cost.at(widths) < cost.full
    session = onnxruntime.InferenceSession(variant.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.zeros((2, 3, 8, 8), np.float32)})[0].shape == (2, 4)


def test_weights_that_two_layers_share_stay_one_constant(tmp_path):
    module = _network()
    module.last = nn.Conv2d(24, 32, 1, bias=False)
    module.extra = nn.Conv2d(24, 32, 1, bias=False)
    module.extra.weight = module.last.weight

    def forward(x: Tensor) -> Tensor:
        x = torch.relu(module.join(torch.cat([module.left(x), module.right(x), module.small(x)], 1)))
        return module.head((module.last(x) + module.extra(torch.relu(-x))).mean((2, 3)))

    module.forward = forward
    model = load_onnx(_exported(module.eval(), tmp_path), weights=True)
    read = [name for node in model.graph.node for name in node.input if name in ("last.weight", "extra.weight")]
    assert read == ["last.weight", "last.weight"]
