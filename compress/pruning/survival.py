"""Surviving channels: the channels of the baseline's feature maps that a recipe keeps."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.model.recipe import Recipe, RemoveChannels
from compress.pruning.graph import ChannelGraph


def surviving_channels(
    module: nn.Module, recipe: Recipe, example: Tensor, apply: Callable[[nn.Module, Recipe, Tensor], nn.Module]
) -> dict[str, Tensor]:
    """Return module path -> (n,) ascending kept channels, for each feature map that loses channels.

    Args:
        module: The baseline; left unchanged.
        recipe: Edits made to the baseline.
        example: One input, (1, ...).
        apply: Applies a recipe to a network, which it may change.

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
