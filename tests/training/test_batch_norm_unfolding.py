"""Batch norms that were folded come back while a network trains, compute the same, and are folded again exactly."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.training.batch_norm_unfolding import UnfoldedConv, can_unfold, folded, unfolded


class Plain(nn.Module):
    """Convolutions of several kinds: strided, depthwise, called twice, of one value for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.unbiased = nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Conv2d(8, 4, 1)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.first(x).relu()).relu()
        x = self.unbiased(self.twice(self.twice(x)))
        return self.linear(self.head(x.mean((2, 3), keepdim=True)).flatten(1))


def images() -> Split:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8)
    return Split("calibration", ArraySource(pixels, np.zeros(40, np.int64)), np.arange(40), Preprocessing(scale=1.0))


def plain() -> Plain:
    torch.manual_seed(0)
    return Plain().eval()


def test_network_computes_the_same_with_norms_in_the_right_places() -> None:
    module, split = plain(), images()
    changed = unfolded(module, split)
    places = {name for name, part in changed.named_modules() if isinstance(part, UnfoldedConv)}
    assert places == {"first", "depthwise"}
    x = 255 * torch.rand(4, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(changed(x), module(x), rtol=1e-4, atol=1e-3)
    filters = changed.get_submodule("first.conv").weight.flatten(1).norm(dim=1)
    assert torch.allclose(filters, torch.ones(8))
    assert isinstance(module.first, nn.Conv2d)


def test_statistics_are_those_of_the_images() -> None:
    module, split = plain(), images()
    changed = unfolded(module, split)
    x = torch.from_numpy(split.preprocessing.normalize(split.source.read(np.arange(40))))
    with torch.no_grad():
        before = changed(x)
        trained = changed.train()(x)
    assert torch.allclose(trained, before, rtol=0.05, atol=0.05 * float(before.abs().max()))


def test_what_was_trained_is_folded_exactly() -> None:
    module = plain()
    changed = unfolded(module, images()).train()
    optimizer = torch.optim.SGD(changed.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        changed(255 * torch.rand(8, 3, 12, 12)).square().mean().backward()
        nn.utils.clip_grad_norm_(changed.parameters(), 1.0)
        optimizer.step()
    again = folded(changed.eval(), module)
    assert set(again.state_dict()) == set(module.state_dict())
    x = 255 * torch.rand(4, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(again(x), changed(x), rtol=1e-4, atol=1e-3)
        assert not torch.allclose(again(x), module(x), rtol=1e-2)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1)), True),
        (nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)), False),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), False),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), False),
        (nn.Linear(3, 4), False),
    ],
)
def test_only_networks_without_norms_are_changed(module: nn.Module, expected: bool) -> None:
    assert can_unfold(module) is expected
