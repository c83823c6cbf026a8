"""Number of residual blocks to remove: tried in turn within the targets, the least validation loss wins."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

from compress.errors import BudgetUnreachable, InternalError
from compress.model.stage_records import BlockTrial
from compress.search.block_removal import Shortened
from compress.search.parts import Part
from compress.search.pruner import Attempt, Pruner
from compress.search.survey import survey
from compress.search.width_latency import LatencyModel

PATIENCE, TRIALS = 2, 9


@dataclass(frozen=True)
class Trial:
    """An attempt with a number of blocks removed.

    Attributes:
        blocks: Number of removed blocks.
        attempt: Function that returns the attempt; after an interrupted run it is rebuilt from its parts.
        loss: Loss on the validation split; infinite where it is NaN.
        removes_channels: False if removing the blocks alone meets the targets.
    """

    blocks: int
    attempt: Callable[[], Attempt]
    loss: float
    removes_channels: bool


class _LatestLatency:
    """Latency of the last network with a table of its own.

    Attributes:
        get: Function that returns that latency, or None before the first; after a kill, it is rebuilt at first use.
    """

    def __init__(self) -> None:
        self.get: Callable[[], LatencyModel | None] = lambda: None

    def differs_from(self, found: LatencyModel | None) -> bool:
        """Return whether the table of `found` differs from that of the last network."""
        known = self.get()
        return found is not None and (known is None or found.table is not known.table)


class BlockNumberSearch:
    """Search for the number of residual blocks to remove.

    Args:
        pruner: Meets the targets with a number of blocks removed.

    Attributes:
        records: Loss of each number tried, or the reason why the targets cannot be met with it.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.records: list[BlockTrial] = []
        self._pruner, self._progress = pruner, pruner.ctx.progress
        self._latency = _LatestLatency()
        self._unreachable: BudgetUnreachable | None = None

    def run(self, networks: Iterable[Shortened]) -> Attempt:
        """Meet the targets with no block removed, with one, with two ...; return the attempt of least validation loss.

        In a network of many blocks, trials skip numbers of blocks; the numbers next to the best are tried at the end.
        The search stops when the loss has risen twice in a row, or when removing blocks alone meets the targets.

        Args:
            networks: Networks that `shorten` yields.

        Raises:
            BudgetUnreachable: The targets cannot be met with any number of blocks.
        """
        best: Trial | None = None
        rises = 0
        between: dict[int, Shortened] = {}  # near the best, not tried
        for shortened in networks:
            step, count = math.ceil(shortened.blocks / TRIALS) or 1, len(shortened.removed)
            if count % step:
                between[count] = shortened
                continue
            trial = self._try(shortened)
            if trial is None:
                continue
            is_better = best is None or trial.loss < best.loss
            rises = 0 if is_better else rises + 1
            best = trial if is_better else best
            if rises == PATIENCE or not trial.removes_channels:
                break
            between = {
                other: kept for other, kept in between.items() if best is not None and other > best.blocks - step
            }
        while best is not None and (near := between.keys() & {best.blocks - 1, best.blocks + 1}):
            trial = self._try(between.pop(min(near)))
            best = trial if trial is not None and trial.loss < best.loss else best
        if best is None:
            raise self._unreachable or InternalError("No number of blocks was tried.")
        return best.attempt()

    def _try(self, shortened: Shortened) -> Trial | None:
        """Return a trial without some blocks; None if it cannot meet the targets."""
        try:
            trial = self._trial(shortened)
        except BudgetUnreachable as error:
            self.records.append(BlockTrial(blocks=len(shortened.removed), loss=None, reason=error.message))
            self._unreachable = self._unreachable or error
            return None
        self.records.append(BlockTrial(blocks=trial.blocks, loss=trial.loss))
        self._progress.note(f"{trial.blocks} blocks removed: validation loss {trial.loss:.4f} within the budget")
        return replace(trial, loss=math.inf if math.isnan(trial.loss) else trial.loss)

    def _trial(self, shortened: Shortened) -> Trial:
        """Meet the targets without some blocks, or read the result of an interrupted run.

        Raises:
            BudgetUnreachable: The targets cannot be met without these blocks.
        """
        pruner, latency, before = self._pruner, self._latency, self._latency.get
        parts, target = pruner.ctx.parts, pruner.config.target.given()
        key = {"part": "trial", "of": pruner.identify(shortened, None), "target": target}
        part = parts.find(key)
        if part is None:
            prepared = pruner.prepare(shortened, before())
            found = prepared.surveyed.targets.latency
            is_timed_anew = latency.differs_from(found)
            latency.get = lambda: found
            attempt = pruner.attempt(prepared)
            loss, removes = pruner.loss(attempt), bool(attempt.selection.removed)
            parts.add(key, Part({"loss": loss, "cuts_channels": removes, "is_timed_anew": is_timed_anew}))
            return Trial(len(shortened.removed), lambda: attempt, loss, removes)
        if part.record["is_timed_anew"]:
            model, config, ctx = shortened.model, pruner.config, pruner.ctx
            latency.get = cache(lambda: survey(model, config, before(), ctx).targets.latency)

        def again() -> Attempt:
            return pruner.attempt(pruner.prepare(shortened, before()))

        return Trial(len(shortened.removed), again, part.record["loss"], part.record["cuts_channels"])
