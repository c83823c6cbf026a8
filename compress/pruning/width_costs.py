"""MACs, params and layer sizes of a torch network as functions of the widths of its channel groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.allocation.costs import Axis, CoupledCost, Term
from compress.cost.macs import COUNTED, count_macs, count_params
from compress.pruning.groups import Amount, ChannelGroup, is_depthwise
from compress.pruning.shortcuts import FixedShortcut

_Slots = dict[str, dict[str, float]]


def build_cost(module: nn.Module, example: Tensor, groups: Mapping[str, ChannelGroup], unit: str) -> CoupledCost:
    """Return the cost of `module` as a function of the widths of `groups`.

    Args:
        module: The network the groups belong to.
        example: One input of the size that the groups were found with, (1, C, H, W).
        groups: Groups whose width may change.
        unit: "macs", "params", or "weights" (the params that values are multiplied by: no biases, no norms).
    """
    slots: dict[Amount, tuple[dict[str, float], dict[str, float]]] = {}
    for group in groups.values():
        for share in group.shares:
            if share.amount.unit == unit:
                on_axis = slots.setdefault(share.amount, ({}, {}))[share.axis]
                on_axis[group.name] = share.slots
    terms = tuple(
        Term(amount.total / (rows * columns), Axis(rows, of_rows), Axis(columns, of_columns), amount.layer)
        for amount, (of_rows, of_columns) in sorted(slots.items(), key=lambda item: item[0].number)
        for rows, columns in (amount.sizes,)
    )
    total = count_macs(module, example) if unit == "macs" else count_params(module)
    widths = {name: group.width for name, group in groups.items()}
    counted = CoupledCost(terms, 0.0, widths)
    return CoupledCost(terms, total - counted.full, widths)


class ExpectedCost:
    """Expected cost of a network whose channels and blocks are kept with given probabilities; differentiable in them.

    Args:
        cost: Cost as a function of the widths.
        whole: Divisor of the cost, such as the baseline's cost.
        blocks: Module paths of residual blocks; layers in a removed block cost nothing. No block lies in another.
    """

    def __init__(self, cost: CoupledCost, whole: float, blocks: Sequence[str] = ()) -> None:
        self._names, self._blocks = list(cost.widths), list(blocks)
        self._full = torch.tensor([float(width) for width in cost.widths.values()])
        self._factors = torch.tensor([term.factor for term in cost.terms], dtype=torch.float64) / whole
        self._fixed = cost.fixed / whole
        self._axes = [self._matrix([getattr(term, side) for term in cost.terms]) for side in ("out", "inp")]
        inside = [[f"{term.layer}.".startswith(f"{block}.") for block in self._blocks] for term in cost.terms]
        self._inside = torch.tensor(inside, dtype=torch.bool).reshape(len(cost.terms), len(self._blocks))

    def __call__(self, widths: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
        """Return the expected cost over `whole`, a scalar.

        Args:
            widths: Group name -> expected width, a scalar.
            kept: Block -> probability that the block is kept, (1,).
        """
        removed = (self._full - torch.stack([widths[name] for name in self._names])).double()
        out, inp = (size - slots @ removed for size, slots in self._axes)
        products = self._factors * out * inp
        if self._blocks:
            chances = torch.cat([kept[name] for name in self._blocks]).double()
            products = products * torch.where(self._inside, chances, torch.ones_like(chances)).prod(1)
        return self._fixed + products.sum()

    def _matrix(self, axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
        """Return (terms,) full sizes and (terms, groups) slots for each channel."""
        sizes = torch.tensor([axis.size for axis in axes], dtype=torch.float64)
        slots = torch.tensor([[axis.slots.get(name, 0.0) for name in self._names] for axis in axes])
        return sizes, slots.double().reshape(len(axes), len(self._names))


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
        return {layer: (out.channels_at(removed), inp.channels_at(removed)) for layer, (out, inp) in self.axes.items()}


def layer_axes(module: nn.Module, groups: Mapping[str, ChannelGroup]) -> LayerAxes:
    """Return the sizes of layers as functions of the widths of `groups`."""
    outs, inps = _slots_by_layer(groups)
    axes: dict[str, tuple[Axis, Axis]] = {}
    for name, layer in module.named_modules():
        out, inp = outs.get(name, {}), inps.get(name, {})
        if not out and not inp:
            continue
        if isinstance(layer, (*COUNTED, FixedShortcut)) and not is_depthwise(layer):
            size_out, size_in = _sizes(layer)
            axes[name] = (Axis(size_out, out), Axis(size_in, inp))
        else:
            axis = Axis(_channels(layer), out or inp)
            axes[name] = (axis, axis)
    return LayerAxes(axes, {name: group.width for name, group in groups.items()})


def _channels(layer: nn.Module) -> int:
    """Return the number of channels that a layer passes on: the length of its parameters or buffers."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return next((int(tensor.shape[0]) for tensor in tensors if tensor.ndim), 0)


def _slots_by_layer(groups: Mapping[str, ChannelGroup]) -> tuple[_Slots, _Slots]:
    """Return layer -> group -> slots of each channel, for the out axis and for the in axis."""
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
