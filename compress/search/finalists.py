"""Last round of a search: the best candidates are rebuilt, their channels ranked again, and repaired in full."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

from compress.checkpoint.rebuild import example_input
from compress.errors import BudgetUnreachable, InternalError
from compress.model.stage_records import BlockTrial
from compress.model.tensors import weights_digest
from compress.search.block_removal import Shortened, places_in_whole, without_blocks
from compress.search.parts import Part
from compress.search.pricing import Pricing
from compress.search.pruner import Attempt, Prepared, Pruner
from compress.search.repairs import apply_repairs, repaired_part, repairs_of, repairs_towards
from compress.search.whole_trials import Tried

FINALISTS = 3


def order_finalists(tried: Sequence[Tried], usual: Pricing) -> list[Tried]:
    """Return the candidate networks in the order in which they are finished, lowest loss first.

    If the best one removes blocks, a copy priced without learned factors becomes number `FINALISTS`: factors learned
    while the blocks were present need not hold without them.

    Args:
        tried: Candidate networks.
        usual: Prices without learned factors.
    """
    ordered = sorted(tried, key=lambda one: one.loss)
    best = ordered[0]
    if not best.structure.removed:
        return ordered
    return [*ordered[: FINALISTS - 1], replace(best, pricing=usual), *ordered[FINALISTS - 1 :]]


class Finalists:
    """Networks that are finished at the end of a search.

    Args:
        prepared: The ranked network with all its blocks.
        pruner: Ranks, prunes and repairs.

    Attributes:
        records: Loss of each network that was finished, or the reason why the targets cannot be met with it.
    """

    def __init__(self, prepared: Prepared, pruner: Pruner) -> None:
        self.records: list[BlockTrial] = []
        self._prepared, self._pruner, self._ctx = prepared, pruner, pruner.ctx
        self._shorter: dict[tuple[str, ...], Prepared] = {(): prepared}

    def finish(self, ordered: Sequence[Tried]) -> Attempt:
        """Prune and repair the best networks in full, and return the attempt of least validation loss.

        Args:
            ordered: Candidate networks, best first.

        Raises:
            BudgetUnreachable: The targets cannot be met with any of them.
        """
        best: tuple[float, Attempt] | None = None
        unreachable: BudgetUnreachable | None = None
        for tried in ordered:
            blocks = len(tried.structure.removed)
            try:
                attempt = self._finished(tried)
            except BudgetUnreachable as error:
                unreachable = unreachable or error
                self.records.append(BlockTrial(blocks=blocks, loss=None, reason=error.message))
                continue
            loss = self._pruner.loss(attempt)
            self.records.append(BlockTrial(blocks=blocks, loss=loss))
            self._ctx.progress.note(f"{blocks} blocks removed, repaired in full: validation loss {loss:.4f}")
            if best is None or loss < best[0] or math.isnan(best[0]):
                best = loss, attempt
            if sum(record.loss is not None for record in self.records) == FINALISTS:
                break
        if best is None:
            raise unreachable or InternalError("No candidate network was tried.")
        return best[1]

    def _finished(self, tried: Tried) -> Attempt:
        """Return an attempt within the targets: channels ranked without the removed blocks, widths by its prices."""
        prepared = self._without_blocks(tried.structure.removed)
        places = places_in_whole(prepared.surveyed.groups, self._prepared.surveyed.groups)
        candidates = tried.pricing.repriced(prepared.candidates, {name: whole for name, (whole, _) in places.items()})
        return self._pruner.complete(self._pruner.choose_among(prepared, candidates, asdict(tried.pricing)))

    def _without_blocks(self, blocks: tuple[str, ...]) -> Prepared:
        """Return the network without some blocks, its channels ranked."""
        if blocks not in self._shorter:
            surveyed = self._prepared.surveyed
            layers = frozenset(member.layer for group in surveyed.groups.values() for member in group.producers)
            found = self._pruner.prepare(self._shorten(blocks), surveyed.targets.latency, layers)
            self._shorter[blocks] = replace(found, surveyed=replace(found.surveyed, excluded=surveyed.excluded))
        return self._shorter[blocks]

    def _shorten(self, blocks: tuple[str, ...]) -> Shortened:
        """Return the network without some blocks, repaired."""
        before, config = self._prepared.shortened, self._pruner.config
        model, example = without_blocks(before.model, blocks), example_input(before.model.signature)

        def repair() -> Part:
            module, whole = model.module, before.whole
            wanted = repairs_towards(whole, module, {}, config.repair, example, self._ctx, config.refit_images)
            tried = apply_repairs(module, wanted, self._ctx, enough=("least_squares",))  # channels are removed next
            return repaired_part(module, tried)

        weights = weights_digest(before.model.module)
        key = {"part": "without", "of": self._prepared.key, "removed": blocks, "weights": weights}
        part = self._ctx.parts.keep(key, repair)
        model.module.load_state_dict(part.tensors)
        repairs = before.repairs + repairs_of(part.record)
        return replace(before, model=model, removed=before.removed + blocks, repairs=repairs)
