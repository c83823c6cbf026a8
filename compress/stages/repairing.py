"""Which repairs help? Each is applied, judged by the loss on the validation split, and taken back if it does not."""

import copy
import math
from collections.abc import Callable, Sequence, Sized

from torch import nn

from compress.pruning.repair import reestimate_batch_norm
from compress.stages.context import Record, StageContext
from compress.training.evaluate import evaluate_loss

Repair = tuple[str, Callable[[nn.Module], Sized]]


def batch_norm_repair(ctx: StageContext) -> Repair:
    """Return the repair that measures batch-norm statistics again on the calibration split."""
    return "batch_norm", lambda module: reestimate_batch_norm(module, ctx.data.calibration, ctx.progress)


def apply_repairs(module: nn.Module, repairs: Sequence[Repair], ctx: StageContext) -> list[Record]:
    """Apply repairs in turn and in place, each kept only if it lowers the validation loss.

    Args:
        module: The network after a cut.
        repairs: Names, and functions that change the network in place and return what they changed.
        ctx: Has the validation split.

    Returns:
        For each repair that found something to change its name, the loss before and after, and whether it was kept.
    """
    if not repairs:
        return []
    validation, records = ctx.data.validation, []
    loss = evaluate_loss(module, validation, progress=ctx.progress)
    for name, repair in repairs:
        state = copy.deepcopy(module.state_dict())
        if not repair(module):
            continue
        after = evaluate_loss(module, validation, progress=ctx.progress)
        is_kept = after < loss or (math.isnan(loss) and not math.isnan(after))
        records.append({"repair": name, "loss_before": loss, "loss_after": after, "is_kept": is_kept})
        ctx.progress.note(f"{name}: validation loss {loss:.4f} -> {after:.4f}{'' if is_kept else ', taken back'}")
        if is_kept:
            loss = after
        else:
            module.load_state_dict(state)
    return records
