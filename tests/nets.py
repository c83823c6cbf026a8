"""Six tiny networks that the tests use everywhere: (N, 3, 16, 16) -> (N, 4), seeded, eval mode, warm batch norm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXAMPLE = torch.zeros(1, 3, 16, 16)


def _conv_bn(inp: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


class _Head(nn.Module):
    """A body, global average pooling and a linear layer."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class ResidualBlock(nn.Module):
    """An identity-shaped residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class _Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = _conv_bn(3, 8), _conv_bn(3, 8, 1)
        self.join = _conv_bn(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.left(x), self.right(x)], 1))


class _LinearHead(nn.Module):
    """Flattens a feature map, so that one channel is many columns of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(_conv_bn(3, 8, stride=2), nn.MaxPool2d(2))
        self.fc1, self.fc2 = nn.Linear(8 * 16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(torch.flatten(self.features(x), 1))))


def _chain() -> nn.Module:
    return _Head(nn.Sequential(_conv_bn(3, 8), _conv_bn(8, 16, stride=2), _conv_bn(16, 16)), 16)


def _residual() -> nn.Module:
    return _Head(nn.Sequential(_conv_bn(3, 16), ResidualBlock(16), ResidualBlock(16)), 16)


def _depthwise() -> nn.Module:
    return _Head(nn.Sequential(_conv_bn(3, 16), _conv_bn(16, 16, groups=16), _conv_bn(16, 16, 1)), 16)


def _grouped() -> nn.Module:
    return _Head(nn.Sequential(_conv_bn(3, 16), _conv_bn(16, 16, groups=4), _conv_bn(16, 16, 1)), 16)


def _concat() -> nn.Module:
    return _Head(_Concat(), 16)


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "chain": _chain,
    "residual": _residual,
    "depthwise": _depthwise,
    "grouped": _grouped,
    "concat": _concat,
    "linear_head": _LinearHead,
}
NAMES = tuple(_BUILDERS)


def build(name: str, seed: int = 0) -> nn.Module:
    """Build one of the tiny networks with weights and batch-norm statistics that no channel is alike."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = _BUILDERS[name]()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0.0, 0.3)
                nn.init.normal_(part.running_mean, 0.0, 0.3)
                nn.init.uniform_(part.running_var, 0.5, 1.5)
    return module.eval()


def chain() -> nn.Module:
    """Build the chain network: the factory that test pipelines name."""
    return build("chain")


def images(count: int = 4, seed: int = 1) -> Tensor:
    """Return random inputs, (count, 3, 16, 16)."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
