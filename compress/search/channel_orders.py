"""Orders in which the channels of each group are removed, and damages measured on the way.

by readers    error of the reading layers, refitted without the channels (least squares)
by losses     loss when the values read from a channel are multiplied by a factor
sensitivity   the loss with each allowed width
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.allocation.widths import Candidates
from compress.checkpoint.rebuild import example_input
from compress.model.modes import eval_mode
from compress.pruning.criteria.base import Ranking
from compress.pruning.groups import ChannelGroup
from compress.pruning.ranking.elimination import ReaderPass, reader_passes
from compress.pruning.ranking.sensitivity import SavedRises, Sensitivity, with_rises
from compress.search.block_removal import Shortened
from compress.search.context import StageContext
from compress.search.parts import Part
from compress.search.repairs import batch_norm_repair
from compress.search.scaling import scaled_reads
from compress.search.survey import Survey
from compress.training.evaluate import evaluate_loss, image_losses, run

LOSS_IMAGES = 128
SENSITIVITY_FILE = "sensitivity.json"
_RANKED = ("order", "measured", "errors", "scales")  # arrays of a group's ranking that are stored


@dataclass(frozen=True)
class ChannelOrders:
    """Orders of the channels of one network, each group kept as a part of the stage.

    Attributes:
        shortened: The network.
        surveyed: Its groups and their allowed widths.
        key: Digest that identifies the network among the parts of the stage.
        ctx: Splits, parts and listener of the stage.
        by_errors: True uses the refit errors found while ranking as damages.
    """

    shortened: Shortened
    surveyed: Survey
    key: str
    ctx: StageContext
    by_errors: bool

    @cached_property
    def passes(self) -> list[ReaderPass]:
        """Passes over the calibration images for the statistics of readers."""
        split = self.ctx.data.calibration.first(self.surveyed.config.score_images)
        return reader_passes(self.shortened.model.module, self.surveyed.groups, split)

    def shared_pass(self, criterion: Any) -> ReaderPass | None:
        """Return the first pass that `find` needs, for another loop over the same images; None if it needs none."""
        needs_readers = criterion.order == "readers" or self.surveyed.config.damage == "sensitivity"
        if not needs_readers or not self._uses_readers(criterion):
            return None
        return next((one for one in self.passes if not one.has_begun), None)

    def find(self, criterion: Any, candidates: Mapping[str, Candidates]) -> dict[str, Candidates]:
        """Return the groups with orders, and with measured damages if the settings request them.

        Args:
            criterion: Criterion that ranks by readers or by losses; one that ranks by scores leaves the order.
            candidates: Group -> its candidates.
        """
        sensitivity = self._sensitivity() if self.surveyed.config.damage == "sensitivity" else None
        if criterion.order == "loss":
            found = self._by_losses(criterion, dict(candidates))
        else:
            found = self._by_readers(criterion, dict(candidates), sensitivity)
        for name, one in found.items():
            if sensitivity is not None and one.errors is None:
                found[name] = with_rises(one, sensitivity.rises(self.surveyed.groups[name], one, None))
        return found

    def loss_with(self, group: ChannelGroup) -> Callable[[Tensor], float]:
        """Return a function of (C,) factors: the loss with the reads of each channel multiplied by its factor."""
        module, calibration = self.shortened.model.module, self.ctx.data.calibration
        split = calibration.first(min(self.surveyed.config.score_images, LOSS_IMAGES))

        def loss_of(factors: Tensor) -> float:
            with scaled_reads(module, group, factors):
                return evaluate_loss(module, split)

        return loss_of

    def _by_losses(self, criterion: Any, found: dict[str, Candidates]) -> dict[str, Candidates]:
        def rank(name: str) -> Part:
            group, one = self.surveyed.groups[name], found[name]
            with self.ctx.progress.task(f"losses with channels of {name}", 1) as task:
                result = self._ranked(one, criterion.rank_by_loss(group, self.loss_with(group), _most_removed(one)))
                task.advance()
            return Part(None, _arrays(result))

        for name, one in found.items():
            found[name] = _with_arrays(one, self.ctx.parts.keep(self._part([name]), partial(rank, name)).tensors)
        return found

    def _by_readers(
        self, criterion: Any, found: dict[str, Candidates], sensitivity: Sensitivity | None
    ) -> dict[str, Candidates]:
        """Rank groups by refits of their readers, and measure damages; groups that share readers take one pass."""
        ranks, groups, ctx = criterion.order == "readers", self.surveyed.groups, self.ctx
        if not self._uses_readers(criterion):
            return found

        for one_pass in self.passes:
            names = one_pass.groups
            part = ctx.parts.find(self._part(names))
            if part is not None:
                found.update({name: _with_arrays(found[name], part.tensors) for name in names})
                continue
            stats = one_pass.collect(ctx.progress)
            with ctx.progress.task("order of channels", len(names)) as task:
                for name in names:
                    one = found[name]
                    if ranks:
                        ranking = criterion.rank(groups[name], stats, _most_removed(one))
                        found[name] = one = self._ranked(one, ranking)
                    if sensitivity is not None:
                        found[name] = with_rises(one, sensitivity.rises(groups[name], one, stats))
                    task.advance()
            arrays = {name: values for one in names for name, values in _arrays(found[one]).items()}
            ctx.parts.add(self._part(names), Part(None, arrays))
        return found

    def _uses_readers(self, criterion: Any) -> bool:
        return criterion.order == "readers" or "least_squares" in self.surveyed.config.repair

    def _part(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the key of the part that keeps the orders of some groups."""
        return {"part": "order", "of": self.key, "groups": list(names)}

    def _ranked(self, one: Candidates, ranking: Ranking) -> Candidates:
        scales = None if ranking.scales is None else at_levels(one, ranking.scales)
        one = replace(one, order=ranking.order, scales=scales)
        return replace(one, measured=at_levels(one, ranking.errors)) if self.by_errors else one

    def _sensitivity(self) -> Sensitivity:
        """Return the measurement of damages, on images of the validation split."""
        ctx, model = self.ctx, self.shortened.model
        example = example_input(model.signature)
        split = ctx.data.validation.first(self.surveyed.config.score_images)
        with torch.no_grad(), eval_mode(model.module):
            guess = split.objective.guess(run(model.module, example))
        return Sensitivity(
            model.module,
            lambda network: image_losses(network, split),
            guess,
            batch_norm_repair(ctx)[1],
            example,
            SavedRises(ctx.folder / SENSITIVITY_FILE, "+".join(self.shortened.removed)),
            ctx.progress,
        )


def at_levels(one: Candidates, by_removed: np.ndarray) -> np.ndarray:
    """Select the values of the allowed widths from (U + 1, ...) values, indexed by the number of removed units."""
    chosen: np.ndarray = by_removed[(one.full - np.asarray(one.levels)) // one.channels_per_unit]
    return chosen


def _most_removed(one: Candidates) -> int:
    """Return the largest number of units that may be removed."""
    return (one.full - one.levels[0]) // one.channels_per_unit


def _arrays(one: Candidates) -> dict[str, Tensor]:
    values = {kind: getattr(one, kind) for kind in _RANKED}
    return {
        f"{one.name}/{kind}": torch.from_numpy(np.ascontiguousarray(array))
        for kind, array in values.items()
        if array is not None
    }


def _with_arrays(one: Candidates, arrays: Mapping[str, Tensor]) -> Candidates:
    known: dict[str, Any] = {kind: arrays[key].numpy() for kind in _RANKED if (key := f"{one.name}/{kind}") in arrays}
    return replace(one, **known)
