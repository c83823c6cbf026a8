"""Zero-padded shortcuts become convolutions with fixed weights, bit by bit the same, and are cut through."""

import copy
from pathlib import Path

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.checkpoint.rebuild import build_module
from compress.cost.macs import count_macs, count_params
from compress.model.artifacts import FactorySpec
from compress.pruning.shortcuts import FixedShortcut, write_out_shortcuts
from compress.pruning.surgery import cut_copy
from compress.pruning.trial import difference, find_cuttable, masked_copy

CIFAR = Path(__file__).parents[2] / "models" / "cifar_resnet" / "model.py"


class _Lambda(nn.Module):
    """A function as a module, as many published CIFAR ResNets have it."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Net(nn.Module):
    """A stem, a block with a shortcut, and a head: (N, 3, 16, 16) -> (N, 4)."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Linear(12, 4)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.conv(x) + self.shortcut(x)).mean((2, 3)))


class _ByShape(nn.Module):
    """Padding whose amount depends on what comes in: not to be followed without running it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        missing = 4 if x.shape[0] > 0 else 0
        return F.pad(x[:, :, ::2, ::2] * self.scale, (0, 0, 0, 0, 0, missing))


def _cifar(depth: int = 8) -> nn.Module:
    return build_module(FactorySpec("factory", f"{CIFAR}:resnet", {"depth": depth}))


def _written(module: nn.Module, example: Tensor) -> nn.Module:
    changed = copy.deepcopy(module)
    write_out_shortcuts(changed, example)
    return changed


def _hold(module: nn.Module, images: Tensor) -> None:
    groups, _ = find_cuttable(module, images[:1])
    removed = {name: tuple(range(0, group.width, 2)) for name, group in groups.items()}
    slim = cut_copy(module, removed, images[:1])
    with torch.no_grad():
        assert difference(slim(images), masked_copy(module, removed, groups)(images)) is None


def test_residual_streams_of_a_cifar_resnet_are_groups_of_their_own():
    module, images = _cifar(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    written = _written(module, images[:1])
    assert torch.equal(written(images), module(images))
    assert [name for name, part in written.named_modules() if isinstance(part, FixedShortcut)] == [
        "layer2.0.fixed_shortcut",
        "layer3.0.fixed_shortcut",
    ]
    assert set(module.state_dict()) < set(written.state_dict())
    assert (count_params(written), count_macs(written, images[:1])) == (
        count_params(module),
        count_macs(module, images[:1]),
    )
    groups, excluded = find_cuttable(written, images[:1])
    streams = {name: group.width for name, group in groups.items() if len(group.producers) > 1}
    assert streams == {"conv1": 16}  # one block each: the other streams have one producer and the shortcut
    assert {"layer2.0.conv2", "layer3.0.conv2"} < set(groups)
    assert all(item.expected for item in excluded)
    _hold(written, images)


def test_the_fixed_convolution_follows_a_cut_on_either_side():
    module, images = _cifar(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    written = _written(module, images[:1])
    slim = cut_copy(written, {"conv1": (0, 1, 2), "layer2.0.conv2": (0, 31)}, images[:1])
    shortcut = slim.get_submodule("layer2.0.fixed_shortcut")
    assert (shortcut.in_channels, shortcut.out_channels) == (13, 30)
    assert slim.get_submodule("layer3.0.fixed_shortcut").in_channels == 30


def test_a_module_that_only_pads_is_replaced():
    net = _Net(_Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 3)))).eval()
    written = _written(net, nets.EXAMPLE)
    assert isinstance(written.shortcut, FixedShortcut)
    assert (written.shortcut.in_channels, written.shortcut.out_channels, written.shortcut.strides) == (8, 12, (2, 2))
    assert torch.equal(written(nets.images()), net(nets.images()))
    _hold(written, nets.images())


@pytest.mark.parametrize(
    "shortcut",
    [
        lambda x: F.pad(x[:, :, 1::2, ::2], (0, 0, 0, 0, 1, 3)),  # other rows than a convolution would take
        lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 3)) * 2 if x.shape[0] else x,
        lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 3), value=1.0),
    ],
)
def test_what_is_no_zero_padded_shortcut_is_left_as_it_is(shortcut):
    net = _Net(_Lambda(shortcut)).eval()
    assert not any(isinstance(part, FixedShortcut) for part in _written(net, nets.EXAMPLE).modules())


def test_code_that_cannot_be_rewritten_is_cut_where_the_padding_allows():
    net = _Net(_ByShape()).eval()
    written = _written(net, nets.EXAMPLE)
    assert not any(isinstance(part, FixedShortcut) for part in written.modules())
    groups, excluded = find_cuttable(written, nets.EXAMPLE)
    assert (list(groups), groups["stem"].width) == (["stem"], 8)
    assert "it meets channels padded with zeros" in {item.name: item.reason for item in excluded}["conv"]
    _hold(written, nets.images())


class _Activated(nn.Module):
    """A block whose shortcut starts behind its own activation, as in pre-activation ResNets."""

    def __init__(self, drops: bool = False) -> None:
        super().__init__()
        self.norm, self.conv, self.drops = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, 2, 1), drops

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(x))
        inner = F.dropout(x, 0.5, self.training) if self.drops else x
        return self.conv(inner) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


def test_silent_channels_make_no_other_structure():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), _Activated()).eval()
    nn.init.constant_(net[1].norm.bias[:3], -100)
    written = _written(net, nets.EXAMPLE)
    assert [part.out_channels for part in written.modules() if isinstance(part, FixedShortcut)] == [12]
    assert torch.equal(written(nets.images()), net(nets.images()))


def test_a_forward_pass_that_is_another_in_training_is_left_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), _Activated(drops=True)).eval()
    written = _written(net, nets.EXAMPLE)
    assert isinstance(written[1], _Activated)
    assert not any(part.training for part in written.modules())
    written.train()
    assert not torch.equal(written(nets.images()), written(nets.images()))


def test_a_network_without_padding_has_nothing_to_write_out():
    assert write_out_shortcuts(nets.build("residual"), nets.EXAMPLE) == 0
    assert write_out_shortcuts(_cifar(), torch.zeros(1, 3, 32, 32)) == 2
