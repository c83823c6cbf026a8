"""Training-time methods: their interface and their setting.

A method is a set of hooks of the training loop. While the network trains it decides which channels are removed, and how
many of each group under one budget for all, and brings them to zero, so that the cut at the end changes next to
nothing:

    scores   of every channel, a moving average over steps; larger = keep
    chosen   the removed channels, by the budget and the scores; chosen again every so many steps
    frozen   from one step on the choice is final, and removed channels decay for the rest of the run

The scale and the shift of the batch norms that a channel passes decay, because a batch norm compensates small weights
before it. The weights themselves decay only where no batch norm follows. A zero-padded shortcut has nothing to
decay: its contribution to a removed channel is faded to 0 once the choice is final.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from compress.errors import StageError
from compress.pruning.groups import ChannelGroup
from compress.pruning.methods.group_tensors import unfit_gate
from compress.pruning.width_costs import ExpectedCost

Removed = dict[str, tuple[int, ...]]

DECAYED = 8.0
FADE = 0.5  # share of the steps after the choice in which shortcuts are faded to 0


class Choose(Protocol):
    """Choice of the removed channels that brings the network within its budget."""

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        damages: Mapping[str, np.ndarray] | None = None,
        closed: Sequence[str] = (),
        is_final: bool = False,
    ) -> Removed:
        """Return group name -> removed channels; groups that lose none are absent.

        Args:
            scores: (C,) for each group; larger = keep.
            damages: (levels,) damage of each allowed width by group; None to compute it from the scores.
            closed: Residual blocks that are removed, too.
            is_final: Whether the choice is final; widths are then timed if the budget is in milliseconds.

        Raises:
            BudgetUnreachable: No allowed widths are within the budgets.
        """
        ...


@dataclass(frozen=True)
class Setting:
    """Network, budget and schedule of a method's run.

    Attributes:
        module: The network in training.
        groups: Prunable channel groups; their members are layers of `module`.
        choose: Chooses the removed channels within the budget.
        levels: Group name -> allowed widths, ascending; the last is the full width.
        rates: (steps,) the learning rate of each step.
        momentum: Momentum of SGD.
        weight_decay: L2 factor that the optimiser adds to every gradient.
        seed: Seed of everything random.
        cost: Expected cost from the probabilities that channels and blocks are kept, as a share of the baseline's cost.
        kept_ratio: Share of the baseline's cost to keep.
        blocks: Removable residual block -> the part whose output is added to the block's input.
    """

    module: nn.Module
    groups: Mapping[str, ChannelGroup]
    choose: Choose
    levels: Mapping[str, Sequence[int]]
    rates: np.ndarray
    momentum: float
    weight_decay: float
    seed: int
    cost: ExpectedCost
    kept_ratio: float
    blocks: Mapping[str, str]

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return len(self.rates)

    def sized_decay(self, first: int) -> float:
        """Return the L2 factor that brings a parameter without gradient to e^-8 of its value, from a step to the last.

        Raises:
            StageError: The steps are too few for any factor: momentum alone forgets too slowly.
        """
        self.require_steps(first)
        return self.factor(DECAYED, first)

    def sized_ceiling(self, first: int, shape: np.ndarray | float) -> float:
        """Return the ceiling of a penalty on weights: 1, or the larger one that lets them decay to e^-8.

        Args:
            first: First step of the penalty.
            shape: (steps from there,) penalty as a share of the ceiling; 1 for a constant one.

        Raises:
            StageError: The steps are too few for any penalty.
        """
        self.require_steps(first)
        return max(1.0, DECAYED / self._reached(first, shape))

    def factor(self, exponent: float, first: int, last: int | None = None) -> float:
        """Return the L2 factor that brings weights without gradient to e^-exponent from step `first` to before `last`.

        Source: Ding et al. 2019, "Global Sparse Momentum SGD", arXiv:1909.12778: weights without gradient decay as
            exp(-sum of the rates * factor / (1 - momentum)). The factor follows from that here.
        """
        return exponent * (1 - self.momentum) / float(self.rates[first:last].sum())

    def require_decay(self, first: int, factors: np.ndarray | float, what: str) -> None:
        """Check that given L2 factors of the steps from `first` on let a parameter without gradient decay to e^-8.

        Raises:
            StageError: The decay is too small; the hint names a sufficient number of steps.
        """
        self.require_steps(first)
        reached = self._reached(first, factors)
        if reached < DECAYED:
            needed = math.ceil(self.steps * DECAYED / reached) if reached > 0 else math.inf
            raise StageError(
                f"Channels that go must decay to e^-{DECAYED:g} of what they were before the cut; {what} brings them "
                f"to e^-{reached:.2g} in {self.steps} steps.",
                hint=f"At this learning rate train for at least {needed} steps, or raise it.",
            )

    def _reached(self, first: int, factors: np.ndarray | float) -> float:
        """Return x, where L2 factors of the steps from `first` on let weights without gradient decay to e^-x."""
        return float((self.rates[first:] * factors).sum()) / (1 - self.momentum)

    def require_left(self, first: int) -> None:
        """Check that steps are left from `first` on.

        Raises:
            StageError: No step with a learning rate is left.
        """
        if not self.rates[first:].any():
            raise StageError(
                f"The choice must stand before the last step; of {self.steps} steps none is left after it.",
                hint="Train for longer.",
            )

    def require_steps(self, first: int) -> None:
        """Check that the steps from `first` on are enough for momentum to forget: it keeps sqrt(momentum) a step.

        Raises:
            StageError: The steps are too few.
        """
        self.require_left(first)
        least = math.ceil(2 * DECAYED / -math.log(self.momentum)) if self.momentum > 0 else 1
        left = self.steps - first
        if left < least:
            raise StageError(
                f"Channels that go must decay to e^-{DECAYED:g} of what they were before the cut; at momentum "
                f"{self.momentum:g} that takes {least} steps, and of {self.steps} steps the choice leaves {left}.",
                hint=f"Train for at least {math.ceil(least * self.steps / max(left, 1))} steps.",
            )


class Hooks(Protocol):
    """Hooks of one training run, as `compress.training.hooks.TrainingHooks`."""

    def parameters(self) -> Iterable[Tensor]:
        """Return the tensors that are learned besides the network."""
        ...

    def on_step_begin(self, step: int) -> None:
        """Act before the forward pass."""
        ...

    def on_gradients(self, step: int) -> None:
        """Act after the backward pass."""
        ...

    def on_step_end(self, step: int) -> None:
        """Act after the weights have changed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` resumes."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        ...


class Method(Hooks, Protocol):
    """A training-time method: hooks of the training, and their result.

    Attributes:
        name: Name in the pipeline file.
    """

    name: ClassVar[str]

    def __init__(self, setting: Setting, options: Any) -> None: ...

    @staticmethod
    def unfit(group: ChannelGroup) -> str | None:
        """Return the reason why this method cannot prune a group, or None."""
        ...

    def finish(self) -> None:
        """Remove all hooks from the network after the last step, and leave it ready to be cut."""
        ...

    @property
    def removed(self) -> Removed:
        """Removed channels of each group that loses some."""
        ...

    @property
    def closed(self) -> tuple[str, ...]:
        """Removed residual blocks."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return metrics of the run for the report."""
        ...

    def cause(self) -> str:
        """Return the likely cause of a higher loss after the cut, and the remedy; after `finish`."""
        ...


@runtime_checkable
class WarningMethod(Protocol):
    """A method that may warn the user, besides its metrics for the report."""

    def warnings(self) -> list[str]:
        """Return one text for each warning; after `finish`."""
        ...


class TrainingMethod:
    """Defaults of a method that learns the network alone, removes no blocks and leaves nothing to finish."""

    @staticmethod
    def unfit(group: ChannelGroup) -> str | None:
        """Return the reason why this method cannot prune a group, or None."""
        return unfit_gate(group)

    @property
    def closed(self) -> tuple[str, ...]:
        """No residual block is removed."""
        return ()

    def parameters(self) -> Iterable[Tensor]:
        """Return nothing: only the network is learned."""
        return ()

    def on_step_begin(self, step: int) -> None:
        """Do nothing."""

    def on_step_end(self, step: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing: the network is ready to be cut."""
