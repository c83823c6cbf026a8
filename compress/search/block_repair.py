"""Block reconstruction of the network that a stage has chosen, resumable block by block."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.checkpoint.rebuild import apply_edits, example_input
from compress.config.schema.repair import BLOCKS, BlockRepairConfig
from compress.cost.macs import count_macs
from compress.data.batches import evaluation_batches
from compress.data.splits import Split
from compress.model.artifacts import TorchModel
from compress.model.modes import eval_mode
from compress.model.recipe import Recipe
from compress.model.stage_records import Repair, RepairedBlock
from compress.model.tensors import weights_digest
from compress.pruning.repair.block_reconstruction import Reconstruction, reconstruct_blocks
from compress.pruning.repair.walks import Pair, find_walk
from compress.pruning.survival import surviving_channels
from compress.search.context import StageContext
from compress.search.parts import Part
from compress.search.repairs import apply_repairs

_PASS_BATCH = 32
_STEPS, _FEWEST_STEPS = 400, 100
_BATCH, _SMALLEST_BATCH = 64, 8
_MACS = 5e12  # of the whole training by default: some minutes of one core
_PASSES = 3  # forward, gradients of inputs, gradients of weights
_MEMORY = 2 * 10**9


def repair_blocks(
    before: TorchModel,
    after: TorchModel,
    repair: Sequence[str],
    settings: BlockRepairConfig | None,
    ctx: StageContext,
) -> list[Repair]:
    """Train each block of a cut network, in place, to return what it returned before the stage.

    The result is rolled back if the validation loss rises.

    Args:
        before: The network that the stage was given.
        after: The cut network, with the edits of the stage at the end of its recipe.
        repair: Names of the requested repairs; nothing is done without `blocks` among them.
        settings: Settings of the training of each block; None for the defaults.
        ctx: Splits, parts and listener of the stage.

    Returns:
        One record, as in `apply_repairs`, with the errors of the blocks; none if nothing was asked for or trained.
    """
    if BLOCKS not in repair:
        return []
    settings = settings or BlockRepairConfig()
    edits = Recipe(after.recipe.edits[len(before.recipe.edits) :])
    results: list[RepairedBlock] = []

    def reconstruct(module: nn.Module) -> list[str]:
        results.extend(_reconstruct(module, before, edits, settings, ctx))
        return [one.name for one in results if one.is_kept]

    records = apply_repairs(after.module, [(BLOCKS, reconstruct)], ctx)
    if results and not records:
        ctx.progress.note("blocks: training lowered the error of no block; all are unchanged")
    return [replace(one, blocks=tuple(results)) for one in records]


def _reconstruct(
    module: nn.Module, before: TorchModel, edits: Recipe, settings: BlockRepairConfig, ctx: StageContext
) -> list[RepairedBlock]:
    example = example_input(before.signature)

    def surviving(network: nn.Module) -> dict[str, Tensor]:
        return surviving_channels(network, edits, example, apply_edits)

    walk = find_walk(Pair(module, before.module, surviving), example)
    steps, batch_size = affordable(count_macs(module, example), settings.steps, settings.batch_size)
    ctx.progress.note(f"blocks: {steps} steps with {batch_size} images for each of {len(walk)} blocks")
    training = Reconstruction(steps, batch_size, settings.learning_rate, ctx.seed)
    digest = weights_digest(module)

    def keep(
        name: str, train: Callable[[], tuple[RepairedBlock, dict[str, Tensor]]]
    ) -> tuple[RepairedBlock, dict[str, Tensor]]:
        def make() -> Part:
            result, weights = train()
            return Part(result.to_dict(), weights)

        chosen = {**settings.model_dump(mode="json"), "steps": steps, "batch_size": batch_size}
        key = {"part": "block", "of": digest, "block": name, "settings": chosen}
        part = ctx.parts.keep(key, make)
        return RepairedBlock(**part.record), part.tensors

    with eval_mode(module), eval_mode(before.module):
        with torch.no_grad():
            room = max(2, _MEMORY // max(walk.live_bytes(example), 1))
        batches = _images(min(settings.images, room), ctx)
        return reconstruct_blocks(walk.blocks(batches), len(walk), training, ctx.progress, keep)


def affordable(macs: int, steps: int | None = None, batch_size: int | None = None) -> tuple[int, int]:
    """Return the number of steps and their images; defaults are lowered, the images first, to bound the work.

    Args:
        macs: Multiply-accumulates of the network for one image.
        steps: Requested steps; None for the default.
        batch_size: Requested images in a step; None for the default.

    >>> affordable(40_000_000), affordable(300_000_000), affordable(4_000_000_000), affordable(4_000_000_000, 400, 64)
    ((400, 64), (400, 13), (100, 8), (400, 64))
    """
    whole = max(1, _PASSES * macs)
    if batch_size is None:
        batch_size = int(min(max(_MACS / (whole * (steps or _STEPS)), _SMALLEST_BATCH), _BATCH))
    if steps is None:
        steps = int(min(max(_MACS / (whole * batch_size), _FEWEST_STEPS), _STEPS))
    return steps, batch_size


def _images(count: int, ctx: StageContext) -> list[Tensor]:
    """Return images in random order, calibration images first if there are fewer than asked for."""
    splits: list[Split] = [ctx.data.calibration.first(count)]
    missing = count - len(splits[0])
    if missing > 0 and len(ctx.data.train):
        splits.append(ctx.data.train.first(missing))
    found = [
        images for split in splits if len(split) for images, _ in evaluation_batches(split, _PASS_BATCH, "nothing")
    ]
    images = torch.cat(found)
    mixed = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(ctx.seed))]
    return [mixed[start : start + _PASS_BATCH] for start in range(0, len(mixed), _PASS_BATCH)]
