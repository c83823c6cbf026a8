"""Networks between ranking and removal of their channels: ranked ones, and choices of channels within the targets."""

from dataclasses import dataclass

from compress.allocation.widths import Candidates
from compress.model.artifacts import TorchModel
from compress.pruning.ranking.selection import Selection
from compress.search.block_removal import Shortened
from compress.search.context import Record
from compress.search.latency_loop import TimedChoice
from compress.search.survey import Survey


@dataclass(frozen=True)
class Prepared:
    """A network whose channels are ranked.

    Attributes:
        shortened: The network, perhaps without some blocks.
        surveyed: Its prunable groups and the targets.
        candidates: The groups with their scores and allowed widths.
        key: Identifies the network among the parts of the stage.
        damage: Measure that widths are chosen by: scores, errors or sensitivity; None where a method decides.
    """

    shortened: Shortened
    surveyed: Survey
    candidates: list[Candidates]
    key: str
    damage: str | None = None


@dataclass(frozen=True)
class Attempt:
    """A choice of channels within the targets.

    Attributes:
        prepared: The ranked network.
        model: The network, before or after the channels are removed.
        selection: The channels chosen.
        timed: Whole networks that were timed on the way.
        repairs: Records of the repairs after the removal.
    """

    prepared: Prepared
    model: TorchModel
    selection: Selection
    timed: list[TimedChoice]
    repairs: list[Record]

    @property
    def removed_blocks(self) -> tuple[str, ...]:
        """Module paths of the removed blocks."""
        return self.prepared.shortened.removed
