"""Measured damages: rises of the loss when one channel group is narrowed, or one residual block skipped.

A group is narrowed to each of its widths with its readers refitted. Each rise has a standard error over images, and is
saved at once, so that an interrupted run resumes.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.allocation.widths import Candidates
from compress.errors import ArtifactError
from compress.model.modes import eval_mode, hooked
from compress.progress import Progress
from compress.pruning.groups import BATCH_NORMS, ChannelGroup
from compress.pruning.ranking.elimination import ReaderStats, unit_inputs
from compress.pruning.repair.lockstep import following_norms
from compress.pruning.repair.repairs import add_constant
from compress.pruning.trial import masked_copy
from compress.storage.digest import DIGEST_KEY, add_digest, read_record
from compress.storage.files import write_atomic


@dataclass(frozen=True, slots=True)
class Rise:
    """A rise of the loss.

    Attributes:
        mean: Mean over images, in nats.
        error: Standard error of the mean.
        is_measured: False at widths below the one at which the network was no better than a guess. Each such rise
            counts as twice that at the next wider width.
    """

    mean: float
    error: float
    is_measured: bool = True


class SavedRises:
    """Rises of the loss of one network, saved in a file as they are measured.

    Args:
        path: Path of the file; it need not exist. A damaged file is ignored.
        key: Identifier of the network within the file.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._known = _read(path)

    def get(self, group: str, width: int) -> tuple[float, float] | None:
        """Return mean and error of the rise at a width of a group; None if it was not measured."""
        found = self._known.get(self._name(group, width))
        return None if found is None else (found[0], found[1])

    def add(self, group: str, width: int, mean: float, error: float) -> None:
        """Save the rise at a width of a group."""
        self._known[self._name(group, width)] = [mean, error]
        write_atomic(self.path, json.dumps(add_digest(self._known)))

    def _name(self, group: str, width: int) -> str:
        return f"{self.key}/{group}/{width}"


class Sensitivity:
    """Measurement of the rises of the loss for the groups of one network.

    Args:
        module: The network; left unchanged.
        losses_of: Network -> (N,) the loss of each image.
        guess: Loss of a network with the same output for every image.
        reestimate: Re-estimates batch-norm statistics, in place; used if readers cannot be refitted.
        example: One input, (1, C, H, W).
        saved: Store of the measured rises; new ones are added to it.
        progress: Receives progress by width.
    """

    def __init__(
        self,
        module: nn.Module,
        losses_of: Callable[[nn.Module], Tensor],
        guess: float,
        reestimate: Callable[[nn.Module], object],
        example: Tensor,
        saved: SavedRises,
        progress: Progress,
    ) -> None:
        self.module = module
        self.losses_of, self.guess, self.reestimate = losses_of, guess, reestimate
        self.saved, self.progress = saved, progress
        with eval_mode(module):
            self.norms = following_norms(module, BATCH_NORMS, example)
        self.intact: Tensor | None = None

    def rises(
        self, group: ChannelGroup, candidates: Candidates, stats: Mapping[str, ReaderStats] | None
    ) -> tuple[Rise, ...]:
        """Return the rise of the loss at each width in `candidates.levels`, never less at a narrower one.

        Args:
            group: The group to narrow.
            candidates: Widths of the group, and the order in which its channels are removed.
            stats: Statistics of the layers that read the group; None if these cannot be refitted.
        """
        found: list[Rise] = [Rise(0.0, 0.0)]
        with self.progress.task(f"loss at the widths of {group.name}", len(candidates.levels) - 1) as task:
            for width in reversed(candidates.levels[:-1]):
                rise = self._rise(group, candidates, width, stats, found)
                found.append(rise)
                task.advance()
        return tuple(reversed(found))

    def _rise(
        self,
        group: ChannelGroup,
        candidates: Candidates,
        width: int,
        stats: Mapping[str, ReaderStats] | None,
        wider: Sequence[Rise],
    ) -> Rise:
        known = self.saved.get(group.name, width)
        if known is None:
            hopeless = max(self.guess - float(self._intact().mean()), 0.0)
            if wider[-1].mean > hopeless:
                return Rise(2 * wider[-1].mean, wider[-1].error, is_measured=False)
            narrowed = self._narrowed(group, candidates.removed_units(width), stats)
            rises = self.losses_of(narrowed) - self._intact()
            mean, error = float(rises.mean()), float(rises.std(unbiased=False)) / math.sqrt(len(rises))
            known = (mean, error) if math.isfinite(mean) else (2 * hopeless + 1, 0.0)
            self.saved.add(group.name, width, *known)
        mean, error = known
        return Rise(max(mean, wider[-1].mean), error)

    def _intact(self) -> Tensor:
        if self.intact is None:
            self.intact = self.losses_of(self.module)
        return self.intact

    def _narrowed(
        self, group: ChannelGroup, units: Sequence[int], stats: Mapping[str, ReaderStats] | None
    ) -> nn.Module:
        """Return a copy of the network in which no reader receives the given units."""
        if stats is None:
            silent = masked_copy(self.module, {group.name: group.expand(units)}, {group.name: group})
            self.reestimate(silent)
            return silent
        refitted = copy.deepcopy(self.module)
        with torch.no_grad():
            for reader in group.readers:
                layer: Any = refitted.get_submodule(reader.layer)
                of_layer = stats[reader.layer]
                weight = of_layer.refit(unit_inputs(group, reader)[list(units)].flatten())
                if of_layer.has_intercept:
                    norm = self.norms.get(reader.layer)
                    shift = (weight - of_layer.weight)[:, -1].float()
                    add_constant(layer, None if norm is None else refitted.get_submodule(norm), shift)
                    weight = weight[:, :-1]
                layer.weight.copy_(weight.reshape(layer.weight.shape))
        return refitted


def _read(path: Path) -> dict[str, list[float]]:
    """Return the measurements of an interrupted run; empty if the file is missing or damaged."""
    try:
        content = read_record(path)
    except ArtifactError:
        return {}
    return {name: values for name, values in content.items() if name != DIGEST_KEY}


def with_rises(candidates: Candidates, rises: Sequence[Rise]) -> Candidates:
    """Return candidates whose damages are measured rises of the loss."""
    means, errors = (np.asarray([getattr(rise, name) for rise in rises]) for name in ("mean", "error"))
    return replace(candidates, measured=means, errors=errors)


def block_damage(
    module: nn.Module,
    blocks: Sequence[str],
    loss_of: Callable[[nn.Module], float],
    progress: Progress,
    instead: Callable[[str, Tensor], Tensor] = lambda _block, inputs: inputs,
) -> dict[str, float]:
    """Return block -> rise of the loss when that block is skipped, or replaced.

    Args:
        module: Classifier; left unchanged.
        blocks: Module paths of removable blocks.
        loss_of: Network -> mean loss on labelled images outside of the evaluation split.
        progress: Receives progress by block.
        instead: Takes a block and its input, and returns what the block then returns; by default its input.
    """
    with progress.task("loss without each block", len(blocks) + 1) as task:
        intact = loss_of(module)
        task.advance()
        damage = {}
        for name in blocks:
            with _replaced(module.get_submodule(name), partial(instead, name)):
                damage[name] = loss_of(module) - intact
            task.advance()
    return damage


@contextmanager
def _replaced(block: nn.Module, instead: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a block return something else for its input."""
    given: list[Tensor] = []

    def remember(_block: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.append(inputs[0].clone())  # the block may change it in place

    def give(_block: nn.Module, _inputs: tuple[Any, ...], _output: Tensor) -> Tensor:
        return instead(given.pop())

    with hooked(before=[(block, remember)]), hooked(after=[(block, give)]):
        yield
