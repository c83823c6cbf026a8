"""Memory format of feature maps in which a network runs fastest on the CPU.

Channels-last is a format of tensors with four axes: weights and buffers with five, of 3-D convolutions or a user's own,
stay contiguous in a network whose others are channels-last.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from compress.cost.macs import eval_mode
from compress.data.batches import evaluation_batches
from compress.data.splits import Split

_IMAGE_AXES = 4


def set_memory_format(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Bring the weights and buffers of four axes into a memory format, in place; the others are left as they are.

    Args:
        module: Any network; its parameters stay the same objects, also where layers share them.
        memory_format: torch.channels_last or torch.contiguous_format.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == _IMAGE_AXES:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


def fastest_memory_format(module: nn.Module, split: Split) -> torch.memory_format:
    """Return channels-last where the network runs on it (a `.view` of a feature map does not), else contiguous.

    Args:
        module: The network; left contiguous.
        split: Images that it can read.
    """
    images = next((images for images, _ in evaluation_batches(split.first(2), 2, "nothing")), torch.empty(0))
    if images.ndim != _IMAGE_AXES:
        return torch.contiguous_format
    set_memory_format(module, torch.channels_last)
    try:
        with torch.no_grad(), eval_mode(module):
            module(images.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    finally:
        set_memory_format(module, torch.contiguous_format)
    return torch.channels_last


@contextmanager
def in_fastest_memory_format(module: nn.Module, split: Split) -> Iterator[torch.memory_format]:
    """Keep a network's weights in the format that it runs fastest in, and say which; contiguous again at the end."""
    found = fastest_memory_format(module, split)
    set_memory_format(module, found)
    try:
        yield found
    finally:
        set_memory_format(module, torch.contiguous_format)
