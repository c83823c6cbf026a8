"""Channels of the baseline's feature maps that are left after a recipe."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.model.recipe import Recipe, RemoveChannels
from compress.pruning.graph import ChannelGraph


def surviving_channels(
    module: nn.Module, recipe: Recipe, example: Tensor, apply: Callable[[nn.Module, Recipe, Tensor], nn.Module]
) -> dict[str, Tensor]:
    """Return for each part whose feature map loses channels the (n,) ascending channels of it that are left.

    Args:
        module: The baseline; left as it is.
        recipe: What was done to it.
        example: One input, (1, ...).
        apply: Carries out edits on a network that it may change.

    Raises:
        UntraceableModel: The network does not run.
    """
    present, kept = copy.deepcopy(module), dict[str, Tensor]()
    for edit in recipe.edits:
        if isinstance(edit, RemoveChannels):
            graph = ChannelGraph(present, example)
            gone = graph.gone(edit.removed)
            for path, labels in graph.trace.maps.items():
                stays = torch.from_numpy(~gone)[labels.clamp(min=0)] | (labels < 0)
                if not bool(stays.all()):
                    kept[path] = kept.get(path, torch.arange(len(labels)))[stays]
        present = apply(present, Recipe((edit,)), example)
    return kept
