"""Removable blocks are found in any container, others are not, and removal equals skipping."""

from pathlib import Path

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.checkpoint.rebuild import build_module
from compress.errors import UnsupportedLayer
from compress.model.artifacts import FactorySpec
from compress.model.recipe import RemoveBlock
from compress.pruning.blocks import closing_layers, find_removable_blocks
from compress.pruning.ranking.sensitivity import _replaced
from compress.pruning.surgery import remove_block

MODELS = Path(__file__).parents[2] / "models"


class _Projected(nets.ResidualBlock):
    """Of identity shape, with a convolution on the shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.project = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.project(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class _Columns(nets.ResidualBlock):
    """Takes a number by name."""

    def forward(self, x: Tensor, columns: int) -> Tensor:
        return super().forward(x) * columns


class _WithNames(nn.Module):
    """Blocks whose arguments are given by name, as transformers and pytorchcv (FractalNet) do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.plain = nn.Conv2d(3, 8, 3), nets.ResidualBlock(8)
        self.counted, self.by_name = _Columns(8), nets.ResidualBlock(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.by_name(x=self.counted(self.plain(self.stem(x)), columns=1))


def test_blocks_with_arguments_by_name_are_not_removable() -> None:
    assert find_removable_blocks(_WithNames().eval(), nets.EXAMPLE) == ("plain",)


class _Zoo(nn.Module):
    """Residual blocks in every kind of container, and look-alikes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.stage = nn.Sequential(nets.ResidualBlock(8), nn.Sequential(nets.ResidualBlock(8)))
        self.listed = nn.ModuleList([nets.ResidualBlock(8)])
        self.named = nn.ModuleDict({"a": nets.ResidualBlock(8)})
        self.projected = _Projected(8)
        self.plain = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        self.twice = nets.ResidualBlock(8)
        self.unused = nets.ResidualBlock(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projected(self.named["a"](self.listed[0](self.stage(self.stem(x)))))
        return self.head(self.plain(self.twice(self.twice(x))).mean((2, 3)))


@pytest.mark.parametrize("name", nets.NAMES)
def test_only_the_residual_network_has_removable_blocks(name):
    expected = ("body.1", "body.2") if name == "residual" else ()
    assert find_removable_blocks(nets.build(name), nets.EXAMPLE) == expected


def test_blocks_are_found_in_containers_and_look_alikes_are_not():
    module = _Zoo().train()
    assert find_removable_blocks(module, nets.EXAMPLE) == ("stage.0", "stage.1.0", "listed.0", "named.a")
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("name", ["stage.0", "stage.1.0", "listed.0", "named.a"])
def test_removal_gives_the_output_of_skipping(name):
    module = _Zoo().eval()
    with _replaced(module.get_submodule(name), lambda inputs: inputs):
        skipped = module(nets.images())
    slim = remove_block(module, RemoveBlock(name))
    assert torch.equal(slim(nets.images()), skipped)
    assert not torch.equal(module(nets.images()), skipped)
    assert isinstance(slim.get_submodule(name), nn.Identity)
    assert isinstance(module.get_submodule(name), nets.ResidualBlock)
    assert name not in find_removable_blocks(slim, nets.EXAMPLE)


def test_projection_blocks_of_the_shipped_networks_stay():
    mnist = build_module(FactorySpec("factory", f"{MODELS / 'mnist_resnet' / 'model.py'}:build"))
    assert find_removable_blocks(mnist, torch.zeros(1, 1, 28, 28)) == ("blocks.0", "blocks.2", "blocks.4")
    cifar = build_module(FactorySpec("factory", f"{MODELS / 'cifar_resnet' / 'model.py'}:resnet", {"depth": 14}))
    assert find_removable_blocks(cifar, torch.zeros(1, 3, 32, 32)) == ("layer1.0", "layer1.1", "layer2.1", "layer3.1")


@pytest.mark.parametrize("name", ["body.7", "nowhere.conv", "body.1.conv9"])
def test_removal_of_a_block_that_is_not_there_is_refused(name):
    with pytest.raises(UnsupportedLayer, match=f"must have a block '{name}' to remove"):
        remove_block(nets.build("residual"), RemoveBlock(name))


class _Scaled(nets.ResidualBlock):
    """Adds half of what its last norm gives."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + 0.5 * self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class _Bare(nn.Module):
    """A residual block that ends in a convolution without a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(width, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_layers_that_close_a_block_are_those_whose_outputs_are_added_as_they_are():
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nets.ResidualBlock(8), _Bare(8), _Scaled(8), _Projected(8)
    ).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert closing_layers(module, nets.EXAMPLE) == {"2.conv2": "2", "3.inner.2": "3"}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_network_without_residual_blocks_has_no_closing_layer():
    assert closing_layers(nets.build("chain"), nets.EXAMPLE) == {}


def test_a_skipped_block_returns_its_input_even_if_it_changes_it_in_place():
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))
    images = torch.randn(2, 3, 4, 4)
    with _replaced(block, lambda inputs: inputs), torch.no_grad():
        assert torch.equal(block(images.clone()), images)
