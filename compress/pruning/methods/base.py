"""What is a training-time method, and what does it work with?

A method is a set of hooks of the training loop. While the network trains it decides which channels go, and how many of
each group under one budget for all, and brings them to zero, so that the cut at the end changes next to nothing:

    scores   of every channel, a moving average over steps; larger = keep
    chosen   the channels that go, as the budget and the scores have it; chosen again every so many steps
    frozen   from one step on the choice stands, and what is chosen has the rest of the run to decay in

What decays is the scale and the shift of the batch norms a channel passes, because a batch norm makes up for small
weights before it; only where no batch norm follows do the weights themselves decay. A zero-padded shortcut has nothing
to decay: what it gives to a channel that goes is faded to 0 once the choice stands.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import StageError
from compress.onnx_file.counting import FIXED_BUFFER
from compress.pruning.groups import BATCH_NORMS, ChannelGroup, Member
from compress.pruning.shortcuts import FixedShortcut
from compress.pruning.width_costs import ExpectedCost

Removed = dict[str, tuple[int, ...]]

DECAYED = 8.0
FADE = 0.5  # share of the steps after the choice in which what is faded comes to 0
_REMEMBERED = 0.9


class Choose(Protocol):
    """What says which channels go, so that the network is within its budget."""

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        damages: Mapping[str, np.ndarray] | None = None,
        closed: Sequence[str] = (),
        is_final: bool = False,
    ) -> Removed:
        """Return group name -> channels that go; groups that lose none are absent.

        Args:
            scores: (C,) for each group; larger = keep.
            damages: (levels,) of each group, where its scores do not say what each allowed width costs.
            closed: Residual blocks that go, too.
            is_final: Whether the choice will stand; widths are then timed, where the budget is in milliseconds.

        Raises:
            BudgetUnreachable: No allowed widths are within the budgets.
        """
        ...


@dataclass(frozen=True)
class Setting:
    """What a method works with.

    Attributes:
        module: The network that is trained.
        groups: Its channel groups that may be cut; their members are layers of `module`.
        choose: Says which channels go.
        levels: Group name -> the widths it may have, ascending; the last is the full width.
        rates: (steps,) the learning rate of each step.
        momentum: Of SGD.
        weight_decay: L2 factor that the optimiser adds to every gradient.
        seed: Decides everything random.
        cost: What the network costs by the chances of its channels and blocks, as a share of the baseline.
        kept_ratio: The share that is to be kept.
        blocks: Residual blocks that may go -> the part whose output is added to the block's input.
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
        """Of the whole run."""
        return len(self.rates)

    def sized_decay(self, first: int) -> float:
        """Return the L2 factor that, from a step to the last one, brings a parameter without gradient to e^-8 of it.

        Raises:
            StageError: The steps are too few for any factor: momentum alone forgets too slowly.
        """
        self.require_steps(first)
        return self.factor(DECAYED, first)

    def sized_ceiling(self, first: int, shape: np.ndarray | float) -> float:
        """Return the ceiling of a penalty on weights: 1, or what is needed for them to decay to e^-8.

        Args:
            first: The step with which the penalty begins.
            shape: (steps from there,) the share of the ceiling that the penalty has; 1 is all the time.

        Raises:
            StageError: The steps are too few for any penalty.
        """
        self.require_steps(first)
        return max(1.0, DECAYED / self._reached(first, shape))

    def factor(self, exponent: float, first: int, last: int | None = None) -> float:
        """Return the L2 factor that, from step `first` to before `last`, decays what gets no gradient to e^-exponent.

        Source: Ding et al. 2019, "Global Sparse Momentum SGD", arXiv:1909.12778: what gets no gradient decays as
            exp(-sum of the rates * factor / (1 - momentum)). The factor follows from that here.
        """
        return exponent * (1 - self.momentum) / float(self.rates[first:last].sum())

    def require_decay(self, first: int, factors: np.ndarray | float, what: str) -> None:
        """Check that given L2 factors of the steps from `first` on let a parameter without gradient decay to e^-8.

        Raises:
            StageError: They do not; says how many steps would do.
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
        """Return x, where L2 factors of the steps from `first` on let what gets no gradient decay to e^-x."""
        return float((self.rates[first:] * factors).sum()) / (1 - self.momentum)

    def require_left(self, first: int) -> None:
        """Check that steps are left from `first` on.

        Raises:
            StageError: None is.
        """
        if not self.rates[first:].any():
            raise StageError(
                f"The choice must stand before the last step; of {self.steps} steps none is left after it.",
                hint="Train for longer.",
            )

    def require_steps(self, first: int) -> None:
        """Check that the steps from `first` on are enough for momentum to forget: it keeps sqrt(momentum) a step.

        Raises:
            StageError: They are not.
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


class Method(Protocol):
    """A training-time method: hooks as `compress.training.hooks.TrainingHooks`, and what comes of them.

    Attributes:
        name: As in the pipeline file.
    """

    name: ClassVar[str]

    def __init__(self, setting: Setting, options: Any) -> None: ...

    @staticmethod
    def unfit(group: ChannelGroup) -> str | None:
        """Say why a group cannot be cut by this method, or None."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """Return what it learns besides the network."""
        ...

    def on_step_begin(self, step: int) -> None:
        """Before the forward pass."""
        ...

    def on_gradients(self, step: int) -> None:
        """After the backward pass."""
        ...

    def on_step_end(self, step: int) -> None:
        """After the weights have changed."""
        ...

    def finish(self) -> None:
        """After the last step: take all hooks off the network, and leave in it what is to be cut."""
        ...

    @property
    def removed(self) -> Removed:
        """The channels that go."""
        ...

    @property
    def closed(self) -> tuple[str, ...]:
        """The residual blocks that go."""
        ...

    def figures(self) -> dict[str, float]:
        """Return what the report tells of the run."""
        ...

    def cause(self) -> str:
        """Say what it would come from, were the loss higher after the cut, and what would help; after `finish`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` goes on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        ...


@runtime_checkable
class WarningMethod(Protocol):
    """A method that may have something to warn about besides what it is asked for the report."""

    def warnings(self) -> list[str]:
        """Return what the user must hear of, one text each; after `finish`."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """The part of one parameter that belongs to the channels of a group.

    Attributes:
        parameter: Of a layer; or a buffer of it.
        slots: (n,) positions on its channel axis.
        channels: (n,) the channel of the group that each belongs to.
        axis: That axis.
    """

    parameter: Tensor
    slots: Tensor
    channels: Tensor
    axis: int = 0

    def among(self, channels: Tensor) -> "Rows":
        """Return the part that belongs to some of the channels, (C,) bool."""
        places = channels[self.channels]
        return replace(self, slots=self.slots[places], channels=self.channels[places])

    @property
    def values(self) -> Tensor:
        """(n, ...) the parameter at the slots, a copy."""
        return self.parameter.detach().transpose(0, self.axis)[self.slots]

    @property
    def gradient(self) -> Tensor:
        """(n, ...) its gradient there, a copy; zero where there is none."""
        gradient = self.parameter.grad
        return torch.zeros_like(self.values) if gradient is None else gradient.transpose(0, self.axis)[self.slots]

    def set_values(self, values: Tensor) -> None:
        """Set the parameter at the slots."""
        self.parameter.detach().transpose(0, self.axis)[self.slots] = values

    def set_gradient(self, gradient: Tensor) -> None:
        """Set the gradient at the slots."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        self.parameter.grad.transpose(0, self.axis)[self.slots] = gradient

    def spread(self, factors: Tensor) -> Tensor:
        """Return (n, 1, ...) the factors, (C,), of the channels the slots belong to."""
        return factors[self.channels].reshape(-1, *[1] * (self.parameter.ndim - 1)).to(self.parameter.device)


class Shortcuts:
    """Contribution of zero-padded shortcuts to the channels of a group.

    Their weights are fixed and no norm lies behind them, so that a channel whose norms are all at 0 still has what they
    give. The factors are written into the weights: they are saved with the network, and no hook is needed.

    Args:
        group: Its shortcuts give in full.
    """

    def __init__(self, group: ChannelGroup) -> None:
        self._members = fixed_members(group)
        self._whole = [_fixed_rows(member).values for member in self._members]

    @torch.no_grad()
    def give(self, factors: Tensor) -> None:
        """Let them give from now on what they gave at the start times (C,) factors."""
        for member, whole in zip(self._members, self._whole, strict=True):
            rows = _fixed_rows(member)
            rows.set_values(whole.to(rows.parameter.device) * rows.spread(factors))


class GroupTensors:
    """The parameters that compute and normalise the channels of a group.

    What is by channel comes on the CPU, wherever the parameters are.

    Attributes:
        gates: For each place where multiplying a channel by 0 is the same as removing it, the parameters that are
            linear in such a factor.
        filters: Of convolutions and linear layers, those of depthwise ones among them.
        decaying: Those that must be 0 for the channels to be: scales and shifts of the norms, and the filters of
            layers that no norm follows.
        shortcuts: What zero-padded shortcuts give to them.
    """

    def __init__(self, group: ChannelGroup) -> None:
        self.width = group.width
        self.gates = [rows_of(gate) for gate in group.gates]
        self.filters = [
            rows for member in group.members if member.axis == "out" and not member.is_norm for rows in rows_of(member)
        ]
        norms = [rows for member in group.norms for rows in rows_of(member)]
        self.decaying = norms + [rows for member in group.bare for rows in rows_of(member)]
        self.shortcuts = Shortcuts(group)

    def derivatives(self) -> Tensor:
        """Return (C,) the derivative of the loss by a factor 1 at each channel, from the gradients of the parameters.

        It is where the parameters are, so that nobody waits for a GPU.

        What such a factor multiplies is linear in the parameters of the gate, so the derivative is the sum over them
        of parameter * gradient; over all gates of a channel it is added up before anybody takes an absolute value.
        """
        total = torch.zeros(self.width, device=self.gates[0][0].parameter.device)
        for gate in self.gates:
            for rows in gate:
                products = (rows.values * rows.gradient).reshape(len(rows.slots), -1).sum(1)
                total.index_add_(0, rows.channels.to(total.device), products)
        return total

    def stop(self, channels: Tensor) -> None:
        """Zero the gradients of the channels, (C,) bool, in all these parameters."""
        kept = (~channels).float()
        for rows in self.every():
            rows.set_gradient(rows.gradient * rows.spread(kept))

    def decay(self, factors: Tensor, with_filters: bool = False) -> None:
        """Add factor * parameter to the gradients, with a factor, (C,), for each channel."""
        for rows in self.every() if with_filters else self.decaying:
            rows.set_gradient(rows.gradient + rows.spread(factors) * rows.values)

    def strength(self) -> Tensor:
        """Return (C,) the root of the sum of squares of what decays in each channel."""
        total = torch.zeros(self.width)
        for rows in self.decaying:
            squares = rows.values.reshape(len(rows.slots), -1).square().sum(1)
            total.index_add_(0, rows.channels, squares.cpu())
        return total.sqrt()

    def every(self) -> list[Rows]:
        """Return all of them, each once."""
        seen = {id(rows.parameter) for rows in self.decaying}
        return self.decaying + [rows for rows in self.filters if id(rows.parameter) not in seen]


class Scored:
    """What the methods share that choose by scores: the scores, the choice, and when it stands.

    Args:
        setting: What to work with.
        frozen: The step from which on the choice stands.
        interval: Steps from one choice to the next before that.
        first: The step of the first choice; no channel goes before.
    """

    def __init__(self, setting: Setting, frozen: int, interval: int, first: int = 0) -> None:
        self.setting, self.frozen, self.interval, self.first = setting, frozen, interval, first
        self.tensors = {name: GroupTensors(group) for name, group in setting.groups.items()}
        self.scores = {name: torch.zeros(group.width) for name, group in setting.groups.items()}
        self.chosen: Removed = {}
        self.reactivated = 0
        self._before = {name: tensors.strength() for name, tensors in self.tensors.items()}

    @staticmethod
    def unfit(group: ChannelGroup) -> str | None:
        """Say why a group cannot be cut by this method, or None."""
        return unfit_gate(group)

    @property
    def removed(self) -> Removed:
        """The channels that go."""
        return self.chosen

    @property
    def closed(self) -> tuple[str, ...]:
        """No residual block goes."""
        return ()

    def parameters(self) -> Iterable[Tensor]:
        """Return nothing: all that is learned is the network."""
        return ()

    def on_step_begin(self, step: int) -> None:
        """Nothing is done."""

    def on_step_end(self, step: int) -> None:
        """Fade the contribution of zero-padded shortcuts to removed channels, once the choice is final."""
        if step < self.frozen:
            return
        left = faded(step, self.frozen, self.setting.steps)
        for name in self.chosen:
            self.tensors[name].shortcuts.give(torch.where(self.goes(name), left, 1.0))

    def finish(self) -> None:
        """The network is as it is to be cut."""

    def observe(self, step: int) -> None:
        """Let the gradients of this step into the scores, and choose when it is time to."""
        derivatives = torch.cat([tensors.derivatives() for tensors in self.tensors.values()]).cpu()
        widths = [len(scores) for scores in self.scores.values()]
        for name, present in zip(self.scores, torch.split(derivatives, widths), strict=True):
            self._average(name, present.abs())
        is_due = self.first <= step < self.frozen and (step - self.first) % self.interval == 0
        if is_due or step == self.frozen:
            self._choose(step == self.frozen)

    def goes(self, name: str) -> Tensor:
        """Return (C,) bool: the channels of a group that go, by the present choice."""
        goes = torch.zeros(self.setting.groups[name].width, dtype=torch.bool)
        goes[list(self.chosen.get(name, ()))] = True
        return goes

    def figures(self) -> dict[str, float]:
        """Return how many channels came back, and the mean share of their strength that channels that go have left."""
        left = [
            (tensors.strength() / self._before[name].clamp_min(1e-12))[self.goes(name)]
            for name, tensors in self.tensors.items()
        ]
        every = torch.cat(left) if left else torch.zeros(0)
        return {"reactivated": self.reactivated, "left_ratio": float(every.mean()) if len(every) else 0.0}

    def cause(self) -> str:
        """Say what it would come from, were the loss higher after the cut, and what would help."""
        left = self.figures()["left_ratio"]
        return f"What went had {left:.2%} of its strength left; more steps after the choice stands would help."

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` goes on."""
        return {
            "scores": self.scores,
            "chosen": {name: list(channels) for name, channels in self.chosen.items()},
            "reactivated": self.reactivated,
            "before": self._before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.scores, self._before = state["scores"], state["before"]
        self.chosen = {name: tuple(channels) for name, channels in state["chosen"].items()}
        self.reactivated = state["reactivated"]

    def _average(self, name: str, present: Tensor) -> None:
        """Let the (C,) absolute derivatives of one step into the scores of a group."""
        self.scores[name].mul_(_REMEMBERED).add_(present, alpha=1 - _REMEMBERED)

    def _choose(self, is_final: bool) -> None:
        before = {(name, channel) for name, channels in self.chosen.items() for channel in channels}
        self.chosen = self.setting.choose(self.scores, is_final=is_final)
        after = {(name, channel) for name, channels in self.chosen.items() for channel in channels}
        self.reactivated += len(before - after)


def faded(step: int, first: int, steps: int) -> float:
    """Return the share that a step leaves of what is faded from step `first` on, in half of the steps from there.

    >>> [faded(step, 4, 8) for step in range(4, 8)]
    [0.5, 0.0, 0.0, 0.0]
    """
    return max(0.0, 1 - (step + 1 - first) / max(1.0, FADE * (steps - first)))


def fixed_members(group: ChannelGroup) -> list[Member]:
    """Return the zero-padded shortcuts that give to the channels of a group."""
    return [member for member in group.members if member.axis == "out" and isinstance(member.module, FixedShortcut)]


def _fixed_rows(member: Member) -> Rows:
    """Return the rows of a shortcut's weight as it is now: moving a network to a device replaces its buffers."""
    return Rows(getattr(member.module, FIXED_BUFFER), member.slots, member.channels)


def unfit_gate(group: ChannelGroup) -> str | None:
    """Say which norm behind the producers of a group has nothing to learn, so that it cannot let a channel go."""
    fixed = [gate.layer for gate in group.gates if not rows_of(gate)]
    if not group.gates:
        return "no convolution or linear layer computes it"
    return f"{fixed[0]} behind it has no scale to learn" if fixed else None


def rows_of(member: Member) -> list[Rows]:
    """Return the parameters of a layer that computes or passes on channels, at their slots, each slot once."""
    slots, first = np.unique(member.slots.numpy(), return_index=True)
    channels = member.channels[torch.from_numpy(first)]
    axis = 1 if getattr(member.module, "transposed", False) else 0
    found = []
    for name, parameter in member.module.named_parameters(recurse=False):
        found.append(Rows(parameter, torch.from_numpy(slots), channels, axis if name == "weight" else 0))
    return found


def norm_factors(gate: Member, width: int) -> Tensor:
    """Return (width,) the scale of the batch norm at a gate over its running deviation; 1 where there is none."""
    norm, factors = gate.module, torch.ones(width)
    if isinstance(norm, BATCH_NORMS) and isinstance(norm.weight, Tensor) and isinstance(norm.running_var, Tensor):
        deviations = (norm.running_var + norm.eps).sqrt()
        factors[gate.channels] = (norm.weight.detach() / deviations)[gate.slots].cpu()
    return factors


def weight_rows(member: Member) -> Rows:
    """Return the rows of the weight of a convolution or linear layer, without those of its bias."""
    (rows,) = [rows for rows in rows_of(member) if rows.parameter is member.module.weight]
    return rows


def folded_filters(group: ChannelGroup) -> Tensor:
    """Return (C, n) the filters that produce each channel, of all producers, with batch norms folded into them."""
    parts = []
    for producer, gate in zip(group.producers, group.gates, strict=True):
        rows = weight_rows(producer)
        filters = torch.zeros(group.width, rows.values[0].numel())
        factors = norm_factors(gate, group.width)
        filters[rows.channels] = rows.values.cpu().flatten(1) * factors[rows.channels, None]
        parts.append(filters)
    return torch.cat(parts, 1)
