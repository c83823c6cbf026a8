"""Scores, orders and damages of a network's channel groups, by the criterion that the pipeline names.

    scores   for all groups, or only for those that cannot be ranked where errors decide widths
    order    by readers or by losses, for criteria that do so
    damage   of each width: by scores, by errors of the ranking, or measured (sensitivity)

All of it is stored in parts, so that a killed run resumes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from compress.allocation.widths import Candidates
from compress.catalog import CRITERIA
from compress.config.schema.prune import CutConfig, PruneConfig, TorchPruningConfig
from compress.errors import ConfigValueError
from compress.pruning.criteria.base import Criterion
from compress.pruning.criteria.magnitude import L2
from compress.pruning.ranking.selection import Groups, find_candidates, score_groups
from compress.search.block_removal import Shortened
from compress.search.channel_orders import ChannelOrders, at_levels
from compress.search.context import StageContext
from compress.search.evidence import EvidenceCollector
from compress.search.parts import Part
from compress.search.survey import Survey
from compress.tasks.imitation import Imitation
from compress.user_code import short_reference


@dataclass(frozen=True)
class Scoring:
    """Scores of the groups of one network.

    Attributes:
        shortened: The network.
        surveyed: Its groups, their allowed widths, and the settings of the stage.
        key: Digest that identifies the network among the parts of the stage.
        ctx: Splits, parts and listener of the stage.
    """

    shortened: Shortened
    surveyed: Survey
    key: str
    ctx: StageContext

    @cached_property
    def criterion(self) -> Any:
        """The criterion that the pipeline names."""
        return criterion_of(self.surveyed.config, self.ctx.seed)

    @property
    def damage(self) -> str:
        """Measure that widths are chosen by: scores, errors or sensitivity.

        Errors replace scores for criteria that declare it, and for those that rank by readers if images have no labels.
        """
        criterion, damage = self.criterion, self.surveyed.config.damage
        is_without_loss = criterion.order == "readers" and not self._has_labels
        return "errors" if damage == "scores" and (criterion.widths_by == "errors" or is_without_loss) else damage

    @cached_property
    def orders(self) -> ChannelOrders:
        """Orders of the channels, found by readers or by losses."""
        return ChannelOrders(self.shortened, self.surveyed, self.key, self.ctx, by_errors=self.damage == "errors")

    @property
    def evidence(self) -> EvidenceCollector:
        """Collector of the evidence that the criterion needs."""
        return EvidenceCollector(self.shortened.model, self.surveyed.groups, self.surveyed.config, self.ctx)

    def candidates(self) -> list[Candidates]:
        """Return the groups with scores, orders and damages.

        Raises:
            UnsupportedLayer: The criterion cannot score a group.
            NonFinite: A score is NaN or infinite.
            ConfigValueError: `damage: errors` is set for a criterion without errors.
        """
        config, groups, criterion = self.surveyed.config, self.surveyed.groups, self.criterion
        if config.damage == "errors" and criterion.order == "scores":
            raise ConfigValueError(
                f"damage must be scores or sensitivity with criterion '{criterion.name}', got 'errors'.",
                hint="Criteria with errors of their own are greedy, greedy_refit, lasso, greedy_loss, reconstruction.",
            )
        if self.damage == "errors":
            found = self._by_errors()
        else:
            found = self._scored(criterion, groups)
            if criterion.order != "scores" or config.damage == "sensitivity":
                found = self.orders.find(criterion, found)
        if config.order == "shuffled":
            found = {name: replace(one, order=self._any_order(one), scales=None) for name, one in found.items()}
        return list(found.values())

    def _by_errors(self) -> dict[str, Candidates]:
        """Return the groups with errors as damages; for groups that cannot be ranked, scores on the scale of errors."""
        criterion, groups = self.criterion, self.surveyed.groups
        if self.surveyed.config.damage == "scores" and criterion.widths_by == "scores":
            self.ctx.progress.note(
                f"images without labels: widths by the errors of readers, as {criterion.name} has them"
            )
        found = self.orders.find(criterion, {name: self._without_scores(name) for name in groups})
        unranked = [name for name, one in found.items() if one.order is None]
        if unranked:
            scored = self._scored(criterion if self._has_labels else L2(), groups)
            found |= self._on_a_scale(scored, found, unranked)
        return found

    def _without_scores(self, name: str) -> Candidates:
        group, levels = self.surveyed.groups[name], self.surveyed.levels[name]
        return Candidates(name, np.zeros(group.width // group.parts), group.parts, levels)

    def _any_order(self, one: Candidates) -> np.ndarray:
        """Return the units of a group in an order that the seed and its name decide."""
        return np.random.default_rng([self.ctx.seed, *one.name.encode()]).permutation(len(one.scores))

    def _scored(self, criterion: Any, groups: Groups) -> dict[str, Candidates]:
        """Return the groups with scores, and with the damages that the criterion computes from them."""

        def measure() -> Part:
            evidence = self.evidence.collect(criterion, self.orders.shared_pass(criterion))
            return Part(None, score_groups(groups, criterion, evidence))

        scores = self.ctx.parts.keep({"part": "scores", "of": self.key}, measure).tensors
        found = find_candidates(groups, scores, self.surveyed.levels, criterion.comparable)
        if not hasattr(criterion, "damages"):
            return {one.name: one for one in found}
        return {one.name: replace(one, measured=at_levels(one, criterion.damages(one.scores))) for one in found}

    def _on_a_scale(
        self, scored: Mapping[str, Candidates], ranked: Mapping[str, Candidates], unranked: Sequence[str]
    ) -> dict[str, Candidates]:
        """Return the groups that cannot be ranked, with damages by scores on the scale of errors.

        The factor is the median of error over damage at the least width, over the groups that have both.
        """
        ratios = [
            float(one.damages[0] / scored[name].damages[0])
            for name, one in ranked.items()
            if name not in unranked and scored[name].damages[0] > 0
        ]
        factor = float(np.median(ratios)) if ratios else 1.0
        self.ctx.progress.note(f"channel groups ranked by scores, as their readers cannot be refitted: {len(unranked)}")
        return {name: replace(scored[name], measured=scored[name].damages * factor) for name in unranked}

    @property
    def _has_labels(self) -> bool:
        """True if the loss comes from labels, False if it is the distance to the baseline."""
        return not isinstance(self.ctx.data.calibration.objective, Imitation)


def criterion_of(config: PruneConfig, seed: int) -> Criterion:
    """Return the criterion that a pipeline names, or a criterion made of the user's torch-pruning importance.

    Raises:
        ModelError: That importance cannot be imported, raises, or is not an importance.
    """
    named = config.criterion
    if isinstance(named, TorchPruningConfig):
        from compress.pruning.criteria.torch_pruning import OwnImportance  # imports torch-pruning, which takes seconds

        own: Any = OwnImportance(named.torch_pruning, named.kwargs, named.gradients, named.comparable, seed)
        return own  # type: ignore[no-any-return]
    criterion: Criterion = CRITERIA.get(named)(seed=seed)
    return criterion


def criterion_name(config: CutConfig) -> str:
    """Return the name of the criterion; for the user's importance, its file without the folder, and its class."""
    named = config.criterion
    return named if isinstance(named, str) else short_reference(named.torch_pruning)
