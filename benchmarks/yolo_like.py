"""A concat network with the blocks of today's YOLO detectors: C2f, SPPF, an FPN-PAN neck, three decoupled heads.

Written for measurements of speed: weights are random, and nothing decodes its outputs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNormAct(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inp: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        conv = nn.Conv2d(inp, out, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out), nn.SiLU())


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, with a shortcut where asked for."""

    def __init__(self, width: int, is_residual: bool) -> None:
        super().__init__()
        self.first, self.second = ConvNormAct(width, width, 3), ConvNormAct(width, width, 3)
        self.is_residual = is_residual

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, width, H, W)."""
        found: Tensor = self.second(self.first(x))
        return x + found if self.is_residual else found


class C2f(nn.Module):
    """Cross-stage block: two halves, a chain of bottlenecks on one, everything concatenated."""

    def __init__(self, inp: int, out: int, count: int, is_residual: bool) -> None:
        super().__init__()
        half = out // 2
        self.left, self.right = ConvNormAct(inp, half), ConvNormAct(inp, half)
        self.chain = nn.ModuleList(Bottleneck(half, is_residual) for _ in range(count))
        self.join = ConvNormAct((2 + count) * half, out)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out, H, W)."""
        parts = [self.left(x), self.right(x)]
        for block in self.chain:
            parts.append(block(parts[-1]))
        found: Tensor = self.join(torch.cat(parts, 1))
        return found


class SPPF(nn.Module):
    """Spatial pyramid pooling: one feature map and three poolings of it, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.join = ConvNormAct(width, width // 2), ConvNormAct(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, width, H, W)."""
        parts = [self.reduce(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        found: Tensor = self.join(torch.cat(parts, 1))
        return found


class Head(nn.Module):
    """Box and class predictions of one feature map, by a branch each."""

    def __init__(self, inp: int, width: int, classes: int) -> None:
        super().__init__()
        self.box = nn.Sequential(ConvNormAct(inp, width, 3), ConvNormAct(width, width, 3), nn.Conv2d(width, 64, 1))
        self.kind = nn.Sequential(
            ConvNormAct(inp, width, 3), ConvNormAct(width, width, 3), nn.Conv2d(width, classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 64 + classes, H, W)."""
        return torch.cat([self.box(x), self.kind(x)], 1)


class YoloLike(nn.Module):
    """The detector.

    Args:
        widths: Of the stem and the four stages.
        classes: Number of classes.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 128, 256), classes: int = 80) -> None:
        super().__init__()
        stem, second, third, fourth, fifth = widths
        self.stem = ConvNormAct(3, stem, 3, 2)
        self.stage2 = nn.Sequential(ConvNormAct(stem, second, 3, 2), C2f(second, second, 1, True))
        self.stage3 = nn.Sequential(ConvNormAct(second, third, 3, 2), C2f(third, third, 2, True))
        self.stage4 = nn.Sequential(ConvNormAct(third, fourth, 3, 2), C2f(fourth, fourth, 2, True))
        self.stage5 = nn.Sequential(ConvNormAct(fourth, fifth, 3, 2), C2f(fifth, fifth, 1, True), SPPF(fifth))
        self.down4, self.down3 = C2f(fifth + fourth, fourth, 1, False), C2f(fourth + third, third, 1, False)
        self.stride4, self.up4 = ConvNormAct(third, third, 3, 2), C2f(third + fourth, fourth, 1, False)
        self.stride5, self.up5 = ConvNormAct(fourth, fourth, 3, 2), C2f(fourth + fifth, fifth, 1, False)
        self.heads = nn.ModuleList(Head(width, max(64, third), classes) for width in (third, fourth, fifth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three maps (N, 64 + classes, H / 8 and 16 and 32, W / 8 and 16 and 32)."""
        third = self.stage3(self.stage2(self.stem(x)))
        fourth = self.stage4(third)
        fifth = self.stage5(fourth)
        neck4 = self.down4(torch.cat([F.interpolate(fifth, scale_factor=2.0), fourth], 1))
        neck3 = self.down3(torch.cat([F.interpolate(neck4, scale_factor=2.0), third], 1))
        out4 = self.up4(torch.cat([self.stride4(neck3), neck4], 1))
        out5 = self.up5(torch.cat([self.stride5(out4), fifth], 1))
        small, middle, large = (head(one) for head, one in zip(self.heads, (neck3, out4, out5), strict=True))
        return small, middle, large


def yolo_like(classes: int = 80) -> nn.Module:
    """Build the detector at the width of the smallest YOLOs."""
    return YoloLike(classes=classes)
