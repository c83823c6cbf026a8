"""In which order should feature maps lie in memory, so that a network runs fastest on the CPU?"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from compress.cost.macs import eval_mode
from compress.data.batches import evaluation_batches
from compress.data.splits import Split


def fastest_memory_format(module: nn.Module, split: Split) -> torch.memory_format:
    """Return channels-last where the network runs on it (a `.view` of a feature map does not), else contiguous.

    Args:
        module: The network; left contiguous.
        split: Images that it can read.
    """
    images = next((images for images, _ in evaluation_batches(split.first(2), 2, "nothing")), torch.empty(0))
    if images.ndim != 4:
        return torch.contiguous_format
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        with torch.no_grad(), eval_mode(module):
            module(images.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    finally:
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return torch.channels_last


@contextmanager
def in_fastest_memory_format(module: nn.Module, split: Split) -> Iterator[torch.memory_format]:
    """Keep a network's weights in the format that it runs fastest in, and say which; contiguous again at the end."""
    found = fastest_memory_format(module, split)
    module.to(memory_format=found)  # type: ignore[call-overload]
    try:
        yield found
    finally:
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
