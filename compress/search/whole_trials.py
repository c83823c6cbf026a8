"""Candidate networks, pruned, repaired on few images and scored on part of the validation split: seconds each."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from compress.allocation.blocks import Structure
from compress.checkpoint.rebuild import example_input
from compress.model.recipe import RemoveBlock, RemoveChannels
from compress.model.stage_records import TriedNetwork
from compress.pruning.groups import kept_outputs
from compress.pruning.ranking.sensitivity import block_damage
from compress.pruning.surgery import remove_block, remove_channels
from compress.search.context import StageContext
from compress.search.parts import Part
from compress.search.pricing import Pricing
from compress.search.pruner import Prepared
from compress.search.repairs import repairs_towards
from compress.training.evaluate import evaluate_loss
from compress.training.memory_format import set_memory_format

TRIAL_IMAGES = 256
T = TypeVar("T")


@dataclass(frozen=True)
class Tried:
    """A candidate network that was pruned, repaired and scored.

    Attributes:
        structure: Widths of its groups, and removed blocks.
        pricing: Prices at which the structure has the least damage.
        loss: Loss on part of the validation split; infinite where it is NaN.
        predicted: Predicted loss; None before factors were learned.
    """

    structure: Structure
    pricing: Pricing
    loss: float
    predicted: float | None

    @property
    def record(self) -> TriedNetwork:
        """Values for the report."""
        return TriedNetwork(
            source=self.pricing.source,
            blocks=len(self.structure.removed),
            removed=self.structure.removed,
            loss=self.loss if math.isfinite(self.loss) else None,
            predicted_loss=self.predicted,
        )


class NetworkTrials:
    """Trials of candidate networks, with their losses.

    The first rounds remove channels by one ranking, made on the network with all its blocks.

    Args:
        prepared: The ranked network.
        ctx: Splits, parts and listener of the stage.
        memory_format: Memory format that networks are fastest in.

    Attributes:
        base_loss: Loss of the network before any removal.
        tried: Networks that were tried, in order.
    """

    def __init__(self, prepared: Prepared, ctx: StageContext, memory_format: torch.memory_format) -> None:
        self._prepared, self._ctx, self._memory_format = prepared, ctx, memory_format
        self._module = prepared.shortened.model.module
        self._config = prepared.surveyed.config
        self._split = ctx.data.validation.first(self._config.score_images)
        self._needs_batch_norm: bool | None = None
        self.tried: list[Tried] = []
        self.base_loss = float(self.keep("intact", {}, lambda: evaluate_loss(self._module, self._split)))

    @property
    def best(self) -> Tried:
        """The network of least loss."""
        return min(self.tried, key=lambda one: one.loss)

    def find(self, structure: Structure) -> Tried | None:
        """Return the earlier trial of a structure; None if it was not tried."""
        return next((one for one in self.tried if name_structure(one.structure) == name_structure(structure)), None)

    def add(self, structure: Structure, pricing: Pricing, predicted: float | None) -> Tried:
        """Prune, repair and score a network.

        Args:
            structure: Widths of its groups, and removed blocks.
            pricing: Prices at which the structure has the least damage.
            predicted: Predicted loss; None before factors were learned.
        """
        loss = self._loss(structure)
        tried = Tried(structure, pricing, math.inf if math.isnan(loss) else loss, predicted)
        self.tried.append(tried)
        return tried

    def measure_blocks(self, blocks: Sequence[str]) -> dict[str, float]:
        """Return block -> rise of the loss when the block is skipped; above 0, so that each block has a price."""
        if not blocks:
            return {}
        split = self._ctx.data.calibration.first(min(TRIAL_IMAGES, self._config.score_images))

        def measure() -> dict[str, float]:
            return block_damage(self._module, blocks, lambda one: evaluate_loss(one, split), self._ctx.progress)

        found: dict[str, float] = self.keep("block damages", {"blocks": list(blocks)}, measure)
        finite = [value for value in found.values() if math.isfinite(value)]
        most = max((abs(value) for value in finite), default=0.0) or 1.0
        return {block: max(value if math.isfinite(value) else most, 1e-3 * most) for block, value in found.items()}

    def keep(self, what: str, key: Mapping[str, object], make: Callable[[], T]) -> T:
        """Return a stored plain value, or compute and store it."""
        full = {"part": f"joint {what}", "of": self._prepared.key, "images": self._config.score_images, **key}
        value: T = self._ctx.parts.keep(full, lambda: Part(make())).record
        return value

    def _loss(self, structure: Structure) -> float:
        """Return the loss of a network after a quick repair.

        The first network decides whether batch-norm statistics are measured again in all networks.
        """
        removed = self._removed(structure)
        key = {"cut": removed, "removed": structure.removed, "batch_norm": self._needs_batch_norm}
        losses: dict[str, float] = self.keep("network", key, lambda: self._measure(structure, removed))
        refitted, measured = losses["refitted"], losses.get("batch_norm", math.nan)
        if self._needs_batch_norm is None:
            self._needs_batch_norm = measured < refitted or (math.isnan(refitted) and not math.isnan(measured))
        return measured if self._needs_batch_norm else refitted

    def _measure(self, structure: Structure, removed: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
        """Return the loss after refits and, unless known to be of no use, the loss with new batch-norm statistics."""
        slim = self._cut(structure, removed)
        prepared, names = self._prepared, self._config.repair
        kept, images = kept_outputs(removed, prepared.surveyed.groups), min(TRIAL_IMAGES, self._config.refit_images)
        example = example_input(prepared.shortened.model.signature)
        whole, outputs = prepared.shortened.whole, prepared.outputs
        wanted = repairs_towards(whole, slim, kept, names, example, self._ctx, images, outputs)
        losses = {}
        for name, repair in wanted:
            if name != "batch_norm":
                repair(slim)
        losses["refitted"] = evaluate_loss(slim, self._split)
        for name, repair in wanted:
            if name == "batch_norm" and self._needs_batch_norm is not False:
                repair(slim)
                losses["batch_norm"] = evaluate_loss(slim, self._split)
        return losses

    def _cut(self, structure: Structure, removed: Mapping[str, tuple[int, ...]]) -> nn.Module:
        module, example = self._module, example_input(self._prepared.shortened.model.signature)
        slim = remove_channels(module, RemoveChannels(dict(removed)), example) if removed else copy.deepcopy(module)
        for block in structure.removed:
            slim = remove_block(slim, RemoveBlock(block))
        set_memory_format(slim, self._memory_format)
        return slim

    def _removed(self, structure: Structure) -> dict[str, tuple[int, ...]]:
        """Return group -> removed channels, by the ranking of the network with all its blocks."""
        groups = self._prepared.surveyed.groups
        return {
            one.name: groups[one.name].expand(one.removed_units(structure.widths[one.name]))
            for one in self._prepared.candidates
            if structure.widths[one.name] < one.full
        }


def name_structure(structure: Structure) -> str:
    """Return a name that is equal for equal structures only."""
    return f"{structure.removed} {sorted(structure.widths.items())}"
