"""Memory format of feature maps: channels-last, which is faster on a CPU, if a network computes the same in it.

Channels-last is a format of tensors with four axes. Weights and buffers with five axes, as of 3-D convolutions, stay
contiguous in a channels-last network.
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
    """Bring the weights and buffers of four axes into a memory format, in place; others do not change.

    Args:
        module: Any network; its parameters stay the same objects, also where layers share them.
        memory_format: torch.channels_last or torch.contiguous_format.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == _IMAGE_AXES:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


def set_common_format(modules: Sequence[nn.Module], split: Split) -> torch.memory_format:
    """Bring networks that read the same images into their common fastest format; contiguous if they differ.

    Args:
        modules: The networks, changed in place.
        split: Images that the networks can read.
    """
    formats = {fastest_memory_format(module, split) for module in modules}
    memory_format = formats.pop() if len(formats) == 1 else torch.contiguous_format
    for module in modules:
        set_memory_format(module, memory_format)
    return memory_format


def fastest_memory_format(module: nn.Module, split: Split) -> torch.memory_format:
    """Return channels-last if the network computes the same in it, else contiguous.

    The check runs the network in eval mode and in training mode, on images of either format. A `.view` of a feature map
    fails in channels-last, and code that depends on the memory order computes other values.

    Args:
        module: The network, not modified.
        split: Images that the network can read.
    """
    images = next((images for images, _ in evaluation_batches(split.first(2), 2, "nothing")), torch.empty(0))
    if images.ndim != _IMAGE_AXES:
        return torch.contiguous_format
    # the network's code may raise anything; an error in both formats is found later
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
    """Return the outputs of a network; the global random state does not change."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), eval_mode(module):
        return module.train(training)(images)


def _without_hooks(module: nn.Module) -> nn.Module:
    """Remove the hooks of a network, so that the training around a trial does not notice it."""
    for part in module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return module


def _are_close(found: Any, wanted: Any) -> bool:
    pairs = zip(each(plain(found)), each(plain(wanted)), strict=True)
    return all(bool(((a - b).abs() <= TOLERANCE * b.abs().max()).all()) for a, b in pairs)


@contextmanager
def in_fastest_memory_format(module: nn.Module, split: Split) -> Iterator[torch.memory_format]:
    """Keep a network's weights in its fastest format within the context, and yield that; contiguous afterwards."""
    found = fastest_memory_format(module, split)
    set_memory_format(module, found)
    try:
        yield found
    finally:
        set_memory_format(module, torch.contiguous_format)
