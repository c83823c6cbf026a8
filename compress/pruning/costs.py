"""How do MACs, params and the sizes of layers depend on the widths of the channel groups of a torch network?"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.allocation.costs import ONE, Axis, CoupledCost, Term
from compress.cost.macs import COUNTED, count_macs, count_params, layer_macs
from compress.pruning.graph import ChannelGroup, is_depthwise

_Slots = dict[str, dict[str, float]]


def build_cost(module: nn.Module, example: Tensor, groups: Mapping[str, ChannelGroup], unit: str) -> CoupledCost:
    """Return the cost of `module` as a function of the widths of `groups`.

    Args:
        module: The network the groups belong to.
        example: One input, (1, C, H, W).
        groups: Groups whose width may change.
        unit: "macs", "params", or "weights" (those of convolutions and linear layers, without biases and norms).
    """
    outs, inps = _slots_by_layer(groups)
    terms: list[Term] = []
    macs = layer_macs(module, example) if unit == "macs" else {}
    for name, layer in module.named_modules():
        out, inp = outs.get(name, {}), inps.get(name, {})
        if not out and not inp:
            continue
        if isinstance(layer, COUNTED):
            terms += (
                _macs_terms(layer, macs[name], out, inp) if unit == "macs" else _params_terms(layer, out, inp, unit)
            )
        elif unit == "params":
            terms += [Term(1.0, Axis(p.numel(), out)) for p in layer.parameters(recurse=False) if p.requires_grad]
    total = count_macs(module, example) if unit == "macs" else count_params(module)
    widths = {name: group.width for name, group in groups.items()}
    counted = CoupledCost(tuple(terms), 0.0, widths)
    return CoupledCost(tuple(terms), total - counted.full, widths)


@dataclass(frozen=True, slots=True)
class LayerAxes:
    """The outputs and inputs of every layer that some group narrows, as functions of the widths.

    Attributes:
        axes: Layer -> (outputs, inputs); the same axis twice for a layer that passes channels on.
        widths: Group name -> full width.
    """

    axes: Mapping[str, tuple[Axis, Axis]]
    widths: Mapping[str, int]

    def sizes(self, widths: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Return layer -> (outputs, inputs) at the given widths; groups not named keep their full width."""
        removed = {name: full - widths.get(name, full) for name, full in self.widths.items()}
        return {layer: (round(out.at(removed)), round(inp.at(removed))) for layer, (out, inp) in self.axes.items()}


def layer_axes(module: nn.Module, groups: Mapping[str, ChannelGroup]) -> LayerAxes:
    """Return how the sizes of layers follow the widths of `groups`."""
    outs, inps = _slots_by_layer(groups)
    axes: dict[str, tuple[Axis, Axis]] = {}
    for name, layer in module.named_modules():
        out, inp = outs.get(name, {}), inps.get(name, {})
        if not out and not inp:
            continue
        if isinstance(layer, COUNTED) and not is_depthwise(layer):
            axes[name] = _axes(layer, out, inp)
        else:
            axis = Axis(_channels(layer), out or inp)
            axes[name] = (axis, axis)
    return LayerAxes(axes, {name: group.width for name, group in groups.items()})


def _channels(layer: nn.Module) -> int:
    """Return how many channels a layer passes on: the length of its parameters or buffers."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return next((int(tensor.shape[0]) for tensor in tensors if tensor.ndim), 0)


def _slots_by_layer(groups: Mapping[str, ChannelGroup]) -> tuple[_Slots, _Slots]:
    """Return for each layer and group how many slots each channel has on the out axis and on the in axis."""
    axes: dict[str, _Slots] = {"out": {}, "in": {}}
    for group in groups.values():
        for member in group.members:
            slots = axes[member.axis].setdefault(member.layer, {})
            slots[group.name] = slots.get(group.name, 0.0) + len(torch.unique(member.slots)) / group.width
    return axes["out"], axes["in"]


def _sizes(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return int(layer.out_channels), int(layer.in_channels)  # type: ignore[arg-type]


def _axes(layer: nn.Module, out: Mapping[str, float], inp: Mapping[str, float]) -> tuple[Axis, Axis]:
    size_out, size_in = _sizes(layer)
    if is_depthwise(layer):
        return Axis(size_out, out or inp), ONE
    return Axis(size_out, out), Axis(size_in, inp)


def _macs_terms(layer: nn.Module, macs: int, out: Mapping[str, float], inp: Mapping[str, float]) -> list[Term]:
    axis_out, axis_in = _axes(layer, out, inp)
    return [Term(macs / (axis_out.size * axis_in.size), axis_out, axis_in)]


def _params_terms(layer: nn.Module, out: Mapping[str, float], inp: Mapping[str, float], unit: str) -> list[Term]:
    axis_out, axis_in = _axes(layer, out, inp)
    terms = []
    weight, bias = layer.weight, layer.bias
    if isinstance(weight, nn.Parameter) and weight.requires_grad:
        terms.append(Term(weight.numel() / (axis_out.size * axis_in.size), axis_out, axis_in))
    if unit == "params" and isinstance(bias, nn.Parameter) and bias.requires_grad:
        terms.append(Term(1.0, axis_out))
    return terms
