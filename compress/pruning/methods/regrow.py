"""Channel regrowth: the network trains masked, and some masked channels come back at every choice."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.config.schema.methods import RegrowConfig
from compress.errors import StageError
from compress.pruning.groups import ChannelGroup
from compress.pruning.methods.base import Setting
from compress.pruning.methods.group_tensors import GroupTensors, Rows, folded_filters
from compress.pruning.methods.scored import Scored

_INTERVALS = 40


class Regrow(Scored):
    """Training-time method that chooses channels every few steps and lets a random share of the removed ones return.

    widths      of each group, by the budget and the first-order scores of all methods here
    leverage    decides within a group: channels whose filters span the most are kept
    regrowth    a share of the group's channels, drawn at random from the removed ones, is trained, too; it falls to 0
    mask        scales and shifts of masked channels are 0, as is the contribution of zero-padded shortcuts to them;
                they get no gradient

    A channel that comes back has its filters, norms and reader columns from before it was masked, and no momentum.
    From `until` on the masks are final. A masked channel is 0 everywhere, so the cut changes nothing.

    Args:
        setting: Network, budget and schedule.
        options: See `RegrowConfig`.

    Raises:
        StageError: The run has no step for a first choice before the final one, or no step after it.

    Source: Hou et al. 2022, "CHEX: CHannel EXploration for CNN Model Compression", CVPR, arXiv:2203.15794; Evci et al.
        2020, "Rigging the Lottery", arXiv:1911.11134 (regrowth). Widths by first-order scores under a budget, leverage
        of filters with batch norms folded in over all producers of a group, and a schedule in shares of the run are
        adaptations.
    """

    name: ClassVar[str] = "regrow"

    def __init__(self, setting: Setting, options: RegrowConfig | None = None) -> None:
        self.options = options = options or RegrowConfig()
        frozen = round(setting.steps * options.until)
        setting.require_left(frozen)
        interval = options.interval or max(1, setting.steps // _INTERVALS)
        if interval >= frozen:
            raise StageError(
                f"A first choice must come before the final one, got a first after {interval} steps and a final one "
                f"after {frozen} of {setting.steps}.",
                hint=f"Train for at least {math.ceil((interval + 1) / options.until)} steps, or lower regrow.interval.",
            )
        super().__init__(setting, frozen, interval, first=interval)
        self.returned = {name: torch.zeros(group.width, dtype=torch.bool) for name, group in setting.groups.items()}
        self._returning: dict[str, Tensor] = {}  # (C,) bool: channels that came back in this step
        self._snapshots = Snapshots(setting.module, self.tensors)
        self._optimizer: Optimizer | None = None
        self._step = 0

    def on_optimizer(self, optimizer: Optimizer) -> None:
        """Keep the optimizer, whose momentum is reset where channels come back."""
        self._optimizer = optimizer

    def share(self, step: int) -> float:
        """Return the share of a group's channels that comes back at a step: ratio * (1 + cos(pi * step / last)) / 2."""
        return self.options.ratio * (1 + math.cos(math.pi * min(step, self.frozen) / self.frozen)) / 2

    def on_gradients(self, step: int) -> None:
        """Choose on schedule, and zero the gradients of masked channels."""
        self._step, self._returning = step, {}
        self.observe(step)
        for name, tensors in self.tensors.items():
            stopped = self.goes(name)
            if name in self._returning:
                stopped |= self._returning[name]  # computed while they were masked
            if stopped.any():
                tensors.stop(stopped)

    def on_step_end(self, step: int) -> None:
        """Set scales and shifts of masked channels to 0, and the contribution of zero-padded shortcuts to them.

        Momentum and weight decay have moved the scales and shifts.
        """
        for name, tensors in self.tensors.items():
            goes = self.goes(name)
            tensors.shortcuts.give((~goes).float())
            for rows in tensors.decaying if goes.any() else ():
                masked = rows.among(goes)
                masked.set_values(torch.zeros_like(masked.values))

    def metrics(self) -> dict[str, float]:
        """Return the number of channels that came back, and the share of them kept in the end."""
        returned = torch.cat([*self.returned.values(), torch.zeros(0, dtype=torch.bool)])
        goes = torch.cat([*(self.goes(name) for name in self.returned), torch.zeros(0, dtype=torch.bool)])
        count = int(returned.sum())
        return {
            **super().metrics(),
            "returned_channels": count,
            "returned_kept_ratio": float((returned & ~goes).sum()) / max(1, count),
        }

    def cause(self) -> str:
        """Return the likely cause of a higher loss after the cut, and the remedy."""
        return "All removed channels were masked; layers behind them turn zero into something else."

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` resumes."""
        return {**super().state_dict(), "returned": self.returned, "snapshots": self._snapshots.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        super().load_state_dict(state)
        self.returned, self._snapshots.saved = state["returned"], state["snapshots"]

    def _average(self, name: str, present: Tensor) -> None:
        """Average the scores of trained channels; masked ones keep theirs, for their derivative is 0."""
        before, goes = self.scores[name].clone(), self.goes(name)
        super()._average(name, present)
        self.scores[name] = torch.where(goes, before, self.scores[name])

    @torch.no_grad()
    def _choose(self, is_final: bool) -> None:
        groups = self.setting.groups
        wanted = self.setting.choose(self.scores, is_final=is_final)
        masked = {name: self.goes(name) for name in groups}
        for name, group in groups.items():
            self._snapshots.take(group, ~masked[name])
        for name, group in groups.items():
            self._snapshots.restore(group, masked[name])
        chosen = {}
        for number, (name, group) in enumerate(groups.items()):
            going = units_by_leverage(group, len(wanted.get(name, ())))
            if not is_final:
                going = self._without_regrown(group, going, number)
            if going:
                chosen[name] = group.expand(going)
        self.chosen = chosen
        for name in groups:
            returning = masked[name] & ~self.goes(name)
            if returning.any():
                self._returning[name] = returning
                self.returned[name] |= returning
                self.reactivated += int(returning.sum())
                if self._optimizer is not None:
                    self._snapshots.reset_momentum(groups[name], returning, self._optimizer)

    def _without_regrown(self, group: ChannelGroup, going: list[int], number: int) -> list[int]:
        """Return the units to mask, without the units drawn to come back; all processes draw the same."""
        count = min(len(going), round(self.share(self._step) * (group.width // group.parts)))
        random = np.random.default_rng([self.setting.seed, self._step, number])
        regrown = random.choice(len(going), count, replace=False) if count else ()
        return [unit for place, unit in enumerate(going) if place not in set(regrown)]


class Snapshots:
    """Weights of channels at the time of masking: filters, norms with statistics, and reader columns.

    Args:
        module: The network.
        tensors: Group name -> parameters of the group.

    Attributes:
        saved: Group name -> values of each of its rows.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, GroupTensors]) -> None:
        self.saved: dict[str, list[Tensor]] = {}
        self._module, self._tensors = module, tensors

    def take(self, group: ChannelGroup, channels: Tensor) -> None:
        """Save the present values of some channels, (C,) bool; of all channels the first time."""
        present = [rows.values for rows in self._rows(group)]
        before = self.saved.get(group.name)
        if before is None:
            self.saved[group.name] = present
            return
        for rows, old, values in zip(self._rows(group), before, present, strict=True):
            places = channels[rows.channels]
            old[places] = values[places].to(old.device)

    def restore(self, group: ChannelGroup, channels: Tensor) -> None:
        """Set some channels, (C,) bool, to their saved values."""
        for rows, values in zip(self._rows(group), self.saved[group.name], strict=True):
            places = channels[rows.channels]
            rows.among(channels).set_values(values[places].to(rows.parameter.device))

    def reset_momentum(self, group: ChannelGroup, channels: Tensor, optimizer: Optimizer) -> None:
        """Zero the momentum of some channels, (C,) bool."""
        for rows in self._rows(group):
            momentum = optimizer.state.get(rows.parameter, {}).get("momentum_buffer")
            if momentum is not None:
                part = Rows(momentum, rows.slots, rows.channels, rows.axis).among(channels)
                part.set_values(torch.zeros_like(part.values))

    def _rows(self, group: ChannelGroup) -> list[Rows]:
        return [*self._tensors[group.name].every(), *_statistics(group), *_columns(self._module, group)]


def _statistics(group: ChannelGroup) -> Iterable[Rows]:
    for norm in group.norms:
        for name in ("running_mean", "running_var"):
            values = getattr(norm.module, name, None)
            if isinstance(values, Tensor):
                yield Rows(values, norm.slots, norm.channels)


def _columns(module: nn.Module, group: ChannelGroup) -> Iterable[Rows]:
    for read in group.reads:
        weight = getattr(module.get_submodule(read.path), read.name)
        yield Rows(weight, read.slots, read.channels, read.dim)


def units_by_leverage(group: ChannelGroup, count: int) -> list[int]:
    """Return the units of a group to remove for `count` channels, lowest leverage first."""
    if not count:
        return []
    units = leverage(folded_filters(group), group.width - count).reshape(group.parts, -1).sum(0)
    return [int(unit) for unit in units.argsort(stable=True)[: count // group.parts]]


def leverage(filters: Tensor, kept: int) -> Tensor:
    """Return (C,) the leverage scores of (C, n) filters: squared norms of the rows of the top singular vectors.

    Args:
        filters: One row for each channel.
        kept: Number of singular vectors, as many as channels are to be kept.

    If the filters are shorter than the number of channels (n < C), L1 norms replace leverage, as in the paper.

    >>> leverage(torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]), 2).tolist()
    [1.0, 1.0, 0.0]
    """
    if filters.shape[1] < filters.shape[0]:
        return filters.abs().sum(1)
    gram = filters.double() @ filters.double().T
    _, vectors = torch.linalg.eigh(gram)  # ascending
    scores: Tensor = vectors[:, len(gram) - kept :].square().sum(1).float()
    return scores
