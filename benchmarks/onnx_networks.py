"""Which trained networks are made into ONNX files by torch's exporter, and how are they built?

ResNet-20 and ResNet-56 are those of `models/cifar_resnet`; the other two are written here after their descriptions.
Padding named SAME is TensorFlow's: where the stride is 2, one row below and one column to the right, and none before.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.user_code import import_callable

ROOT = Path(__file__).resolve().parents[1]
EPSILON = 1e-3  # of TensorFlow's batch norms
WIDTHS = (16, *(24,) * 2, *(32,) * 3, *(64,) * 4, *(96,) * 3, *(160,) * 3, 320)
HALVING = (1, 3, 6, 13)  # blocks whose stride is 2
GROWTH = 6
OPSET = 18


class TinyResNet(nn.Module):
    """ResNet-8 of MLPerf Tiny: raw RGB values 0 to 255, (N, 3, 32, 32), -> (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16, EPSILON)
        before = 16
        for number, channels in enumerate((16, 32, 64), 1):
            parts = {
                "conv1": nn.Conv2d(before, channels, 3, 1 if number == 1 else 2, padding=int(number == 1)),
                "bn1": nn.BatchNorm2d(channels, EPSILON),
                "conv2": nn.Conv2d(channels, channels, 3, padding=1),
                "bn2": nn.BatchNorm2d(channels, EPSILON),
            }
            if number > 1:
                parts["short"] = nn.Conv2d(before, channels, 1, 2)
            for name, part in parts.items():
                self.add_module(f"b{number}_{name}", part)
            before = channels
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 10) logits."""
        x = F.relu(self.stem_bn(self.stem(x)))
        for number in (1, 2, 3):
            part = {
                name: getattr(self, f"b{number}_{name}", None) for name in ("conv1", "bn1", "conv2", "bn2", "short")
            }
            padded = x if number == 1 else F.pad(x, (0, 1, 0, 1))
            out = part["bn2"](part["conv2"](F.relu(part["bn1"](part["conv1"](padded)))))
            x = F.relu(out + (x if part["short"] is None else part["short"](x)))
        return self.fc(x.mean((2, 3)))


class MobileBlock(nn.Module):
    """An inverted residual whose batch norms have been folded."""

    def __init__(self, channels_in: int, channels: int, stride: int, growth: int) -> None:
        super().__init__()
        inner = channels_in * growth
        self.expand = nn.Conv2d(channels_in, inner, 1) if growth > 1 else None
        self.dw = nn.Conv2d(inner, inner, 3, stride, padding=int(stride == 1), groups=inner)
        self.project = nn.Conv2d(inner, channels, 1)
        self.is_residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, channels, ...), half as large where the stride is 2."""
        out = x if self.expand is None else F.relu6(self.expand(x))
        out = F.relu6(self.dw(out if self.dw.stride == (1, 1) else F.pad(out, (0, 1, 0, 1))))
        return x + self.project(out) if self.is_residual else self.project(out)


class MobileNet(nn.Module):
    """MobileNetV2 1.0: (value - 128) / 128, (N, 3, 224, 224), -> (N, 1001) logits, the first of the background."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2)
        before = 32
        for number, channels in enumerate(WIDTHS):
            block = MobileBlock(before, channels, 2 if number in HALVING else 1, GROWTH if number else 1)
            self.add_module(f"block{number}", block)
            before = channels
        self.head, self.classifier = nn.Conv2d(before, 1280, 1), nn.Conv2d(1280, 1001, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 1001) logits."""
        x = F.relu6(self.stem(F.pad(x, (0, 1, 0, 1))))
        for number in range(len(WIDTHS)):
            x = getattr(self, f"block{number}")(x)
        return self.classifier(F.relu6(self.head(x)).mean((2, 3), keepdim=True)).flatten(1)


def cifar_resnet(path: Path, depth: int) -> nn.Module:
    """Return a published ResNet for CIFAR-10 from its checkpoint, whose names begin with "module."."""
    module: nn.Module = import_callable(f"{ROOT / 'models' / 'cifar_resnet' / 'model.py'}:resnet", "Factory")(depth)
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return module


def tiny_resnet(path: Path) -> nn.Module:
    """Return ResNet-8 from its state dict."""
    module = TinyResNet()
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return module


def mobilenet(path: Path) -> nn.Module:
    """Return MobileNetV2 from its integers: weight = (q - zero) * scale, bias = bias_q * bias_scale."""
    module = MobileNet()
    with np.load(path) as read:
        module.load_state_dict(dequantised(dict(read), module.state_dict()))
    return module


def dequantised(arrays: Mapping[str, np.ndarray], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return float weights and biases of the layers whose integers an archive holds, in the shapes that are wanted."""
    found = {}
    for layer in {name.removesuffix(".q") for name in arrays if name.endswith(".q")}:
        part = {key: arrays[f"{layer}.{key}"] for key in ("q", "scale", "zero", "bias_q", "bias_scale")}
        weight = (part["q"].astype(np.float32) - np.float32(part["zero"])) * np.float32(part["scale"])
        found[f"{layer}.weight"] = torch.from_numpy(weight).reshape(wanted[f"{layer}.weight"].shape)
        found[f"{layer}.bias"] = torch.from_numpy(part["bias_q"].astype(np.float32) * np.float32(part["bias_scale"]))
    return found


NETWORKS: dict[str, tuple[str, tuple[int, ...], Callable[[Path], nn.Module]]] = {
    "resnet20": ("resnet20-12fca82f.th", (3, 32, 32), lambda path: cifar_resnet(path, 20)),
    "resnet56": ("resnet56-4bfd9763.th", (3, 32, 32), lambda path: cifar_resnet(path, 56)),
    "mlperf_tiny_resnet8": ("mlperf_tiny_resnet8.pth", (3, 32, 32), tiny_resnet),
    "mobilenet_v2": ("mobilenet_v2_1.0_224_uint8.npz", (3, 224, 224), mobilenet),
}


def write_onnx(name: str, weights: Path, path: Path) -> Path:
    """Let torch's exporter write a network of `NETWORKS`, with an open number of images.

    Args:
        name: Which.
        weights: Folder of the trained weights.
        path: Of the file; left alone where it is there.
    """
    if not path.is_file():
        file, shape, make = NETWORKS[name]
        module = make(weights / file).eval()
        options: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "opset_version": OPSET}
        torch.onnx.export(  # noqa: TID251 - a file that a user brings was not written by us
            module, (torch.zeros(2, *shape),), path, dynamo=True, external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},), **options,
        )  # fmt: skip
    return path
