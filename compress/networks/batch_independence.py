"""Refusal of networks whose output for an image depends on the other images of its batch.

The outputs of such a network depend on the batch size and on the images that share a batch. Scores, repairs and the
verdict would each measure a network that differs from the deployed one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError, attempt, first_line
from compress.model.modes import eval_mode, hooked
from compress.tasks.outputs import each, plain

IMAGES = 4
_TOLERANCE, _TOLERANCE_ALONE = 1e-4, 1e-3  # of the largest output; the latter for a network that has no float64 form
_TOLERANCE_FLOAT64 = 1e-8
_NORMS = (nn.modules.batchnorm._BatchNorm,)
Seen = dict[str, tuple[list[Tensor], list[Tensor]]]


def require_batch_independence(module: nn.Module, images: Tensor) -> None:
    """Compare images alone with the same images in one batch.

    If they differ by more than rounding in float32 explains, a comparison in float64 decides.

    Args:
        module: Network that takes one array.
        images: (N, ...) different images, at least two; a single image is not checked.

    Raises:
        ModelError: An output differs; the message names the first layer whose output differs.
    """
    if len(images) < 2:
        return
    with eval_mode(module), torch.no_grad():
        difference = _difference(module, images)
        if difference <= _TOLERANCE:
            return
        # a network that makes float32 values by itself cannot be run in float64
        exact = attempt(lambda: _difference(copy.deepcopy(module).double(), images.double()), lambda _: None)
        if (exact is None and difference <= _TOLERANCE_ALONE) or (exact is not None and exact <= _TOLERANCE_FLOAT64):
            return
        place, hint = _place(module, images)
    raise ModelError(
        "The output for an image must not depend on the other images of its batch: alone and among "
        f"{len(images)} the output differs by {min(difference, 1e9):.2g} of the largest value, first in {place}.",
        hint=hint,
    )


def _difference(module: nn.Module, images: Tensor) -> float:
    """Return the largest output difference over the largest value; infinity if the network refuses a single image."""
    names = getattr(module, "output_names", ())
    together = list(each(plain(module(images), names)))
    largest = 0.0
    for place in range(len(images)):
        # a batch norm refuses one value for each channel
        alone = attempt(partial(_outputs, module, images[place : place + 1], names), lambda _: None)
        if alone is None:
            return float("inf")
        pairs = zip(alone, together, strict=True)
        largest = max(largest, *(_relative(one[0], all_[place], all_) for one, all_ in pairs))
    return largest


def _outputs(module: nn.Module, images: Tensor, names: Sequence[str]) -> list[Tensor]:
    return list(each(plain(module(images), names)))


def _relative(alone: Tensor, among: Tensor, scale: Tensor) -> float:
    if alone.shape != among.shape:
        return float("inf")
    size = float(scale.double().abs().max()) if scale.numel() else 0.0
    apart = float((alone.double() - among.double()).abs().max()) if alone.numel() else 0.0
    return apart / size if size else apart


def _place(module: nn.Module, images: Tensor) -> tuple[str, str]:
    """Return, in words, the first layer whose values for the first image depend on the batch, and a hint."""
    plain_hint = "Let the forward pass treat each image by itself: no mean, sum or norm over the first axis."
    with _watched(module) as together:
        module(images)
    with _watched(module) as alone:
        refusal = attempt(lambda: (module(images[:1]), "")[1], first_line)
    if refusal:
        name = next((one for one in together if one not in alone), "")
        return f"layer '{name}', which refuses one image: {refusal}", _hint_of(module, name)
    for name, (inputs, outputs) in together.items():
        if name not in alone or not _differs(alone[name][1], outputs, len(images)):
            continue
        if _differs(alone[name][0], inputs, len(images)):
            return f"what layer '{name}' reads", plain_hint
        return f"layer '{name}' ({type(module.get_submodule(name)).__name__})", _hint_of(module, name)
    return "what no layer of its own computes", plain_hint


def _hint_of(module: nn.Module, name: str) -> str:
    if isinstance(module.get_submodule(name), _NORMS):
        return (
            "Give the batch norm running statistics (track_running_stats=True, and eval mode), or use a group norm: "
            "without them it normalises by whatever is in the batch."
        )
    return "Let this layer treat each image by itself."


@contextmanager
def _watched(module: nn.Module) -> Iterator[Seen]:
    """Record the inputs and outputs of the first call of each layer, by layer name, in the order of the calls."""
    seen: Seen = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
            if name not in seen:
                seen[name] = list(_tensors(inputs)), list(_tensors(outputs))

        return hook

    leaves = [(name, part) for name, part in module.named_modules() if name and not list(part.children())]
    with hooked(after=[(part, keep(name)) for name, part in leaves]):
        yield seen


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield copies of all tensors in nested values; layers may change them in place."""
    if isinstance(values, Tensor):
        yield values.detach().clone()
    elif isinstance(values, Mapping):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _differs(alone: list[Tensor], together: list[Tensor], count: int) -> bool:
    """Return whether any value of the first image differs between a single image and the batch."""
    return any(
        _relative(one, all_[: len(one)], all_) > _TOLERANCE
        for one, all_ in zip(alone, together, strict=False)
        if one.ndim and all_.ndim and len(one) * count == len(all_)
    )
