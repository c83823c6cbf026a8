"""Scores, orders and damages of a network's channel groups: evidence is collected, a criterion turns it into numbers.

    scores   for all groups, or only for those that cannot be ranked where errors decide widths
    order    by readers or by losses, where the criterion says so
    damage   of each width: by scores, by errors of the ranking, or measured (sensitivity)

All of it is kept in parts, so that a run that was killed goes on.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.allocation.widths import Candidates
from compress.catalog import CRITERIA
from compress.checkpoint.rebuild import example_input
from compress.config.schema.prune import CutConfig, PruneConfig, TorchPruningConfig
from compress.data.batches import Batch, evaluation_batches
from compress.data.splits import Split
from compress.errors import ConfigValueError, DataError
from compress.model.artifacts import TorchModel
from compress.model.modes import eval_mode
from compress.progress import Task
from compress.pruning.criteria.base import Criterion, Ranking, collect_gradients
from compress.pruning.criteria.gradient_flow import collect_gradient_flow
from compress.pruning.criteria.magnitude import L2
from compress.pruning.criteria.pfp import collect_contributions
from compress.pruning.groups import BATCH_NORMS, ChannelGroup
from compress.pruning.ranking.elimination import reader_statistics
from compress.pruning.ranking.selection import Groups, find_candidates, score_groups
from compress.pruning.ranking.sensitivity import SavedRises, Sensitivity, with_rises
from compress.search.block_removal import Trunk
from compress.search.context import StageContext
from compress.search.parts import Part
from compress.search.repairs import batch_norm_repair
from compress.search.survey import Survey
from compress.tasks.imitation import Imitation
from compress.training.evaluate import evaluate_loss, image_losses, run
from compress.user_code import short_reference

SCORE_BATCH, SCORE_PIXELS = 64, 2**18
FLOW_BATCH, SHARE_BATCH = 32, 8
LOSS_IMAGES = 128
UNTRAINED_TEMPERATURE = 200.0
UNTRAINED = 0.9  # of the loss of a guess
IMITATED = 1e-6  # loss below which a network equals the baseline
SENSITIVITY_FILE = "sensitivity.json"
CLOSER = ("order", "measured", "errors", "scales")  # kept of a group's ranking


@dataclass(frozen=True)
class Scoring:
    """Scores the groups of one network.

    Attributes:
        config: Of the prune stage.
        trunk: The network.
        surveyed: Its groups and their allowed widths.
        key: Tells the network from others among the parts of the stage.
        ctx: Surroundings.
    """

    config: PruneConfig
    trunk: Trunk
    surveyed: Survey
    key: str
    ctx: StageContext

    @cached_property
    def criterion(self) -> Any:
        """The criterion that the pipeline names."""
        return criterion_of(self.config, self.ctx.seed)

    @property
    def damage(self) -> str:
        """Measure that widths are chosen by: scores, errors or sensitivity.

        Errors stand in for scores where the criterion says so, and where it ranks by readers and images have no labels.
        """
        criterion, damage = self.criterion, self.config.damage
        is_without_loss = criterion.order == "readers" and not self._has_labels
        return "errors" if damage == "scores" and (criterion.widths_by == "errors" or is_without_loss) else damage

    def candidates(self) -> list[Candidates]:
        """Return the groups with scores, orders and damages.

        Raises:
            UnsupportedLayer: The criterion cannot score a group.
            NonFinite: A score is NaN or infinite.
            ConfigValueError: `damage: errors` is asked of a criterion without errors.
        """
        config, groups = self.config, self.surveyed.groups
        criterion = self.criterion
        if config.damage == "errors" and criterion.order == "scores":
            raise ConfigValueError(
                f"damage must be scores or sensitivity with criterion '{criterion.name}', got 'errors'.",
                hint="Criteria with errors of their own are greedy, greedy_refit, lasso, greedy_loss, reconstruction.",
            )
        by_errors = self.damage == "errors"
        if by_errors and config.damage == "scores" and criterion.widths_by == "scores":
            self.ctx.progress.note(
                f"images without labels: widths by the errors of readers, as {criterion.name} has them"
            )
        if by_errors:
            found = {name: self._without_scores(name) for name in groups}
            found = self._ranked(criterion, found, by_errors)
            unranked = [name for name, one in found.items() if one.order is None]
            if unranked:
                scored = self._scored(criterion if self._has_labels else L2(), groups)
                found |= self._on_a_scale(scored, found, unranked)
        else:
            found = self._scored(criterion, groups)
            if criterion.order != "scores" or config.damage == "sensitivity":
                found = self._ranked(criterion, found, by_errors)
        if config.order == "shuffled":
            found = {name: replace(one, order=self._any_order(one), scales=None) for name, one in found.items()}
        return list(found.values())

    def _without_scores(self, name: str) -> Candidates:
        group, levels = self.surveyed.groups[name], self.surveyed.levels[name]
        return Candidates(name, np.zeros(group.width // group.parts), group.parts, levels)

    def _any_order(self, one: Candidates) -> np.ndarray:
        """Return the units of a group in an order that the seed and its name decide."""
        return np.random.default_rng([self.ctx.seed, *one.name.encode()]).permutation(len(one.scores))

    def _scored(self, criterion: Any, groups: Groups) -> dict[str, Candidates]:
        """Return the groups with scores, and with the damages that the criterion makes of them."""

        def measure() -> Part:
            return Part(None, score_groups(groups, criterion, self._evidence(criterion)))

        scores = self.ctx.parts.keep({"part": "scores", "of": self.key}, measure).tensors
        found = find_candidates(groups, scores, self.surveyed.levels, criterion.comparable)
        if not hasattr(criterion, "damages"):
            return {one.name: one for one in found}
        return {one.name: replace(one, measured=_at_levels(one, criterion.damages(one.scores))) for one in found}

    def _on_a_scale(
        self, scored: Mapping[str, Candidates], ranked: Mapping[str, Candidates], unranked: Sequence[str]
    ) -> dict[str, Candidates]:
        """Return groups that cannot be ranked, their damages by scores brought to the scale of errors.

        The factor is the median, over the groups that have both, of error over damage at the least width.
        """
        ratios = [
            float(one.damages[0] / scored[name].damages[0])
            for name, one in ranked.items()
            if name not in unranked and scored[name].damages[0] > 0
        ]
        factor = float(np.median(ratios)) if ratios else 1.0
        self.ctx.progress.note(f"channel groups ranked by scores, as their readers cannot be refitted: {len(unranked)}")
        return {name: replace(scored[name], measured=scored[name].damages * factor) for name in unranked}

    def _evidence(self, criterion: Criterion) -> Any:
        """Collect what the scores of a criterion rest on."""
        config, ctx, module = self.config, self.ctx, self.trunk.model.module
        groups, kind = self.surveyed.groups, criterion.evidence
        split = ctx.data.calibration.first(config.score_images)
        if kind == "weights":
            return None
        if kind == "contributions":
            with ctx.progress.task("shares of channels", len(split)) as task:
                batches = _counted(evaluation_batches(split, SHARE_BATCH, "nothing"), task)
                return collect_contributions(module, groups.values(), batches)
        losses = split.lesson.image_losses
        self._require_loss(module, split, criterion.name)
        if kind == "parameter_gradients":
            from compress.pruning.criteria.parameter_gradients import collect_parameter_gradients

            with ctx.progress.task("gradients of weights", len(split)) as task:
                batches = _counted(evaluation_batches(split, 1), task)
                return collect_parameter_gradients(module, batches, losses)
        module = self._with_statistics(module)
        if kind == "gradient_flow":
            is_trained = self._is_trained(module, split)
            temperature = 1.0 if is_trained or not split.lesson.chooses else UNTRAINED_TEMPERATURE
            with ctx.progress.task("gradient flow", len(split)) as task:
                images = list(_counted(evaluation_batches(split, FLOW_BATCH), task))
                stats = collect_gradient_flow(module, groups.values(), images, losses, temperature)
            ctx.progress.note(f"gradient flow of {'a trained' if is_trained else 'an untrained'} network")
            return replace(stats, is_signed=not is_trained)
        with ctx.progress.task("score channels", len(split)) as task:
            size = score_batch(self.trunk.model, config.images_per_gradient)
            batches = _counted(evaluation_batches(split, size), task)
            return collect_gradients(module, groups.values(), batches, config.images_per_gradient, losses)

    @property
    def _has_labels(self) -> bool:
        """True where the loss is that of a task, and not the distance to the baseline."""
        return not isinstance(self.ctx.data.calibration.lesson, Imitation)

    def _require_loss(self, module: nn.Module, split: Split, criterion: str) -> None:
        """Check that the loss has gradients: without labels it is the distance to the baseline, least at the baseline.

        Raises:
            DataError: The network is the baseline, and images have no labels.
        """
        if isinstance(split.lesson, Imitation) and evaluate_loss(module, split) < IMITATED:
            raise DataError(
                f"Criterion '{criterion}' needs gradients of a loss. These images have no labels, and the loss is the "
                "distance to the baseline, which the network still equals: all gradients are 0.",
                hint="Label the calibration images, or choose a criterion without gradients, such as greedy, lasso or "
                "tp_magnitude.",
            )

    def _with_statistics(self, module: nn.Module) -> nn.Module:
        """Return the network; a copy with measured statistics where no batch norm has seen an image yet."""
        norms = [part for part in module.modules() if isinstance(part, BATCH_NORMS) and part.running_mean is not None]
        is_new = bool(norms) and all(
            not norm.running_mean.any() and bool((norm.running_var == 1).all())  # type: ignore[union-attr]
            for norm in norms
        )
        if not is_new:
            return module
        measured = copy.deepcopy(module)
        batch_norm_repair(self.ctx)[1](measured)
        return measured

    def _is_trained(self, module: nn.Module, split: Split) -> bool:
        """Return True for a network that does clearly better than one that gives the same output for every image."""
        example = example_input(self.trunk.model.signature)
        with torch.no_grad(), eval_mode(module):
            guess = split.lesson.guess(run(module, example))
        return evaluate_loss(module, split, progress=self.ctx.progress) < UNTRAINED * guess

    def _ranked(self, criterion: Any, candidates: Mapping[str, Candidates], by_errors: bool) -> dict[str, Candidates]:
        """Return groups with the order in which their channels go, and measured damages where those are asked for."""
        module, groups, ctx = self.trunk.model.module, self.surveyed.groups, self.ctx
        found = dict(candidates)
        sensitivity = self._sensitivity() if self.config.damage == "sensitivity" else None

        def ranked(one: Candidates, ranking: Ranking) -> Candidates:
            scales = None if ranking.scales is None else _at_levels(one, ranking.scales)
            one = replace(one, order=ranking.order, scales=scales)
            return replace(one, measured=_at_levels(one, ranking.errors)) if by_errors else one

        if criterion.order == "loss":
            for name, one in found.items():
                key = {"part": "order", "of": self.key, "groups": [name]}

                def rank(one: Candidates = one, name: str = name) -> Part:
                    with ctx.progress.task(f"losses with channels of {name}", 1) as task:
                        loss_of = self._loss_with(groups[name])
                        result = ranked(one, criterion.rank_by_loss(groups[name], loss_of, _most(one)))
                        task.advance()
                    return Part(None, _arrays(result))

                found[name] = _with_arrays(one, ctx.parts.keep(key, rank).tensors)
            return self._with_rises(found, sensitivity)

        ranks = criterion.order == "readers"
        refits = ranks or "least_squares" in self.config.repair
        split = ctx.data.calibration.first(self.config.score_images)

        def is_done(names: Sequence[str]) -> bool:
            part = ctx.parts.find({"part": "order", "of": self.key, "groups": list(names)})
            if part is not None:
                found.update({name: _with_arrays(found[name], part.tensors) for name in names})
            return part is not None

        for names, stats in reader_statistics(module, groups, split, ctx.progress, is_done) if refits else ():
            with ctx.progress.task("order of channels", len(names)) as task:
                for name in names:
                    one = found[name]
                    if ranks:
                        found[name] = one = ranked(one, criterion.rank(groups[name], stats, _most(one)))
                    if sensitivity is not None:
                        found[name] = with_rises(one, sensitivity.rises(groups[name], one, stats))
                    task.advance()
            arrays = {name: values for one in names for name, values in _arrays(found[one]).items()}
            ctx.parts.add({"part": "order", "of": self.key, "groups": list(names)}, Part(None, arrays))
        return self._with_rises(found, sensitivity)

    def _with_rises(self, found: dict[str, Candidates], sensitivity: Sensitivity | None) -> dict[str, Candidates]:
        for name, one in found.items():
            if sensitivity is not None and one.errors is None:
                found[name] = with_rises(one, sensitivity.rises(self.surveyed.groups[name], one, None))
        return found

    def _loss_with(self, group: ChannelGroup) -> Any:
        """Return what gives the loss on one fixed batch with what reads each channel multiplied by a factor."""
        module, calibration = self.trunk.model.module, self.ctx.data.calibration
        split = calibration.first(min(self.config.score_images, LOSS_IMAGES))

        def loss_of(factors: Tensor) -> float:
            with scaled_reads(module, group, factors):
                return evaluate_loss(module, split)

        return loss_of

    def _sensitivity(self) -> Sensitivity:
        """Return what measures damages, on images of the validation split."""
        ctx, module = self.ctx, self.trunk.model.module
        example = example_input(self.trunk.model.signature)
        split = ctx.data.validation.first(self.config.score_images)
        with torch.no_grad(), eval_mode(module):
            guess = split.lesson.guess(run(module, example))
        return Sensitivity(
            module,
            lambda network: image_losses(network, split),
            guess,
            batch_norm_repair(ctx)[1],
            example,
            SavedRises(ctx.folder / SENSITIVITY_FILE, "+".join(self.trunk.removed)),
            ctx.progress,
        )


def criterion_of(config: PruneConfig, seed: int) -> Criterion:
    """Return the criterion that a pipeline names, or that it makes of an importance of the user's own.

    Raises:
        ModelError: That importance cannot be imported, raises, or is none.
    """
    named = config.criterion
    if isinstance(named, TorchPruningConfig):
        from compress.pruning.criteria.torch_pruning import OwnImportance  # imports torch-pruning, which takes seconds

        own: Any = OwnImportance(named.torch_pruning, named.kwargs, named.gradients, named.comparable, seed)
        return own  # type: ignore[no-any-return]
    criterion: Criterion = CRITERIA.get(named)(seed=seed)
    return criterion


def criterion_name(config: CutConfig) -> str:
    """Return the name of the criterion, or file and class of an importance of the user's own, less its folder."""
    named = config.criterion
    return named if isinstance(named, str) else short_reference(named.torch_pruning)


@contextmanager
def scaled_reads(module: nn.Module, group: ChannelGroup, factors: Tensor) -> Iterator[None]:
    """Multiply what reads each channel of a group by a factor, while it lasts.

    Args:
        module: The network the group belongs to.
        group: C channels.
        factors: (C,) float32.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for read in group.reads:
            weight: Tensor = getattr(module.get_submodule(read.path), read.name)
            kept.append((weight, weight.detach().clone()))
            scale_slots(weight, read.dim, read.slots, factors[read.channels])
        yield
    finally:
        with torch.no_grad():
            for weight, values in reversed(kept):
                weight.copy_(values)


@torch.no_grad()
def scale_slots(weight: Tensor, dim: int, slots: Tensor, factors: Tensor) -> None:
    """Multiply the slots of one dimension of a weight by factors, in place."""
    shape = [1] * weight.ndim
    shape[dim] = len(slots)
    slots, values = slots.to(weight.device), factors.to(weight).reshape(shape)
    weight.index_copy_(dim, slots, weight.index_select(dim, slots) * values)


def score_batch(model: TorchModel, each: int) -> int:
    """Return how many images to score at once: many small ones, few large ones, whose activations all are kept.

    Args:
        model: The network.
        each: Images of one gradient; the batch is a multiple of it.
    """
    pixels = math.prod(int(size) for size in model.signature.inputs[0].shape[2:])
    fitting = min(SCORE_BATCH, SCORE_PIXELS // max(1, pixels))
    return max(1, fitting // each) * each


def _most(one: Candidates) -> int:
    """Return how many units may be removed at most."""
    return (one.full - one.levels[0]) // one.channels_per_unit


def _at_levels(one: Candidates, by_removed: np.ndarray) -> np.ndarray:
    """Return of (U + 1, ...) values by the number of removed units those of the allowed widths."""
    chosen: np.ndarray = by_removed[(one.full - np.asarray(one.levels)) // one.channels_per_unit]
    return chosen


def _arrays(one: Candidates) -> dict[str, Tensor]:
    values = {kind: getattr(one, kind) for kind in CLOSER}
    return {
        f"{one.name}/{kind}": torch.from_numpy(np.ascontiguousarray(array))
        for kind, array in values.items()
        if array is not None
    }


def _with_arrays(one: Candidates, arrays: Mapping[str, Tensor]) -> Candidates:
    known: dict[str, Any] = {kind: arrays[key].numpy() for kind in CLOSER if (key := f"{one.name}/{kind}") in arrays}
    return replace(one, **known)


def _counted(batches: Iterator[Batch], task: Task) -> Iterator[Batch]:
    """Pass batches on and tell the task how many images they hold."""
    for images, targets in batches:
        yield images, targets
        task.advance(len(images))
