"""Replacement of a layer by a chain of thin ones.

    layer  ->  nn.Sequential("0", "1"[, "2"])      the last carries the bias

`replace_structure` does it without weights (a rebuild loads them afterwards), `factorize_layer` with the factors of
the layer's own weight. The layer may sit in any parent.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress.errors import NonFinite, UnsupportedLayer
from compress.lowrank.factorize import SLICES, Moments, check_ranks, factorize
from compress.model.recipe import Factorize

Layer = nn.Conv2d | nn.Linear
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def apply_factorize(module: nn.Module, edit: Factorize) -> nn.Module:
    """Return a copy of `module` with one layer factorised.

    Args:
        module: Any network; left unchanged.
        edit: Layer, scheme and ranks.

    Raises:
        UnsupportedLayer: There is no such layer, it cannot be factorised, or scheme and ranks do not fit it.
        NonFinite: The layer's weight is not finite.
    """
    changed = copy.deepcopy(module)
    factorize_layer(changed, edit)
    return changed


def factorized_copy(
    module: nn.Module, edits: Sequence[Factorize], moments: Mapping[str, Moments] | None = None
) -> tuple[nn.Module, dict[str, float]]:
    """Return a copy of `module` with layers factorised, and the relative error of each; errors as `apply_factorize`.

    Args:
        module: Any network.
        edits: Layer, scheme and ranks of each factorisation.
        moments: Layer -> second moments of its inputs, for the layers whose outputs are approximated.
    """
    changed = copy.deepcopy(module)
    return changed, {edit.layer: factorize_layer(changed, edit, (moments or {}).get(edit.layer)) for edit in edits}


def factorize_layer(module: nn.Module, edit: Factorize, moments: Moments | None = None) -> float:
    """Factorise one layer in place and return the relative error; arguments and errors as in `apply_factorize`."""
    layer = _find(module, edit)
    if not bool(torch.isfinite(layer.weight).all()):
        raise NonFinite(f"The weight of layer '{edit.layer}' must be finite to be factorised.")
    factors = factorize(layer.weight, edit.scheme, edit.ranks, moments)
    parts = replace_structure(module, edit)
    with torch.no_grad():
        for part, weight in zip(parts, factors.weights, strict=True):
            part.weight.copy_(weight)
        if parts[-1].bias is not None and layer.bias is not None:
            parts[-1].bias.copy_(layer.bias)
    return factors.relative_error


def replace_structure(module: nn.Module, edit: Factorize) -> tuple[Layer, ...]:
    """Replace one layer in place by thin layers whose weights are all zero, and return them; no SVD is made.

    Args:
        module: Any network.
        edit: Layer, scheme and ranks.

    Raises:
        UnsupportedLayer: There is no such layer, it cannot be factorised, or scheme and ranks do not fit it.
    """
    layer = _find(module, edit)
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights, which nobody needs
        parts = _linear_parts(layer, edit) if isinstance(layer, nn.Linear) else _conv_parts(layer, edit)
    for part in parts:
        part.weight.requires_grad_(layer.weight.requires_grad)
        for parameter in part.parameters():
            nn.init.zeros_(parameter)
    if parts[-1].bias is not None and layer.bias is not None:
        parts[-1].bias.requires_grad_(layer.bias.requires_grad)
    parent, _, name = edit.layer.rpartition(".")
    setattr(module.get_submodule(parent), name, nn.Sequential(*parts).train(layer.training))
    return parts


def unsupported_reason(module: nn.Module, name: str) -> str | None:
    """Return the reason why a convolution or linear layer cannot be factorised, or None.

    Args:
        module: The network.
        name: Path of one of its layers.
    """
    layer = module.get_submodule(name)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return f"is a {type(layer).__name__}, not a Conv2d or Linear"
    if "weight" not in layer._parameters:
        return "has a weight that is computed (parametrized or weight-normalised)"
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return f"is a {type(layer).__name__}, which may do more than its base class"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"has groups={layer.groups}"
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        return "has hooks"
    return _sharing_reason(module, name, layer)


def _sharing_reason(module: nn.Module, name: str, layer: Layer) -> str | None:
    shared = (layer.weight, layer.bias)
    for other_name, other in module.named_modules(remove_duplicate=False):
        if other_name == name:
            continue
        if other is layer:
            return f"is the same module as '{other_name}'"
        if any(mine is theirs for theirs in other._parameters.values() for mine in shared if mine is not None):
            return f"shares parameters with '{other_name}'"
    return None


def _find(module: nn.Module, edit: Factorize) -> Layer:
    try:
        layer = module.get_submodule(edit.layer) if edit.layer else module
    except AttributeError as error:
        raise UnsupportedLayer(f"Layer '{edit.layer}' must exist to be factorised; the network has none.") from error
    if layer is module:
        raise UnsupportedLayer("A layer to be factorised must be part of a network, got the network itself.")
    reason = unsupported_reason(module, edit.layer)
    if reason is not None:
        raise UnsupportedLayer(f"Layer '{edit.layer}' cannot be factorised: it {reason}.")
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    try:
        check_ranks(tuple(layer.weight.shape), edit.scheme, edit.ranks)
    except UnsupportedLayer as error:
        raise UnsupportedLayer(f"Layer '{edit.layer}': {error.message}") from error
    return layer


def _linear_parts(layer: nn.Linear, edit: Factorize) -> tuple[Layer, ...]:
    kind: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    (rank,) = edit.ranks
    first = nn.Linear(layer.in_features, rank, bias=False, **kind)
    return first, nn.Linear(rank, layer.out_features, bias=layer.bias is not None, **kind)


def _conv_parts(layer: nn.Conv2d, edit: Factorize) -> tuple[Layer, ...]:
    inputs, outputs = layer.in_channels, layer.out_channels
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    whole: dict[str, Any] = {name: getattr(layer, name) for name in names}
    point: dict[str, Any] = {"kernel_size": 1}
    if edit.scheme == "tucker2":
        first, second = edit.ranks
        plan = [(inputs, first, point), (first, second, whole), (second, outputs, point)]
    elif edit.scheme == "vh":
        (rank,) = edit.ranks
        plan = [(inputs, rank, _one_axis(layer, 0)), (rank, outputs, _one_axis(layer, 1))]
    else:
        width = SLICES[edit.scheme] * edit.ranks[0]
        plan = [(inputs, width, whole | {"groups": SLICES[edit.scheme]}), (width, outputs, point)]
    biases = [False] * (len(plan) - 1) + [layer.bias is not None]
    kind: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    return tuple(
        nn.Conv2d(source, target, bias=bias, **geometry, **kind)
        for (source, target, geometry), bias in zip(plan, biases, strict=True)
    )


def _one_axis(layer: nn.Conv2d, axis: int) -> dict[str, Any]:
    """Return the geometry of `layer` along one axis, and a 1-wide kernel's along the other."""

    def only(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
        return tuple(value if index == axis else neutral for index, value in enumerate(values))

    padding = layer.padding if isinstance(layer.padding, str) else only(layer.padding, 0)
    return {
        "kernel_size": only(layer.kernel_size, 1),
        "stride": only(layer.stride, 1),
        "padding": padding,
        "dilation": only(layer.dilation, 1),
        "padding_mode": layer.padding_mode,
    }
