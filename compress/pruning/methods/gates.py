"""Learned gates: how many channels of each group go, and which residual blocks, is learned along with the weights."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.config.schema.methods import GatesMethodConfig
from compress.model.modes import Hook, hooked
from compress.pruning.groups import ChannelGroup, Member
from compress.pruning.methods.base import Removed, Setting, fixed_members, unfit_gate

_OPEN = 0.995
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)


class Gates:
    """A gate behind each channel and each residual branch, open or closed at random by a chance that is learned.

    While the choice is open each image draws its own gates; where one is closed the channel, or the branch, is 0. The
    gradient passes as if the chance itself had been multiplied. The chances learn from the loss and, while the
    expected cost is above the budget, from its price: what a channel costs at the present widths of its neighbours,
    times a multiplier that rises as long as the budget is exceeded. From the step on from which the choice stands the
    gates are fixed and the weights get used to it, so that the cut changes nothing.

    A latency budget is followed through MACs while the gates learn; the widths that stand are chosen by latency.

    Args:
        setting: What to work with.
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
        start = math.log(_OPEN / (1 - _OPEN))
        self.channels = {name: nn.Parameter(torch.full((g.width,), start)) for name, g in setting.groups.items()}
        self.blocks = {name: nn.Parameter(torch.full((1,), start)) for name in setting.blocks}
        # Adam moves by about its rate in a step: from open to closed in a quarter of the steps
        rate = self.options.gate_rate or 4 * start / max(1, self.frozen)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=rate)
        self.multiplier_rate = self.options.multiplier_rate or 30 / max(1, self.frozen)
        self.multiplier = 0.0
        self.chosen: Removed | None = None
        self._closed: tuple[str, ...] = ()
        self._drawn: dict[str, Tensor] = {}
        self._hooks = hooked(before=[(setting.module, self._draw)], after=self._gating_hooks())

    @staticmethod
    def unfit(group: ChannelGroup) -> str | None:
        """Say why a group cannot be cut by this method, or None."""
        return unfit_gate(group) if not group.gates else None

    @property
    def removed(self) -> Removed:
        """The channels whose gates are closed."""
        return self.chosen or {}

    @property
    def closed(self) -> tuple[str, ...]:
        """The residual blocks whose gates are closed."""
        return self._closed

    def parameters(self) -> list[nn.Parameter]:
        """Return the gates."""
        return [*self.channels.values(), *self.blocks.values()]

    def on_step_begin(self, step: int) -> None:
        """Fix the gates when it is time to."""
        if step >= self.frozen and self.chosen is None:
            self._closed = tuple(name for name, gate in self.blocks.items() if gate.item() < 0)
            scores = {name: torch.sigmoid(gate.detach()) for name, gate in self.channels.items()}
            self.chosen = self.setting.choose(scores, closed=self._closed, is_final=True)

    def on_gradients(self, step: int) -> None:
        """Let the gates learn from the loss and from the price of what they let through."""
        if self.chosen is not None:
            return
        cost = self._cost()
        excess = cost.item() - self.setting.kept_ratio
        self.multiplier = max(0.0, self.multiplier + self.multiplier_rate * excess)
        if excess > 0:
            (self.multiplier * cost).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def on_step_end(self, step: int) -> None:
        """Nothing is done."""

    def finish(self) -> None:
        """Take the gates off."""
        self._hooks.close()

    def figures(self) -> dict[str, float]:
        """Return the multiplier, and the shares of channels and blocks whose gates closed by themselves."""
        gates = torch.cat([gate.detach() for gate in self.channels.values()])
        return {
            "multiplier": self.multiplier,
            "channels_closed_ratio": float((gates < 0).float().mean()),
            "blocks_closed_ratio": len(self._closed) / max(1, len(self.blocks)),
        }

    def cause(self) -> str:
        """Say what it would come from, were the loss higher after the cut, and what would help."""
        return "All gates of what went were closed; layers behind them turn nothing into something."

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` goes on."""
        return {
            "channels": {name: gate.detach() for name, gate in self.channels.items()},
            "blocks": {name: gate.detach() for name, gate in self.blocks.items()},
            "optimizer": self.optimizer.state_dict(),
            "multiplier": self.multiplier,
            "chosen": None if self.chosen is None else {name: list(gone) for name, gone in self.chosen.items()},
            "closed": list(self._closed),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for gates, saved in ((self.channels, state["channels"]), (self.blocks, state["blocks"])):
            for name, gate in gates.items():
                gate.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.multiplier, self._closed = state["multiplier"], tuple(state["closed"])
        chosen = state["chosen"]
        self.chosen = None if chosen is None else {name: tuple(gone) for name, gone in chosen.items()}

    def _cost(self) -> Tensor:
        """Return the expected cost as a share of the baseline's."""
        widths = {name: torch.sigmoid(gate).sum() for name, gate in self.channels.items()}
        return self.setting.cost(widths, {name: torch.sigmoid(gate) for name, gate in self.blocks.items()})

    def _draw(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Draw the gates of one forward pass: (N, C) of each group and (N, 1) of each block."""
        every: Mapping[str, nn.Parameter] = {**self.channels, **{f"{name}()": g for name, g in self.blocks.items()}}
        for name, gate in every.items():
            if self.chosen is not None:
                self._drawn[name] = self._fixed(name, len(gate))
            elif module.training:
                noise = torch.rand(len(inputs[0]), len(gate)).clamp(1e-6, 1 - 1e-6)
                chance = torch.sigmoid(gate + noise.log() - (1 - noise).log())
                self._drawn[name] = (chance > 0.5).float() + chance - chance.detach()
            else:
                self._drawn[name] = (gate.detach() >= 0).float()[None]

    def _fixed(self, name: str, width: int) -> Tensor:
        """Return (1, width) the gates as they stand."""
        is_open = torch.ones(1, width)
        if name.removesuffix("()") in self._closed and name.endswith("()"):
            return torch.zeros(1, width)
        is_open[:, list(self.removed.get(name, ()))] = 0
        return is_open

    def _gating_hooks(self) -> Iterator[tuple[nn.Module, Hook]]:
        """Yield the layers and residual branches with the hook that multiplies their outputs by gates."""
        for name, group in self.setting.groups.items():
            gates, bare = ({member.layer for member in several} for several in (group.gates, group.bare))
            for shortcut in fixed_members(group):  # what it gives is added to what the gates let through
                yield shortcut.module, self._gated(name, shortcut, True)
            for member in group.members:
                if member.is_norm or member.layer in bare:
                    yield member.module, self._gated(name, member, member.layer in gates)
        for name, part in self.setting.blocks.items():
            yield self.setting.module.get_submodule(part), self._gated_branch(name)

    def _gated(self, name: str, member: Member, is_gate: bool) -> Hook:
        """Return the hook that multiplies what a layer gives; of a norm that is no gate only once the gates stand."""

        def hook(layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            if not (is_gate or self.chosen is not None):
                return output
            drawn = self._drawn[name]
            axis = output.ndim - 1 if isinstance(layer, _CHANNELS_LAST) else 1
            factors = torch.ones(len(drawn), output.shape[axis])
            factors = factors.index_copy(1, member.slots, drawn[:, member.channels])
            return output * _aligned(factors, output, axis)

        return hook

    def _gated_branch(self, block: str) -> Hook:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return output * _aligned(self._drawn[f"{block}()"], output, 1)

        return hook


def _aligned(factors: Tensor, output: Tensor, axis: int) -> Tensor:
    """Return (N, C) factors, or (1, C), in the shape that multiplies an output with channels on an axis."""
    shape = [1] * output.ndim
    shape[0], shape[axis] = factors.shape
    return factors.reshape(shape).to(output.device)
