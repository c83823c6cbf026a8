"""Memory format of feature maps: channels-last where a network computes the same in it, which is faster on a CPU.

Channels-last is a format of tensors with four axes: weights and buffers with five, of 3-D convolutions or a user's own,
stay contiguous in a network whose others are channels-last.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.batches import evaluation_batches
from compress.data.splits import Split
from compress.errors import attempt
from compress.model.modes import eval_mode
from compress.tasks.outputs import each, plain

TOLERANCE = 1e-3  # of the largest output; the two formats add up in other orders

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


def set_common_format(modules: Sequence[nn.Module], split: Split) -> torch.memory_format:
    """Bring networks that read the same images into the format that all are fastest in; contiguous where they differ.

    Args:
        modules: The networks, changed in place.
        split: Images that they can read.
    """
    formats = {fastest_memory_format(module, split) for module in modules}
    memory_format = formats.pop() if len(formats) == 1 else torch.contiguous_format
    for module in modules:
        set_memory_format(module, memory_format)
    return memory_format


def fastest_memory_format(module: nn.Module, split: Split) -> torch.memory_format:
    """Return channels-last where the network computes the same in it, else contiguous.

    Tried are a call in eval mode and one in training mode, with images of either format: a `.view` of a feature map
    fails in channels-last, and code that reads memory in its order gives something else.

    Args:
        module: The network; left as it is.
        split: Images that it can read.
    """
    images = next((images for images, _ in evaluation_batches(split.first(2), 2, "nothing")), torch.empty(0))
    if images.ndim != _IMAGE_AXES:
        return torch.contiguous_format
    # the network's code may raise anything; what is wrong in both formats is found later
    is_same = attempt(lambda: _is_same_channels_last(module, images), lambda _: False)
    return torch.channels_last if is_same else torch.contiguous_format


def _is_same_channels_last(module: nn.Module, images: Tensor) -> bool:
    trial = _without_hooks(copy.deepcopy(module))
    wanted, state = _call(trial, images, training=False), copy.deepcopy(trial.state_dict())
    set_memory_format(trial, torch.channels_last)
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        trial.load_state_dict(state)
        if not _are_close(_call(trial, given, training=False), wanted):
            return False
        _call(trial, given, training=True)
    return True


def _call(module: nn.Module, images: Tensor, training: bool) -> Any:
    """Return what a network returns; random numbers drawn by it do not count."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), eval_mode(module):
        return module.train(training)(images)


def _without_hooks(module: nn.Module) -> nn.Module:
    """Return a network that a trial is not noticed by: hooks belong to the training around it."""
    for part in module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return module


def _are_close(found: Any, wanted: Any) -> bool:
    pairs = zip(each(plain(found)), each(plain(wanted)), strict=True)
    return all(bool(((a - b).abs() <= TOLERANCE * b.abs().max()).all()) for a, b in pairs)


@contextmanager
def in_fastest_memory_format(module: nn.Module, split: Split) -> Iterator[torch.memory_format]:
    """Keep a network's weights in the format that it runs fastest in, and say which; contiguous again at the end."""
    found = fastest_memory_format(module, split)
    set_memory_format(module, found)
    try:
        yield found
    finally:
        set_memory_format(module, torch.contiguous_format)
