"""Linear regression of a layer's outputs on its inputs, for layers that can be refitted."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RIDGE = 1e-4
_ROWS_PER_UNKNOWN, _FEWEST_POSITIONS = 4, 32
_BLOCK = 512


def is_refittable(layer: nn.Module) -> bool:
    """Return whether a layer is linear in its inputs, and these can be extracted as patches."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def positions_needed(unknowns: int, images: int) -> int:
    """Return the number of positions to sample in each image, so that there are several rows for each unknown."""
    return max(_FEWEST_POSITIONS, -(-_ROWS_PER_UNKNOWN * unknowns // images))


@dataclass(frozen=True, slots=True)
class Places:
    """Sample of output positions of each image.

    Attributes:
        count: Number of positions; a smaller map is used completely.
        seed: Seed of the sample, for one batch.
    """

    count: int
    seed: int

    def rows_of(self, maps: Tensor) -> Tensor:
        """Return (rows, C) values at the sampled positions of (N, C, H, W) maps; all rows of (N, ..., C) features."""
        if maps.ndim != 4:
            return maps.reshape(-1, maps.shape[-1])
        down, across = self.inside(*maps.shape[2:])
        return maps[:, :, down, across].transpose(1, 2).flatten(0, 1)

    def inside(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return the rows and the columns of the sampled positions in a map."""
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(height * width, generator=generator)[: self.count]
        return chosen // width, chosen % width


def regression_rows(
    layer: nn.Conv2d | nn.Linear, inputs: Tensor, outputs: Tensor, places: Places
) -> tuple[Tensor, Tensor]:
    """Return (rows, inputs * kernel) inputs and (rows, outputs) outputs at the same positions in every image."""
    return input_rows(layer, inputs, outputs.shape[2:], places), places.rows_of(outputs)


def input_rows(layer: nn.Conv2d | nn.Linear, inputs: Tensor, map_shape: torch.Size, places: Places) -> Tensor:
    """Return (rows, inputs * kernel) inputs at sampled positions of the output, the same in every image.

    Args:
        layer: The layer.
        inputs: Its inputs.
        map_shape: (H, W) of its output; not used for a linear layer.
        places: Sample of positions.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    return _patches(layer, inputs, *places.inside(*map_shape))


def _patches(layer: nn.Conv2d, inputs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return (N * positions, inputs * kernel) inputs that a convolution reads for its outputs at (rows, columns)."""
    vertical, horizontal = (int(padding) for padding in layer.padding)
    padded = F.pad(inputs, (horizontal, horizontal, vertical, vertical))
    offsets = [torch.arange(size) * step for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    down = (rows[:, None] * layer.stride[0] + offsets[0])[:, :, None]
    across = (columns[:, None] * layer.stride[1] + offsets[1])[:, None, :]
    return padded[:, :, down, across].transpose(1, 2).flatten(0, 1).flatten(1)


class GramSum:
    """The Gram matrix of rows, added up batch by batch in float64.

    It is symmetric: of each batch only the blocks on and above the diagonal are computed.

    Args:
        size: Number of entries of a row.
    """

    def __init__(self, size: int) -> None:
        self._sum = torch.zeros(size, size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add (count, size) rows."""
        for start in range(0, len(self._sum), _BLOCK):
            block = slice(start, start + _BLOCK)
            self._sum[block, start:] += rows[:, block].T @ rows[:, start:]

    def matrix(self) -> Tensor:
        """Return the (size, size) matrix itself, not a copy."""
        for start in range(0, len(self._sum), _BLOCK):
            block = slice(start, start + _BLOCK)
            self._sum[start + _BLOCK :, block] = self._sum[block, start + _BLOCK :].T
        return self._sum
