"""Network under training, with everything that an optimiser step changes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import NonFinite
from compress.training.distributed import Ranks
from compress.training.hooks import OptimizerHooks, TrainingHooks
from compress.training.settings import FitSettings
from compress.training.weight_averaging import WeightAverage


class Learner:
    """Network, optimiser, gradient scaler, averages of the weights and the hooks of a method.

    Args:
        module: Network that learns.
        settings: Optimiser, clipping, averages, precision.
        hooks: Hooks of a method, called in every step, or None.
        device: Device that the network will be moved to.
        ranks: The ranks, whose networks take the same steps.

    Attributes:
        module: Network that learns.
        hooks: Hooks of a method, or None.
        optimizer: Optimiser of all parameters of the network.
        moving: Moving average of the weights; None if not requested.
        tail: Average of the weights of the last steps; None if not requested.
    """

    def __init__(
        self, module: nn.Module, settings: FitSettings, hooks: TrainingHooks | None, device: torch.device, ranks: Ranks
    ) -> None:
        self.module, self.hooks = module, hooks
        self.optimizer = build_optimizer(module, settings)
        self.moving = WeightAverage(module, settings.ema) if settings.ema else None
        self.tail = WeightAverage(module, None) if settings.average_ratio else None
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self._ranks, self._clip = ranks, settings.gradient_clip

    @property
    def measured(self) -> nn.Module:
        """The network that is measured and returned: the moving average, if there is one."""
        return self.module if self.moving is None else self.moving.module

    @property
    def averages(self) -> list[WeightAverage]:
        """Requested averages of the weights."""
        return [average for average in (self.moving, self.tail) if average is not None]

    @property
    def rate(self) -> float:
        """Learning rate of the present step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def give_optimizer(self) -> None:
        """Pass the optimiser to hooks that change its state, after its saved state is loaded."""
        if isinstance(self.hooks, OptimizerHooks):
            self.hooks.on_optimizer(self.optimizer)

    def begin_step(self, step: int, rate: float) -> None:
        """Set the learning rate and clear the gradients; steps are counted from 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        if self.hooks is not None:
            self.hooks.on_step_begin(step)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a batch."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def average(self, loss: Tensor) -> Tensor:
        """Average over the ranks, after the backward pass, all that is not averaged in it; return the mean loss.

        These are the statistics of batch norms and the gradients of a method's own parameters. The latter are on the
        CPU, and `DistributedDataParallel` takes parameters of one kind of device only.

        Args:
            loss: Scalar, the loss of this rank's part of the step.
        """
        if self._ranks.size == 1:
            return loss
        learned = () if self.hooks is None else self.hooks.parameters()
        gradients = [parameter.grad for parameter in learned if parameter.grad is not None]
        mean = loss.clone()
        self._ranks.average([*gradients, *_statistics(self.module), mean])
        return mean

    def end_step(self, step: int, is_in_tail: bool) -> None:
        """Update the weights by the gradients.

        Args:
            step: Number of the step, counted from 0.
            is_in_tail: True adds the new weights to the average of the last steps.
        """
        hooks = self.hooks
        if self._clip is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        if hooks is not None:
            hooks.on_gradients(step)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if hooks is not None:
            hooks.on_step_end(step)
        if self.moving is not None:
            self.moving.update(self.module)
        if self.tail is not None and is_in_tail:
            self.tail.update(self.module)

    def require_finite_weights(self, step: int, total_steps: int) -> None:
        """Check the weights, so that no broken network is saved over a good one.

        Args:
            step: Number of the last step, counted from 1.
            total_steps: Number of steps of the run.

        Raises:
            NonFinite: A weight is NaN or infinite.
        """
        for name, value in self.module.state_dict().items():
            if not torch.isfinite(value).all():
                raise NonFinite(
                    f"Weights must be finite, '{name}' is not after step {step} of {total_steps} "
                    f"(learning rate {self.rate:.4g}).",
                    hint="Lower learning_rate.",
                )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` resumes from."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "averages": [average.state_dict() for average in self.averages],
            "hooks": None if self.hooks is None else self.hooks.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state; entries of other classes in it are ignored."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(saved)
        if self.hooks is not None:
            self.hooks.load_state_dict(state["hooks"])


def build_optimizer(module: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    """Return the optimiser of a network's parameters."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=decay)
    momentum = settings.momentum
    return torch.optim.SGD(module.parameters(), rate, momentum, weight_decay=decay, nesterov=momentum > 0)


def _statistics(network: nn.Module) -> Iterator[Tensor]:
    """Yield the floating-point buffers of a network: the statistics of batch norms."""
    yield from (buffer for buffer in network.buffers() if buffer.is_floating_point())
