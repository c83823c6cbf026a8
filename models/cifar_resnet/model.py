"""The CIFAR ResNets (depth 6n + 2) with parameter-free, zero-padded shortcuts, or with projections.

Layer names match the widely used checkpoints of these networks: `conv1`, `bn1`, `layer{1,2,3}.{i}`, and `linear`
(`resnet`), or `fc` and `downsample.{0,1}` (`projected_resnet`).
Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2, options A and B, arXiv:1512.03385.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters.

    Where the stride is 2 the shortcut keeps every second row and column and pads the channels with zeros, half of
    the missing channels on each side.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.missing = channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.missing == 0:
            return x
        before = self.missing // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing - before))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """(N, 3, 32, 32) float32 images -> (N, num_classes) logits."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _layer(16, 16, blocks, 1)
        self.layer2 = _layer(16, 32, blocks, 2)
        self.layer3 = _layer(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _layer(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def resnet(depth: int = 20, num_classes: int = 10) -> CifarResNet:
    """Build the network; `depth` is 6n + 2 (20, 32, 44, 56, 110, 1202).

    Raises:
        ValueError: `depth` is not 6n + 2.
    """
    return CifarResNet(_blocks(depth), num_classes)


def _blocks(depth: int) -> int:
    """Return the number of blocks in each of the three layers."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6n + 2 (20, 32, 44, 56, 110, ...), got {depth}")
    return (depth - 2) // 6


class ProjectedBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution with a batch norm where the stride is 2."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential()
        if stride != 1:
            self.downsample.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ProjectedResNet(nn.Module):
    """(N, 3, 32, 32) float32 images -> (N, num_classes) logits."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        in_channels = 16
        for number, channels in enumerate((16, 32, 64), start=1):
            first = ProjectedBlock(in_channels, channels, 1 if number == 1 else 2)
            rest = (ProjectedBlock(channels, channels, 1) for _ in range(blocks - 1))
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            in_channels = channels
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def projected_resnet(depth: int = 56, num_classes: int = 10) -> ProjectedResNet:
    """Build the network with projection shortcuts; `depth` as in `resnet`.

    Raises:
        ValueError: `depth` is not 6n + 2.
    """
    return ProjectedResNet(_blocks(depth), num_classes)
