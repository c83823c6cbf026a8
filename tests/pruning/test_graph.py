"""Channel groups are the right ones, what cannot be cut is excluded by name, and a cut equals silencing."""

import copy
from pathlib import Path

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.checkpoint.rebuild import build_module
from compress.cost.macs import count_params
from compress.errors import UnsupportedLayer, UntraceableModel
from compress.model.artifacts import FactorySpec
from compress.model.recipe import RemoveChannels
from compress.pruning.surgery import cut_copy, remove_channels
from compress.pruning.trial import find_cuttable, masked_copy

CIFAR = Path(__file__).parents[2] / "models" / "cifar_resnet" / "model.py"

# net -> group -> (width, parts, producers, gates, readers)
EXPECTED = {
    "chain": {
        "body.0.0": (8, 1, ["body.0.0"], ["body.0.1"], ["body.1.0"]),
        "body.1.0": (16, 1, ["body.1.0"], ["body.1.1"], ["body.2.0"]),
        "body.2.0": (16, 1, ["body.2.0"], ["body.2.1"], ["head"]),
    },
    "residual": {
        "body.0.0": (
            16,
            1,
            ["body.0.0", "body.1.conv2", "body.2.conv2"],
            ["body.0.1", "body.1.bn2", "body.2.bn2"],
            ["body.1.conv1", "body.2.conv1", "head"],
        ),
        "body.1.conv1": (16, 1, ["body.1.conv1"], ["body.1.bn1"], ["body.1.conv2"]),
        "body.2.conv1": (16, 1, ["body.2.conv1"], ["body.2.bn1"], ["body.2.conv2"]),
    },
    "depthwise": {
        "body.0.0": (16, 1, ["body.0.0"], ["body.0.1"], ["body.2.0"]),
        "body.2.0": (16, 1, ["body.2.0"], ["body.2.1"], ["head"]),
    },
    "grouped": {
        "body.0.0": (16, 4, ["body.0.0"], ["body.0.1"], ["body.1.0"]),
        "body.1.0": (16, 4, ["body.1.0"], ["body.1.1"], ["body.2.0"]),
        "body.2.0": (16, 1, ["body.2.0"], ["body.2.1"], ["head"]),
    },
    "concat": {
        "body.left.0": (8, 1, ["body.left.0"], ["body.left.1"], ["body.join.0"]),
        "body.right.0": (8, 1, ["body.right.0"], ["body.right.1"], ["body.join.0"]),
        "body.join.0": (16, 1, ["body.join.0"], ["body.join.1"], ["head"]),
    },
    "linear_head": {
        "features.0.0": (8, 1, ["features.0.0"], ["features.0.1"], ["fc1"]),
        "fc1": (24, 1, ["fc1"], ["fc1"], ["fc2"]),
    },
}


def _half(groups, seed=0):
    """Return the removal of a random half of the units of every group."""
    generator = torch.Generator().manual_seed(seed)
    removed = {}
    for name, group in groups.items():
        units = group.width // group.parts
        removed[name] = group.expand(torch.randperm(units, generator=generator)[: max(1, units // 2)].tolist())
    return removed


def _hold_cut_equals_silencing(module: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    groups, _ = find_cuttable(module, images[:1])
    assert groups
    removed = _half(groups, seed)
    slim = cut_copy(module, removed, images[:1])
    with torch.no_grad():
        expected = masked_copy(module, removed, groups)(images)
        assert torch.allclose(slim(images), expected, atol=1e-5)
        assert not torch.allclose(module(images), expected, atol=1e-3)
    assert count_params(slim) < count_params(module)
    return slim


@pytest.mark.parametrize("name", nets.NAMES)
def test_groups_of_the_tiny_networks(name):
    groups, excluded = find_cuttable(nets.build(name), nets.EXAMPLE)
    found = {
        group.name: (
            group.width,
            group.parts,
            sorted(member.layer for member in group.producers),
            sorted(member.layer for member in group.gates),
            sorted(member.layer for member in group.readers),
        )
        for group in groups.values()
    }
    assert found == EXPECTED[name]
    assert list(groups) == list(found)
    (output,) = excluded
    assert output.name == {"linear_head": "fc2"}.get(name, "head")
    assert output.expected
    assert output.reason == "its channels are the network's outputs"


def test_flattened_channel_is_many_columns_of_the_reader():
    groups, _ = find_cuttable(nets.build("linear_head"), nets.EXAMPLE)
    (reader,) = groups["features.0.0"].readers
    assert (reader.layer, len(reader.slots)) == ("fc1", 8 * 16)
    assert reader.slots[reader.channels == 2].tolist() == list(range(32, 48))


def test_concatenated_groups_read_disjoint_columns():
    groups, _ = find_cuttable(nets.build("concat"), nets.EXAMPLE)
    (left,), (right,) = groups["body.left.0"].readers, groups["body.right.0"].readers
    assert left.slots.tolist() == list(range(8))
    assert right.slots.tolist() == list(range(8, 16))


def test_expand_takes_the_same_position_of_every_part():
    groups, _ = find_cuttable(nets.build("grouped"), nets.EXAMPLE)
    assert groups["body.0.0"].expand([1, 3]) == (1, 3, 5, 7, 9, 11, 13, 15)
    assert groups["body.2.0"].expand([3, 1]) == (1, 3)


@pytest.mark.parametrize("name", nets.NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_cut_equals_the_silenced_original(name, seed):
    _hold_cut_equals_silencing(nets.build(name), nets.images(), seed)


@pytest.mark.parametrize(("depth", "inner"), [(8, 3), (20, 9)])
def test_zero_padded_shortcuts_are_cut_through(depth, inner):
    module = build_module(FactorySpec("factory", f"{CIFAR}:resnet", {"depth": depth}))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    groups, excluded = find_cuttable(module, images[:1])
    blocks = range((depth - 2) // 6)
    inside = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in blocks]
    assert list(groups) == ["conv1", *inside]
    assert len(groups) == inner + 1
    stream = groups["conv1"]
    assert (stream.width, stream.parts) == (16, 1)
    slots = {member.layer: member.slots.tolist() for member in stream.producers}
    assert slots["layer2.0.conv2"] == list(range(8, 24))
    assert slots["layer3.0.conv2"] == list(range(24, 40))
    unexpected = {item.name: item.reason for item in excluded if not item.expected}
    assert list(unexpected) == ["layer2.0.conv2", "layer3.0.conv2"]
    assert all("it meets channels padded with zeros" in reason for reason in unexpected.values())
    removed = _half(groups)
    slim = cut_copy(module, removed, images[:1])
    assert slim.linear.in_features == 64 - 8
    assert torch.allclose(slim(images), masked_copy(module, removed, groups)(images), atol=1e-4)


def test_frozen_parameters_and_training_flags_are_kept():
    module = nets.build("residual").train()
    module.body[1].eval()
    module.head.weight.requires_grad_(False)
    module.body[0][0].weight.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    slim = cut_copy(module, {"body.0.0": (0, 3, 5), "body.1.conv1": (1,)}, nets.EXAMPLE)
    for network in (module, slim):
        assert {name for name, part in network.named_modules() if not part.training} == {
            "body.1",
            *(f"body.1.{layer}" for layer in ("conv1", "bn1", "conv2", "bn2")),
        }
        frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
        assert frozen == {"head.weight", "body.0.0.weight"}
        assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert slim.head.weight.shape == (4, 13)


def test_finding_groups_leaves_the_network_as_it_is():
    module = nets.build("grouped").train()
    module.head.bias.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    find_cuttable(module, nets.EXAMPLE)
    assert all(part.training for part in module.modules())
    assert not module.head.bias.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize(
    ("removed", "match"),
    [
        ({"nowhere": (0,)}, "must have a channel group 'nowhere'"),
        ({"body.0.1": (0,)}, "must have a channel group 'body.0.1'"),
        ({"body.0.0": ()}, "Group 'body.0.0' has 8 channels; it must lose at least one"),
        ({"body.0.0": (8,)}, "all of them within it"),
        ({"body.0.0": (-1,)}, "all of them within it"),
        ({"body.0.0": tuple(range(8))}, "keep at least one, got 8 indices"),
    ],
)
def test_cut_that_does_not_fit_is_refused(removed, match):
    with pytest.raises(UnsupportedLayer, match=match):
        remove_channels(nets.build("chain"), RemoveChannels(removed), nets.EXAMPLE)


class _NeedsLargeImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


def test_network_that_does_not_run_is_untraceable():
    match = r"one input of shape \(1, 3, 16, 16\); .* gave RuntimeError: .*ernel"
    for call in (find_cuttable, lambda net, example: cut_copy(net, {"conv": (0,)}, example)):
        with pytest.raises(UntraceableModel, match=match):
            call(_NeedsLargeImages(), nets.EXAMPLE)


class _Reshaping(nn.Module):
    """Flattens by a view whose size is written down."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.fixed = fixed
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 6, 3, 1, 1)
        self.fc1, self.fc2 = nn.Linear(6 * 16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = x.view(-1, 6 * 4 * 4) if self.fixed else x.view(x.size(0), -1)
        return self.fc2(F.relu(self.fc1(x)))


def test_view_of_a_written_down_size_keeps_only_its_own_group_whole():
    module = _Reshaping(fixed=True).eval()
    groups, excluded = find_cuttable(module, nets.EXAMPLE)
    assert list(groups) == ["conv1", "fc1"]
    assert [item.name for item in excluded if not item.expected] == ["conv2"]
    _hold_cut_equals_silencing(module, nets.images())


def test_view_of_the_batch_size_is_cut():
    module = _Reshaping(fixed=False).eval()
    assert list(find_cuttable(module, nets.EXAMPLE)[0]) == ["conv1", "conv2", "fc1"]
    _hold_cut_equals_silencing(module, nets.images())


class _Shared(nn.Module):
    """One convolution used twice, or two with one weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.a = nn.Conv2d(8, 8, 3, 1, 1)
        self.b = nn.Conv2d(8, 8, 3, 1, 1) if tied else self.a
        self.b.weight = self.a.weight
        self.last = nn.Conv2d(8, 8, 3, 1, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(F.relu(self.stem(x))))))
        return self.head(self.last(x).mean((2, 3)))


def test_convolution_used_twice_is_cut_once_for_both_uses():
    module = _Shared(tied=False).eval()
    assert "last" in find_cuttable(module, nets.EXAMPLE)[0]
    slim = _hold_cut_equals_silencing(module, nets.images())
    assert slim.b is slim.a


def test_tied_weights_are_cut_and_stay_tied():
    module = _Shared(tied=True).eval()
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    assert list(groups) == ["stem", "last"]
    assert [member.layer for member in groups["stem"].producers] == ["stem", "a", "b"]
    slim = _hold_cut_equals_silencing(module, nets.images())
    assert slim.b.weight is slim.a.weight
    assert slim.b.bias is not slim.a.bias
    assert slim.a.weight.shape == (4, 4, 3, 3)


class _InPlace(nn.Module):
    """Activations that overwrite their input, as functions and as modules, and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.conv3(self.relu(self.conv2(x)))
        y += x
        return self.head(F.relu_(y).mean((2, 3)))


def test_activations_in_place_are_cut():
    module = _InPlace().eval()
    assert list(find_cuttable(module, nets.EXAMPLE)[0]) == ["conv1", "conv2"]
    _hold_cut_equals_silencing(module, nets.images())


class _Prelu(nn.Module):
    """A learned activation with one slope for all channels, and one with a slope for each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.one, self.each = nn.PReLU(), nn.PReLU(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.each(self.conv2(self.one(self.conv1(x)))).mean((2, 3)))


def test_learned_activations_are_cut():
    module = _Prelu().eval()
    assert list(find_cuttable(module, nets.EXAMPLE)[0]) == ["conv1", "conv2"]
    slim = _hold_cut_equals_silencing(module, nets.images())
    assert slim.one.weight.shape == (1,)


class _GroupNormed(nn.Module):
    """Statistics over several channels change when one of them goes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8)
        self.conv2, self.head = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(F.relu(self.norm(self.conv1(x)))).mean((2, 3)))


def test_a_group_norm_loses_whole_groups_of_channels():
    module = _GroupNormed().eval()
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    assert {name: (group.width, group.parts) for name, group in groups.items()} == {"conv1": (8, 4), "conv2": (8, 1)}
    slim = _hold_cut_equals_silencing(module, nets.images())
    assert (slim.norm.num_groups, slim.norm.num_channels) == (1, 4)


def test_a_group_too_narrow_to_cut_is_excluded():
    module = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 3))
    groups, excluded = find_cuttable(module.eval(), nets.EXAMPLE)
    assert list(groups) == ["1"]
    assert {item.name: item.reason for item in excluded}["0"] == "it has one channel only"
