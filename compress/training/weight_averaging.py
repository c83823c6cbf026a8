"""Averages of weights over the steps of a training."""

import copy
from typing import Any

import torch
from torch import nn

_WARMUP = 10


class WeightAverage:
    """An average of a network's weights and buffers over steps: a moving one, or one of all that were let in.

    A moving average forgets faster in the first steps, so that it is not of the weights before training: what was
    weighs min(decay, (1 + n) / (10 + n)) after n steps.

    Args:
        module: The network that is trained; it is left as it is.
        decay: In (0, 1); None lets all in alike.

    Attributes:
        module: A copy that holds the average; in eval mode.
        count: How often weights were let in.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; the faster start as in
        TensorFlow's ExponentialMovingAverage; all alike at the end of a run: Izmailov et al. 2018, arXiv:1803.05407.
    """

    def __init__(self, module: nn.Module, decay: float | None) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.count, self._decay = 0, decay

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Let the network's present weights in."""
        n = self.count
        share = 1 / (n + 1) if self._decay is None else 1 - min(self._decay, (1 + n) / (_WARMUP + n))
        self.count += 1
        present = module.state_dict()
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                value.lerp_(present[name], share)
            else:
                value.copy_(present[name])

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on."""
        return {"module": self.module.state_dict(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.module.load_state_dict(state["module"])
        self.count = state["count"]
