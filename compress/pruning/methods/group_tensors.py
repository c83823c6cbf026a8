"""Parameters that compute, normalise and pass on the channels of a group, by channel."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from compress.onnx_file.counting import FIXED_BUFFER
from compress.pruning.groups import BATCH_NORMS, ChannelGroup, Member
from compress.pruning.shortcuts import FixedShortcut


@dataclass(frozen=True, slots=True)
class Rows:
    """Part of one parameter that belongs to the channels of a group.

    Attributes:
        parameter: Parameter or buffer of a layer.
        slots: (n,) positions on its channel axis.
        channels: (n,) the channel of the group that each position belongs to.
        axis: The channel axis.
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
        """(n, ...) the gradient at the slots, a copy; zero without a gradient."""
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

    Their weights are fixed and no norm lies behind them, so they contribute even if all norms of a channel are at 0.
    The factors are written into the weights: they are saved with the network, and no hook is needed.

    Args:
        group: A group whose shortcuts contribute in full.
    """

    def __init__(self, group: ChannelGroup) -> None:
        self._members = fixed_members(group)
        self._whole = [_fixed_rows(member).values for member in self._members]

    @torch.no_grad()
    def give(self, factors: Tensor) -> None:
        """Set the contribution of the shortcuts to the initial one times (C,) factors."""
        for member, whole in zip(self._members, self._whole, strict=True):
            rows = _fixed_rows(member)
            rows.set_values(whole.to(rows.parameter.device) * rows.spread(factors))


class GroupTensors:
    """Parameters that compute and normalise the channels of a group.

    Values by channel are on the CPU, wherever the parameters are.

    Attributes:
        gates: For each gate of the group, the parameters that its output is linear in. Multiplying a channel by 0 at a
            gate is the same as removing it.
        filters: Weights and biases of convolutions and linear layers, depthwise ones among them.
        decaying: Parameters that are 0 where a channel is 0: scales and shifts of the norms, and the filters of layers
            that no norm follows.
        shortcuts: Contribution of zero-padded shortcuts.
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

        The result is on the device of the parameters, so that nothing waits for a GPU.

        The output of a gate is linear in its parameters, so the derivative is the sum over them of parameter *
        gradient. It is added up over all gates of a channel before any absolute value is taken.
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
        """Return (C,) the root of the sum of squares of the decaying parameters of each channel."""
        total = torch.zeros(self.width)
        for rows in self.decaying:
            squares = rows.values.reshape(len(rows.slots), -1).square().sum(1)
            total.index_add_(0, rows.channels, squares.cpu())
        return total.sqrt()

    def every(self) -> list[Rows]:
        """Return the rows of all these parameters, each once."""
        seen = {id(rows.parameter) for rows in self.decaying}
        return self.decaying + [rows for rows in self.filters if id(rows.parameter) not in seen]


def fixed_members(group: ChannelGroup) -> list[Member]:
    """Return the zero-padded shortcuts that contribute to the channels of a group."""
    return [member for member in group.members if member.axis == "out" and isinstance(member.module, FixedShortcut)]


def _fixed_rows(member: Member) -> Rows:
    """Return the rows of a shortcut's present weight: moving a network to a device replaces its buffers."""
    return Rows(getattr(member.module, FIXED_BUFFER), member.slots, member.channels)


def unfit_gate(group: ChannelGroup) -> str | None:
    """Return the reason why no gate can close a group's channels, such as a norm without a scale to learn, or None."""
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
    """Return (width,) the scale of the batch norm at a gate over its running deviation; 1 without a batch norm."""
    norm, factors = gate.module, torch.ones(width)
    if isinstance(norm, BATCH_NORMS) and isinstance(norm.weight, Tensor) and isinstance(norm.running_var, Tensor):
        deviations = (norm.running_var + norm.eps).sqrt()
        factors[gate.channels] = (norm.weight.detach() / deviations)[gate.slots].cpu()
    return factors


def weight_rows(member: Member) -> Rows:
    """Return the rows of the weight of a convolution or linear layer, without its bias."""
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
