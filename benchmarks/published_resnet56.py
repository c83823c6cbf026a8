"""torch-pruning's published ResNet-56 for CIFAR-10, with and without its channels."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.cost.macs import count_macs
from compress.data.preprocessing import Preprocessing
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.artifacts import Signature, TensorSpec
from compress.search.context import StageContext
from compress.search.export import OPSET, conditions_of
from compress.verification.measurement import measure_onnx

FULL_WIDTHS = (16, 32, 64)
BLOCKS = 9
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the stride is 2."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both branches, (N, C, H, W)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


class ProjectedResNet56(nn.Module):
    """ResNet-56 with projection shortcuts, of any widths, named as in torch-pruning's published file.

    Args:
        stream: Channels between blocks, for each of the three layers.
        inner: Channels inside the nine blocks of each layer.
    """

    def __init__(self, stream: Sequence[int], inner: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, stream[0], 3, 1, 1, bias=False), nn.BatchNorm2d(stream[0])
        inputs = stream[0]
        for number, (outputs, widths) in enumerate(zip(stream, inner, strict=True), start=1):
            blocks: list[nn.Module] = []
            for width in widths:
                stride = 2 if number > 1 and not blocks else 1
                blocks.append(Block(inputs, width, outputs, stride))
                inputs = outputs
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Turn (N, 3, 32, 32) images into (N, 10) logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)  # type: ignore[operator]
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def export_published(weights: Path, folder: Path, ctx: StageContext) -> dict[str, Any]:
    """Write the published network and the same network with all its channels, `slim.onnx` and `dense.onnx`.

    Args:
        weights: The published state dict.
        folder: Where to write.
        ctx: Has the evaluation split.

    Returns:
        {"macs" times fewer, "top1" of the file on the evaluation split}.
    """
    state = torch.load(weights, weights_only=True)
    inner = [[len(state[f"layer{n}.{i}.conv1.weight"]) for i in range(BLOCKS)] for n in (1, 2, 3)]
    slim = ProjectedResNet56([len(state[f"layer{n}.0.conv2.weight"]) for n in (1, 2, 3)], inner)
    slim.load_state_dict(state)
    dense = ProjectedResNet56(FULL_WIDTHS, [[width] * BLOCKS for width in FULL_WIDTHS])
    preprocessing = Preprocessing(mean=MEAN, std=STD)
    signature = Signature((TensorSpec("images", ("batch", 3, 32, 32)),), (TensorSpec("logits", ("batch", 10)),))
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in (("slim", slim), ("dense", dense)):
        export_onnx(
            network.eval(), signature, folder / f"{name}.onnx", ExportSettings(opset=OPSET), preprocessing=preprocessing
        )
    evaluation = replace(ctx.data.evaluation, preprocessing=preprocessing)
    figures = measure_onnx(folder / "slim.onnx", evaluation, conditions_of(ctx.deploy), progress=ctx.progress)
    example = torch.zeros(1, 3, 32, 32)
    return {"macs": count_macs(dense, example) / count_macs(slim, example), "top1": figures.quality["top1"]}
