"""Widths of channel groups, read from the shapes of a state dict that is narrower than its network.

Each dimension of each parameter yields one equation. Its number of missing indices is the sum, over the channel groups
on it, of the units that the group lost times the indices of one unit. A convolution behind a concatenation has several
groups on its inputs, a linear layer behind a flattened feature map several indices for each channel.

A trial checks the solution: the network of full width, with the narrow values at the kept positions and nothing reading
the others, must have the outputs of the narrow network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import ArtifactError
from compress.model.modes import eval_mode
from compress.pruning.graph import ChannelGraph
from compress.pruning.surgery import kept_indices
from compress.pruning.trial import difference, masked_copy

_WHOLE = 1e-6  # tolerance of a whole number of units
FULL_WIDTH = "model.factory and model.kwargs must be those of the network before it was slimmed."


@dataclass(frozen=True, slots=True)
class _Equation:
    """Equation of one dimension of one tensor.

    Attributes:
        name: Name of the tensor in the state dict.
        full: Shape of the tensor in the network.
        found: Shape of the tensor in the state dict.
        lacking: Number of missing indices of the dimension.
        lost: Group name -> number of indices of one unit.
    """

    name: str
    full: tuple[int, ...]
    found: tuple[int, ...]
    lacking: int
    lost: dict[str, float]

    @property
    def words(self) -> str:
        """The tensor with both shapes."""
        return f"{self.name} is {self.found} in the file and {self.full} in the network"


def find_removed(
    graph: ChannelGraph, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: str
) -> dict[str, tuple[int, ...]]:
    """Return the cut that gives the network the shapes of a state dict.

    Args:
        graph: Channel graph of the network of full width.
        tensors: Name in the state dict -> parameter or buffer of the network; shared tensors under each name.
        shapes: Name -> shape in the state dict; tensors without a shape are skipped.
        source: The state dict in words, for messages.

    Returns:
        Group name -> removed channels: the last units of the group. Groups of full width are left out.

    Raises:
        ArtifactError: A tensor is wider than in the network or narrower without a prunable channel, or the shapes
            contradict each other or leave the widths open. The message names the tensor and both shapes.
    """
    equations = _equations(graph, tensors, shapes, source)
    units = {name: group.width // group.parts for name, group in graph.groups.items()}
    lost = _solve(equations, units, source)
    return {
        name: group.expand(range(units[name] - lost[name], units[name]))
        for name, group in graph.groups.items()
        if lost.get(name)
    }


def check_narrow(
    module: nn.Module,
    slim: nn.Module,
    graph: ChannelGraph,
    removed: Mapping[str, Sequence[int]],
    example: Tensor,
) -> str | None:
    """Return how a narrow network differs, in words, from its values in the network of full width, or None.

    Args:
        module: The network of full width; its values at the kept positions are overwritten.
        slim: The narrow network, with its own values.
        graph: Channel graph of `module`.
        removed: Group name -> channels that `slim` lacks.
        example: Inputs, (N, ...).
    """
    kept = {id(tensor): indices for tensor, indices in kept_indices(graph, removed)}
    narrow = named_tensors(slim)
    with torch.no_grad():
        for name, tensor in named_tensors(module).items():
            places = [kept.get(id(tensor), {}).get(dim, torch.arange(size)) for dim, size in enumerate(tensor.shape)]
            if places:
                tensor[torch.meshgrid(*places, indexing="ij")] = narrow[name].to(tensor.dtype)
            else:
                tensor.copy_(narrow[name])
    masked = masked_copy(module, removed, graph.groups)
    with torch.no_grad(), eval_mode(slim), eval_mode(masked):
        return difference(slim(example), masked(example))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a network's state dict themselves, shared ones under each name."""
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {name: named[name] for name in module.state_dict() if name in named}


def _equations(
    graph: ChannelGraph, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: str
) -> list[_Equation]:
    """Return the equation of each prunable dimension; equations with fewer groups come first."""
    axes = {(id(axis.tensor), axis.dim): axis.lost for axis in graph.parameter_axes()}
    reasons = {item.name: item.reason for item in graph.excluded}
    equations = []
    for name, tensor in tensors.items():
        if name not in shapes:
            continue
        full, found = tuple(tensor.shape), tuple(shapes[name])
        if len(full) != len(found):
            raise ArtifactError(
                f"{source} must hold tensors with the axes of the network's; {name} is {found} in the file and "
                f"{full} in the network.",
                hint=FULL_WIDTH,
            )
        has_kernel = len(full) > 3 and not any(axes.get((id(tensor), dim)) for dim in range(2, len(full)))
        if has_kernel and found[2:] != full[2:]:
            raise ArtifactError(
                f"{source} must hold kernels of the network's size; {name} is {found} in the file and {full} in the "
                "network.",
                hint=FULL_WIDTH,
            )
        if any(have > most for have, most in zip(found, full, strict=True)):
            raise ArtifactError(
                f"{source} must be nowhere wider than the network; {name} is {found} in the file and {full} in the "
                "network.",
                hint=FULL_WIDTH,
            )
        for dim, (have, most) in enumerate(zip(found, full, strict=True)):
            lost = axes.get((id(tensor), dim), {})
            prunable = {group: count for group, count in lost.items() if group in graph.groups}
            equation = _Equation(name, full, found, most - have, prunable)
            if have < most and not prunable:
                why = sorted({reasons[group] for group in lost if group in reasons})
                raise ArtifactError(
                    f"{source} must be narrower at prunable channels alone; {equation.words}"
                    f"{f': {why[0]}' if why else ''}.",
                    hint=FULL_WIDTH,
                )
            if prunable:
                equations.append(equation)
    return sorted(equations, key=lambda equation: len(equation.lost))


def _solve(equations: Sequence[_Equation], units: Mapping[str, int], source: str) -> dict[str, int]:
    """Return the units that each group lost.

    Raises:
        ArtifactError: There is no solution, or more than one.
    """
    lost: dict[str, int] = {}
    sources: dict[str, _Equation] = {}  # equation that determines each number
    for equation in equations:
        for name in equation.lost if not equation.lacking else ():
            lost[name], sources[name] = 0, sources.get(name, equation)
    left = [equation for equation in equations if equation.lacking]
    while True:
        ready = [one for one in left if sum(name not in lost for name in one.lost) == 1]
        for equation in ready:
            open_names = [name for name in equation.lost if name not in lost]
            if open_names:
                name = open_names[0]
                lost[name] = _whole(_remaining(equation, lost) / equation.lost[name], equation, units[name], source)
                sources[name] = equation
        if not ready:
            break
    unknown = sorted({name for one in left for name in one.lost if name not in lost})
    if unknown:
        rest = [one for one in left if any(name in unknown for name in one.lost)]
        matrix = np.array([[one.lost.get(name, 0.0) for name in unknown] for one in rest])
        values, _, rank, _ = np.linalg.lstsq(matrix, np.array([_remaining(one, lost) for one in rest]), rcond=None)
        if rank < len(unknown):
            raise ArtifactError(
                f"{source} must tell the width of each channel group; for {', '.join(unknown[:4])} its shapes leave "
                f"several open, such as: {rest[0].words}.",
                hint="A state dict does not tell such widths: let a factory build the network as narrow as it is.",
            )
        for name, value in zip(unknown, values.tolist(), strict=True):
            first = next(one for one in rest if name in one.lost)
            lost[name], sources[name] = _whole(value, first, units[name], source), first
    for equation in equations:
        if abs(_remaining(equation, lost)) > _WHOLE:
            others = {sources[name].words: None for name in equation.lost if sources[name] is not equation}
            raise _unfit(source, "; ".join([equation.words, *others]))
    return lost


def _remaining(equation: _Equation, lost: Mapping[str, int]) -> float:
    """Return the number of missing indices beyond the known losses of groups."""
    return equation.lacking - sum(count * lost.get(name, 0) for name, count in equation.lost.items())


def _whole(value: float, equation: _Equation, units: int, source: str) -> int:
    """Return a number of lost units; raise ArtifactError unless it is whole and leaves at least one unit."""
    if abs(value - round(value)) > _WHOLE or not 0 <= round(value) < units:
        raise _unfit(source, equation.words)
    return round(value)


def _unfit(source: str, words: str) -> ArtifactError:
    return ArtifactError(f"{source} must fit the network at some set of widths; {words}.", hint=FULL_WIDTH)
