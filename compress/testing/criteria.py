"""Contract suite of criteria."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedLayer
from compress.pruning.criteria.base import Criterion, Evidence, Order, WidthsBy, collect_gradients, cross_entropies
from compress.pruning.criteria.gradient_flow import collect_gradient_flow
from compress.pruning.criteria.parameter_gradients import collect_parameter_gradients
from compress.pruning.criteria.pfp import collect_contributions
from compress.pruning.groups import ChannelGroup
from compress.pruning.trial import find_cuttable
from compress.testing.checks import flags_and_hooks, hold, over_parts, rearranged


@dataclass(frozen=True)
class CriterionCase:
    """Network and images for the tests of a criterion.

    Attributes:
        name: Name in the titles of tests.
        module: A classifier; the suite works on copies of it.
        images: (N, ...) input of the network.
        labels: (N,) class indices.
    """

    name: str
    module: nn.Module
    images: Tensor
    labels: Tensor


def _evidence(kind: Evidence, module: nn.Module, groups: Mapping[str, ChannelGroup], case: CriterionCase) -> Any:
    """Return the evidence of a criterion, collected from the images of a case in two batches."""
    halves = list(zip(case.images.chunk(2), case.labels.chunk(2), strict=True))
    if kind == "weights":
        return None
    if kind == "contributions":
        return collect_contributions(module, groups.values(), halves)
    if kind == "gradient_flow":
        return collect_gradient_flow(module, groups.values(), halves)
    if kind == "parameter_gradients":
        return collect_parameter_gradients(module, halves, cross_entropies)
    return collect_gradients(module, groups.values(), halves)


class CriterionContract:
    """Contract of every criterion. A subclass sets `criterion_class` and offers a fixture `criterion_case`.

    A criterion may refuse a group with UnsupportedLayer, but not every group of a network.

    Attributes:
        criterion_class: The criterion under test.
        tolerance: Largest difference between scores that must be equal, relative to the largest score of the group.
    """

    criterion_class: ClassVar[type[Criterion]]
    tolerance: ClassVar[float] = 1e-4

    def score(self, case: CriterionCase, module: nn.Module) -> dict[str, Tensor]:
        """Return the scores of every group of `module` that the criterion does not refuse."""
        groups, _ = find_cuttable(module, case.images[:1])
        criterion = self.criterion_class(seed=0)
        stats = _evidence(criterion.evidence, module, groups, case)
        scores = {}
        for name, group in groups.items():
            try:
                scores[name] = criterion.scores(group, stats)
            except UnsupportedLayer as error:
                hold(name in str(error), f"the refusal of '{name}' does not name it: '{error}'")
        hold(bool(scores), f"every group of '{case.name}' is refused")
        return scores

    def test_scores_are_one_finite_number_a_channel(self, criterion_case: CriterionCase) -> None:
        """Scores are (C,) float32, finite, detached."""
        groups, _ = find_cuttable(criterion_case.module, criterion_case.images[:1])
        for name, scores in self.score(criterion_case, criterion_case.module).items():
            hold(scores.shape == (groups[name].width,), f"'{name}' has scores of shape {tuple(scores.shape)}")
            hold(scores.dtype == torch.float32, f"'{name}' has scores of {scores.dtype}")
            hold(bool(scores.isfinite().all()), f"'{name}' has scores that are not finite")
            hold(not scores.requires_grad, f"'{name}' has scores that hold on to a gradient graph")

    def test_scores_are_the_same_twice(self, criterion_case: CriterionCase) -> None:
        """A new criterion with the same seed computes the same scores to the bit."""
        first, second = (self.score(criterion_case, criterion_case.module) for _ in range(2))
        for name, scores in first.items():
            hold(torch.equal(scores, second[name]), f"'{name}' has other scores the second time")

    def test_network_is_left_as_it_is(self, criterion_case: CriterionCase) -> None:
        """Weights, buffers, gradients, requires_grad, training flags and hooks do not change."""
        module = copy.deepcopy(criterion_case.module).train()
        next(module.children()).eval()
        next(module.parameters()).requires_grad_(False)
        before, flags = copy.deepcopy(module.state_dict()), flags_and_hooks(module)
        self.score(criterion_case, module)
        for name, value in module.state_dict().items():
            hold(torch.equal(value, before[name]), f"'{name}' changed")
        hold(flags_and_hooks(module) == flags, "a training flag, a requires_grad, a gradient or a hook changed")

    def test_permuted_channels_have_permuted_scores(self, criterion_case: CriterionCase) -> None:
        """The score of a channel does not depend on its index."""
        if not self.criterion_class.treats_equals_equally:
            return
        for name, group in self._groups(criterion_case).items():
            units = group.width // group.parts
            order = torch.randperm(units, generator=torch.Generator().manual_seed(0))
            index = over_parts(group, order)
            before = self.score(criterion_case, criterion_case.module)
            after = self.score(criterion_case, rearranged(criterion_case.module, group, index))
            if name in before:
                self._hold_close(after[name], before[name][index], name)

    def test_equal_channels_have_equal_scores(self, criterion_case: CriterionCase) -> None:
        """Channels with equal weights in all layers have equal scores."""
        if not self.criterion_class.treats_equals_equally:
            return
        for name, group in self._groups(criterion_case).items():
            units = torch.arange(group.width // group.parts)
            units[-1] = 0
            index = over_parts(group, units)
            scores = self.score(criterion_case, rearranged(criterion_case.module, group, index))
            if name in scores:
                self._hold_close(scores[name], scores[name][index], name)

    def test_criterion_says_what_it_is(self, criterion_case: CriterionCase) -> None:
        """The criterion has a name and traits of the right types."""
        hold(isinstance(self.criterion_class.name, str) and bool(self.criterion_class.name), "it has no name")
        for trait in ("comparable", "treats_equals_equally"):
            hold(isinstance(getattr(self.criterion_class, trait), bool), f"'{trait}' is not True or False")
        for trait, names in (("evidence", Evidence), ("order", Order), ("widths_by", WidthsBy)):
            hold(getattr(self.criterion_class, trait) in get_args(names), f"'{trait}' is none of {get_args(names)}")
        method = {"readers": "rank", "loss": "rank_by_loss"}.get(self.criterion_class.order, "scores")
        hold(callable(getattr(self.criterion_class, method, None)), f"it has no method '{method}'")

    def _groups(self, case: CriterionCase) -> dict[str, ChannelGroup]:
        return find_cuttable(case.module, case.images[:1])[0]

    def _hold_close(self, got: Tensor, wanted: Tensor, name: str) -> None:
        difference = float((got - wanted).abs().max())
        hold(difference <= self.tolerance * float(wanted.abs().max()), f"'{name}' has scores {difference:.2g} apart")
