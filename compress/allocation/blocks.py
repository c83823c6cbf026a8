"""Widths of channel groups and residual blocks that may be removed, chosen by one knapsack.

A block is a decision of two options: 0 removes it, 1 keeps it. The layers of a removed block cost nothing, so its
groups keep their full width and do no damage.

Source: Sun et al. 2025, "MDP: Multidimensional Vision Model Pruning with Latency Constraint", CVPR, arXiv:2504.02168,
where blocks and widths are chosen by one program under a latency.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.allocation.knapsack import allocate
from compress.allocation.problem import Budget, Decision
from compress.allocation.widths import Candidates, Widths
from compress.errors import BudgetUnreachable


@dataclass(frozen=True, slots=True)
class Structure:
    """Widths and removed blocks.

    Attributes:
        widths: Group name -> width; full in a removed block.
        removed: Removed blocks, in the order in which the blocks were given.
        costs: Budget name -> cost.
        is_optimal: Whether it is proved that nothing within the budgets does less damage.
    """

    widths: Widths
    removed: tuple[str, ...]
    costs: dict[str, float]
    is_optimal: bool


def block_decision(block: str) -> str:
    """Return the name of the decision about a block, which no channel group has.

    >>> block_decision("layer1.0")
    'layer1.0()'
    """
    return f"{block}()"


def allocate_structure(
    groups: Sequence[Candidates], blocks: Mapping[str, float], budgets: Sequence[Budget], limits_text: str = ""
) -> Structure:
    """Choose a width for every group and the removed blocks, with the least damage within all budgets.

    Args:
        groups: The groups, each with its damages and allowed widths.
        blocks: Module path of each removable block -> damage of its removal, >= 0.
        budgets: Budgets, at least one. Parts in a block have the switch `block_decision(block)`.
        limits_text: Limits on the widths in words, for the message.

    Raises:
        BudgetUnreachable: Nothing allowed is within the budgets; the message states the best reachable.
    """
    if not groups and not blocks:
        raise BudgetUnreachable("No channel group and no residual block can be removed.")
    decisions = [Decision(group.name, group.damages) for group in groups]
    decisions += [Decision(block_decision(name), np.asarray([damage, 0.0])) for name, damage in blocks.items()]
    counted = [
        f"{count} {what}{'' if count == 1 else 's'}"
        for count, what in ((len(groups), "channel group"), (len(blocks), "residual block"))
        if count
    ]
    found = allocate(decisions, budgets, f", with {' and '.join(counted)} at the widths allowed{limits_text}")
    widths = {group.name: group.levels[found.choice[group.name]] for group in groups}
    removed = tuple(name for name in blocks if found.choice[block_decision(name)] == 0)
    return Structure(widths, removed, found.costs, found.is_optimal)
