"""Residual blocks that can be removed, leaving the identity.

A block is removable if it has convolutions, keeps the shape of its input, and returns a non-negative input
unchanged once all its parameters are zero: then `x + f(x)` without `f` is `x`.
"""

import copy

import torch
from torch import Tensor, nn

from compress.cost.macs import CONVOLUTIONS, COUNTED
from compress.model.modes import eval_mode, hooked
from compress.pruning.groups import NORMS
from compress.pruning.repair.lockstep import call_order, following_norms


def find_removable_blocks(module: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Return the module paths of removable residual blocks in definition order, innermost blocks only.

    Args:
        module: Any network; left unchanged.
        example: One input, (1, C, H, W).
    """
    shapes = _same_shape_parts(module, example)
    found = [name for name, shape in shapes.items() if _passes_input_when_silent(module.get_submodule(name), shape)]
    return tuple(name for name in found if not any(other.startswith(f"{name}.") for other in found))


def _same_shape_parts(module: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    """Return module path -> output shape, for parts with inner convolutions, called once, that keep the input shape."""
    calls: dict[str, list[tuple[int, ...] | None]] = {}

    def watch(name: str):  # type: ignore[no-untyped-def]
        def hook(_part: nn.Module, inputs: tuple[object, ...], keywords: dict[str, object], output: object) -> None:
            same = (
                len(inputs) == 1
                and not keywords  # the identity has none
                and isinstance(inputs[0], Tensor)
                and isinstance(output, Tensor)
                and inputs[0].shape == output.shape
            )
            calls.setdefault(name, []).append(tuple(output.shape) if same and isinstance(output, Tensor) else None)

        return hook

    parts = [
        (part, watch(name))
        for name, part in module.named_modules()
        if name and any(isinstance(child, CONVOLUTIONS) for child in part.modules() if child is not part)
    ]
    with hooked(after=parts, with_kwargs=True), torch.no_grad(), eval_mode(module):
        module(example)
    return {name: shapes[0] for name, shapes in calls.items() if len(shapes) == 1 and shapes[0] is not None}


@torch.no_grad()
def _passes_input_when_silent(block: nn.Module, shape: tuple[int, ...]) -> bool:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return torch.equal(_silenced(block)(x), x)


def _silenced(block: nn.Module) -> nn.Module:
    """Return a copy with all parameters and running means of norms set to zero."""
    silent = copy.deepcopy(block).eval()
    for part in silent.modules():
        for parameter in part.parameters(recurse=False):
            parameter.zero_()
        if isinstance(part, NORMS) and isinstance(getattr(part, "running_mean", None), Tensor):
            part.running_mean.zero_()  # type: ignore[union-attr,operator]
    return silent


def closing_layers(module: nn.Module, example: Tensor) -> dict[str, str]:
    """Return the layers whose outputs, behind their norm, are added to the input of a residual block.

    Args:
        module: Any network; left unchanged.
        example: One input, (1, C, H, W).

    Returns:
        Layer -> its block, for the removable blocks that return the sum of the two (or its positive part).
    """
    with eval_mode(module):
        norms = following_norms(module, NORMS, example)
        shapes = _same_shape_parts(module, example)
        found: dict[str, str] = {}
        for block in find_removable_blocks(module, example):
            inside = [
                f"{block}.{name}"
                for name, part in module.get_submodule(block).named_modules()
                if isinstance(part, COUNTED)
            ]
            order = call_order(module, inside, example)
            if not order:
                continue
            last = norms.get(order[-1], order[-1])
            if last.startswith(f"{block}.") and _adds_up(
                module.get_submodule(block), last[len(block) + 1 :], shapes[block]
            ):
                found[order[-1]] = block
    return found


@torch.no_grad()
def _adds_up(block: nn.Module, part: str, shape: tuple[int, ...]) -> bool:
    """Return whether a block returns the sum of a non-negative input and of the output of the part inside."""
    silent = _silenced(block)
    generator = torch.Generator().manual_seed(0)
    x, added = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    with hooked(after=[(silent.get_submodule(part), lambda _part, _inputs, output: output + added)]):
        try:
            return torch.allclose(silent(x), x + added)
        except RuntimeError:  # another shape: an operation lies between the part and the sum
            return False
