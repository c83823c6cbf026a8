"""Backward elimination: taylor scores decide widths, and channels that refitted readers make up for best go first."""

from collections.abc import Mapping
from typing import ClassVar

from compress.pruning.criteria.base import Order, Ranking
from compress.pruning.criteria.taylor import Taylor
from compress.pruning.groups import ChannelGroup
from compress.pruning.ranking.elimination import ReaderStats, removal_ranking


class Reconstruction(Taylor):
    """Taylor scores decide how wide each group becomes; the error of its refitted readers decides which channels go.

    Where the readers of a group cannot be refitted (grouped convolutions, very wide layers) the scores decide both.

    Source: `compress.pruning.ranking.elimination`.
    """

    name: ClassVar[str] = "reconstruction"
    order: ClassVar[Order] = "readers"

    def rank(self, group: ChannelGroup, stats: Mapping[str, ReaderStats], most: int) -> Ranking:
        """Rank units by backward elimination; see `compress.pruning.ranking.elimination.removal_ranking`."""
        return removal_ranking(group, stats, most)
