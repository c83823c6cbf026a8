"""What are the weights of a network on average over the steps of its training?"""

import copy
from typing import Any

import torch
from torch import nn

_WARMUP = 10


class MovingAverage:
    """The exponential moving average of a network's weights and buffers.

    In the first steps the average forgets faster, so that it is not of the weights before training: the weight of what
    was is min(decay, (1 + n) / (10 + n)) after n steps.

    Args:
        module: The network that is trained; it is left as it is.
        decay: In (0, 1).

    Attributes:
        module: A copy that holds the average; in eval mode.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; the faster start as in
        TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._decay, self._count = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Let the network's present weights in."""
        share = 1 - min(self._decay, (1 + self._count) / (_WARMUP + self._count))
        self._count += 1
        present = module.state_dict()
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                value.lerp_(present[name], share)
            else:
                value.copy_(present[name])

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on."""
        return {"module": self.module.state_dict(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.module.load_state_dict(state["module"])
        self._count = state["count"]
