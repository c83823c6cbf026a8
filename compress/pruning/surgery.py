"""How is a structural edit carried out? A copy goes in edited, the original stays untouched."""

import copy

from torch import Tensor, nn

from compress.errors import UnsupportedLayer
from compress.model.recipe import RemoveBlock, RemoveChannels
from compress.pruning.channel_removal import cut_copy


def remove_channels(module: nn.Module, edit: RemoveChannels, example: Tensor) -> nn.Module:
    """Return a copy of `module` without the channels that `edit` names.

    Args:
        module: The network as it is before the edit.
        edit: Group names and channel indices.
        example: One input, (1, C, H, W).

    Raises:
        UntraceableModel: No graph could be built.
        UnsupportedLayer: A group or index does not exist.
    """
    return cut_copy(module, edit.removed, example)


def remove_block(module: nn.Module, edit: RemoveBlock) -> nn.Module:
    """Return a copy of `module` with the block replaced by the identity.

    Raises:
        UnsupportedLayer: There is no such block.
    """
    slim = copy.deepcopy(module)
    parent_name, _, name = edit.block.rpartition(".")
    try:
        parent = slim.get_submodule(parent_name)
        parent.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedLayer(f"The network must have a block '{edit.block}' to remove, it has none.") from error
    setattr(parent, name, nn.Identity().train(parent.training))
    return slim
