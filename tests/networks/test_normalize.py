"""Layers whose weight is computed become plain layers with that weight, and the network computes what it did."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import wired
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torchvision.ops import FrozenBatchNorm2d

from compress.errors import InternalError
from compress.networks import normalize as prepare_module
from compress.networks.normalize import FrozenNorm, SamePaddedConv2d, prepare

IMAGES = torch.randn(2, 3, 15, 18, generator=torch.Generator().manual_seed(0))


class Standardised(nn.Conv2d):
    """Filters of mean 0 and deviation 1."""

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / deviation, self.bias, self.stride, self.padding)


class StandardisedSame(Standardised):
    """The same, padded as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class ByInput(nn.Conv2d):
    """Its weight depends on what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias)


class Doubled(nn.Linear):
    """A linear layer that multiplies by twice its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


def build(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    linear = isinstance(layer, nn.Linear)
    parts = [nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True)]
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer] if linear else [layer, nn.ReLU(inplace=True)]
    return nn.Sequential(*parts).eval()


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (lambda: weight_norm(nn.Conv2d(6, 8, 3)), nn.Conv2d),
        (lambda: spectral_norm(nn.Conv2d(6, 8, 3)), nn.Conv2d),
        (lambda: parametrizations.weight_norm(nn.Conv2d(6, 8, 3)), nn.Conv2d),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(6, 8, 3)), nn.Conv2d),
        (lambda: parametrizations.orthogonal(nn.Linear(6, 4)), nn.Linear),
        (lambda: weight_norm(nn.Linear(6, 4)), nn.Linear),
        (lambda: weight_norm(nn.ConvTranspose2d(6, 8, 3)), nn.ConvTranspose2d),
        (lambda: Standardised(6, 8, 3, stride=2, padding=1), nn.Conv2d),
        (lambda: StandardisedSame(6, 8, 3, stride=2), SamePaddedConv2d),
        (lambda: Doubled(6, 4), nn.Linear),
        (lambda: FrozenBatchNorm2d(6, eps=1e-3), FrozenNorm),
        (lambda: nn.SyncBatchNorm(6, eps=1e-3), nn.BatchNorm2d),
    ],
)
def test_a_layer_with_a_computed_weight_becomes_a_plain_one(layer: Any, kind: type[nn.Module]):
    module = build(layer())
    wanted, place = module(IMAGES), next(n for n, p in reversed(list(module.named_children())) if list(p.state_dict()))
    prepared = prepare(module, IMAGES)
    found = prepared.get_submodule(place)
    assert type(found) is kind
    assert torch.allclose(prepared(IMAGES), wanted, atol=1e-6)
    other = IMAGES.flip(3)[..., :14]
    assert torch.allclose(prepared(other), rebuilt(layer)(other), atol=1e-5)
    extra = {"num_batches_tracked", "running_mean", "running_var"}
    assert set(found.state_dict()) - extra == {"weight", "bias"} - ({"bias"} if found.bias is None else set())
    again = copy.deepcopy(prepared)  # strictly, and without the names of before
    again.load_state_dict(prepared.state_dict())
    assert not found._forward_pre_hooks


def rebuilt(layer: Any) -> nn.Module:
    """Return the network as it was before: the same seed draws the same weights."""
    torch.manual_seed(0)
    return build(layer())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_a_whole_network_of_them_computes_what_it_did_in_training_mode_too():
    module = wired.structured("dict")
    wanted = module(IMAGES)
    prepared = prepare(module, IMAGES)
    got = prepared.train()(IMAGES)
    assert torch.allclose(got["logits"], wanted["logits"], atol=1e-6)
    assert not any(parameter.requires_grad for parameter in prepared.norm.parameters())
    assert all(parameter.requires_grad for parameter in prepared.body.parameters())
    assert not prepared.norm.training


@pytest.mark.parametrize("kind", [lambda *sizes: parametrizations.weight_norm(nn.Conv2d(*sizes)), Standardised])
def test_a_frozen_weight_stays_frozen_and_a_parameter(kind: Any):
    layer = kind(6, 8, 3)
    layer.requires_grad_(False)
    prepared = prepare(build(layer), IMAGES)
    assert not prepared[2].weight.requires_grad
    assert "2.weight" in dict(prepared.named_parameters())


@pytest.mark.parametrize("layer", [lambda: ByInput(6, 8, 3), lambda: nn.Conv2d(6, 8, 3), lambda: nn.Linear(6, 4)])
def test_what_is_no_fixed_weight_is_left_as_it_is(layer: Any):
    module = build(layer())
    before = list(module)
    assert list(prepare(module, IMAGES)) == before


def test_a_shared_layer_is_replaced_under_each_of_its_names():
    shared = Standardised(3, 3, 3, padding=1)
    module = nn.ModuleDict({"a": nn.Sequential(shared, shared), "b": shared})
    module.forward = lambda x: module["b"](module["a"](x))  # type: ignore[method-assign]
    wanted = module(IMAGES)
    prepare(module.eval(), IMAGES)
    assert type(module["b"]) is nn.Conv2d
    assert module["a"][0] is module["a"][1] is module["b"]
    assert torch.allclose(module(IMAGES), wanted, atol=1e-6)


def test_structure_does_not_depend_on_the_weights_or_the_example():
    one, other = (prepare(wired.structured("tensor"), images) for images in (IMAGES, torch.zeros(1, 3, 16, 16)))
    assert [type(part) for part in one.modules()] == [type(part) for part in other.modules()]
    assert list(one.state_dict()) == list(other.state_dict())


class Scaled(nn.Module):
    """A network that divides images by their size, which zeros do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardised(3, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x / x.square().mean((1, 2, 3), keepdim=True).sqrt())


def test_structure_is_the_same_where_zeros_give_no_numbers():
    one, other = (prepare(Scaled().eval(), images) for images in (IMAGES, torch.zeros(1, 3, 16, 16)))
    assert type(one.conv) is type(other.conv) is nn.Conv2d


def test_a_network_that_changes_from_run_to_run_is_not_our_fault():
    module = nn.Sequential(weight_norm(nn.Conv2d(3, 6, 3)), nn.Dropout(0.5))
    module.eval().register_forward_hook(lambda _module, _inputs, output: F.dropout(output))
    assert type(prepare(module, IMAGES)[0]) is nn.Conv2d


def test_a_step_that_changes_the_outputs_is_our_fault_and_said(monkeypatch: pytest.MonkeyPatch):
    def corrupt(module: nn.Module, _: Tensor) -> int:
        module[0].weight.data.mul_(2)
        return 1

    monkeypatch.setattr(prepare_module, "_thaw", corrupt)
    with pytest.raises(InternalError, match="must give the same outputs, they differ by"):
        prepare(build(nn.Conv2d(6, 8, 3)), IMAGES)
