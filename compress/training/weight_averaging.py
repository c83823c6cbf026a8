"""Averages of weights over the steps of a training."""

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

_WARMUP = 10


class WeightAverage:
    """Average of a network's weights and buffers over steps: a moving one, or the mean of all updates.

    A moving average forgets faster in the first steps, so that weights from before training soon lose their influence:
    after n steps the old average has the weight min(decay, (1 + n) / (10 + n)).

    Args:
        module: The network in training, not modified.
        decay: Decay of the moving average, in (0, 1); None weighs all updates alike.

    Attributes:
        module: Copy of the network that holds the average, in eval mode.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; the faster start as in
        TensorFlow's ExponentialMovingAverage; all alike at the end of a run: Izmailov et al. 2018, arXiv:1803.05407.
    """

    def __init__(self, module: nn.Module, decay: float | None) -> None:
        self._averaged = AveragedModel(module, avg_fn=self._average, use_buffers=True)
        self._averaged.n_averaged.fill_(1)  # torch would copy the first weights in place of averaging them
        self._averaged.eval().requires_grad_(False)
        self._decay = decay

    @property
    def module(self) -> nn.Module:
        """The network that holds the average."""
        return self._averaged.module

    def update(self, module: nn.Module) -> None:
        """Add the network's present weights to the average."""
        self._averaged.update_parameters(module)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and its number of updates."""
        return {"module": self.module.state_dict(), "count": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.module.load_state_dict(state["module"])
        self._averaged.n_averaged.fill_(state["count"] + 1)

    @property
    def _updates(self) -> int:
        return int(self._averaged.n_averaged) - 1

    def _average(self, mean: Tensor, present: Tensor, _count: Tensor | int) -> Tensor:
        if not mean.is_floating_point():
            return present
        n = self._updates
        share = 1 / (n + 1) if self._decay is None else 1 - min(self._decay, (1 + n) / (_WARMUP + n))
        return mean.lerp(present, share)
