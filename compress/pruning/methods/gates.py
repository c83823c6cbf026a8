"""Learned gates: the widths of channel groups and the removed residual blocks are learned along with the weights."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.config.schema.methods import GatesMethodConfig
from compress.model.modes import Hook, hooked
from compress.pruning.groups import ChannelGroup, Member
from compress.pruning.methods.base import Removed, Setting, TrainingMethod
from compress.pruning.methods.group_tensors import fixed_members, unfit_gate

_OPEN = 0.995
_START = math.log(_OPEN / (1 - _OPEN))
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)


class Gates(TrainingMethod):
    """Training-time method with a gate behind each channel and residual branch, open with a learned probability.

    Before the final choice each image draws its own gates; a closed gate sets the channel, or the branch, to 0. The
    gradient passes as if the probability itself had been multiplied. The probabilities learn from the loss and, while
    the expected cost is above the budget, from its price: the cost of a channel at the present widths of its
    neighbours, times a multiplier that rises as long as the budget is exceeded. From the final choice on the gates are
    fixed and the weights adapt to it, so that the cut changes nothing.

    A latency budget is followed through MACs while the gates learn; the final widths are chosen by latency.

    Args:
        setting: Network, budget and schedule.
        options: See `GatesMethodConfig`.

    Raises:
        StageError: No step is left in which the gates are fixed.

    Source: Passov et al. 2022, "Gator", arXiv:2205.15404 (gates, prices by present widths); Haider and Taj 2020,
        "Comprehensive Online Network Pruning via Learnable Scaling Factors", arXiv:2010.02623 (blocks next to
        channels). The budget by dual ascent and a schedule in shares of the run are adaptations.
    """

    name: ClassVar[str] = "gates"

    def __init__(self, setting: Setting, options: GatesMethodConfig | None = None) -> None:
        self.setting, self.options = setting, options or GatesMethodConfig()
        self.frozen = round(setting.steps * (1 - self.options.frozen_ratio))
        setting.require_left(self.frozen)
        self.gates = NetworkGates(setting)
        self.channels, self.blocks = self.gates.channels, self.gates.blocks
        # Adam moves by about its rate in a step: from open to closed in a quarter of the steps
        rate = self.options.gate_rate or 4 * _START / max(1, self.frozen)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=rate)
        self.multiplier_rate = self.options.multiplier_rate or 30 / max(1, self.frozen)
        self.multiplier = 0.0

    @staticmethod
    def unfit(group: ChannelGroup) -> str | None:
        """Return the reason why this method cannot prune a group, or None."""
        return unfit_gate(group) if not group.gates else None

    @property
    def removed(self) -> Removed:
        """The channels whose gates are closed."""
        return self.gates.chosen or {}

    @property
    def closed(self) -> tuple[str, ...]:
        """The residual blocks whose gates are closed."""
        return self.gates.closed

    def parameters(self) -> list[nn.Parameter]:
        """Return the logits of all gates."""
        return [*self.channels.values(), *self.blocks.values()]

    def on_step_begin(self, step: int) -> None:
        """Make the final choice on schedule."""
        if step >= self.frozen and self.gates.chosen is None:
            self.gates.closed = tuple(name for name, gate in self.blocks.items() if gate.item() < 0)
            scores = {name: torch.sigmoid(gate.detach()) for name, gate in self.channels.items()}
            self.gates.chosen = self.setting.choose(scores, closed=self.gates.closed, is_final=True)

    def on_gradients(self, step: int) -> None:
        """Update the gates by the loss and by the price of the open ones."""
        if self.gates.chosen is not None:
            return
        cost = self.gates.expected_cost()
        excess = cost.item() - self.setting.kept_ratio
        self.multiplier = max(0.0, self.multiplier + self.multiplier_rate * excess)
        if excess > 0:
            (self.multiplier * cost).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """Remove the gates from the network."""
        self.gates.remove()

    def metrics(self) -> dict[str, float]:
        """Return the multiplier, and the shares of channels and blocks whose gates closed by themselves."""
        gates = torch.cat([gate.detach() for gate in self.channels.values()])
        return {
            "multiplier": self.multiplier,
            "channels_closed_ratio": float((gates < 0).float().mean()),
            "blocks_closed_ratio": len(self.closed) / max(1, len(self.blocks)),
        }

    def cause(self) -> str:
        """Return the likely cause of a higher loss after the cut, and the remedy."""
        return "All gates of what went were closed; layers behind them turn nothing into something."

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` resumes."""
        chosen = self.gates.chosen
        return {
            "channels": {name: gate.detach() for name, gate in self.channels.items()},
            "blocks": {name: gate.detach() for name, gate in self.blocks.items()},
            "optimizer": self.optimizer.state_dict(),
            "multiplier": self.multiplier,
            "chosen": None if chosen is None else {name: list(gone) for name, gone in chosen.items()},
            "closed": list(self.closed),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        for gates, saved in ((self.channels, state["channels"]), (self.blocks, state["blocks"])):
            for name, gate in gates.items():
                gate.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.multiplier, self.gates.closed = state["multiplier"], tuple(state["closed"])
        chosen = state["chosen"]
        self.gates.chosen = None if chosen is None else {name: tuple(gone) for name, gone in chosen.items()}


class NetworkGates:
    """Gates at the layers and residual branches of a network, drawn for each forward pass.

    Args:
        setting: The network, its groups and blocks.

    Attributes:
        channels: Group name -> (C,) logits of the probability to be open.
        blocks: Residual block -> (1,) logit of the probability to be open.
        chosen: The final choice of removed channels; from then on the gates are fixed. None before.
        closed: Removed residual blocks.
        drawn: Gates of the last forward pass: (N, C) by group name, (N, 1) by block name followed by "()".
    """

    def __init__(self, setting: Setting) -> None:
        self.channels = {name: nn.Parameter(torch.full((g.width,), _START)) for name, g in setting.groups.items()}
        self.blocks = {name: nn.Parameter(torch.full((1,), _START)) for name in setting.blocks}
        self.chosen: Removed | None = None
        self.closed: tuple[str, ...] = ()
        self.drawn: dict[str, Tensor] = {}
        self._setting = setting
        self._hooks = hooked(before=[(setting.module, self._draw)], after=self._masks())

    def expected_cost(self) -> Tensor:
        """Return the expected cost as a share of the baseline's."""
        widths = {name: torch.sigmoid(gate).sum() for name, gate in self.channels.items()}
        return self._setting.cost(widths, {name: torch.sigmoid(gate) for name, gate in self.blocks.items()})

    def remove(self) -> None:
        """Remove the hooks from the network."""
        self._hooks.close()

    def _draw(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Draw the gates of one forward pass: (N, C) of each group and (N, 1) of each block."""
        every: Mapping[str, nn.Parameter] = {**self.channels, **{f"{name}()": g for name, g in self.blocks.items()}}
        for name, gate in every.items():
            if self.chosen is not None:
                self.drawn[name] = self._fixed(name, len(gate))
            elif module.training:
                noise = torch.rand(len(inputs[0]), len(gate)).clamp(1e-6, 1 - 1e-6)
                chance = torch.sigmoid(gate + noise.log() - (1 - noise).log())
                self.drawn[name] = (chance > 0.5).float() + chance - chance.detach()
            else:
                self.drawn[name] = (gate.detach() >= 0).float()[None]

    def _fixed(self, name: str, width: int) -> Tensor:
        """Return (1, width) the gates of the final choice."""
        is_open = torch.ones(1, width)
        if name.removesuffix("()") in self.closed and name.endswith("()"):
            return torch.zeros(1, width)
        is_open[:, list((self.chosen or {}).get(name, ()))] = 0
        return is_open

    def _masks(self) -> Iterator[tuple[nn.Module, Hook]]:
        """Yield layers and residual branches, each with the hook that multiplies its outputs by gates."""
        for name, group in self._setting.groups.items():
            gates, bare = ({member.layer for member in several} for several in (group.gates, group.bare))
            for shortcut in fixed_members(group):  # its contribution is added to the outputs of the gates
                yield shortcut.module, self._mask(name, shortcut, True)
            for member in group.members:
                if member.is_norm or member.layer in bare:
                    yield member.module, self._mask(name, member, member.layer in gates)
        for name, part in self._setting.blocks.items():
            yield self._setting.module.get_submodule(part), self._branch_mask(name)

    def _mask(self, name: str, member: Member, is_gate: bool) -> Hook:
        """Return the hook that multiplies a layer's outputs; for a norm that is not a gate, after the final choice."""

        def hook(layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            if not (is_gate or self.chosen is not None):
                return output
            drawn = self.drawn[name]
            axis = output.ndim - 1 if isinstance(layer, _CHANNELS_LAST) else 1
            factors = torch.ones(len(drawn), output.shape[axis])
            factors = factors.index_copy(1, member.slots, drawn[:, member.channels])
            return output * _aligned(factors, output, axis)

        return hook

    def _branch_mask(self, block: str) -> Hook:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return output * _aligned(self.drawn[f"{block}()"], output, 1)

        return hook


def _aligned(factors: Tensor, output: Tensor, axis: int) -> Tensor:
    """Return (N, C) or (1, C) factors in the shape that multiplies an output with channels on an axis."""
    shape = [1] * output.ndim
    shape[0], shape[axis] = factors.shape
    return factors.reshape(shape).to(output.device)
