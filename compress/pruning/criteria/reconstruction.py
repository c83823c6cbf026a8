"""Criteria that rank channels by the reconstruction error of their readers: no labels are used for the order.

reconstruction   backward elimination with refitted readers; widths by Taylor scores
greedy           forward selection by local imitation of the readers
greedy_refit     forward selection with refitted readers
lasso            path of a LASSO on the contributions to the readers
"""

from collections.abc import Mapping
from typing import ClassVar

from compress.pruning.criteria.base import Order, Ranking, WidthsBy
from compress.pruning.criteria.taylor import Taylor
from compress.pruning.groups import ChannelGroup
from compress.pruning.ranking.elimination import ReaderStats, removal_ranking
from compress.pruning.ranking.forward_selection import (
    contribution_gram,
    imitation_ranking,
    lasso_ranking,
    refit_ranking,
)


class Reconstruction(Taylor):
    """Criterion with widths by Taylor scores, and the order within a group by the error of its refitted readers.

    If the readers of a group cannot be refitted (grouped convolutions, very wide layers), the scores decide both.

    Source: `compress.pruning.ranking.elimination`.
    """

    name: ClassVar[str] = "reconstruction"
    order: ClassVar[Order] = "readers"

    def rank(self, group: ChannelGroup, stats: Mapping[str, ReaderStats], most: int) -> Ranking:
        """Rank units by backward elimination; see `compress.pruning.ranking.elimination.removal_ranking`."""
        return removal_ranking(group, stats, most)


class _ByReaders(Taylor):
    """Criterion with order and widths by the error of the readers' outputs; Taylor scores if these cannot be ranked."""

    order: ClassVar[Order] = "readers"
    widths_by: ClassVar[WidthsBy] = "errors"


class Greedy(_ByReaders):
    """Greedy forward selection by local imitation: channels enter in the order in which they imitate the readers best.

    Source: `compress.pruning.ranking.forward_selection.imitation_ranking`.
    """

    name: ClassVar[str] = "greedy"

    def rank(self, group: ChannelGroup, stats: Mapping[str, ReaderStats], most: int) -> Ranking:
        """Rank units by local imitation; the ranking has factors of the readers' columns."""
        return imitation_ranking(contribution_gram(group, stats), most)


class GreedyRefit(_ByReaders):
    """Forward selection with full refit of the readers at each step; made for strong compression.

    Source: `compress.pruning.ranking.forward_selection.refit_ranking`.
    """

    name: ClassVar[str] = "greedy_refit"

    def rank(self, group: ChannelGroup, stats: Mapping[str, ReaderStats], most: int) -> Ranking:
        """Rank units by orthogonal least squares."""
        return refit_ranking(group, stats, most)


class Lasso(_ByReaders):
    """LASSO channel selection: one path of the penalty gives the order for all widths.

    Source: `compress.pruning.ranking.forward_selection.lasso_ranking`.
    """

    name: ClassVar[str] = "lasso"

    def rank(self, group: ChannelGroup, stats: Mapping[str, ReaderStats], most: int) -> Ranking:
        """Rank units by the LASSO path."""
        return lasso_ranking(contribution_gram(group, stats), most)
