"""Importance measures of torch-pruning, by name or of the user's own, on channel groups of our channel graph.

torch-pruning's `Group` is built from our `ChannelGroup`; its tracer is not used. An importance gets copies of the
group's layers, with gradients if it needs them, so that the network cannot be changed. torch-pruning is imported at
the first score, because the import takes seconds.

Faults of torch-pruning 1.6.1 that are not passed on:
    GroupHessianImportance.accumulate_grad keeps the last sample only    the mean of all squares stands in `.grad`
    FPGMImportance fails on layers that read through groups              refused, with the layer
    RandomImportance draws from torch's global generator                 seeded, and the generator is restored
"""

import copy
import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from compress.cost.macs import CONVOLUTIONS, TRANSPOSED
from compress.errors import InternalError, ModelError, UnsupportedLayer, translated
from compress.pruning.criteria.base import Evidence, Order, WidthsBy
from compress.pruning.criteria.parameter_gradients import ParameterGradients
from compress.pruning.groups import BATCH_NORMS, INSTANCE_NORMS, ChannelGroup, Member, is_depthwise
from compress.user_code import describe_error, import_callable, import_path_of, raise_as, short_reference

Gradients = Literal["none", "mean", "squares"]
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_CONVOLUTIONS = (*CONVOLUTIONS, *TRANSPOSED)
# class of a layer -> middle part of the name of torch-pruning's pruning function
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    (_CONVOLUTIONS, "conv"),
    ((nn.Linear,), "linear"),
    (BATCH_NORMS, "batchnorm"),
    ((nn.LayerNorm,), "layernorm"),
    ((nn.GroupNorm,), "groupnorm"),
    (INSTANCE_NORMS, "instancenorm"),
    ((nn.PReLU,), "prelu"),
)


def build_group(group: ChannelGroup, gradients: Mapping[str, Tensor] | None = None) -> Any:
    """Build torch-pruning's group of a channel group.

    Its first item is the root; the items of layers that hold every channel once come before all others, because
    torch-pruning counts the channels of a group by the first item that it scores. Weights that belong to no layer of
    a kind torch-pruning knows have no item.

    Args:
        group: C channels, numbered 0 to C - 1. These numbers are the items' `root_idxs`.
        gradients: Parameter name -> gradient, set as `.grad` of the layers' parameters; None for no gradients.

    Returns:
        A `torch_pruning.dependency.Group` of copies of the layers; it belongs to no `DependencyGraph`.
    """
    from torch_pruning._helpers import GroupItem
    from torch_pruning.dependency import Dependency, Group, Node
    from torch_pruning.pruner import function

    layers = _copied_layers(group, gradients)
    known = [(member, name) for member in _ordered(group) if (name := function_name(member)) is not None]
    nodes = {member.layer: Node(layers[member.layer], None, member.layer) for member, _ in known}
    built = Group()
    for member, name in known:
        handler = getattr(function, name)
        trigger = built[0].dep.handler if len(built) else handler
        source = built[0].dep.target if len(built) else nodes[member.layer]
        item = GroupItem(Dependency(trigger, handler, source, nodes[member.layer]), member.slots.tolist())
        item.root_idxs = member.channels.tolist()  # lists: importances sort them and index with them
        built.items.append(item)
    return built


def _ordered(group: ChannelGroup) -> list[Member]:
    """Return each layer once per side: the root, then the layers that hold every channel once, then the others."""
    every: dict[tuple[int, str], Member] = {}
    for member in group.members:
        every.setdefault((id(member.module), member.axis), member)

    def place(member: Member) -> int:
        holds_all = len(member.slots) == group.width == len(set(member.channels.tolist()))
        is_root = member.is_producer and member.layer == group.name
        return 0 if is_root and holds_all else 1 if holds_all and member.is_producer else 2 if holds_all else 3

    return sorted(every.values(), key=place)


def function_name(member: Member) -> str | None:
    """Return the name of torch-pruning's function that would cut a layer; None for a layer of unknown kind."""
    kind = next((kind for classes, kind in _KINDS if isinstance(member.module, classes)), None)
    if kind is None:
        return None
    if kind == "conv" and is_depthwise(member.module):
        kind = "depthwise_conv"
    return f"prune_{kind}_{'in' if member.axis == 'in' else 'out'}_channels"


def _copied_layers(group: ChannelGroup, gradients: Mapping[str, Tensor] | None) -> dict[str, nn.Module]:
    """Return module path -> copy of the layer; the copies share the parameters that the layers share."""
    shared: dict[int, Any] = {}
    layers = {member.layer: copy.deepcopy(member.module, shared) for member in group.members}
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.grad = None
    for path, layer in layers.items():
        for name, parameter in layer.named_parameters():
            found = None if gradients is None else gradients.get(f"{path}.{name}" if path else name)
            if found is not None:
                parameter.grad = found.clone()
    return layers


def score_group(
    importance: Callable[[Any], Any], group: ChannelGroup, gradients: Mapping[str, Tensor] | None, seed: int
) -> Any:
    """Return an importance's result for a group; torch's generator is seeded by seed and group, then restored."""
    built = build_group(group, gradients)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed * 1_000_003 + zlib.crc32(group.name.encode()))
        return importance(built)


class _Measure:
    """An importance class of torch-pruning with its defaults, except for the normalizer.

    Attributes:
        gradients: Kind of gradients set as `.grad`.
        reads_weights: Whether the class reads weights of convolutions and linear layers.
    """

    name: ClassVar[str]
    evidence: ClassVar[Evidence] = "weights"
    order: ClassVar[Order] = "scores"
    widths_by: ClassVar[WidthsBy] = "scores"
    comparable: ClassVar[bool] = False
    treats_equals_equally: ClassVar[bool] = True
    gradients: ClassVar[Gradients] = "none"
    reads_weights: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def importance(self) -> Any:
        """Return the object of torch-pruning that scores."""
        raise NotImplementedError

    def scores(self, group: ChannelGroup, stats: ParameterGradients | None) -> Tensor:
        """Score each channel of `group` as torch-pruning does.

        Args:
            group: C coupled channels.
            stats: From `collect_parameter_gradients`, for the measures that need gradients.

        Returns:
            (C,) float32, >= 0.

        Raises:
            UnsupportedLayer: torch-pruning cannot score the group.
        """
        self._require(group)
        gradients = _gradients_of(self.name, self.gradients, stats)
        with translated(
            lambda error: UnsupportedLayer(
                f"Criterion '{self.name}' cannot score group '{group.name}', "
                f"torch-pruning raises {describe_error(error)}.",
                hint="Exclude the group, or choose another criterion.",
            )
        ):
            found = score_group(self.importance(), group, gradients, self.seed)
        if not isinstance(found, Tensor) or found.shape != (group.width,):
            raise UnsupportedLayer(
                f"Criterion '{self.name}' looks at no layer that holds all {group.width} channels of group "
                f"'{group.name}'.",
                hint="Exclude the group, or choose tp_magnitude.",
            )
        return found.detach().float()

    def _require(self, group: ChannelGroup) -> None:
        for member in group.members if self.reads_weights else ():
            module = member.module
            if isinstance(module, TRANSPOSED) and int(module.groups) > 1 and not is_depthwise(module):
                raise UnsupportedLayer(
                    f"Criterion '{self.name}' cannot score group '{group.name}': torch-pruning indexes transposed "
                    f"convolutions with groups, such as '{member.layer}', wrongly.",
                    hint="Exclude the group, or choose a criterion of compress.",
                )


class TpMagnitude(_Measure):
    """Mean over the layers of the group of each channel's sum of squared weights.

    Source: torch-pruning, `GroupMagnitudeImportance`; Fang et al. 2023, "DepGraph: Towards Any Structural Pruning",
        arXiv:2301.12900.
    """

    name = "tp_magnitude"

    def importance(self) -> Any:
        """Return `GroupMagnitudeImportance` without a normalizer."""
        from torch_pruning.pruner.importance import GroupMagnitudeImportance

        return GroupMagnitudeImportance(normalizer=None)


class TpFpgm(_Measure):
    """Sum of distances between a channel's squared weights and the other channels', mean over the layers.

    Source: torch-pruning, `FPGMImportance`; He et al. 2019, "Filter Pruning via Geometric Median", arXiv:1811.00250,
        which takes distances of weights, not of their squares.
    """

    name = "tp_fpgm"

    def importance(self) -> Any:
        """Return `FPGMImportance` without a normalizer."""
        from torch_pruning.pruner.importance import FPGMImportance

        return FPGMImportance(normalizer=None)

    def _require(self, group: ChannelGroup) -> None:
        super()._require(group)
        for member in group.members:
            module = member.module
            if member.axis == "in" and isinstance(module, _CONVOLUTIONS) and int(module.groups) > 1:
                raise UnsupportedLayer(
                    f"Criterion 'tp_fpgm' cannot score group '{group.name}': '{member.layer}' reads it through "
                    f"{module.groups} groups, on which torch-pruning 1.6 fails.",
                    hint=f"Add '{group.name}' to exclude, or choose tp_magnitude.",
                )


class TpLamp(_Measure):
    """`tp_magnitude` over the sum of all scores in the group that are not smaller: the largest score is 1.

    Equal channels get unequal scores, in the order of a sort.

    Source: torch-pruning, `LAMPImportance`; Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based
        Pruning", arXiv:2010.07611.
    """

    name = "tp_lamp"
    comparable = True
    treats_equals_equally = False

    def importance(self) -> Any:
        """Return `LAMPImportance`, which allows no other normalizer than its own."""
        from torch_pruning.pruner.importance import LAMPImportance

        return LAMPImportance()


class TpTaylor(_Measure):
    """Mean over the layers of each channel's sum of |weight * gradient|; batch norms do not count.

    Source: torch-pruning, `GroupTaylorImportance`; Molchanov et al. 2019, "Importance Estimation for Neural Network
        Pruning", arXiv:1906.10771. Batch norms do not count because torch-pruning 1.6 looks for a group norm there.
    """

    name = "tp_taylor"
    evidence = "parameter_gradients"
    comparable = True
    gradients = "mean"

    def importance(self) -> Any:
        """Return `GroupTaylorImportance` without a normalizer."""
        from torch_pruning.pruner.importance import GroupTaylorImportance

        return GroupTaylorImportance(normalizer=None)


class TpHessian(_Measure):
    """Mean over the layers of each channel's sum of weight² * mean squared gradient of an image.

    Source: torch-pruning, `GroupHessianImportance`; LeCun et al. 1989, "Optimal Brain Damage", with the empirical
        Fisher matrix in place of the Hessian and without the factor 1/2.
    """

    name = "tp_hessian"
    evidence = "parameter_gradients"
    comparable = True
    gradients = "squares"

    def importance(self) -> Any:
        """Return `GroupHessianImportance` without a normalizer."""
        from torch_pruning.pruner.importance import GroupHessianImportance

        return GroupHessianImportance(normalizer=None)


class TpBnScale(_Measure):
    """Mean over the batch norms of the group of a channel's |scale|.

    Source: torch-pruning, `BNScaleImportance`; Liu et al. 2017, "Learning Efficient Convolutional Networks through
        Network Slimming", arXiv:1708.06519.
    """

    name = "tp_bn_scale"
    reads_weights = False

    def importance(self) -> Any:
        """Return `BNScaleImportance` without a normalizer."""
        from torch_pruning.pruner.importance import BNScaleImportance

        return BNScaleImportance(normalizer=None)


class TpRandom(_Measure):
    """Uniform random scores, the same for the same seed and group.

    Source: torch-pruning, `RandomImportance`.
    """

    name = "tp_random"
    reads_weights = False
    comparable = True
    treats_equals_equally = False

    def importance(self) -> Any:
        """Return `RandomImportance`."""
        from torch_pruning.pruner.importance import RandomImportance

        return RandomImportance()


class OwnImportance:
    """A criterion made from the user's own importance.

    Args:
        reference: "pkg.module:Class" or "path/file.py:Class", a subclass of `torch_pruning.importance.Importance`.
        kwargs: Keyword arguments of the class.
        gradients: Gradients of the loss in `.grad` of the layers: "none", "mean" of all images, or "squares", the mean
            of each image's squared gradient. None: "mean" for subclasses of torch-pruning's Taylor importance,
            "squares" for subclasses of its Hessian importance, else "none".
        comparable: Whether scores of different groups have one scale.
        seed: Seed of torch's random numbers during scoring.

    Raises:
        ModelError: The class cannot be imported, raises, or is no importance.
    """

    order: ClassVar[Order] = "scores"
    widths_by: ClassVar[WidthsBy] = "scores"
    treats_equals_equally: ClassVar[bool] = False

    def __init__(
        self,
        reference: str,
        kwargs: Mapping[str, Any],
        gradients: Gradients | None = None,
        comparable: bool = False,
        seed: int = 0,
    ) -> None:
        from torch_pruning.pruner import importance as library

        self.reference, self.seed, self.comparable = reference, seed, comparable
        self.name = short_reference(reference)
        make = import_callable(reference, "Importance")
        hint = _accepted(make) if kwargs else None
        with import_path_of(reference), raise_as(ModelError, f"Importance '{self.name}' must open", hint):
            self._importance = make(**kwargs)
        if not isinstance(self._importance, library.Importance):
            raise ModelError(
                f"Importance '{self.name}' must be a torch_pruning.importance.Importance, got "
                f"{type(self._importance).__name__}.",
                hint="class MyImportance(torch_pruning.importance.Importance): with __call__(self, group)",
            )
        self.gradients: Gradients = gradients or _usual_gradients(self._importance, library)
        self.evidence: Evidence = "weights" if self.gradients == "none" else "parameter_gradients"

    def scores(self, group: ChannelGroup, stats: ParameterGradients | None) -> Tensor:
        """Score each channel of `group` by the user's importance.

        Args:
            group: C coupled channels.
            stats: From `collect_parameter_gradients`; None if no gradients are needed.

        Returns:
            (C,) float32. If scores of groups have no common scale and some are negative, all are shifted so that the
            least is 0, because scores are divided by their mean afterwards.

        Raises:
            ModelError: The importance raises, or returns something else than one number for each channel.
        """
        gradients = _gradients_of(self.name, self.gradients, stats)
        hint = None if gradients else "If it reads .grad, write gradients: mean (or squares) beside torch_pruning."
        with (
            import_path_of(self.reference),
            raise_as(ModelError, f"Importance '{self.name}' must score group '{group.name}'", hint),
        ):
            found = score_group(self._importance, group, gradients, self.seed)
        if not isinstance(found, Tensor) or found.shape != (group.width,) or found.is_complex():
            got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else _kind_of(found)
            raise ModelError(
                f"Importance '{self.name}' must return one score for each of the {group.width} channels of group "
                f"'{group.name}', got {got}.",
                hint="Exclude groups that it cannot score." if found is None else None,
            )
        scores = found.detach().cpu().float()
        return scores - scores.min().clamp(max=0) if not self.comparable else scores


def _accepted(make: Callable[..., Any]) -> str | None:
    """Return in words the names of the keyword arguments that a class takes; None if they are not known."""
    try:
        names = [name for name, one in inspect.signature(make).parameters.items() if one.kind in _BY_NAME]
    except (TypeError, ValueError):  # a class without a signature
        return None
    return f"kwargs of {getattr(make, '__name__', 'it')}: {', '.join(names) or 'none'}."


def _kind_of(value: Any) -> str:
    """Return the name of a value's type; "None" for None."""
    return "None" if value is None else type(value).__name__


def _gradients_of(name: str, kind: Gradients, stats: ParameterGradients | None) -> dict[str, Tensor] | None:
    """Return the gradient in `.grad` for an importance that needs one, None for others."""
    if kind == "none":
        return None
    if stats is None:
        raise InternalError(f"Criterion '{name}' was called without gradients.")
    return stats.mean if kind == "mean" else stats.squares


def _usual_gradients(importance: Any, library: Any) -> Gradients:
    if isinstance(importance, library.GroupHessianImportance):
        return "squares"
    return "mean" if isinstance(importance, library.GroupTaylorImportance) else "none"
