"""Second opinion on channel groups: torch-pruning's dependency graph compared with ours; each difference is tried.

`pruning/trial.py` tries our groups. A trial of torch-pruning's group removes half of the channels from a copy, with
torch-pruning's own code. The outputs must equal those of the baseline with these channels masked in all
readers.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from compress.cost.macs import TRANSPOSED
from compress.errors import attempt
from compress.model.adapter import random_inputs
from compress.model.modes import eval_mode
from compress.progress import Progress
from compress.pruning.criteria.torch_pruning import function_name
from compress.pruning.graph import ChannelGraph
from compress.pruning.groups import ChannelGroup, Exclusion, Member, is_depthwise
from compress.pruning.trial import difference, find_cuttable
from compress.user_code import describe_error

RIGHT = "right"
_SEED = 20190813
_ONE_SIDED = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
_Place = tuple[str, str]  # layer, side
_Places = dict[_Place, frozenset[int]]


@dataclass(frozen=True, slots=True)
class GroupDifference:
    """Channel group that only one of the two graphs has, or whose members differ.

    Attributes:
        kind: "other members", "only ours" or "only torch-pruning's".
        name: Root of our group, or of torch-pruning's where only it has the group.
        only_ours: Members that torch-pruning lacks, such as "layer1.0.conv2 out".
        only_theirs: Members that ours lacks.
        ours: Result of our trial: "right", or the reason against the group. None if our graph has no such group.
        theirs: Result of the trial of torch-pruning's group, in the same form.
    """

    kind: str
    name: str
    only_ours: tuple[str, ...]
    only_theirs: tuple[str, ...]
    ours: str | None
    theirs: str | None


@dataclass(frozen=True, slots=True)
class SecondOpinion:
    """torch-pruning's channel groups compared with ours.

    Attributes:
        version: Version of torch-pruning.
        error: Error of torch-pruning's tracer; None if tracing succeeded.
        ours: Number of our groups.
        theirs: Number of torch-pruning's groups, without those of the network's outputs.
        equal: Number of groups with the same layers, sides and channel positions.
        differences: Groups that differ.
    """

    version: str
    error: str | None
    ours: int
    theirs: int
    equal: int
    differences: tuple[GroupDifference, ...]


def find_second_opinion(module: nn.Module, example: Tensor, progress: Progress) -> SecondOpinion:
    """Compare our channel groups with those of torch-pruning.

    Args:
        module: Any network; unchanged.
        example: One input, (1, ...).
        progress: Listener for the progress.

    Raises:
        UntraceableModel: The network does not run.
    """
    with progress.task("channel groups, once more", 1) as task:
        groups = ChannelGraph(module, example).groups
        excluded = {item.name: item for item in find_cuttable(module, example)[1]}
        task.advance()
    outputs = [name for name, item in excluded.items() if item.expected]
    with progress.task("dependency graph of torch-pruning", 1) as task:
        theirs = attempt(  # any error of its tracer is shown
            lambda: _Theirs(module, example, outputs), lambda error: describe_error(error).splitlines()[0]
        )
        task.advance()
    if isinstance(theirs, str):
        return SecondOpinion(version("torch-pruning"), theirs, len(groups), 0, 0, ())
    return _compare(groups, excluded, theirs, progress)


class _Theirs:
    """Groups that torch-pruning finds in a copy of a network.

    Args:
        module: The network.
        example: One input, (1, ...).
        outputs: Names of the layers that torch-pruning ignores.

    Attributes:
        places: Root of each group -> its members.
    """

    def __init__(self, module: nn.Module, example: Tensor, outputs: Sequence[str]) -> None:
        self.module, self.example = module, example
        whole, graph = self._graph()
        ignored = [whole.get_submodule(name) for name in outputs if _has(whole, name)]
        names = {layer: name for name, layer in whole.named_modules()}
        self.places: dict[str, _Places] = {}
        for group in graph.get_all_groups(ignored_layers=ignored):
            self.places[names[group[0].dep.target.module]] = _places_of(group, names)

    def _cut(self, root: str) -> tuple[_Places, Tensor, Any]:
        """Return the members that torch-pruning narrows for half of a group, inputs, and the narrow copy's outputs."""
        slim, graph = self._graph()
        layer = slim.get_submodule(root)
        pruner = graph.get_pruner_of_module(layer)
        group = graph.get_pruning_group(layer, pruner.prune_out_channels, self._half(root))
        places = _places_of(group, {part: name for name, part in slim.named_modules()})
        group.prune(record_history=False)
        inputs = random_inputs(self.module, self.example, 2, _SEED).to(self.example.dtype)
        with torch.no_grad(), eval_mode(slim):
            got = slim(inputs)
        return places, inputs, got

    def judgement(self, root: str) -> str:
        """Remove half of a group's channels with torch-pruning; return "right", or the fault of the result."""
        cut = attempt(
            lambda: self._cut(root),
            lambda error: f"the cut network does not run ({describe_error(error).splitlines()[0]})",
        )
        if isinstance(cut, str):
            return cut
        places, inputs, got = cut
        silent = copy.deepcopy(self.module)
        for (name, side), slots in places.items():
            if side == "in":
                _silence(silent.get_submodule(name), sorted(slots))
        with torch.no_grad(), eval_mode(silent):
            return difference(got, silent(inputs)) or RIGHT

    def _graph(self) -> tuple[nn.Module, Any]:
        from torch_pruning import DependencyGraph

        whole = copy.deepcopy(self.module).eval()
        for parameter in whole.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)  # it traces by gradients
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return whole, DependencyGraph().build_dependency(whole, self.example, verbose=False)

    def _half(self, root: str) -> list[int]:
        """Return half of the channels, at the same positions in each part of a grouped convolution."""
        places = self.places[root]
        width = len(places[root, "out"])
        layers = [self.module.get_submodule(name) for name, _ in places]
        parts = max([int(getattr(one, "groups", 1)) for one in layers if not is_depthwise(one)], default=1)
        parts = parts if width % parts == 0 else 1
        units = width // parts
        chosen = torch.randperm(units, generator=torch.Generator().manual_seed(_SEED))[: max(1, units // 2)].tolist()
        return sorted(part * units + unit for part in range(parts) for unit in chosen)


def _has(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_modules())


def _places_of(group: Any, names: Mapping[nn.Module, str]) -> _Places:
    """Return the layers of one of torch-pruning's groups, without its items for functions and parameters."""
    found: _Places = {}
    for dep, slots in group:
        layer = dep.target.module
        if not isinstance(layer, nn.Module) or layer not in names or _is_scalar(layer):
            continue
        one_sided = isinstance(layer, _ONE_SIDED) or is_depthwise(layer)
        side = "out" if one_sided or "_out_" in dep.handler.__name__ else "in"
        place = names[layer], side
        found[place] = found.get(place, frozenset()) | frozenset(int(one) for one in slots)
    return found


def _places_of_ours(members: Iterable[Member]) -> _Places:
    return {
        (member.layer, member.axis): frozenset(member.slots.tolist())
        for member in members
        if function_name(member) is not None and not _is_scalar(member.module)
    }


def _is_scalar(layer: nn.Module) -> bool:
    return isinstance(layer, nn.PReLU) and layer.num_parameters == 1


@torch.no_grad()
def _silence(layer: nn.Module, slots: list[int]) -> None:
    """Mask input channels of a layer by zeroing its weights for them."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    groups = int(getattr(layer, "groups", 1))  # type: ignore[arg-type]
    if isinstance(layer, TRANSPOSED):
        weight[slots] = 0
    elif groups > 1:
        each_in, each_out = weight.shape[1], weight.shape[0] // groups
        for slot in slots:
            start = slot // each_in * each_out
            weight[start : start + each_out, slot % each_in] = 0
    else:
        weight[:, slots] = 0


def _compare(
    groups: Mapping[str, ChannelGroup], excluded: Mapping[str, Exclusion], theirs: _Theirs, progress: Progress
) -> SecondOpinion:
    """Match each of our groups with the torch-pruning group that shares most members, and try groups that differ."""
    matched: dict[str, tuple[_Places, str | None]] = {}
    for name, group in groups.items():
        places = _places_of_ours(group.members)
        common = {root: len(places.items() & found.items()) for root, found in theirs.places.items()}
        best = max(common, key=common.__getitem__, default=None)
        matched[name] = places, best if best is not None and common[best] else None
    unequal = {name: one for name, one in matched.items() if one[1] is None or one[0] != theirs.places[one[1]]}
    unmatched = theirs.places.keys() - {root for _, root in matched.values()}
    tried = sorted({root for _, root in unequal.values() if root is not None} | unmatched)
    judged: dict[str, str] = {}
    with progress.task("cuts of torch-pruning", len(tried)) as task:
        for root in tried:
            judged[root] = theirs.judgement(root)
            task.advance()
    found = []
    for name, (places, match) in unequal.items():
        verdict = excluded[name].reason if name in excluded else RIGHT
        if match is None:
            found.append(GroupDifference("only ours", name, _only(places, {}), (), verdict, None))
            continue
        other = theirs.places[match]
        only_ours, only_theirs = _only(places, other), _only(other, places)
        found.append(GroupDifference("other members", name, only_ours, only_theirs, verdict, judged[match]))
    for root in sorted(unmatched):
        reason = excluded[root].reason if root in excluded else None
        members = _only(theirs.places[root], {})
        found.append(GroupDifference("only torch-pruning's", root, (), members, reason, judged[root]))
    equal = len(matched) - len(unequal)
    return SecondOpinion(version("torch-pruning"), None, len(groups), len(theirs.places), equal, tuple(found))


def _only(places: _Places, other: _Places) -> tuple[str, ...]:
    """Return the members of one group that another group lacks, or has at other channel positions."""
    texts = []
    for (layer, side), slots in places.items():
        if other.get((layer, side)) != slots:
            is_shared = (layer, side) in other
            texts.append(f"{layer} {side}" + (f" ({len(slots)} positions)" if is_shared else ""))
    return tuple(texts)
