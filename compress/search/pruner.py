"""Pruning of one network: channels are ranked, chosen within the targets, removed, and the rest is repaired.

    prepare -> choose -> cut -> repair -> loss

The result of every step is stored in parts, so that a killed run resumes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from compress.allocation.widths import Candidates
from compress.checkpoint.rebuild import example_input
from compress.config.schema.prune import PruneConfig
from compress.data.batches import evaluation_batches
from compress.data.splits import Split
from compress.errors import InternalError
from compress.model.artifacts import TorchModel
from compress.model.recipe import RemoveChannels
from compress.model.stage_records import Repair, StreamTrial
from compress.model.tensors import weights_digest
from compress.pruning.groups import kept_outputs
from compress.pruning.ranking.selection import Groups, Selection
from compress.pruning.repair.originals import OriginalOutputs
from compress.pruning.surgery import remove_channels
from compress.pruning.trial import masked_copy
from compress.search.block_removal import Shortened
from compress.search.context import StageContext
from compress.search.latency_loop import TimedChoice
from compress.search.parts import Part
from compress.search.repairs import apply_repairs, loss_after, repaired_part, repairs_of, repairs_towards
from compress.search.scaling import scaling_repairs
from compress.search.scoring import Scoring
from compress.search.survey import Survey, survey
from compress.search.width_latency import LatencyModel
from compress.storage.digest import digest_value
from compress.tasks.outputs import each
from compress.training.evaluate import evaluate_loss, run
from compress.training.memory_format import set_memory_format

CUT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Prepared:
    """A network whose channels are ranked.

    Attributes:
        shortened: The network, perhaps without some blocks.
        surveyed: Its prunable groups and the targets.
        candidates: The groups with their scores and allowed widths.
        key: Digest that identifies the network among the parts of the stage.
        damage: Measure that widths are chosen by: scores, errors or sensitivity; None if a method decides.
        outputs: Outputs of the network with all blocks, shared by the repairs of all attempts.
    """

    shortened: Shortened
    surveyed: Survey
    candidates: list[Candidates]
    key: str
    damage: str | None = None
    outputs: OriginalOutputs = field(default_factory=OriginalOutputs, compare=False)


@dataclass(frozen=True)
class Attempt:
    """A choice of channels within the targets.

    Attributes:
        prepared: The ranked network.
        model: The network, before or after the channels are removed.
        selection: The channels chosen.
        timed: Choices that were timed as complete networks, in order.
        repairs: Records of the repairs after the removal.
    """

    prepared: Prepared
    model: TorchModel
    selection: Selection
    timed: list[TimedChoice]
    repairs: tuple[Repair, ...] = ()

    @property
    def removed_blocks(self) -> tuple[str, ...]:
        """Module paths of the removed and merged blocks."""
        return self.prepared.shortened.removed

    @property
    def merged_blocks(self) -> tuple[str, ...]:
        """Module paths of the blocks merged into one convolution."""
        return self.prepared.shortened.merged


@dataclass(frozen=True)
class Pruner:
    """Steps that prune one network.

    Attributes:
        config: Settings of the prune stage.
        ctx: Splits, parts and listener of the stage.
        memory_format: Memory format that networks are fastest in.
    """

    config: PruneConfig
    ctx: StageContext
    memory_format: torch.memory_format = torch.contiguous_format

    def prepare(
        self, shortened: Shortened, latency: LatencyModel | None = None, among: frozenset[str] | None = None
    ) -> Prepared:
        """Find the prunable groups of a network, and rank their channels.

        Args:
            shortened: The network, perhaps without some blocks.
            latency: Latency of the same network with more blocks; its table is reused if it covers this network.
            among: As in `survey`.
        """
        surveyed = survey(shortened.model, self.config, latency, self.ctx, among=among)
        key = self.identify(shortened, surveyed)
        scoring = Scoring(shortened, surveyed, key, self.ctx)
        return Prepared(shortened, surveyed, scoring.candidates(), key, scoring.damage)

    def identify(self, shortened: Shortened, surveyed: Survey | None) -> str:
        """Return the digest that identifies a network among the parts of the stage."""
        values = {
            "config": self.config.model_dump(mode="json", exclude={"target", "blocks"}),
            "seed": self.ctx.seed,
            "removed": shortened.removed,
            "weights": [weights_digest(shortened.whole), weights_digest(shortened.model.module)],
            "levels": None if surveyed is None else surveyed.levels,
            **({"merged": shortened.merged} if shortened.merged else {}),
        }
        return digest_value(values)

    def stream_factors(self, prepared: Prepared) -> tuple[float, ...]:
        """Return the factors of damage along residual streams that are tried, one after the other."""
        has_any = any(group.is_summed for group in prepared.surveyed.groups.values())
        return self.config.residual_factors if self.config.residual == "auto" and has_any else (1.0,)

    def choose(self, prepared: Prepared, factor: float) -> Attempt:
        """Choose the channels to remove to meet the targets, without removing them.

        Args:
            prepared: The ranked network.
            factor: Factor of damages along residual streams.
        """
        groups = prepared.surveyed.groups
        candidates = [one.dearer(factor) if groups[one.name].is_summed else one for one in prepared.candidates]
        return self.choose_among(prepared, candidates, {"factor": factor})

    def choose_among(self, prepared: Prepared, candidates: Sequence[Candidates], how: Mapping[str, Any]) -> Attempt:
        """Choose the channels to remove by given candidates.

        Args:
            prepared: The ranked network.
            candidates: Its groups, with the damages to choose by.
            how: Values that distinguish this choice from others of the same network, for its key among the parts.
        """
        key = {"part": "choice", "of": prepared.key, "target": self.config.target.given(), **how}
        part = self.ctx.parts.find(key)
        if part is None:
            selection, timed = prepared.surveyed.choose_timed(candidates, self.ctx.progress)
            self.ctx.parts.add(key, Part([asdict(selection), [asdict(choice) for choice in timed]]))
        else:
            values, choices = part.record
            removed = {name: tuple(channels) for name, channels in values["removed"].items()}
            selection = Selection(values["widths"], removed, values["is_optimal"])
            timed = [TimedChoice(**choice) for choice in choices]
        return Attempt(prepared, prepared.shortened.model, selection, timed)

    def attempt(self, prepared: Prepared) -> Attempt:
        """Choose channels until the targets are met, remove them and repair."""
        return self.complete(self.choose(prepared, self.stream_factors(prepared)[0]))

    def complete(self, attempt: Attempt) -> Attempt:
        """Remove the channels of a choice, and repair."""
        return self.repair(self.cut(attempt))

    def cut(self, attempt: Attempt) -> Attempt:
        """Remove the channels of a choice.

        Raises:
            InternalError: The slim network differs from the masked one.
        """
        selection, shortened = attempt.selection, attempt.prepared.shortened
        if not selection.removed:
            return attempt
        edit, model = RemoveChannels(selection.removed), shortened.model
        slim = remove_channels(model.module, edit, example_input(model.signature))
        set_memory_format(slim, self.memory_format)
        check_cut(slim, model.module, selection, attempt.prepared.surveyed.groups, self.ctx.data.calibration)
        return replace(attempt, model=replace(model, module=slim, recipe=model.recipe.then(edit)))

    def repair(self, attempt: Attempt) -> Attempt:
        """Repair a network whose channels were removed, in place."""
        selection, prepared, slim = attempt.selection, attempt.prepared, attempt.model.module
        if not selection.removed:
            return attempt
        whole, groups = prepared.shortened.whole, prepared.surveyed.groups
        example, kept, ctx = example_input(attempt.model.signature), kept_outputs(selection.removed, groups), self.ctx

        def repair() -> Part:
            names, images = self.config.repair, self.config.refit_images
            ((_, fold),) = repairs_towards(whole, slim, kept, ("bias_folding",), example, ctx, images)
            wanted = repairs_towards(whole, slim, kept, names, example, ctx, images, prepared.outputs)
            if "scaling" in names:
                wanted = scaling_repairs(prepared.candidates, selection, groups, fold) + wanted
            return repaired_part(slim, apply_repairs(slim, wanted, ctx))

        part = ctx.parts.keep({"part": "repair", "of": prepared.key, "removed": selection.removed}, repair)
        slim.load_state_dict(part.tensors)
        return replace(attempt, repairs=repairs_of(part.record))

    def loss(self, attempt: Attempt) -> float:
        """Return the validation loss of a network that was pruned and repaired."""
        if attempt.repairs:
            return loss_after(attempt.repairs)

        def measure() -> Part:
            return Part(evaluate_loss(attempt.model.module, self.ctx.data.validation, progress=self.ctx.progress))

        key = {"part": "loss", "of": attempt.prepared.key, "removed": attempt.selection.removed}
        return float(self.ctx.parts.keep(key, measure).record)


def best_along_streams(kept: Attempt, pruner: Pruner) -> tuple[Attempt, tuple[StreamTrial, ...]]:
    """Meet the targets again with more channels of residual streams removed; return the attempt of least loss.

    Scores and repairs are less certain for these channels than for channels inside a block, since every block of a
    stage adds to them.

    Args:
        kept: The attempt with the first factor, which removes few of these channels.
        pruner: Steps that prune the network.

    Returns:
        The best attempt, and the factor and loss of each attempt; no records if there is nothing to try.
    """
    factors = pruner.stream_factors(kept.prepared)
    if factors == (1.0,):
        return kept, ()
    best, least = kept, pruner.loss(kept)
    trials = [StreamTrial(factor=factors[0], loss=least)]
    tried = [kept.selection.removed]
    for factor in factors[1:]:
        found = pruner.choose(kept.prepared, factor)
        if found.selection.removed in tried:
            continue
        tried.append(found.selection.removed)
        found = pruner.complete(found)
        loss = pruner.loss(found)
        trials.append(StreamTrial(factor=factor, loss=loss))
        pruner.ctx.progress.note(
            f"damage along shortcuts counted {factor:g} times: validation loss {loss:.4f}, {least:.4f} before"
        )
        if loss < least or math.isnan(least):
            best, least = found, loss
    return best, tuple(trials)


@torch.no_grad()
def check_cut(slim: nn.Module, original: nn.Module, selection: Selection, groups: Groups, split: Split) -> None:
    """Check that the slim network equals the original with the removed channels masked.

    Raises:
        InternalError: Their outputs differ.
    """
    images, _ = next(evaluation_batches(split.first(8), 8, "nothing"))
    wanted = each(run(masked_copy(original, selection.removed, groups), images))
    for got, expected in zip(each(run(slim, images)), wanted, strict=True):
        difference = float((got - expected).abs().max())
        if not difference <= CUT_TOLERANCE * (1 + float(expected.abs().max())):
            raise InternalError(f"The cut network differs from the masked original by {difference:.2g}.")
