"""A sample of the support matrix: networks of every kind are inspected, cut, compared, exported and compared again.

The same function fills docs/support.json with all networks; here they are small, and cut once.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.segmentation.lraspp import LRASPP

from compress.inspection.targets import vary_weights

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHARE = 0.5


@pytest.fixture(scope="module")
def trial() -> Iterator[ModuleType]:
    """The module that tries networks, which lies outside the package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import support_trial

        yield support_trial
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("support_trial", "support_networks"):
            sys.modules.pop(name, None)


class SmallSegmenter(nn.Module):
    """torchvision's LR-ASPP head on a small body: two feature maps, a gate, an upsampled sum of two predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.network = LRASPP(_Features(), 16, 32, num_classes=5, inter_channels=16)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)["out"]


class _Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.high = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        low = self.low(images)
        return {"low": low, "high": self.high(low)}


def try_network(trial: ModuleType, build: Callable[[], nn.Module], size: int) -> dict[str, Any]:
    """Build a network the same each time, and take it through all steps."""

    def make(_: object) -> tuple[nn.Module, Tensor]:
        example = torch.zeros(1, 3, size, size)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = build().eval()
        vary_weights(module, example)
        return module, example

    record: dict[str, Any] = trial.try_module(make, (SHARE,))
    return record


def require_passed(trial: ModuleType, record: dict[str, Any]) -> None:
    assert record["failures"] == []
    (cut,) = record["cuts"]
    assert cut["reached"] <= SHARE
    assert cut["precision"] == "float64"
    assert cut["difference"] <= trial.CUT_LIMIT[torch.float64]
    assert cut["effect"] > trial.LEAST_EFFECT
    assert cut["parity"] <= trial.PARITY_LIMIT
    assert record["groups"] > 0


SAMPLE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "residual": (models.resnet18, 32),
    "dense": (lambda: models.DenseNet(8, (2, 2), 16, num_classes=10), 32),
    "squeeze-excite": (lambda: models.mobilenet_v3_small(num_classes=10, width_mult=0.5), 32),
    "channel shuffle": (lambda: models.ShuffleNetV2([1, 2, 1], [8, 16, 32, 64, 64], num_classes=10), 64),
    "concat": (lambda: models.squeezenet1_1(num_classes=10), 48),
    "layer norm": (lambda: models.ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]), 32),
    "segmentation": (SmallSegmenter, 32),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_networks_of_torchvision(trial: ModuleType, name: str) -> None:
    require_passed(trial, try_network(trial, *SAMPLE[name]))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_networks_of_timm(trial: ModuleType, name: str) -> None:
    timm = pytest.importorskip("timm")
    require_passed(trial, try_network(trial, lambda: timm.create_model(name, num_classes=10), 64))
