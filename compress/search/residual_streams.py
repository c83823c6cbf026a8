"""Channels along residual streams: more of them removed, as far as the validation loss likes it."""

import math

from compress.search.attempts import Attempt
from compress.search.context import Record
from compress.search.pruner import Pruner


def best_along_streams(kept: Attempt, pruner: Pruner) -> tuple[Attempt, list[Record]]:
    """Meet the targets again with more channels of residual streams removed; return the least validation loss.

    Scores and repairs say less surely how much such a channel is missed, which every block of a stage adds to, than one
    inside a block.

    Args:
        kept: The attempt that hardly touches them.
        pruner: Meets the targets.

    Returns:
        The best attempt, and the factor and loss of each one tried; none where there is nothing to try.
    """
    factors = pruner.stream_factors(kept.prepared)
    if factors == (1.0,):
        return kept, []
    best, least = kept, pruner.loss(kept)
    trials: list[Record] = [{"factor": factors[0], "loss": least}]
    tried = [kept.selection.removed]
    for factor in factors[1:]:
        found = pruner.choose(kept.prepared, factor)
        if found.selection.removed in tried:
            continue
        tried.append(found.selection.removed)
        found = pruner.complete(found)
        loss = pruner.loss(found)
        trials.append({"factor": factor, "loss": loss})
        pruner.ctx.progress.note(
            f"damage along shortcuts counted {factor:g} times: validation loss {loss:.4f}, {least:.4f} before"
        )
        if loss < least or math.isnan(least):
            best, least = found, loss
    return best, trials
