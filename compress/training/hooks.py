"""Hooks of the one training loop."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer


class TrainingHooks(Protocol):
    """Called by `compress.training.loop.fit` in every step, in this order; steps are counted from 0.

    What a hook draws at random follows from the global generator, which the loop seeds for every step before
    `on_step_begin`; all else that it remembers from one step to the next is in its state.
    """

    def parameters(self) -> Iterable[Tensor]:
        """Return what is learned besides the network; of several processes the gradients are averaged, too."""
        ...

    def on_step_begin(self, step: int) -> None:
        """Before the forward pass."""
        ...

    def on_gradients(self, step: int) -> None:
        """After the backward pass; gradients may be changed. Those of weight decay are added later."""
        ...

    def on_step_end(self, step: int) -> None:
        """After the weights have changed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` goes on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        ...


@runtime_checkable
class OptimizerHooks(Protocol):
    """Hooks that change the state of the optimizer too, such as the momentum of some weights; optional."""

    def on_optimizer(self, optimizer: Optimizer) -> None:
        """Before the first step of a process, once its saved state is loaded; the optimizer stays the same object."""
        ...
