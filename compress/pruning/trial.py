"""Trial cuts of channel groups: each is made on a copy and compared with the network that masks the same channels.

masked      the original in which nothing reads the removed channels: the weights that read them are zero
safety net  the cut network must run, keep its output shapes, and equal the masked one
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.allocation.costs import CoupledCost
from compress.cost.macs import count_macs, count_params
from compress.model.adapter import random_inputs
from compress.model.modes import eval_mode
from compress.pruning.graph import ChannelGraph
from compress.pruning.groups import ChannelGroup, Exclusion
from compress.pruning.surgery import cut_out
from compress.pruning.width_costs import build_cost
from compress.user_code import is_interrupt, user_frame, user_place

_TRIAL_SEED = 20190813
_TRIAL_TOLERANCE = 1e-3
_MISCOUNT = 0.5  # a count is a whole number, a prediction nearly one
_UNIT_NAMES = {"macs": "MACs", "params": "params"}
_SILENT = 1e-2  # a weight whose largest value is below it passes hardly anything on


def find_cuttable(
    module: nn.Module, example: Tensor, skip: frozenset[str] = frozenset()
) -> tuple[dict[str, ChannelGroup], list[Exclusion]]:
    """Return the groups that are prunable, and the others with the reason.

    Args:
        module: Any network; left unchanged. The groups returned refer to its own layers.
        example: One input, (1, ...).
        skip: Names of groups to leave out.

    Raises:
        UntraceableModel: The network does not run.
    """
    graph = ChannelGraph(module, example)
    names = [name for name in graph.groups if name not in skip]
    with _all_heard(module):
        failures = _Trial(module, example, graph).failing(names)
    excluded = [item for item in graph.excluded if item.name not in skip]
    excluded += [Exclusion(name, reason) for name, reason in failures.items()]
    return {name: graph.groups[name] for name in names if name not in failures}, excluded


@contextmanager
def _all_heard(module: nn.Module) -> Iterator[None]:
    """Replace weights that are (nearly) zero within the context, because they would hide a wrong cut.

    Examples are initial layer scales, and the last norms of residual blocks.
    """
    generator = torch.Generator().manual_seed(_TRIAL_SEED)
    kept = {
        parameter: parameter.detach().clone()
        for name, parameter in module.named_parameters()
        if name.rpartition(".")[2] != "bias" and parameter.numel() and float(parameter.detach().abs().max()) < _SILENT
    }
    with torch.no_grad():
        try:
            for parameter in kept:
                drawn = torch.rand(parameter.shape, generator=generator) + 0.5
                parameter.copy_(drawn if parameter.ndim < 2 else drawn / max(1.0, parameter[0].numel() ** 0.5))
            yield
        finally:
            for parameter, values in kept.items():
                parameter.copy_(values)


def masked_copy(
    module: nn.Module, removed: Mapping[str, Sequence[int]], groups: Mapping[str, ChannelGroup]
) -> nn.Module:
    """Return a copy of `module` in which nothing reads the removed channels.

    Args:
        module: The network the groups belong to.
        removed: Group name -> channel indices.
        groups: The groups of `module`.
    """
    silent = copy.deepcopy(module)
    with torch.no_grad():
        for name, indices in removed.items():
            gone = torch.tensor(sorted(indices))
            for read in groups[name].reads:
                weight = getattr(silent.get_submodule(read.path), read.name)
                weight.index_fill_(read.dim, read.slots[torch.isin(read.channels, gone)], 0)
    return silent


class _Trial:
    """Cuts on copies of one network.

    Args:
        module: The network; left unchanged.
        example: One input, (1, ...).
        graph: Channel graph of `module`.
    """

    def __init__(self, module: nn.Module, example: Tensor, graph: ChannelGraph) -> None:
        self.module, self.graph, self.example = module, graph, example
        self.costs: dict[str, CoupledCost] = {}
        generator = torch.Generator().manual_seed(_TRIAL_SEED)
        self.removed = _different_parts(graph.groups, generator)
        self.inputs = random_inputs(module, example, 2, _TRIAL_SEED).to(example.dtype)

    def failing(self, names: list[str]) -> dict[str, str]:
        """Return the groups whose cut is wrong, with the reason, by trying all at once and halving on failure."""
        if not names:
            return {}
        reason = self._reason(names)
        if reason is None:
            return {}
        if len(names) == 1:
            return {names[0]: reason}
        middle = len(names) // 2
        failing = {**self.failing(names[:middle]), **self.failing(names[middle:])}
        return failing or self._failing_together(names)

    def _failing_together(self, names: list[str]) -> dict[str, str]:
        """Return groups that fail only together: admit groups one by one, and drop each that breaks the others."""
        admitted: list[str] = []
        failing: dict[str, str] = {}
        for name in names:
            reason = self._reason([*admitted, name])
            if reason is None:
                admitted.append(name)
            else:
                failing[name] = f"{reason} (together with other groups)"
        return failing

    def _reason(self, names: list[str]) -> str | None:
        """Cut about half of each group on a copy; return the fault of the result in words, or None."""
        removed = {name: self.removed[name] for name in names}
        try:
            slim = cut_out(self.module, self.graph, removed)
            with torch.no_grad(), eval_mode(slim):
                got = slim(self.inputs)
        except BaseException as error:  # foreign code under trial: whatever it raises is the reason
            if is_interrupt(error):
                raise
            return f"the cut network does not run ({_failure(error)})"
        silent = masked_copy(self.module, removed, self.graph.groups)
        with torch.no_grad(), eval_mode(silent):
            found = difference(got, silent(self.inputs))
        return found or self._miscounted(slim, removed)

    def _miscounted(self, slim: nn.Module, removed: Mapping[str, tuple[int, ...]]) -> str | None:
        """Return the reason if a cut network has other MACs or params than its widths imply, else None."""
        groups = self.graph.groups
        widths = {name: groups[name].width - len(gone) for name, gone in removed.items()}
        for unit, count in (("macs", count_macs(slim, self.example)), ("params", count_params(slim))):
            if unit not in self.costs:
                self.costs[unit] = build_cost(self.module, self.example, groups, unit)
            predicted = self.costs[unit].at(widths)
            if abs(predicted - count) > _MISCOUNT:
                found = f"{predicted:.0f} {_UNIT_NAMES[unit]} expected, {count} left"
                return f"savings of its cut do not follow from its width ({found})"
        return None


def difference(got: object, expected: object) -> str | None:
    """Return how the outputs of a cut network differ, in words, from the masked network's, or None.

    Args:
        got: Outputs of the cut network, of any structure.
        expected: Outputs of the masked network.
    """
    found, wanted = _tensors(got), _tensors(expected)
    if [tuple(a.shape) for a in found] != [tuple(a.shape) for a in wanted]:
        return f"cutting it changes the output shape to {[tuple(a.shape) for a in found]}"
    for a, b in zip(found, wanted, strict=True):
        gap = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        if not gap <= _TRIAL_TOLERANCE * (1 + float(b.double().abs().max() if b.numel() else 0)):
            return f"the cut network differs from the original with those channels masked, by {gap:.2g}"
    return None


def _different_parts(groups: Mapping[str, ChannelGroup], generator: torch.Generator) -> dict[str, tuple[int, ...]]:
    """Return random channels to remove, a quarter to three quarters of each group.

    Groups of the same width are cut to different widths: code that reads the width of one group to reshape another
    works as long as both are equal.
    """
    removed, seen = {}, dict[int, int]()
    for name, group in groups.items():
        units = group.width // group.parts
        least, half, most = max(1, units // 4), max(1, units // 2), max(1, 3 * units // 4)
        count = least + (half - least + seen.get(units, 0)) % (most - least + 1)
        seen[units] = seen.get(units, 0) + 1
        removed[name] = group.expand(torch.randperm(units, generator=generator)[:count].tolist())
    return removed


def _tensors(outputs: object) -> list[Tensor]:
    return [value for value in tree_leaves(outputs) if isinstance(value, Tensor)]


def _failure(error: BaseException) -> str:
    """Return an error's message, with the line of the user's code that raised it, if any."""
    said = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    frame = user_frame(error)
    return said if frame is None else f"{said}, in {user_place(error)}: {frame.line}"
