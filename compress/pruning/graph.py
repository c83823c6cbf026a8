"""Which channels must be cut together, and which groups of them can be cut correctly?

The only file that imports torch_pruning, and it takes two things from it: the traced graph and the cut of given
indices. Ratios, rankings and caps are decided elsewhere.

    channel group   coupled channel slots; named by its first convolution or linear layer in definition order
    root            that layer; a channel's index in the group is its output index there
    member          one layer touched by the group: on its "out" axis (producer, norm, depthwise) or "in" axis (reader)
    gates           the places where multiplying a channel by 0 is the same as removing it
    parts           equal ranges of channels that must be cut alike, because a grouped convolution sees them so

A group counts as cuttable only after a trial on a copy: the cut network must run, keep its output shape, and equal
the original with the removed channels silenced.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning
from torch import Tensor, nn

from compress.cost.macs import COUNTED, eval_mode
from compress.errors import InternalError, UnsupportedLayer, UntraceableModel

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)
_TRIAL_SEED = 20190813
_TRIAL_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Member:
    """One layer's share of a group.

    Attributes:
        layer: Module path.
        module: The layer.
        axis: "out" when the group's channels are the layer's outputs, "in" when they are its inputs.
        slots: (n,) int64, positions on that axis.
        channels: (n,) int64, which channel of the group each slot belongs to.
    """

    layer: str
    module: nn.Module
    axis: Literal["out", "in"]
    slots: Tensor
    channels: Tensor

    @property
    def is_producer(self) -> bool:
        """Whether the layer computes the channels anew (a depthwise layer only passes them on)."""
        return self.axis == "out" and isinstance(self.module, COUNTED) and not is_depthwise(self.module)

    @property
    def is_norm(self) -> bool:
        """Whether the layer normalises the channels."""
        return self.axis == "out" and isinstance(self.module, NORMS)


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels that must be cut together.

    Attributes:
        name: Module path of the root.
        width: Number of channels, C.
        parts: The channels form this many equal ranges that must lose the same positions.
        members: Every layer touched, in trace order.
        gates: For each producer the member to silence or score it at: its batch norm, or itself.
        bare: The convolutions, depthwise ones among them, and linear layers whose outputs no norm of the group follows.
    """

    name: str
    width: int
    parts: int
    members: tuple[Member, ...]
    gates: tuple[Member, ...]
    bare: tuple[Member, ...] = ()

    @property
    def producers(self) -> tuple[Member, ...]:
        """The layers that compute the channels."""
        return tuple(member for member in self.members if member.is_producer)

    @property
    def norms(self) -> tuple[Member, ...]:
        """The layers that normalise the channels."""
        return tuple(member for member in self.members if member.is_norm)

    @property
    def readers(self) -> tuple[Member, ...]:
        """The convolution and linear layers that read the channels."""
        return tuple(m for m in self.members if m.axis == "in" and isinstance(m.module, COUNTED))

    def expand(self, units: Iterable[int]) -> tuple[int, ...]:
        """Return the channels of the given units: position u of every part."""
        stride = self.width // self.parts
        return tuple(sorted(unit + part * stride for unit in units for part in range(self.parts)))


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A group that stays whole.

    Attributes:
        name: The group.
        reason: Why, in words.
        expected: Whether this is in the nature of the network (its outputs) and needs no warning.
    """

    name: str
    reason: str
    expected: bool = False


class ChannelGraph:
    """The channel groups of one network, traced once.

    Args:
        module: The network; cutting changes it in place, so hand in a copy.
        example: One input, (1, C, H, W).

    Raises:
        UntraceableModel: No graph could be built.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.module = module
        self.example = example
        self._names = {part: name for name, part in module.named_modules()}
        self._graph = _trace(module, example)
        self.groups = {group.name: group for group in self._find_groups()}

    def cut(self, removed: Mapping[str, Sequence[int]]) -> None:
        """Remove channels in place.

        Args:
            removed: Group name -> indices of the channels that go.

        Raises:
            UnsupportedLayer: There is no such group, or an index lies outside it.
        """
        for name, indices in removed.items():
            group = self.groups.get(name)
            if group is None:
                raise UnsupportedLayer(f"The network must have a channel group '{name}' to cut, it has none.")
            if not indices or min(indices) < 0 or max(indices) >= group.width or len(set(indices)) == group.width:
                raise UnsupportedLayer(
                    f"Group '{name}' has {group.width} channels; it must lose at least one, all of them within it, "
                    f"and keep at least one, got {len(set(indices))} indices."
                )
        for name, indices in removed.items():
            root = self.module.get_submodule(name)
            self._raw_group(root, sorted(set(indices))).prune(record_history=False)

    def _raw_group(self, root: nn.Module, indices: list[int]) -> Any:
        pruner = self._graph.get_pruner_of_module(root)
        return self._graph.get_pruning_group(root, pruner.prune_out_channels, indices)

    def _find_groups(self) -> Iterable[ChannelGroup]:
        covered: set[nn.Module] = set()
        for root, name in list(self._names.items()):
            if not isinstance(root, COUNTED) or root in covered or root not in self._graph.module2node:
                continue
            width = _out_channels(root)
            raw = self._raw_group(root, list(range(width)))
            members = tuple(self._members(raw))
            covered.update(member.module for member in members if member.axis == "out")
            if is_depthwise(root) or not any(member.module is root for member in members):
                continue
            behind = self._norms_behind(members)
            gates = tuple(behind.get(member.layer, member) for member in members if member.is_producer)
            bare = tuple(
                member
                for member in members
                if member.axis == "out" and isinstance(member.module, COUNTED) and member.layer not in behind
            )
            yield ChannelGroup(name, width, _parts(members), members, gates, bare)

    def _members(self, raw: Any) -> Iterable[Member]:
        for item in raw:
            module = item.dep.target.module
            if module not in self._names:
                continue  # an operation, or a parameter used without a module; the trial covers those
            if isinstance(module, nn.PReLU) and module.num_parameters == 1:
                continue  # one slope for all channels: nothing of it goes
            axis: Literal["out", "in"] = "out" if self._graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            slots = torch.tensor(item.idxs, dtype=torch.int64)
            channels = torch.tensor(item.root_idxs, dtype=torch.int64)
            yield Member(self._names[module], module, axis, slots, channels)

    def _norms_behind(self, members: Sequence[Member]) -> dict[str, Member]:
        """Return for each layer that a norm of the group follows at once that norm."""
        norms, behind = {member.module: member for member in members if member.is_norm}, {}
        for member in members:
            following = [node.module for node in self._graph.module2node[member.module].outputs]
            if found := next((norms[module] for module in following if module in norms), None):
                behind[member.layer] = found
        return behind


def find_cuttable(
    module: nn.Module, example: Tensor, skip: frozenset[str] = frozenset()
) -> tuple[dict[str, ChannelGroup], list[Exclusion]]:
    """Return the groups that can be cut correctly, and the others with the reason.

    Args:
        module: Any network; it is left as it is, and the groups returned refer to its own layers.
        example: One input, (1, C, H, W).
        skip: Groups not to be looked at.

    Raises:
        UntraceableModel: No graph could be built.
    """
    with _all_grads(module), eval_mode(module):
        graph = ChannelGraph(module, example)
        outputs = _output_layers(module, example)
        tied = _tied_layers(module)
        names, excluded = [], []
        for group in graph.groups.values():
            if group.name in skip:
                continue
            if any(member.is_producer and member.layer in outputs for member in group.members):
                excluded.append(Exclusion(group.name, "its channels are the network's outputs", expected=True))
            elif shared := sorted({member.layer for member in group.members} & tied):
                excluded.append(Exclusion(group.name, f"it has layers that share parameters: {', '.join(shared)}"))
            elif group.width // group.parts < 2:
                excluded.append(Exclusion(group.name, f"it has only {group.width} channels in {group.parts} parts"))
            else:
                names.append(group.name)
        failures = _failing(module, example, names)
    excluded += [Exclusion(name, reason) for name, reason in failures.items()]
    return {name: graph.groups[name] for name in names if name not in failures}, excluded


def cut_copy(module: nn.Module, removed: Mapping[str, Sequence[int]], example: Tensor) -> nn.Module:
    """Return a copy of `module` without the channels given; training and requires_grad flags are kept.

    Raises:
        UntraceableModel: No graph could be built.
        UnsupportedLayer: A group or index does not exist.
    """
    slim = copy.deepcopy(module)
    flags = {name: parameter.requires_grad for name, parameter in slim.named_parameters(remove_duplicate=False)}
    with _all_grads(slim), eval_mode(slim):
        ChannelGraph(slim, example).cut(removed)
    for name, parameter in slim.named_parameters():
        parameter.requires_grad_(flags[name])
        parameter.grad = None
    return slim


def silenced_copy(
    module: nn.Module, removed: Mapping[str, Sequence[int]], groups: Mapping[str, ChannelGroup]
) -> nn.Module:
    """Return a copy of `module` in which the removed channels are computed as zero.

    Args:
        module: The network the groups belong to.
        removed: Group name -> channel indices.
        groups: The groups of `module`.
    """
    silent = copy.deepcopy(module)
    for name, indices in removed.items():
        gone = torch.tensor(sorted(indices))
        for member in groups[name].members:
            if member.axis == "out":
                _silence(silent.get_submodule(member.layer), member.slots[torch.isin(member.channels, gone)])
    return silent


def kept_outputs(removed: Mapping[str, Sequence[int]], groups: Mapping[str, ChannelGroup]) -> dict[str, Tensor]:
    """Return for each layer that loses outputs the (n,) sorted output indices that are left."""
    gone: dict[str, list[Tensor]] = {}
    sizes: dict[str, int] = {}
    for name, indices in removed.items():
        for member in groups[name].members:
            if member.axis != "out" or not isinstance(member.module, COUNTED):
                continue
            slots = member.slots[torch.isin(member.channels, torch.tensor(sorted(indices)))]
            gone.setdefault(member.layer, []).append(slots)
            sizes[member.layer] = _out_channels(member.module)
    everything = {layer: torch.arange(size) for layer, size in sizes.items()}
    return {layer: slots[~torch.isin(slots, torch.cat(gone[layer]))] for layer, slots in everything.items()}


def is_depthwise(module: nn.Module) -> bool:
    """Whether each output channel of a convolution reads one input channel of its own."""
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == getattr(module, "in_channels", None) == getattr(module, "out_channels", None)


def _trace(module: nn.Module, example: Tensor) -> Any:
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            return torch_pruning.DependencyGraph().build_dependency(module, example, verbose=False)
    except Exception as error:  # the tracer runs the user's forward pass and raises whatever that raises
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UntraceableModel(
            f"The network's channels must be traced on one input of shape {tuple(example.shape)}; its forward pass, or "
            f"the tracing of an operation in it (chunk, split and reshape are the usual ones), gave {reason}"
        ) from error


def _failing(module: nn.Module, example: Tensor, names: list[str]) -> dict[str, str]:
    """Return the groups whose cut is wrong, with the reason, by trying all at once and halving on failure."""
    if not names:
        return {}
    reason = _trial(module, example, names)
    if reason is None:
        return {}
    if len(names) == 1:
        return {names[0]: reason}
    middle = len(names) // 2
    failing = {**_failing(module, example, names[:middle]), **_failing(module, example, names[middle:])}
    return failing or _failing_together(module, example, names)


def _failing_together(module: nn.Module, example: Tensor, names: list[str]) -> dict[str, str]:
    """Find groups that fail only in company: admit them one by one and drop each that breaks the rest."""
    admitted: list[str] = []
    failing: dict[str, str] = {}
    for name in names:
        reason = _trial(module, example, [*admitted, name])
        if reason is None:
            admitted.append(name)
        else:
            failing[name] = f"{reason} (together with other groups)"
    return failing


def _trial(module: nn.Module, example: Tensor, names: list[str]) -> str | None:
    """Cut half of each group on a copy; return what is wrong with the result, or None."""
    generator = torch.Generator().manual_seed(_TRIAL_SEED)
    slim = copy.deepcopy(module)
    try:
        graph = ChannelGraph(slim, example)
        removed = {name: _some_half(graph.groups[name], generator) for name in names}
        silent = silenced_copy(module, removed, graph.groups)
        images = torch.randn((2, *example.shape[1:]), generator=generator)
        with torch.no_grad():
            expected = _flat_outputs(silent(images))
            graph.cut(removed)
            got = _flat_outputs(slim(images))
    except Exception as error:  # foreign code under trial: whatever it raises is the reason
        return f"the cut network does not run ({type(error).__name__}: {_first_line(error)})"
    if [tuple(a.shape) for a in got] != [tuple(a.shape) for a in expected]:
        return f"cutting it changes the output shape to {[tuple(a.shape) for a in got]}"
    for a, b in zip(got, expected, strict=True):
        difference = float((a - b).abs().max())
        if not difference <= _TRIAL_TOLERANCE * (1 + float(b.abs().max())):
            return f"the cut network differs from the original with those channels silenced, by {difference:.2g}"
    return None


def _some_half(group: ChannelGroup, generator: torch.Generator) -> tuple[int, ...]:
    units = group.width // group.parts
    return group.expand(torch.randperm(units, generator=generator)[: max(1, units // 2)].tolist())


@torch.no_grad()
def _silence(layer: nn.Module, slots: Tensor) -> None:
    """Zero a layer's output channels: weights, bias and, for a norm, the running mean."""
    if isinstance(layer, COUNTED) and hasattr(layer, "transposed") and layer.transposed:
        layer.weight[:, slots] = 0  # type: ignore[index]
    elif isinstance(getattr(layer, "weight", None), Tensor):
        layer.weight[slots] = 0  # type: ignore[index,operator]
    for name in ("bias", "running_mean"):
        values = getattr(layer, name, None)
        if isinstance(values, Tensor):
            values[slots] = 0


def _parts(members: Sequence[Member]) -> int:
    """Return into how many equal ranges grouped convolutions divide the channels."""
    grouped = [m.module.groups for m in members if getattr(m.module, "groups", 1) > 1 and not is_depthwise(m.module)]
    return math.lcm(*(int(groups) for groups in grouped)) if grouped else 1  # type: ignore[arg-type]


def _out_channels(layer: nn.Module) -> int:
    channels = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
    if not isinstance(channels, int):
        raise InternalError(f"{type(layer).__name__} has neither out_channels nor out_features.")
    return channels


def _output_layers(module: nn.Module, example: Tensor) -> set[str]:
    """Return the layers whose output, as it is, is an output of the network."""
    seen: dict[int, str] = {}
    kept: list[Tensor] = []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                kept.append(output)  # keeps the address from being used again
                seen[output.data_ptr()] = name

        return hook

    handles = [
        part.register_forward_hook(note(name)) for name, part in module.named_modules() if isinstance(part, COUNTED)
    ]
    try:
        with torch.no_grad():
            outputs = _flat_outputs(module(example))
    finally:
        for handle in handles:
            handle.remove()
    return {seen[output.data_ptr()] for output in outputs if output.data_ptr() in seen}


def _tied_layers(module: nn.Module) -> set[str]:
    """Return the layers with a parameter that another layer has, too: a cut would give each a parameter of its own."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, part in module.named_modules():
        for parameter in {id(p): p for p in part.parameters(recurse=False)}.values():
            owners.setdefault(parameter, []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _flat_outputs(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [tensor for value in values for tensor in _flat_outputs(value)]


class _all_grads:  # noqa: N801 - a context manager, named like a function
    """Let every parameter require a gradient while the tracer, which follows gradients, is at work."""

    def __init__(self, module: nn.Module) -> None:
        self.frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for parameter in self.frozen:
            parameter.requires_grad_(False)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
