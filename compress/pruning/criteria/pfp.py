"""Provable filter pruning: channels with the smallest share in any output of their readers go first."""

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from compress.errors import InternalError, UnsupportedLayer
from compress.pruning.criteria.base import Evidence, Order, WidthsBy
from compress.pruning.criteria.contributions import Contributions
from compress.pruning.groups import ChannelGroup

_CONSTANT, _FAILURE = 3.0, 1e-16  # C and delta of the paper's code
_SPAN = (-27.0, 27.0)  # natural logarithms of the error parameters that are looked at
_BISECTIONS = 60


class Pfp:
    """Sensitivity of a channel: its largest share in any output of any layer that reads it. No labels are used.

    A width's damage is the error parameter eps at which the paper keeps so many channels, so that one ranking of all
    groups by damage is the paper's shared error; `allocation: shared_error` is its rule to the letter.

    Source: Liebenwein et al. 2020, "Provable Filter Pruning for Efficient Neural Networks", ICLR, arXiv:1911.07412, in
        its deterministic form. The largest share over all readers of a group replaces the paper's chain of layers, and
        the number of positions inside a logarithm is left out; both are adaptations.
    """

    name: ClassVar[str] = "pfp"
    evidence: ClassVar[Evidence] = "contributions"
    order: ClassVar[Order] = "scores"
    widths_by: ClassVar[WidthsBy] = "scores"
    comparable: ClassVar[bool] = True
    treats_equals_equally: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        pass

    def scores(self, group: ChannelGroup, stats: Contributions | None) -> Tensor:
        """Score each channel of `group` by its sensitivity.

        Args:
            group: C coupled channels.
            stats: From `collect_contributions`.

        Returns:
            (C,) float32 in [0, 1].

        Raises:
            UnsupportedLayer: No convolution or linear layer reads the group.
        """
        if stats is None:
            raise InternalError(f"Criterion '{self.name}' was called without contributions.")
        shares = self._shares(stats)
        total = torch.zeros(group.width)
        readers = [reader for reader in group.readers if reader.layer in shares]
        if not readers:
            raise UnsupportedLayer(
                f"Criterion '{self.name}' needs a convolution or linear layer that reads a channel group, none reads "
                f"'{group.name}'."
            )
        for reader in readers:
            total.scatter_reduce_(0, reader.channels, shares[reader.layer][reader.slots], "amax")
        return total

    def damages(self, scores: np.ndarray) -> np.ndarray:
        """Return (U + 1,) the error parameter eps at which all but n channels are kept.

        Source: m(eps) = ceil(3 (6 + 2 eps) S alpha / eps^2) samples, S the sum of all sensitivities, and
            kept(eps) = ceil(sum of 1 - (1 - p)^m) with p = sensitivity / S.
        """
        units, total = len(scores), float(scores.sum())
        errors = np.zeros(units + 1)
        if total <= 0 or units < 2:
            return errors
        alpha = 2 * _CONSTANT * math.log(16 / _FAILURE)
        missed = np.log1p(-np.minimum(scores / total, 1 - 1e-12))
        kept = np.arange(units, 0, -1)  # with 0, 1, ... removed
        low, high = np.full(units, _SPAN[0]), np.full(units, _SPAN[1])
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            eps = np.exp(middle)
            samples = np.ceil(3 * (6 + 2 * eps) * total * alpha / eps**2)
            expected = -np.expm1(samples[:, None] * missed).sum(1)
            fits = np.ceil(expected - 1e-9) <= kept
            low, high = np.where(fits, low, middle), np.where(fits, middle, high)
        errors[:-1] = np.where(high <= _SPAN[0] + 1e-6, 0.0, np.exp(high))
        errors[0] = 0.0
        errors[-1] = errors[-2]
        return np.maximum.accumulate(errors)

    def _shares(self, stats: Contributions) -> dict[str, Tensor]:
        return dict(stats.largest)


class Sipp(Pfp):
    """As `pfp`, with the mean over the positions of an image in place of the largest: an outlier decides less.

    With `score_images: 1` it is the paper's single-sample form.

    Source: Baykal et al. 2019, "SiPPing Neural Networks: Sensitivity-informed Provable Pruning of Neural Networks",
        arXiv:1910.05422, whose sensitivities of single weights are joined to one for each channel by their largest.
    """

    name: ClassVar[str] = "sipp"

    def _shares(self, stats: Contributions) -> dict[str, Tensor]:
        return dict(stats.mean)
