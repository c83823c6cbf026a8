"""What does a layer read for what it gives? Rows of a linear regression, for layers that can be refitted."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RIDGE = 1e-4
_ROWS_PER_UNKNOWN, _FEWEST_POSITIONS = 4, 32


def is_refittable(layer: nn.Module) -> bool:
    """Whether a layer is linear in what it reads, and its inputs can be taken out of its images."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def positions_needed(unknowns: int, images: int) -> int:
    """Return how many positions of each image to look at, so that there are several rows for each unknown."""
    return max(_FEWEST_POSITIONS, -(-_ROWS_PER_UNKNOWN * unknowns // images))


def regression_rows(
    layer: nn.Conv2d | nn.Linear, inputs: Tensor, outputs: Tensor, positions: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return (rows, inputs * kernel) and (rows, outputs), at the same places in every image."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1]), outputs.reshape(-1, outputs.shape[-1])
    width = outputs.shape[3]
    chosen = torch.randperm(outputs.shape[2] * width, generator=generator)[:positions]
    rows, columns = chosen // width, chosen % width
    return _patches(layer, inputs, rows, columns), outputs[:, :, rows, columns].transpose(1, 2).flatten(0, 1)


def _patches(layer: nn.Conv2d, inputs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return what a convolution reads for the outputs at (rows, columns): (N * positions, inputs * kernel)."""
    vertical, horizontal = (int(padding) for padding in layer.padding)
    padded = F.pad(inputs, (horizontal, horizontal, vertical, vertical))
    offsets = [torch.arange(size) * step for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    down = (rows[:, None] * layer.stride[0] + offsets[0])[:, :, None]
    across = (columns[:, None] * layer.stride[1] + offsets[1])[:, None, :]
    return padded[:, :, down, across].transpose(1, 2).flatten(0, 1).flatten(1)
