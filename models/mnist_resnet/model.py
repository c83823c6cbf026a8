"""A small residual network for 28x28 grey images: batch norm, projection shortcuts, five blocks."""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: the identity, or a 1x1 projection where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class MnistResNet(nn.Module):
    """(N, 1, 28, 28) float32 images -> (N, num_classes) logits."""

    def __init__(self, widths: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Conv2d(1, first, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(first)
        self.blocks = nn.Sequential(
            Block(first, first, 1),
            Block(first, second, 2),
            Block(second, second, 1),
            Block(second, third, 2),
            Block(third, third, 1),
        )
        self.classifier = nn.Linear(third, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


def build(num_classes: int = 10) -> MnistResNet:
    """Build the network with widths 24, 48 and 64."""
    return MnistResNet((24, 48, 64), num_classes)
