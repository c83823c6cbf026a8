"""What networks keep on themselves does not stop a cut: plain tensors, stored activations, numbers in containers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yolo
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.model.tensors import detach_stored
from compress.networks.normalize import prepare
from compress.pruning.groups import ChannelGroup, Exclusion, exclusions_by_cause
from compress.pruning.surgery import Sizes, corrected, cut_copy
from compress.pruning.trial import find_cuttable, masked_copy

EXAMPLE = torch.zeros(1, 3, 8, 8)


class _Two(nn.Module):
    """Two convolutions and a head; `between` is what happens to the first one's maps."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], width: int = 16, **attributes: Any) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 16, 3), nn.Linear(16, 5)
        self.between = between
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self, self.a(x).relu())
        return self.fc(self.b(y).relu().mean((2, 3)))


def _halves(groups: dict[str, ChannelGroup], seed: int = 0) -> dict[str, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: group.expand(
            torch.randperm(group.width // group.parts, generator=generator)[: group.width // group.parts // 2].tolist()
        )
        for name, group in groups.items()
    }


def hold_exact(module: nn.Module, example: Tensor, expected: set[str] | None = None) -> nn.Module:
    """Cut half of every group and hold the result to the masked network in float64, at a batch of 3."""
    module = module.double().eval()
    groups, _ = find_cuttable(module, example.double())
    assert groups
    assert expected is None or set(groups) == expected
    removed = _halves(groups)
    slim = cut_copy(module, removed, example.double())
    images = torch.randn(3, *example.shape[1:], generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        whole = [one.clone() for one in tree_leaves(module(images))]
        wanted = tree_leaves(masked_copy(module, removed, groups)(images))
        got = tree_leaves(slim(images))
    assert [one.shape for one in got] == [one.shape for one in wanted]
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-10 * float(other.abs().max())
    assert any(not torch.allclose(one, other, rtol=1e-3) for one, other in zip(whole, got, strict=True))
    return slim


def _stored(module: Any, y: Tensor) -> Tensor:
    module.features = y
    return y


def _stored_in_a_list(module: Any, y: Tensor) -> Tensor:
    module.features.append(y)
    del module.features[:-2]
    return y


def _scaled(module: Any, y: Tensor) -> Tensor:
    return y * module.scale


def _normalised(module: Any, y: Tensor) -> Tensor:
    return y * torch.from_numpy(module.scale).view(1, -1, 1, 1).to(y)


def _written_down(read: Callable[[Any], int]) -> Callable[[Any, Tensor], Tensor]:
    def between(module: Any, y: Tensor) -> Tensor:
        return y.reshape(y.shape[0], read(module), -1).reshape(y.shape)

    return between


@dataclass
class _Settings:
    width: int = 16
    more: dict[str, Any] = field(default_factory=dict)


CUTTABLE = {
    "a plain tensor of one value": (_scaled, {"scale": torch.tensor(2.0)}),
    "a plain tensor of every channel": (_scaled, {"scale": torch.linspace(0.5, 2, 16).double().view(1, 16, 1, 1)}),
    "a numpy array of one value": (_normalised, {"scale": np.ones(1)}),
    "a numpy array nobody reads": (lambda m, y: y, {"anchors": np.arange(16)}),
    "an activation stored": (_stored, {"features": None}),
    "activations in a list": (_stored_in_a_list, {"features": []}),
    "an attribute that compares oddly": (lambda m, y: y, {"odd": {"mask": torch.ones(16), "array": np.ones(16)}}),
    "a number": (_written_down(lambda m: m.count), {"count": 16}),
    "a number in a dict": (_written_down(lambda m: m.args["width"]), {"args": {"width": 16, "name": "w"}}),
    "a number in a list of lists": (_written_down(lambda m: m.layers[0][1]), {"layers": [["conv", 16], ["fc", 5]]}),
    "a number in a dataclass": (_written_down(lambda m: m.args.width), {"args": _Settings()}),
    "a number in a dict in a dataclass": (
        _written_down(lambda m: m.args.more["w"]),
        {"args": _Settings(7, {"w": 16})},
    ),
    "a number in a namespace": (_written_down(lambda m: m.args.width), {"args": SimpleNamespace(width=16)}),
    "sizes in a tuple": (
        lambda m, y: y.flatten(1).view(-1, *m.sizes),
        {"sizes": (16, 8, 8)},
    ),
    "sizes with one left open": (lambda m, y: y.flatten(1).view(y.shape[0], *m.sizes), {"sizes": [16, -1, 8]}),
    "a mask of one channel": (
        lambda m, y: y * torch.sigmoid(m.mask(y)),
        {"mask": nn.Conv2d(16, 1, 1)},
    ),
    "a mask of one channel first": (
        lambda m, y: torch.sigmoid(m.mask(y)) * y + m.mask(y),
        {"mask": nn.Conv2d(16, 1, 3, padding=1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CUTTABLE))
def test_what_a_module_keeps_follows_the_cut_or_does_not_hinder_it(name: str):
    torch.manual_seed(0)
    between, attributes = CUTTABLE[name]
    module = _Two(between, **copy.deepcopy(attributes))
    hold_exact(module, EXAMPLE, {"a", "b"})


def test_the_attributes_of_the_network_itself_stay():
    settings = _Settings()
    module = _Two(_written_down(lambda m: m.args.width), args=settings).eval()
    slim: Any = cut_copy(module, {"a": (0, 3)}, EXAMPLE)
    assert (slim.args.width, settings.width, module.args.width) == (14, 16, 16)


def _unflattened(sizes: tuple[int, ...]) -> nn.Module:
    inner = nn.Linear(16 * 4 * 4, 24 * 16)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.Flatten(), inner, nn.ReLU(), nn.Unflatten(1, sizes),
        nn.ConvTranspose2d(24, 12, 2, 2), nn.ReLU(), nn.Conv2d(12, 3, 3, 1, 1),
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [(24, 4, 4), (24, -1, 4), (-1, 4, 4)])
def test_sizes_of_unflatten_follow_the_cut(sizes: tuple[int, ...]):
    torch.manual_seed(0)
    slim: Any = hold_exact(_unflattened(sizes), EXAMPLE, {"0", "2", "5"})
    assert slim[2].out_features == 12 * 16
    assert slim[4].unflattened_size == ((12, *sizes[1:]) if sizes[0] == 24 else sizes)


def test_a_vector_becomes_a_feature_map_wider_than_it_has_channels():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.Flatten(), nn.Linear(8 * 16, 8 * 12 * 12), nn.Unflatten(1, (8, 12, 12)),
        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3),
    )  # fmt: skip
    hold_exact(module, EXAMPLE, {"0", "2", "4"})


class _Pair(nn.Conv2d):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, y.mean((2, 3))


class _Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3), _Pair(16, 16, 3), nn.Conv2d(16, 16, 3)
        self.c, self.fc = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, m = self.a(self.stem(x).relu())
        return self.fc(self.c(self.b(y).relu()).mean((2, 3))) + self.fc(m)


def test_a_layer_that_returns_a_tuple_is_excluded_by_name():
    module = prepare(_Paired().eval(), EXAMPLE)
    groups, excluded = find_cuttable(module, EXAMPLE)
    reasons = {item.name: item.reason for item in excluded}
    assert set(groups) == {"b"}
    assert reasons["a"] == reasons["stem"] == "layer 'a' is no plain layer: _Pair returns a tuple"


class _Arrays(nn.Module):
    """Two pairs of convolutions whose code multiplies by a numpy array of one value for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 3)
        self.scales = [torch.linspace(1, 2, 16).view(1, 16, 1, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.c((self.b(self.a(x) * self.scales[0])) * self.scales[0])


def test_the_reason_names_the_attribute():
    groups, excluded = find_cuttable(_Arrays().eval(), EXAMPLE)
    reasons = {item.name: item.reason for item in excluded if not item.expected}
    assert not groups
    assert set(reasons.values()) == {"it meets attribute 'scales[0]', in the network's own forward pass"}
    (sentence,) = exclusions_by_cause(excluded)
    assert sentence.startswith("2 channel groups are not prunable: it meets attribute 'scales[0]'")
    assert sentence.endswith("('a', 'b').")


class _Strict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        assert y.shape[1] == 16, "sixteen it is"
        return self.b(y)


def test_the_reason_names_the_line_of_the_users_code():
    _, excluded = find_cuttable(_Strict().eval(), EXAMPLE)
    (reason,) = [item.reason for item in excluded if not item.expected]
    assert reason.startswith("the cut network does not run (AssertionError: sixteen it is, in test_surgery.py:")
    assert reason.endswith('assert y.shape[1] == 16, "sixteen it is")')


def test_many_groups_of_one_cause_are_one_sentence():
    many = [Exclusion(f"layer{number}", f"it differs by {number / 7:.2g}") for number in range(5)]
    sentences = exclusions_by_cause([*many, Exclusion("fc", "its outputs", True), Exclusion("x", "it is odd")])
    assert sentences == [
        "5 channel groups are not prunable: it differs by 0 ('layer0', 'layer1', 'layer2' and 2 more).",
        "Channel group 'x' is not prunable: it is odd.",
    ]


def test_counts_that_would_become_two_numbers_stay():
    sizes = Sizes()
    sizes.add((16,), (8,))
    assert corrected([16, 16], sizes) == [16, 16]  # two numbers that stand together are no single count
    assert corrected([3, "a", [16]], sizes) == [3, "a", [8]]
    assert corrected(("a", 16, True), sizes) == ("a", 8, True)
    sizes.add((16,), (10,))
    assert corrected(16, sizes) == 16
    same = {"w": 16}
    assert corrected(same, sizes) is same


@pytest.mark.parametrize("export", [False, True])
def test_every_group_of_a_detector_with_plain_tensors_is_cut_exactly(export: bool):
    module = yolo.yolo(export)
    with torch.no_grad():
        module(torch.randn(2, 3, 32, 32))  # anchors and shapes are cached
    expected = {name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)}
    beside = {"head.cv2.0.1", "head.cv2.1.1", "head.cv3.0.1", "head.cv3.1.1", "head.dfl.conv"}
    along = {"block1.m.0.cv2.conv", "block1.m.1.cv2.conv", "block2.m.0.cv2.conv"}  # of the group they add to
    slim: Any = hold_exact(module, yolo.EXAMPLE, expected - beside - along)
    assert slim.block2.c == 8  # written down, and split by
    assert slim.head.reg_max == 4


def test_an_activation_stored_with_its_graph_can_be_copied_afterwards():
    module: Any = _Two(_stored, features=None)
    module(torch.randn(2, 3, 8, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(module)
    kept = module.features.detach().clone()
    detach_stored(module)
    assert torch.equal(copy.deepcopy(module).features, kept)


def test_a_tensor_in_a_container_is_detached_and_others_stay():
    module: Any = _Two(lambda m, y: F.relu(y))
    leaf, inner = torch.ones(2), torch.ones(2, requires_grad=True) * 2
    module.kept, module.plain = {"maps": [inner], "n": 3}, [leaf]
    detach_stored(module)
    assert module.kept["maps"][0].is_leaf
    assert module.kept["n"] == 3
    assert module.plain[0] is leaf
