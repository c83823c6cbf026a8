"""Potential of pruning: prunable groups, reasons against the other groups, and the least MACs that can remain.

The MACs that *depend on* a group are those of the layers that compute its channels and of the layers that read them.
The *least* MACs remain when every group has the least width that the limits allow. *Fixed* layers are those that no
group narrows.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from compress.allocation.costs import CoupledCost
from compress.allocation.widths import Limits, width_levels
from compress.cost.macs import count_params, layer_macs
from compress.model.adapter import sample_shape
from compress.progress import Progress
from compress.pruning.blocks import find_removable_blocks
from compress.pruning.groups import ChannelGroup, Exclusion
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import build_cost

FORWARD = "(forward)"  # stands for products in the network's own forward pass, outside of all layers
_NEARLY_NOTHING = 0.5


@dataclass(frozen=True, slots=True)
class GroupPotential:
    """Potential of one channel group.

    Attributes:
        name: Name of the group.
        width: Number of channels.
        least_width: Fewest channels that the limits allow.
        producers: Module paths of the layers that compute the channels.
        macs_share: MACs that depend on the group, as a share of all MACs.
        saved_share: MACs saved by reducing only this group to its least width, as a share of all MACs.
    """

    name: str
    width: int
    least_width: int
    producers: tuple[str, ...]
    macs_share: float
    saved_share: float


@dataclass(frozen=True, slots=True)
class Uncut:
    """A channel group that is not prunable.

    Attributes:
        name: Name of the group.
        reason: Reason against pruning, a clause.
        macs_share: MACs of the layer that the group is named after, as a share of all MACs.
    """

    name: str
    reason: str
    macs_share: float


@dataclass(frozen=True, slots=True)
class BlockPotential:
    """A residual block that can be removed.

    Attributes:
        name: Module path.
        macs_share: MACs inside the block, as a share of all MACs.
    """

    name: str
    macs_share: float


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """A convolution or linear layer.

    Attributes:
        name: Module path.
        kind: Class name.
        macs: MACs for one image.
    """

    name: str
    kind: str
    macs: int


@dataclass(frozen=True, slots=True)
class Potential:
    """Potential of a network for pruning.

    Attributes:
        input_shape: Shape of one image, without the batch axis.
        macs: MACs for one image.
        params: Number of trainable scalars.
        limits: Limits on the widths of every group.
        layers: Convolution and linear layers in definition order.
        groups: Prunable groups.
        uncut: Groups that are not prunable.
        blocks: Removable residual blocks.
        fixed_share: MACs of layers that no group narrows, as a share of all MACs.
        fixed_layers: Module paths of these layers.
        least_share: MACs at the least widths, as a share of all MACs.
        least_share_without_blocks: MACs at the least widths without all removable blocks, as a share of all MACs.
    """

    input_shape: tuple[int, ...]
    macs: int
    params: int
    limits: Limits
    layers: tuple[LayerFigures, ...]
    groups: tuple[GroupPotential, ...]
    uncut: tuple[Uncut, ...]
    blocks: tuple[BlockPotential, ...]
    fixed_share: float
    fixed_layers: tuple[str, ...]
    least_share: float
    least_share_without_blocks: float

    @property
    def least_widths(self) -> dict[str, int]:
        """Least width of each group whose least width is below its full width."""
        return {group.name: group.least_width for group in self.groups if group.least_width < group.width}


def find_potential(
    module: nn.Module, example: Tensor, limits: Limits, progress: Progress
) -> tuple[Potential, dict[str, ChannelGroup]]:
    """Return the potential of a network, and its prunable channel groups.

    Args:
        module: Any network; left unchanged.
        example: One input, (1, ...).
        limits: Limits on the widths of every group.
        progress: Listener for the progress.

    Raises:
        UntraceableModel: No channel graph could be built.
    """
    with progress.task("find and try channel groups", 1) as task:
        groups, excluded = find_cuttable(module, example)
        task.advance()
    with progress.task("find residual blocks", 1) as task:
        blocks = find_removable_blocks(module, example)
        task.advance()
    return _potential(module, example, limits, groups, excluded, blocks), groups


def _potential(
    module: nn.Module,
    example: Tensor,
    limits: Limits,
    groups: Mapping[str, ChannelGroup],
    excluded: list[Exclusion],
    blocks: tuple[str, ...],
) -> Potential:
    macs, cost = layer_macs(module, example), build_cost(module, example, groups, "macs")
    total = max(1, sum(macs.values()))
    least = {name: width_levels(group.width, group.parts, limits)[0] for name, group in groups.items()}
    fixed = _fixed(macs, cost)
    return Potential(
        input_shape=sample_shape(module, example),
        macs=sum(macs.values()),
        params=count_params(module),
        limits=limits,
        layers=tuple(
            LayerFigures(name or FORWARD, type(module.get_submodule(name)).__name__, n) for name, n in macs.items()
        ),
        groups=tuple(_group(group, least[name], cost, total) for name, group in groups.items()),
        uncut=tuple(Uncut(item.name, item.reason, macs.get(item.name, 0) / total) for item in excluded),
        blocks=tuple(
            BlockPotential(name, sum(n for layer, n in macs.items() if _is_inside(layer, (name,))) / total)
            for name in blocks
        ),
        fixed_share=sum(fixed.values()) / total,
        fixed_layers=tuple(name or FORWARD for name in fixed),
        least_share=cost.at(least) / total,
        least_share_without_blocks=_least_outside(blocks, cost, least, fixed) / total,
    )


def _fixed(macs: Mapping[str, int], cost: CoupledCost) -> dict[str, float]:
    """Return the MACs of each module that no group changes, without those of its submodules."""
    left = dict[str, float](macs)
    for term in cost.terms:
        left[term.layer] = left.get(term.layer, 0.0) - term.factor * term.out.size * term.inp.size
    return {name: count for name, count in left.items() if count > _NEARLY_NOTHING}


def _group(group: ChannelGroup, least: int, cost: CoupledCost, total: int) -> GroupPotential:
    hanging, saved = (cost.full - cost.at({group.name: width}) for width in (0, least))
    producers = tuple(member.layer for member in group.producers)
    return GroupPotential(group.name, group.width, least, producers, hanging / total, saved / total)


def _least_outside(
    blocks: Collection[str], cost: CoupledCost, least: Mapping[str, int], fixed: Mapping[str, float]
) -> float:
    """Return the MACs at the least widths of all layers outside of the blocks."""
    removed = {name: cost.widths[name] - width for name, width in least.items()}
    outside = [term for term in cost.terms if not _is_inside(term.layer, blocks)]
    return sum(term.factor * term.out.at(removed) * term.inp.at(removed) for term in outside) + sum(
        count for layer, count in fixed.items() if not _is_inside(layer, blocks)
    )


def _is_inside(layer: str, blocks: Collection[str]) -> bool:
    return any(f"{layer}.".startswith(f"{block}.") for block in blocks)
