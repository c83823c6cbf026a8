"""A small detector in the style of the YOLO family: everything in it that makes cutting such networks hard.

Plain tensors as attributes (strides, anchors, mean and scale of the image), C2f blocks (chunk, concat of all pieces),
SPPF, a neck with upsampling and concats, and a head with a training and an evaluation branch that caches anchors and
shapes on itself.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

EXAMPLE = torch.zeros(1, 3, 32, 32)


class Conv(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, width: int, adds: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(width, width, 3), Conv(width, width, 3), adds

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C2f(nn.Module):
    """Halves of a convolution's channels, one of them through bottlenecks, all put together."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1, adds: bool = False, splits: bool = False) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1, self.cv2 = Conv(inputs, 2 * self.c), Conv((2 + depth) * self.c, outputs)
        self.m = nn.ModuleList(Bottleneck(self.c, adds) for _ in range(depth))
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1) if self.splits else self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(inputs, inputs // 2), Conv(inputs // 2 * 4, outputs)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class DFL(nn.Module):
    """The mean of a distribution over distances, by a convolution with fixed weights."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)
        self.c1 = bins

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.c1, a).transpose(2, 1).softmax(1)).view(b, 4, a)


class Detect(nn.Module):
    """Raw maps in training mode, decoded boxes beside them in evaluation mode."""

    dynamic = False

    def __init__(self, classes: int, widths: tuple[int, ...], bins: int = 4, export: bool = False) -> None:
        super().__init__()
        self.nc, self.nl, self.reg_max = classes, len(widths), bins
        self.no, self.export, self.shape = classes + 4 * bins, export, None
        self.stride = torch.tensor([4.0, 8.0])  # plain tensors, as in so many repositories
        self.anchors, self.strides = torch.empty(0), torch.empty(0)
        self.cv2 = nn.ModuleList(nn.Sequential(Conv(w, 16, 3), nn.Conv2d(16, 4 * bins, 1)) for w in widths)
        self.cv3 = nn.ModuleList(nn.Sequential(Conv(w, 24, 3), nn.Conv2d(24, classes, 1)) for w in widths)
        self.dfl = DFL(bins)

    def forward(self, x: list[Tensor]) -> object:
        x = [torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1) for i in range(self.nl)]
        if self.training:
            return x
        shape = x[0].shape
        if self.dynamic or self.shape != shape:
            self.anchors, self.strides = (one.transpose(0, 1) for one in make_anchors(x, self.stride))
            self.shape = shape
        flat = torch.cat([one.view(shape[0], self.no, -1) for one in x], 2)
        box, cls = flat.split((self.reg_max * 4, self.nc), 1)
        low, high = self.dfl(box).chunk(2, 1)
        corners = self.anchors.unsqueeze(0) - low, self.anchors.unsqueeze(0) + high
        boxes = torch.cat(((corners[0] + corners[1]) / 2, corners[1] - corners[0]), 1) * self.strides
        y = torch.cat((boxes, cls.sigmoid()), 1)
        return y if self.export else (y, x)


def make_anchors(maps: list[Tensor], strides: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centres of all places of feature maps, and the stride of each."""
    centres, steps = [], []
    for one, stride in zip(maps, strides, strict=True):
        _, _, h, w = one.shape
        ys, xs = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        centres.append(torch.stack((xs, ys), -1).view(-1, 2))
        steps.append(torch.full((h * w, 1), float(stride)))
    return torch.cat(centres), torch.cat(steps)


class Yolo(nn.Module):
    """Backbone, neck and head, called by a list of layers as the YAML files of such networks say."""

    def __init__(self, export: bool = False) -> None:
        super().__init__()
        self.args = SimpleNamespace(imgsz=32, conf=0.25)
        self.names = {0: "circle", 1: "square", 2: "triangle"}
        self.mean, self.scale = torch.tensor([0.4, 0.5, 0.45]).view(1, 3, 1, 1), torch.tensor(4.0)
        self.save: dict[str, Tensor] = {}
        self.stem = Conv(3, 16, 3, 2)
        self.down1, self.block1 = Conv(16, 24, 3, 2), C2f(24, 24, 2, adds=True)
        self.down2, self.block2 = Conv(24, 32, 3, 2), C2f(32, 32, 1, adds=True, splits=True)
        self.sppf, self.up = SPPF(32, 32), nn.Upsample(scale_factor=2, mode="nearest")
        self.neck1 = C2f(32 + 24, 24)
        self.down3, self.neck2 = Conv(24, 24, 3, 2), C2f(24 + 32, 32)
        self.head = Detect(3, (24, 32), export=export)

    def forward(self, x: Tensor) -> object:
        x = (x - self.mean) * self.scale
        x = self.stem(x)
        near = self.block1(self.down1(x))
        far = self.sppf(self.block2(self.down2(near)))
        self.save = {"near": near, "far": far}  # for heat maps
        near = self.neck1(torch.cat([self.up(far), near], 1))
        far = self.neck2(torch.cat([self.down3(near), far], 1))
        return self.head([near, far])


def yolo(export: bool = False) -> nn.Module:
    """Return a detector with weights drawn at random and varied norms, in eval mode."""
    torch.manual_seed(0)
    module = Yolo(export)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return module.eval()
