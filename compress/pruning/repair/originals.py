"""Outputs of the network before a cut, at the positions that refits sample; kept for the repairs of its other cuts.

Several cuts of one network are repaired towards the same outputs. They are computed with the first cut and read again
with the others, which saves a forward pass over all images for each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.pruning.repair.least_squares import Places

_MOST_BYTES = 5 * 10**8


@dataclass(frozen=True, slots=True)
class Sampled:
    """Input and output of one layer for one batch.

    Attributes:
        fingerprint: Shape, sum and sum of squares of the input.
        map_shape: Shape of the output behind its channels.
        rows: (images, positions, outputs) of a map; (rows, outputs) of other outputs.
    """

    fingerprint: tuple[object, ...]
    map_shape: torch.Size
    rows: Tensor

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor, places: Places) -> "Sampled":
        """Return the sample at the given places, or at fewer of the same seed later."""
        rows = places.rows_of(outputs).clone()  # no view of the output, which an activation may overwrite
        if outputs.ndim == 4:
            rows = rows.reshape(len(outputs), -1, rows.shape[-1])
        return cls(_fingerprint(inputs), outputs.shape[2:], rows)

    def equals_input(self, inputs: Tensor) -> bool:
        """Return whether a tensor is the layer's input."""
        return _fingerprint(inputs) == self.fingerprint

    def rows_of(self, places: Places) -> Tensor:
        """Return (rows, outputs), as `Places.rows_of` of the output, for as many places as were sampled or fewer."""
        return self.rows[:, : places.count].flatten(0, 1) if self.rows.ndim == 3 else self.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.rows.numel() * self.rows.element_size()


class OriginalOutputs:
    """Samples of one network's layers, and the means of their outputs.

    Attributes:
        means: Layer -> (n,) mean of each output.
    """

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}
        self._samples: dict[str, list[Sampled]] = {}
        self._images: tuple[int, ...] = ()
        self._bytes = 0

    def has(self, layers: Iterable[str], images: Sequence[int]) -> bool:
        """Return whether samples of all layers are there, for batches of these numbers of images."""
        return self._images == tuple(images) and self._samples.keys() >= set(layers)

    def get(self, layer: str) -> list[Sampled]:
        """Return the samples of a layer by batch."""
        return self._samples[layer]

    def add(self, layer: str, samples: list[Sampled], images: Sequence[int]) -> None:
        """Keep the samples of a layer, if there is room; those for other batches are dropped."""
        if self._images != tuple(images):
            self._images, self._samples, self._bytes = tuple(images), {}, 0
        self._bytes += sum(one.nbytes for one in samples) if layer not in self._samples else 0
        if self._bytes <= _MOST_BYTES:
            self._samples[layer] = samples


def _fingerprint(values: Tensor) -> tuple[object, ...]:
    total, squares = values.sum(dtype=torch.float64), values.square().sum(dtype=torch.float64)
    return values.shape, float(total), float(squares)
