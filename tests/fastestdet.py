"""What a user would bring for FastestDet on COCO128: the network, how pictures are resized, what its outputs mean.

All as its author has them: plain resizing to 352 x 352, one box for each of 22 x 22 cells.
"""

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import batched_nms, generalized_box_iou_loss

from compress.tasks.detection import Detection

SIDE, CELLS = 352, 22


def _normed(*layers: tuple[int, int, int, int, int] | nn.Module) -> nn.Sequential:
    """Return convolutions given as (inputs, outputs, kernel, stride, groups), each with its norm, and other layers."""
    made: list[nn.Module] = []
    for one in layers:
        if isinstance(one, nn.Module):
            made.append(one)
            continue
        inputs, outputs, kernel, stride, groups = one
        made.append(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
        made.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*made)


class _Unit(nn.Module):
    """A unit of ShuffleNetV2; where it does not halve the size, every second channel passes by."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle, self.stride = outputs // 2, stride
        self.branch_main = _normed(
            (inputs, middle, 1, 1, 1), nn.ReLU(), (middle, middle, 3, stride, middle),
            (middle, outputs - inputs, 1, 1, 1), nn.ReLU(),
        )  # fmt: skip
        if stride == 2:
            self.branch_proj = _normed((inputs, inputs, 3, 2, inputs), (inputs, inputs, 1, 1, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)
        return torch.cat([x[:, ::2], self.branch_main(x[:, 1::2])], 1)


def _stage(inputs: int, outputs: int, units: int) -> nn.Sequential:
    return nn.Sequential(_Unit(inputs, outputs, 2), *[_Unit(outputs // 2, outputs, 1) for _ in range(units - 1)])


def _spread(channels: int, times: int) -> nn.Sequential:
    layers = [one for _ in range(times) for one in ((channels, channels, 5, 1, channels), nn.ReLU())]
    return _normed(*layers)


class FastestDet(nn.Module):
    """(N, 3, 352, 352) BGR images -> (N, 85, 22, 22): how likely an object is, its box, and 80 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "first_conv": _normed((3, 24, 3, 2, 1), nn.ReLU()),
                "stage2": _stage(24, 48, 4),
                "stage3": _stage(48, 96, 8),
                "stage4": _stage(96, 192, 4),
            }
        )
        one = {"conv1x1": _normed((336, 96, 1, 1, 1), nn.ReLU())}
        self.SPP = nn.ModuleDict({f"S{times}": _spread(96, times) for times in (1, 2, 3)})
        self.SPP["Conv1x1"], self.SPP["output"] = nn.ModuleDict(one), _normed((288, 96, 1, 1, 1))
        heads = {"obj_layers": 1, "reg_layers": 4, "cls_layers": 80}
        self.detect_head = nn.ModuleDict({"conv1x1": nn.ModuleDict({"conv1x1": _normed((96, 96, 1, 1, 1), nn.ReLU())})})
        for name, outputs in heads.items():
            layers = _normed((96, 96, 5, 1, 96), nn.ReLU(), (96, outputs, 1, 1, 1))
            self.detect_head[name] = nn.ModuleDict({"conv5x5": layers})

    def forward(self, x: Tensor) -> Tensor:
        body, spread, head = self.backbone, self.SPP, self.detect_head
        first = body["stage2"](F.max_pool2d(body["first_conv"](x), 3, 2, 1))
        second = body["stage3"](first)
        third = F.interpolate(body["stage4"](second), scale_factor=2.0)
        x = spread["Conv1x1"]["conv1x1"](torch.cat([F.avg_pool2d(first, 3, 2, 1), second, third], 1))
        x = F.relu(x + spread["output"](torch.cat([spread[name](x) for name in ("S1", "S2", "S3")], 1)))
        x = head["conv1x1"]["conv1x1"](x)
        obj, reg, cls = (head[f"{name}_layers"]["conv5x5"](x) for name in ("obj", "reg", "cls"))
        return torch.cat([obj.sigmoid(), reg, cls.softmax(1)], 1)


class Coco128:
    """Pictures and boxes out of the archive."""

    def __init__(self, archive: str) -> None:
        self.archive = archive
        with zipfile.ZipFile(archive) as content:
            self.names = sorted(name for name in content.namelist() if name.endswith(".jpg"))
            self.files = {name: content.read(name) for name in content.namelist()}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        name = self.names[place]
        with Image.open(io.BytesIO(self.files[name])) as picture:
            image = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        text = self.files.get(name.replace(".jpg", ".txt"), b"").decode()
        rows = np.array([line.split() for line in text.splitlines() if line.strip()], np.float32).reshape(-1, 5)
        middle, size = rows[:, 1:3] * SIDE, rows[:, 3:5] * SIDE
        boxes = np.concatenate([middle - size / 2, middle + size / 2], 1)
        return image, {"boxes": boxes, "labels": rows[:, 0].astype(np.int64)}


def boxes_of(maps: Tensor) -> Tensor:
    """Return (N, 22, 22, 4) the box that each cell says, as shares of the image."""
    rows, columns = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
    x, y = (torch.tanh(maps[:, 1]) + columns) / CELLS, (torch.tanh(maps[:, 2]) + rows) / CELLS
    w, h = torch.sigmoid(maps[:, 3]), torch.sigmoid(maps[:, 4])
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)


def decode(outputs: Mapping[str, Tensor], image_size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return at most 100 boxes of each image, those of one class apart by 0.45."""
    (maps,) = outputs.values()
    height, width = image_size
    scale = torch.tensor([width, height, width, height])
    found = []
    for one, places in zip(maps, boxes_of(maps), strict=True):
        chance, labels = one[5:].max(0)
        scores = (one[0] ** 0.6 * chance**0.4).flatten()
        kept = scores > 0.001
        boxes, scores, labels = (places * scale).reshape(-1, 4)[kept], scores[kept], labels.flatten()[kept]
        chosen = batched_nms(boxes, scores, labels, 0.45)[:100]
        found.append({"boxes": boxes[chosen], "scores": scores[chosen], "labels": labels[chosen]})
    return found


class FastestDetection(Detection):
    """Detection that knows what the outputs are: boxes and classes matter where the original sees an object."""

    def __init__(self) -> None:
        super().__init__(decode)

    def distances(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Return (N,) how far objects, boxes and classes are from those of the original."""
        there, got = wanted[:, 0].clamp(0, 1), outputs.clamp(1e-6, 1 - 1e-6)
        want = wanted.clamp(1e-6, 1 - 1e-6)
        missed = F.binary_cross_entropy(got[:, 0], there, reduction="none")
        missed = missed - F.binary_cross_entropy(want[:, 0], there, reduction="none")
        moved = generalized_box_iou_loss(boxes_of(outputs), boxes_of(wanted), reduction="none")
        confused = (want[:, 5:] * (want[:, 5:] / got[:, 5:]).log()).sum(1)
        objects = there.sum((1, 2)).clamp_min(1.0)
        return (missed + there * (moved + confused)).sum((1, 2)) / objects
