"""What is left of a network when its residual blocks go one by one, each time the one that is missed least?"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from compress.artifacts import TorchModel
from compress.building import example_input
from compress.pruning.blocks import find_removable_blocks
from compress.pruning.damage import block_damage
from compress.pruning.surgery import remove_block
from compress.recipe import RemoveBlock
from compress.stages.context import Record, StageContext
from compress.stages.repairing import apply_repairs, batch_norm_repair
from compress.training.evaluate import evaluate_loss


@dataclass(frozen=True)
class Trunk:
    """A network without some of its residual blocks, before any channel is cut.

    Attributes:
        model: The network.
        removed: Blocks that are gone, in the order in which they went.
        repairs: What was tried after the last one went.
    """

    model: TorchModel
    removed: tuple[str, ...]
    repairs: list[Record]


def shorten(model: TorchModel, score_images: int, has_repair: bool, ctx: StageContext) -> Iterator[Trunk]:
    """Give the network as it is, then without one residual block, without two, until none can be removed.

    Args:
        model: The network; left as it is.
        score_images: Calibration images to measure the loss on.
        has_repair: Whether batch-norm statistics may be measured again after each block.
        ctx: Has the splits.
    """
    yield Trunk(model, (), [])
    removed: tuple[str, ...] = ()
    split = ctx.data.calibration.first(score_images)
    while names := find_removable_blocks(model.module, example_input(model.signature)):
        damage = block_damage(model.module, names, lambda module: evaluate_loss(module, split), ctx.progress)
        weakest = min(names, key=lambda name: damage[name])
        edit = RemoveBlock(weakest)
        model = replace(model, module=remove_block(model.module, edit), recipe=model.recipe.then(edit))
        removed = (*removed, weakest)
        ctx.progress.note(f"block {weakest} removed (loss {damage[weakest]:+.4f})")
        repairs = apply_repairs(model.module, [batch_norm_repair(ctx)], ctx) if has_repair else []
        yield Trunk(model, removed, repairs)
