"""Removal of residual blocks one by one, always the block whose removal raises the loss least."""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from compress.checkpoint.rebuild import example_input
from compress.errors import ConfigValueError
from compress.model.artifacts import TorchModel
from compress.model.recipe import RemoveBlock
from compress.pruning.blocks import find_removable_blocks
from compress.pruning.ranking.selection import Groups
from compress.pruning.ranking.sensitivity import block_damage
from compress.pruning.surgery import remove_block
from compress.search.context import Record, StageContext
from compress.search.parts import Part, weights_digest
from compress.search.repairs import REPAIRS, apply_repairs, repairs_towards
from compress.training.evaluate import evaluate_loss


@dataclass(frozen=True)
class Shortened:
    """A network without some of its residual blocks, before any channel is removed.

    Attributes:
        model: The network.
        removed: Removed blocks, in order of removal.
        repairs: Records of the repairs after the last removal.
        whole: The network with all its blocks.
        blocks: Number of blocks of `whole` that can be removed.
    """

    model: TorchModel
    removed: tuple[str, ...]
    repairs: list[Record]
    whole: nn.Module
    blocks: int


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
    model: TorchModel, score_images: int, repairs: Container[str], ctx: StageContext, refit_images: int = 512
) -> Iterator[Shortened]:
    """Yield the complete network, then it without one residual block, without two, until none can be removed.

    Args:
        model: The network, not modified.
        score_images: Number of calibration images to measure the loss on.
        repairs: Names of the repairs that are tried after each block.
        ctx: Splits, parts and listener of the stage.
        refit_images: Number of images that a least-squares repair fits layers to.
    """
    whole, example = model.module, example_input(model.signature)
    blocks = len(find_removable_blocks(whole, example))
    yield Shortened(model, (), [], whole, blocks)
    removed: tuple[str, ...] = ()
    split = ctx.data.calibration.first(score_images)
    first = weights_digest(whole)

    def weakest_of(names: Sequence[str]) -> Part:
        """Remove the block whose loss rises least, repair, and return the weights."""
        damage = block_damage(model.module, names, lambda module: evaluate_loss(module, split), ctx.progress)
        weakest = min(names, key=lambda name: damage[name])
        slim = remove_block(model.module, RemoveBlock(weakest))
        ctx.progress.note(f"block {weakest} removed (loss {damage[weakest]:+.4f})")
        wanted = repairs_towards(whole, slim, {}, repairs, example, ctx, refit_images)
        tried = apply_repairs(slim, wanted, ctx, enough=("least_squares",))  # more blocks or a cut may follow
        return Part({"block": weakest, "repairs": tried}, slim.state_dict())

    while names := find_removable_blocks(model.module, example):
        used = [name for name in REPAIRS if name in repairs]
        settings = {"images": score_images, "refit_images": refit_images, "repairs": used}
        key = {"part": "block", "of": first, "removed": removed, "seed": ctx.seed, **settings}
        part = ctx.parts.keep(key, partial(weakest_of, names))
        edit = RemoveBlock(part.record["block"])
        module = remove_block(model.module, edit)
        module.load_state_dict(part.tensors)
        model = replace(model, module=module, recipe=model.recipe.then(edit))
        removed = (*removed, edit.block)
        yield Shortened(model, removed, part.record["repairs"], whole, blocks)


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
