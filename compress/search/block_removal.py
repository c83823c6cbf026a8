"""Removal of residual blocks one by one, always the block whose removal raises the loss least.

With merges, each step removes a block or merges one into a single convolution, whichever costs the least loss for the
MACs that it saves.
"""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from compress.checkpoint.rebuild import example_input
from compress.cost.macs import layer_macs
from compress.data.batches import evaluation_batches
from compress.data.splits import Split
from compress.errors import ConfigValueError
from compress.model.artifacts import TorchModel
from compress.model.recipe import MergeBlock, RemoveBlock
from compress.model.stage_records import Repair
from compress.model.tensors import weights_digest
from compress.pruning.blocks import find_removable_blocks
from compress.pruning.merging import Mergeable, find_mergeable_blocks, fit_merged, load_merged, merged_output
from compress.pruning.ranking.selection import Groups
from compress.pruning.ranking.sensitivity import block_damage
from compress.pruning.surgery import merge_block, remove_block
from compress.search.context import StageContext
from compress.search.parts import Part
from compress.search.repairs import REPAIRS, apply_repairs, repairs_of, repairs_towards
from compress.training.evaluate import evaluate_loss

_FIT_BATCH = 32


@dataclass(frozen=True)
class Shortened:
    """A network without some of its residual blocks, before any channel is removed.

    Attributes:
        model: The network.
        removed: Blocks removed or merged, in the order of the steps.
        repairs: Records of the repairs after the last removal.
        whole: The network with all its blocks.
        blocks: Number of blocks of `whole` that can be removed or merged.
        merged: Those of `removed` that are merged into one convolution.
    """

    model: TorchModel
    removed: tuple[str, ...]
    repairs: tuple[Repair, ...]
    whole: nn.Module
    blocks: int
    merged: tuple[str, ...] = ()


class Remembered:
    """Cached networks of `shorten`: each is made once, even if they are iterated over several times."""

    def __init__(self, networks: Iterator[Shortened]) -> None:
        self._rest = networks
        self._known: list[Shortened] = []

    def __iter__(self) -> Iterator[Shortened]:
        for index in count():
            if index == len(self._known):
                following = next(self._rest, None)
                if following is None:
                    return
                self._known.append(following)
            yield self._known[index]


def without_blocks(model: TorchModel, blocks: Sequence[str]) -> TorchModel:
    """Return the network without some residual blocks, all else unchanged."""
    for block in blocks:
        edit = RemoveBlock(block)
        model = replace(model, module=remove_block(model.module, edit), recipe=model.recipe.then(edit))
    return model


def places_in_whole(groups: Groups, whole: Groups) -> dict[str, tuple[str, Tensor]]:
    """Return group -> its name in the network with all blocks, and the (C,) indices of its channels there.

    A group is named after the first layer that computes it, so the removal of a block may change the name.

    Args:
        groups: Groups of the network without some blocks.
        whole: Groups of the network with all blocks.
    """
    if groups is whole:
        return {name: (name, torch.arange(group.width)) for name, group in whole.items()}
    producers = {member.layer: (name, member) for name, group in whole.items() for member in group.producers}
    places = {}
    for name, group in groups.items():
        before, member = producers[name]
        channels = torch.empty(group.width, dtype=torch.int64)
        channels[member.slots] = member.channels
        places[name] = before, channels
    return places


def shorten(
    model: TorchModel,
    score_images: int,
    repairs: Container[str],
    ctx: StageContext,
    refit_images: int = 512,
    *,
    merges: bool = False,
) -> Iterator[Shortened]:
    """Yield the complete network, then it without one residual block, without two, until none can be removed.

    Args:
        model: The network, not modified.
        score_images: Number of calibration images to measure the loss on.
        repairs: Names of the repairs that are tried after each block.
        ctx: Splits, parts and listener of the stage.
        refit_images: Number of images that a least-squares repair fits layers to, and a merged convolution.
        merges: Whether blocks may be merged into one convolution, too.
    """
    whole, example = model.module, example_input(model.signature)
    mergeable = find_mergeable_blocks(whole, example) if merges else {}
    blocks = len({*find_removable_blocks(whole, example), *mergeable})
    yield Shortened(model, (), (), whole, blocks)
    removed: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    split = ctx.data.calibration.first(score_images)
    first = weights_digest(whole)

    def weakest_of(names: Sequence[str], merging: Mapping[str, Mergeable]) -> Part:
        """Remove or merge the block at the least loss, repair, and return the weights."""
        step = _Step(whole, model.module, split, refit_images, ctx)
        edit, weights = step.find(names, merging, example)
        slim = _edited(model.module, edit)
        if weights:
            load_merged(slim, edit.block, weights)
        wanted = repairs_towards(whole, slim, {}, repairs, example, ctx, refit_images)
        tried = apply_repairs(slim, wanted, ctx, enough=("least_squares",))  # more blocks or a cut may follow
        is_merge = {"merge": asdict(edit)} if isinstance(edit, MergeBlock) else {}
        repaired = [one.to_dict() for one in tried]
        return Part({"block": edit.block, "repairs": repaired, **is_merge}, slim.state_dict())

    while True:
        names = find_removable_blocks(model.module, example)
        merging = {name: one for name, one in mergeable.items() if name not in removed}
        if not names and not merging:
            return
        used = [name for name in REPAIRS if name in repairs]
        settings = {"images": score_images, "refit_images": refit_images, "repairs": used}
        key = {"part": "block", "of": first, "removed": removed, "seed": ctx.seed, **settings}
        part = ctx.parts.keep(key | ({"merges": True} if merges else {}), partial(weakest_of, names, merging))
        given = part.record.get("merge")
        edit = RemoveBlock(part.record["block"]) if given is None else MergeBlock(**given)
        module = _edited(model.module, edit)
        module.load_state_dict(part.tensors)
        model = replace(model, module=module, recipe=model.recipe.then(edit))
        removed = (*removed, edit.block)
        merged = merged if given is None else (*merged, edit.block)
        yield Shortened(model, removed, repairs_of(part.record["repairs"]), whole, blocks, merged)


def _edited(module: nn.Module, edit: RemoveBlock | MergeBlock) -> nn.Module:
    return merge_block(module, edit) if isinstance(edit, MergeBlock) else remove_block(module, edit)


@dataclass(frozen=True)
class _Step:
    """Choice of one block to remove or merge.

    Attributes:
        whole: The network with all blocks.
        present: The network with the blocks of earlier steps removed or merged.
        split: Images that the loss is measured on.
        refit_images: Number of images that merged convolutions are fitted to.
        ctx: Context of the stage.
    """

    whole: nn.Module
    present: nn.Module
    split: Split
    refit_images: int
    ctx: StageContext

    def find(
        self, names: Sequence[str], merging: Mapping[str, Mergeable], example: Tensor
    ) -> tuple[RemoveBlock | MergeBlock, dict[str, Tensor]]:
        """Return the edit of least loss, and the weights of a merged block; with merges, of least loss per MAC saved.

        Args:
            names: Blocks that can be removed.
            merging: Blocks that can be merged.
            example: One input, (1, C, H, W).
        """
        progress = self.ctx.progress
        damage = block_damage(self.present, names, self._loss, progress) if names else {}
        if not merging:
            weakest = min(names, key=lambda name: damage[name])
            progress.note(f"block {weakest} removed (loss {damage[weakest]:+.4f})")
            return RemoveBlock(weakest), {}
        edits = [one.edit for one in merging.values()]
        batches = [images for images, _ in evaluation_batches(self._refit, _FIT_BATCH, "nothing")]
        weights = fit_merged(self.whole, self.present, edits, batches, progress)
        rises = block_damage(
            self.present, [*merging], self._loss, progress,
            lambda name, inputs: merged_output(merging[name].edit, weights[name], inputs),
        )  # fmt: skip
        macs = layer_macs(self.present, example)
        saved = {name: sum(count for layer, count in macs.items() if layer.startswith(f"{name}.")) for name in names}
        costs: list[tuple[float, RemoveBlock | MergeBlock, float]] = [
            *((_per_saved(damage[name], saved[name]), RemoveBlock(name), damage[name]) for name in names),
            *((_per_saved(rises[name], one.saved_macs), one.edit, rises[name]) for name, one in merging.items()),
        ]
        _, edit, rise = min(costs, key=lambda one: one[0])
        done = "merged into one convolution" if isinstance(edit, MergeBlock) else "removed"
        progress.note(f"block {edit.block} {done} (loss {rise:+.4f})")
        return edit, weights[edit.block] if isinstance(edit, MergeBlock) else {}

    @property
    def _refit(self) -> Split:
        return self.ctx.data.calibration.first(self.refit_images)

    def _loss(self, module: nn.Module) -> float:
        return evaluate_loss(module, self.split)


def _per_saved(rise: float, saved: int) -> float:
    """Return the rise of the loss per MAC saved; infinite where the loss is NaN."""
    return math.inf if math.isnan(rise) else rise / max(saved, 1)


def take_shortened(networks: Iterable[Shortened], count: int) -> Shortened:
    """Return the network with `count` residual blocks removed.

    Args:
        networks: Networks that `shorten` yields.
        count: Number of blocks to remove.

    Raises:
        ConfigValueError: The network has fewer removable blocks.
    """
    for found in networks:
        if len(found.removed) == count:
            return found
        if count > found.blocks:
            break
    there = found.blocks if count > found.blocks else len(found.removed)  # removable only with another
    raise ConfigValueError(
        f"blocks must not be more than the residual blocks that can be removed ({there}), got {count}."
    )
