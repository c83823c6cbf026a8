"""Repairs after a cut: each is applied, judged by the validation loss, and rolled back if it is shown to do harm."""

import copy
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Sized
from typing import Any

from torch import Tensor, nn

from compress.cost.macs import COUNTED
from compress.model.stage_records import Repair
from compress.pruning.blocks import closing_layers
from compress.pruning.repair.originals import OriginalOutputs
from compress.pruning.repair.repairs import Comparison, fold_means, refit_readers
from compress.search.context import StageContext
from compress.search.parts import Part
from compress.search.validation import is_loss_higher
from compress.training.batch_norm import reestimate_batch_norm
from compress.training.evaluate import image_losses

NamedRepair = tuple[str, Callable[[nn.Module], Sized]]
REPAIRS = ("least_squares", "bias_folding", "batch_norm")


def batch_norm_repair(ctx: StageContext) -> NamedRepair:
    """Return the repair that measures batch-norm statistics again on the calibration split."""
    return "batch_norm", lambda module: reestimate_batch_norm(module, ctx.data.calibration, ctx.progress)


def repairs_towards(
    original: nn.Module,
    slim: nn.Module,
    kept_outputs: Mapping[str, Tensor],
    names: Container[str],
    example: Tensor,
    ctx: StageContext,
    refit_images: int = 512,
    outputs: OriginalOutputs | None = None,
) -> list[NamedRepair]:
    """Return the requested repairs in a useful order: refits of layers before new batch-norm statistics.

    Args:
        original: The network before the removal.
        slim: The network after the removal; its layers are the ones compared.
        kept_outputs: As in `Comparison`.
        names: Names of the requested repairs.
        example: One input, (1, C, H, W).
        ctx: Context of the stage, with the calibration images.
        refit_images: Number of images that the least-squares repair fits layers to.
        outputs: Outputs of the original that the repairs of several cuts share; None for one cut.
    """
    known = dict(original.named_modules())
    layers = frozenset(
        name
        for name, part in slim.named_modules()
        if isinstance(part, COUNTED) and isinstance(known.get(name), COUNTED)
    )
    closing = closing_layers(original, example) if "least_squares" in names else {}
    means: dict[str, Tensor] = {} if outputs is None else outputs.means
    split = ctx.data.calibration

    def comparison(module: nn.Module) -> Comparison:
        return Comparison(module, original, layers, kept_outputs, split, closing, means, refit_images, outputs)

    every: list[NamedRepair] = [
        ("least_squares", lambda module: refit_readers(comparison(module), ctx.progress)),
        ("bias_folding", lambda module: fold_means(comparison(module), ctx.progress)),
        batch_norm_repair(ctx),
    ]
    return [repair for repair in every if repair[0] in names]


def apply_repairs(
    module: nn.Module, repairs: Sequence[NamedRepair], ctx: StageContext, enough: Container[str] = ()
) -> list[Repair]:
    """Apply repairs in turn and in place; one that raises the validation loss by more than noise is rolled back.

    Args:
        module: The network after a cut.
        repairs: Names, and functions that change the network in place and return a collection of their changes.
        ctx: Context of the stage, with the validation split.
        enough: Names of repairs after which no other is tried, if they lowered the loss.

    Returns:
        One record for each repair that changed something: its name, the loss before and after, and whether it was kept.
    """
    if not repairs:
        return []
    validation, records = ctx.data.validation, []
    losses = image_losses(module, validation, progress=ctx.progress)
    for name, repair in repairs:
        state = copy.deepcopy(module.state_dict())
        if not repair(module):
            continue
        new_losses = image_losses(module, validation, progress=ctx.progress)
        loss, after = float(losses.mean()), float(new_losses.mean())
        is_lower = after < loss or (math.isnan(loss) and not math.isnan(after))
        is_kept = is_lower or (after > loss and not is_loss_higher(losses, new_losses))
        records.append(Repair(repair=name, loss_before=loss, loss_after=after, is_kept=is_kept))
        said = "" if is_lower else ", inside the noise" if is_kept else ", rolled back"
        ctx.progress.note(f"{name}: validation loss {loss:.4f} -> {after:.4f}{said}")
        if is_kept:
            losses = new_losses
            if is_lower and name in enough:
                break
        else:
            module.load_state_dict(state)
    return records


def loss_after(repairs: Sequence[Repair]) -> float:
    """Return the validation loss behind the repairs of `apply_repairs`, of which there is at least one."""
    kept = [repair.loss_after for repair in repairs if repair.is_kept]
    return kept[-1] if kept else repairs[0].loss_before


def repaired_part(module: nn.Module, repairs: Sequence[Repair]) -> Part:
    """Return a repaired network as a part of the stage."""
    return Part([one.to_dict() for one in repairs], module.state_dict())


def repairs_of(record: Iterable[Mapping[str, Any]]) -> tuple[Repair, ...]:
    """Return the repairs in the record of a part."""
    return tuple(Repair(**one) for one in record)
