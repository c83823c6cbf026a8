"""Trainability-preserving pruning: a growing penalty on removed filters, decorrelated from kept ones."""

import math
from typing import Any, ClassVar

from torch import Tensor

from compress.config.schema.methods import GregConfig, TppConfig
from compress.pruning.groups import ChannelGroup, Member
from compress.pruning.methods.base import Setting
from compress.pruning.methods.greg import Greg
from compress.pruning.methods.group_tensors import Rows, norm_factors, weight_rows


class Tpp(Greg):
    """Greg, variant 1, with a Gram term that pulls removed filters to be orthogonal to kept ones.

    The term applies to each layer that computes channels of a group with removed channels. Its kernels are W, (N, n),
    one filter per row, with its batch norm folded in by constant factors a, (N,). It adds to the loss

        strength * min(penalty, 1) * s * ||M * W W'||^2,   s = N / (||W||^2 mean(a^2))

    with the mask M: 1 in rows and in columns of removed filters, 0 elsewhere; s has no gradient. Divided by
    the kernels' own size, the strength depends on neither their width nor their scale. s is lowered where a step of the
    present learning rate would overshoot.

    Args:
        setting: Network, budget and schedule.
        options: See `TppConfig`.

    Raises:
        StageError: The run is too short for the penalty to bring the channels down; the hint names a
            sufficient number of steps.

    Source: Wang and Fu 2023, "Trainability Preserving Neural Pruning", ICLR, arXiv:2207.12534. First-order scores in
        place of filter norms, one ranking of all channels under a budget, s in place of 1000 / N^2, batch norms folded
        in, and a schedule in shares of the run are adaptations.
    """

    name: ClassVar[str] = "tpp"

    def __init__(self, setting: Setting, options: TppConfig | None = None) -> None:
        own = options or TppConfig()
        shared = own.model_dump(exclude={"strength"})
        super().__init__(setting, GregConfig(variant=1, **shared))
        self.strength = own.strength
        self._kernels = {name: _kernels_of(group) for name, group in setting.groups.items()}
        self._cross_before = 0.0

    def on_gradients(self, step: int) -> None:
        """Raise the penalties, and add them and the Gram term to the gradients."""
        super().on_gradients(step)
        if step == self.frozen:
            self._cross_before = self.cross_gram()
        if not self.strength:
            return
        for name in self.chosen:
            goes = self.goes(name)
            penalty = min(float(self.penalties[name].max()), 1.0)
            for kernel in self._kernels[name]:
                kernel.add_gradient(goes, self.strength * penalty, float(self.setting.rates[step]))

    def cross_gram(self) -> float:
        """Return the norm of the Gram matrices' part between removed and kept filters, over all layers."""
        squares = [
            float(kernel.cross_gram(self.goes(name)).square().sum())
            for name in self.chosen
            for kernel in self._kernels[name]
        ]
        return math.sqrt(sum(squares))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of `Greg`, and the norm of the cross-Gram matrices at the choice and now."""
        return {
            **super().metrics(),
            "cross_gram_before": self._cross_before,
            "cross_gram_after": self.cross_gram(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` resumes."""
        return {**super().state_dict(), "cross_before": self._cross_before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        super().load_state_dict(state)
        self._cross_before = state["cross_before"]


class _Kernel:
    """The kernels of one layer that compute channels of a group, one row for each of its outputs.

    Args:
        producer: The layer.
        gate: Batch norm behind the layer, or the layer itself.
        width: Number of channels of the group.
    """

    def __init__(self, producer: Member, gate: Member, width: int) -> None:
        self.rows: Rows = weight_rows(producer)
        self._gate, self._width = gate, width
        parts = int(getattr(producer.module, "groups", 1))
        part = self.rows.slots // (self.rows.parameter.shape[self.rows.axis] // parts)
        self._is_alike = part[:, None] == part[None, :]  # filters of one part of a grouped convolution read the same

    def mask(self, goes: Tensor) -> Tensor:
        """Return (N, N): 1 in rows and columns of the removed channels, (C,) bool."""
        gone = goes[self.rows.channels]
        return ((gone[:, None] | gone[None, :]) & self._is_alike).float()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return (N, n) the kernels with the batch norm folded in, and (N, 1) the factors of it."""
        device = self.rows.parameter.device
        factors = norm_factors(self._gate, self._width)[self.rows.channels, None].to(device)
        return self.rows.values.flatten(1) * factors, factors

    def add_gradient(self, goes: Tensor, strength: float, rate: float) -> None:
        """Add the gradient of strength * s * ||M * W W'||^2 at a learning rate."""
        kernels, factors = self.folded()
        gram = kernels @ kernels.T
        scale = self.scale(kernels, factors, gram, strength * rate)
        slopes = 4 * strength * scale * (gram * self.mask(goes).to(gram.device)) @ kernels
        values = self.rows.gradient
        self.rows.set_gradient(values + (factors * slopes).reshape(values.shape))

    @staticmethod
    def scale(kernels: Tensor, factors: Tensor, gram: Tensor, step_size: float) -> float:
        """Return s: N / (||W||^2 mean(a^2)), lowered if a step of `step_size` would move a filter beyond 0."""
        squares = float(kernels.square().sum()) * float(factors.square().mean())
        curvature = 4 * float(gram.abs().sum(1).max()) * float(factors.square().max()) * step_size
        wanted = len(kernels) / max(squares, 1e-12)
        return min(wanted, 1 / curvature) if curvature > 0 else wanted

    def cross_gram(self, goes: Tensor) -> Tensor:
        """Return (n, m) the products of removed with kept kernels, folded."""
        kernels, _ = self.folded()
        gone = goes[self.rows.channels]
        gram = (kernels @ kernels.T).cpu() * self._is_alike
        return gram[gone][:, ~gone]


def _kernels_of(group: ChannelGroup) -> list[_Kernel]:
    """Return the kernels of the layers that compute a group."""
    return [_Kernel(producer, gate, group.width) for producer, gate in zip(group.producers, group.gates, strict=True)]
