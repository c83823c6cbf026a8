"""Layers of a network that can be factorised, and the cost of each scheme."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import NonFinite
from compress.lowrank.factorize import SLICES, Moments, applicable_schemes, norm_bounds, singular_values
from compress.lowrank.ranks import Cost, LayerSpectra, SchemeSpectra
from compress.lowrank.surgery import unsupported_reason
from compress.model.modes import eval_mode, hooked


@dataclass(slots=True)
class Positions:
    """Numbers of positions that a layer runs over for one image, summed over its calls.

    Attributes:
        inputs: Positions of the layer's input, H * W.
        between: Positions after the vertical half of a convolution, H' * W.
        outputs: Positions of the layer's output, H' * W'; 1 for a linear layer on vectors.
    """

    inputs: int = 0
    between: int = 0
    outputs: int = 0


def find_layers(module: nn.Module, example: Tensor) -> tuple[dict[str, Positions], dict[str, str]]:
    """Find the convolutions and linear layers of a network that can be factorised, and the reasons of the others.

    Args:
        module: Any network; left unchanged.
        example: One input.

    Returns:
        Layer name -> positions, for each layer that can be factorised, and layer name -> reason, for each other layer,
        both in definition order.
    """
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Conv2d | nn.Linear) and name]
    reasons = {name: reason for name in names if (reason := unsupported_reason(module, name))}
    able = [name for name in names if name not in reasons]
    reasons.update(_read_from_outside(module, example, able))
    positions = _measure_positions(module, example, [name for name in able if name not in reasons])
    unused = {name: "is not called in the forward pass" for name, places in positions.items() if not places.outputs}
    reasons.update(unused)
    found = {name: places for name, places in positions.items() if name not in unused}
    return found, {name: reasons[name] for name in names if name in reasons}


def layer_spectra(
    name: str,
    layer: nn.Module,
    places: Positions,
    schemes: tuple[str, ...],
    moments: Moments | None = None,
    with_norms: bool = False,
) -> LayerSpectra:
    """Return singular values and costs of every scheme in `schemes` that applies to a layer.

    Args:
        name: Path of the layer.
        layer: Conv2d or Linear.
        places: Positions that the layer runs over.
        schemes: Names of the schemes to choose from.
        moments: Second moments of the layer's inputs; None measures errors on the kernel.
        with_norms: Compute bounds of the operator norm too, for which singular values are computed once more.

    Raises:
        NonFinite: The weight is not finite.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not bool(torch.isfinite(weight).all()):
        raise NonFinite(f"The weight of layer '{name}' must be finite to be factorised.")
    shape = tuple(weight.shape)
    spectra = []
    for scheme in applicable_schemes(shape):
        if scheme in schemes:
            macs, params = _costs(shape, scheme, places)
            bounds = norm_bounds(weight, scheme, moments) if with_norms else None
            spectra.append(SchemeSpectra(scheme, singular_values(weight, scheme, moments), macs, params, bounds))
    return LayerSpectra(name, weight.numel() * places.outputs, weight.numel(), tuple(spectra))


def _costs(shape: tuple[int, ...], scheme: str, places: Positions) -> tuple[Cost, Cost]:
    """Return MACs and params of one scheme by rank."""
    outputs, inputs, *kernel = shape
    height, width = kernel or (1, 1)
    if scheme == "tucker2":
        joint = height * width
        macs = Cost(inputs * places.inputs, joint * places.outputs, outputs * places.outputs)
        return macs, Cost(inputs, joint, outputs)
    if scheme == "vh":
        first, second = inputs * height, outputs * width
        return Cost(first * places.between + second * places.outputs), Cost(first + second)
    per_rank = inputs * height * width + SLICES[scheme] * outputs
    return Cost(per_rank * places.outputs), Cost(per_rank)


def _measure_positions(module: nn.Module, example: Tensor, names: list[str]) -> dict[str, Positions]:
    positions = {name: Positions() for name in names}
    owners = {module.get_submodule(name): name for name in names}

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        places = positions[owners[layer]]
        if isinstance(layer, nn.Linear):
            places.outputs += output.numel() // output.shape[0] // layer.out_features
            return
        places.inputs += inputs[0].shape[-2] * inputs[0].shape[-1]
        places.between += output.shape[-2] * inputs[0].shape[-1]
        places.outputs += output.shape[-2] * output.shape[-1]

    with hooked(after=[(layer, measure) for layer in owners]):
        _forward(module, example)
    return positions


def _read_from_outside(module: nn.Module, example: Tensor, names: list[str]) -> dict[str, str]:
    """Find layers whose attributes (`fc.weight`) the network reads: these cannot become a Sequential.

    Each layer is put into a Sequential of its own for one forward pass, which changes nothing but that.
    """
    if _runs_wrapped(module, example, names):
        return {}
    reason = "is read from outside, such as through its weight"
    return {name: reason for name in names if not _runs_wrapped(module, example, [name])}


def _runs_wrapped(module: nn.Module, example: Tensor, names: list[str]) -> bool:
    with _wrapped(module, names):
        try:
            _forward(module, example)
        except (AttributeError, TypeError):
            return False
    return True


@contextmanager
def _wrapped(module: nn.Module, names: list[str]) -> Iterator[None]:
    places = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    layers = [getattr(parent, name) for parent, name in places]
    try:
        for (parent, name), layer in zip(places, layers, strict=True):
            setattr(parent, name, nn.Sequential(layer).train(layer.training))
        yield
    finally:
        for (parent, name), layer in zip(places, layers, strict=True):
            setattr(parent, name, layer)


@torch.no_grad()
def _forward(module: nn.Module, example: Tensor) -> None:
    with eval_mode(module):
        module(example)
