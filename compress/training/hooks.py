"""Hooks of methods in the training loop."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer


class TrainingHooks(Protocol):
    """Hooks that `compress.training.loop.fit` calls in every step, in this order; steps are counted from 0.

    Hooks draw random numbers from the global generator, which the loop seeds for every step before `on_step_begin`. All
    other memory from one step to the next belongs in their state.
    """

    def parameters(self) -> Iterable[Tensor]:
        """Return parameters learned besides the network's; their gradients are averaged over the ranks, too.

        In a step, either all ranks have a gradient of one of them, or none has.
        """
        ...

    def on_step_begin(self, step: int) -> None:
        """Act before the forward pass."""
        ...

    def on_gradients(self, step: int) -> None:
        """Act after the backward pass; gradients may be changed. Gradients of weight decay are added later."""
        ...

    def on_step_end(self, step: int) -> None:
        """Act after the weights have changed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that `load_state_dict` resumes from."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        ...


@runtime_checkable
class OptimizerHooks(Protocol):
    """Hooks that change the state of the optimizer too, such as the momentum of some weights; optional."""

    def on_optimizer(self, optimizer: Optimizer) -> None:
        """Act before the first step of a process, after its state is loaded; the optimizer stays the same object."""
        ...
