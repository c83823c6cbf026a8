"""Which channels of a network's parameters are the same channel? One forward pass is watched, operation by operation.

    axis        the outputs, the inputs, or the scaled channels of one parameter; each of its places has a label
    same        two places that are one channel: the two sides of a sum, a convolution's output and its batch norm
    tied        two places that must go together though they are different channels: position 3 of every part of a
                grouped convolution
    frozen      places that cannot go, with the reason: a softmax over channels, an operation nobody here knows

Operations are followed as PyTorch carries them out (its dispatcher's), so it does not matter how the network's code
says them. Nothing is guessed beyond that: what comes of it is tried on a copy before anything is believed
(`trial.py`).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from compress.cost.macs import eval_mode
from compress.errors import UntraceableModel
from compress.pruning.labels import (
    NONE,
    ZERO,
    along,
    compact,
    is_labelled,
    joined,
    moved,
    of_channels,
    padded,
    unlabelled,
    vector,
)

OUTPUTS = "its channels are the network's outputs"


@dataclass(frozen=True)
class Axis:
    """The outputs ("out"), inputs ("in") or scaled channels ("scale") of a parameter or buffer.

    Attributes:
        tensor: The parameter.
        role: What its places are.
        dim: Which dimension of the tensor holds them.
        size: How many there are; more than the dimension has where a grouped convolution keeps one part's only.
        start: The label of the first.
    """

    tensor: Tensor
    role: str
    dim: int
    size: int
    start: int

    @property
    def labels(self) -> Tensor:
        """(size,) the labels of its places."""
        return torch.arange(self.start, self.start + self.size)

    def slots(self, places: Tensor) -> Tensor:
        """Return the indices along `dim` of the places given by their numbers."""
        return places % self.tensor.shape[self.dim]


@dataclass(frozen=True)
class Sized:
    """Somewhere in a module's code where a number of channels is or may be written down.

    Attributes:
        module: Its path.
        labels: The places whose number it is.
    """

    module: str
    labels: Tensor


@dataclass
class Trace:
    """What one forward pass told.

    Attributes:
        axes: In the order of their labels.
        same: Pairs of labels, each (2, n).
        tied: Likewise.
        frozen: Labels and the reason.
        behind: Weight -> parameter of the norm that its outputs go to directly.
        norm_groups: Module path of each group norm -> labels of the channels it normalises.
        sized: Where numbers of channels may be written down.
    """

    axes: list[Axis] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    tied: list[Tensor] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    behind: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    norm_groups: list[tuple[str, Tensor]] = field(default_factory=list)
    sized: list[Sized] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many labels there are."""
        return self.axes[-1].start + self.axes[-1].size if self.axes else 0


def trace(module: nn.Module, example: Tensor) -> Trace:
    """Watch one forward pass in eval mode; the network is left as it is.

    Args:
        module: Any network on the CPU.
        example: One input, (1, ...).

    Raises:
        UntraceableModel: The forward pass fails.
    """
    watch = _Watch(module)
    try:
        with warnings.catch_warnings(), torch.no_grad(), eval_mode(module), watch.places(), watch:
            warnings.simplefilter("ignore")
            outputs = module(example)
    except Exception as error:  # the user's forward pass raises whatever it raises
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise UntraceableModel(
            f"The network's channels must be followed on one input of shape {tuple(example.shape)}; its forward pass "
            f"gave {type(error).__name__}: {first}"
        ) from error
    for output in tree_leaves(outputs):
        if isinstance(output, Tensor):
            watch.freeze(watch.labels_of(output), OUTPUTS)
    return watch.trace


class _Watch(TorchDispatchMode):
    """Follows labels from operation to operation."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self._module = module
        self._known: dict[int, Tensor] = {id(t): t for t in (*module.parameters(), *module.buffers())}
        self._axes: dict[tuple[int, str, int], Axis] = {}
        self._labels = WeakIdKeyDictionary()
        self._transposed = WeakIdKeyDictionary()
        self._direct = WeakIdKeyDictionary()
        self._path: list[str] = [""]

    @contextmanager
    def places(self) -> Iterator[None]:
        """Keep track of whose code is running."""
        handles = []
        for name, part in self._module.named_modules():
            handles.append(part.register_forward_pre_hook(lambda *_, name=name: self._path.append(name)))
            handles.append(part.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self._path.pop()

    @property
    def place(self) -> str:
        """The path of the module whose code is running."""
        return self._path[-1]

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        call = Call(operation, args, kwargs or {}, result)
        rule = RULES.get(call.name)
        if rule is None:
            rule = _pointwise if torch.Tag.pointwise in operation.tags else _unknown
        rule(self, call)
        return result

    # labels ---------------------------------------------------------------------------------------------------------

    def labels_of(self, value: Tensor) -> Tensor:
        """Return a value's labels; those of a parameter that differs along one dimension are its own."""
        found = self._labels.get(value)
        if found is not None:
            return found  # type: ignore[no-any-return]
        if id(value) in self._known and (dims := [d for d, size in enumerate(value.shape) if size > 1]):
            return self.scale_labels(value, dims[0]) if len(dims) == 1 else unlabelled(value.ndim)
        return unlabelled(value.ndim)

    def scale_labels(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the labels of a parameter that is multiplied with, or added to, channels along `dim`."""
        return along(dim, tensor.ndim, self.axis(tensor, "scale", dim, tensor.shape[dim]).labels)

    def channel_labels(self, tensor: Tensor) -> Tensor | None:
        """Return (C,) the labels of a vector with one value for each channel, such as a bias."""
        if id(tensor) in self._known and tensor.ndim == 1:
            return self.axis(tensor, "scale", 0, tensor.shape[0]).labels
        return vector(self.labels_of(tensor), 0, tensor.shape[0]) if tensor.ndim == 1 else None

    def give(self, value: Any, labels: Tensor) -> None:
        """Note the labels of a result."""
        if isinstance(value, Tensor):
            self._labels[value] = labels

    def is_known(self, value: Any) -> bool:
        """Whether a value is a parameter or a buffer of the network."""
        return isinstance(value, Tensor) and id(value) in self._known

    def is_followed(self, value: Tensor) -> bool:
        """Whether a value came out of an operation that was watched."""
        return value in self._labels

    def axis(self, tensor: Tensor, role: str, dim: int, size: int, parts: int = 1) -> Axis:
        """Return an axis of a parameter, the same at each use.

        Args:
            tensor: The parameter.
            role: "out", "in" or "scale".
            dim: Of the tensor.
            size: Number of places.
            parts: Equal ranges of places that must lose the same positions.
        """
        key = (id(tensor), role, dim)
        if key not in self._axes:
            self._axes[key] = axis = Axis(tensor, role, dim, size, self.trace.size)
            self.trace.axes.append(axis)
            if parts > 1:
                self.tie(axis.labels, axis.start + torch.arange(size) % (size // parts))
        found = self._axes[key]
        if found.size != size:
            self.freeze(found.labels, f"a parameter of it is used in two different ways in {_where(self.place)}")
        return found

    # facts ----------------------------------------------------------------------------------------------------------

    def join(self, one: Tensor, other: Tensor) -> None:
        """Note that two vectors of labels are the same channels, place by place."""
        self.match(one, other)
        reason = f"it meets values that follow no channel, in {_where(self.place)}"
        self.freeze(one[(one >= 0) & (other < 0)], reason)
        self.freeze(other[(one < 0) & (other >= 0)], reason)

    def match(self, one: Tensor, other: Tensor) -> None:
        """Note that places are the same channel, wherever both belong to one."""
        self._pair(self.trace.same, one, other)

    def require(self, own: Tensor, source: Tensor) -> None:
        """Note that each channel of its own must go with the channel it is computed from."""
        self.tie(own, source)
        self.freeze(own[source < 0], f"it is computed from values that follow no channel, in {_where(self.place)}")

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Note that places must go together."""
        self._pair(self.trace.tied, one, other)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Note that channels cannot go."""
        channels = of_channels(labels)
        if len(channels):
            self.trace.frozen.append((channels, reason))

    def mix(self, labels: Tensor, call: "Call") -> None:
        """Note that an operation mixes channels in a way that a cut would change."""
        if is_labelled(labels):
            self.freeze(labels, f"its channels are mixed by '{call.name}' in {_where(self.place)}")

    def note_size(self, labels: Tensor) -> None:
        """Note that the code that runs may have a number of channels written down."""
        self.trace.sized.append(Sized(self.place, of_channels(labels)))

    def note_direct(self, value: Tensor, weight: Tensor) -> None:
        """Note what a layer's output is."""
        self._direct[value] = weight

    def note_norm(self, value: Tensor, parameter: Tensor) -> None:
        """Note that a norm reads a value."""
        weight = self._direct.get(value)
        if weight is not None:
            self.trace.behind.append((weight, parameter))

    def note_transposed(self, value: Tensor, weight: Tensor) -> None:
        """Note that a value is a parameter, transposed."""
        self._transposed[value] = weight

    def weight_behind(self, value: Tensor) -> tuple[Tensor, int, int] | None:
        """Return the parameter that a matrix product's right side is, with the dimensions of its outputs and inputs."""
        if value in self._transposed:
            return self._transposed[value], 0, 1
        return (value, 1, 0) if self.is_known(value) else None

    def _pair(self, pairs: list[Tensor], one: Tensor, other: Tensor) -> None:
        chosen = (one >= 0) & (other >= 0) & (one != other)
        if bool(chosen.any()):
            pairs.append(torch.stack([one[chosen], other[chosen]]))


class Call:
    """One operation with its arguments by name.

    Attributes:
        name: Such as "convolution" or "add_".
        arguments: By name; those not given are absent.
        result: What it returned.
        repeat: Carries the operation out again on something else in the place of its first argument.
    """

    def __init__(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.name = operation._schema.name.split("::")[-1]
        names = [argument.name for argument in operation._schema.arguments]
        self.arguments: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        self.result = result
        self._operation, self._args, self._kwargs = operation, args, kwargs

    def repeat(self, first: Tensor) -> Any:
        """Carry the operation out with another first argument."""
        return self._operation(first, *self._args[1:], **self._kwargs)

    def get(self, *names: str) -> Any:
        """Return the first of these arguments that is there and not None."""
        return next((self.arguments[name] for name in names if self.arguments.get(name) is not None), None)

    @property
    def first(self) -> Tensor:
        """The first argument."""
        value = self._args[0]
        assert isinstance(value, Tensor)
        return value

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [value for value in tree_leaves((self._args, self._kwargs)) if isinstance(value, Tensor)]

    @property
    def outputs(self) -> list[Tensor]:
        """All tensors among the results."""
        return [value for value in tree_leaves(self.result) if isinstance(value, Tensor)]


Rule = Callable[[_Watch, Call], None]


def _where(place: str) -> str:
    return f"'{place}'" if place else "the network's own forward pass"


# layers -------------------------------------------------------------------------------------------------------------


def _convolution(watch: _Watch, call: Call) -> None:
    value, weight = call.arguments["input"], call.arguments["weight"]
    parts, transposed = int(call.arguments["groups"]), bool(call.arguments["transposed"])
    labels = watch.labels_of(value)
    inputs = vector(labels, 1, value.shape[1])
    outputs = int(call.result.shape[1])
    if inputs is None:
        watch.mix(labels, call)
        inputs = torch.full((value.shape[1],), NONE)
    is_each_alone = parts > 1 and parts == value.shape[1]
    if not watch.is_known(weight):
        _convolution_with_computed_weight(watch, call, inputs, is_each_alone and outputs == parts)
        return
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    if is_each_alone and outputs == parts:
        own = watch.axis(weight, "scale", 0, parts).labels
        watch.join(own, inputs)
    elif is_each_alone and not transposed:
        own = watch.axis(weight, "out", 0, outputs).labels
        watch.require(own, inputs.repeat_interleave(outputs // parts))
    else:
        read = watch.axis(weight, "in", in_dim, value.shape[1], parts)
        watch.join(read.labels, inputs)
        own = watch.axis(weight, "out", out_dim, outputs, parts).labels
        watch.note_direct(call.result, weight)
    _add_bias(watch, call.get("bias"), own)
    watch.give(call.result, along(1, call.result.ndim, own))


def _convolution_with_computed_weight(watch: _Watch, call: Call, inputs: Tensor, passes_on: bool) -> None:
    """A depthwise convolution with a weight that is the same for all channels passes them on; others mix them."""
    weight = call.arguments["weight"]
    own = watch.labels_of(weight)
    along_outputs = vector(own, 0, weight.shape[0])
    if passes_on and along_outputs is not None:
        if is_labelled(own):
            watch.join(along_outputs, inputs)
        watch.give(call.result, along(1, call.result.ndim, inputs))
        return
    watch.mix(inputs, call)
    watch.mix(own, call)
    watch.give(call.result, unlabelled(call.result.ndim))


def _add_bias(watch: _Watch, bias: Tensor | None, labels: Tensor) -> None:
    if bias is not None:
        own = watch.channel_labels(bias)
        if own is None or len(own) != len(labels):
            watch.freeze(labels, f"what is added to it follows no channel, in {_where(watch.place)}")
        else:
            watch.join(own, labels)


def _matrix_product(watch: _Watch, call: Call) -> None:
    value, right = call.get("mat1", "self"), call.arguments["mat2"]
    if call.name == "addmm":
        value = call.arguments["mat1"]
    labels = watch.labels_of(value)
    found = watch.weight_behind(right)
    inputs = vector(labels, 1, value.shape[1])
    if found is None or inputs is None:
        for tensor in call.tensors:
            watch.mix(watch.labels_of(tensor), call)
        if found is None:
            watch.give(call.result, unlabelled(2))
            return
        inputs = torch.full((value.shape[1],), NONE)
    weight, out_dim, in_dim = found
    read = watch.axis(weight, "in", in_dim, weight.shape[in_dim])
    watch.join(read.labels, inputs)
    outputs = watch.axis(weight, "out", out_dim, weight.shape[out_dim]).labels
    if call.name == "addmm":
        _add_bias(watch, call.arguments["self"], outputs)
    watch.note_direct(call.result, weight)
    watch.give(call.result, along(1, 2, outputs))


def _transpose_matrix(watch: _Watch, call: Call) -> None:
    if watch.is_known(call.first) and call.first.ndim == 2:
        watch.note_transposed(call.result, call.first)
        watch.give(call.result, unlabelled(2))
    else:
        _move(watch, call)


def _batch_norm(watch: _Watch, call: Call) -> None:
    value = call.arguments["input"]
    labels = watch.labels_of(value)
    channels = vector(labels, 1, value.shape[1])
    own = [t for name in ("weight", "bias", "running_mean", "running_var") if (t := call.get(name)) is not None]
    if channels is None:
        watch.mix(labels, call)
    else:
        for tensor in own:
            along_channels = watch.channel_labels(tensor)
            if along_channels is not None:
                watch.join(along_channels, channels)
        if own:
            watch.note_norm(value, own[0])
    _give_all(watch, call, labels)


def _group_norm(watch: _Watch, call: Call) -> None:
    value, parts = call.arguments["input"], int(call.arguments["group"])
    labels = watch.labels_of(value)
    channels = vector(labels, 1, value.shape[1])
    if channels is None:
        watch.mix(labels, call)
    else:
        size = len(channels) // parts
        watch.tie(channels, channels.reshape(parts, size)[:, :1].expand(parts, size).flatten())
        for name in ("weight", "bias"):
            if (tensor := call.get(name)) is not None:
                own = watch.channel_labels(tensor)
                if own is not None:
                    watch.join(own, channels)
        watch.trace.norm_groups.append((watch.place, channels))
        if (weight := call.get("weight")) is not None:
            watch.note_norm(value, weight)
    watch.give(call.outputs[0], labels)


def _layer_norm(watch: _Watch, call: Call) -> None:
    value = call.arguments["input"]
    labels = watch.labels_of(value)
    if any(size > 1 for size in labels.shape[-len(call.arguments["normalized_shape"]) :]):
        watch.freeze(labels, f"a layer norm's statistics are over its channels, in {_where(watch.place)}")
    watch.give(call.outputs[0], labels)


# values that keep their place ---------------------------------------------------------------------------------------


def _pointwise(watch: _Watch, call: Call) -> None:
    tensors = [tensor for tensor in call.tensors if tensor.numel() > 1 or watch.is_followed(tensor)]
    if not tensors or not call.outputs:
        return
    ndim = max(tensor.ndim for tensor in tensors)
    shapes = [[*[1] * (ndim - tensor.ndim), *tensor.shape] for tensor in tensors]
    labels = [padded(watch.labels_of(tensor), ndim) for tensor in tensors]
    _label_whole_parameters(watch, tensors, labels)
    result = labels[0]
    seen = shapes[0]
    for one, shape in zip(labels[1:], shapes[1:], strict=True):
        result = _met(watch, result, seen, one, shape)
        seen = [max(a, b) for a, b in zip(seen, shape, strict=True)]
    for output in call.outputs:
        watch.give(output, result if output.ndim == ndim else unlabelled(output.ndim))


def _label_whole_parameters(watch: _Watch, tensors: Sequence[Tensor], labels: list[Tensor]) -> None:
    """Label a parameter with several dimensions along the one along which the others have channels."""
    dims = {dim for one in labels if is_labelled(one) for dim, size in enumerate(one.shape) if size > 1}
    if len(dims) != 1:
        return
    (dim,) = dims
    for position, tensor in enumerate(tensors):
        own = dim - (labels[position].ndim - tensor.ndim)
        if watch.is_known(tensor) and not is_labelled(labels[position]) and own >= 0 and tensor.shape[own] > 1:
            labels[position] = padded(watch.scale_labels(tensor, own), labels[position].ndim)


def _met(watch: _Watch, one: Tensor, one_shape: Sequence[int], other: Tensor, other_shape: Sequence[int]) -> Tensor:
    """Return the labels of two values that meet place by place, and note which channels are the same."""
    whole_one, whole_other = torch.broadcast_tensors(one, other)
    watch.match(whole_one, whole_other)
    for mine, yours, labels, shape in (
        (whole_one, whole_other, one, other_shape),
        (whole_other, whole_one, other, one_shape),
    ):
        varies = [dim for dim, size in enumerate(labels.shape) if size > 1]
        if any(shape[dim] > 1 for dim in varies):
            where = _where(watch.place)
            watch.freeze(mine[(mine >= 0) & (yours == NONE)], f"it meets values that follow no channel, in {where}")
            watch.freeze(mine[(mine >= 0) & (yours == ZERO)], f"it meets channels padded with zeros, in {where}")
    return torch.where(whole_one >= 0, whole_one, torch.where(whole_other >= 0, whole_other, whole_one))


def _keep(watch: _Watch, call: Call) -> None:
    """The result has the shape and the channels of the first argument."""
    _give_all(watch, call, watch.labels_of(call.first))


def _give_all(watch: _Watch, call: Call, labels: Tensor) -> None:
    for output in call.outputs:
        watch.give(output, labels if output.ndim == labels.ndim else unlabelled(output.ndim))


def _spatial(count: int) -> Rule:
    """Return the rule of an operation along the last `count` axes that keeps all others."""

    def rule(watch: _Watch, call: Call) -> None:
        labels = watch.labels_of(call.first)
        if any(size > 1 for size in labels.shape[-count:]):
            watch.mix(labels, call)
            labels = unlabelled(labels.ndim)
        _give_all(watch, call, labels)

    return rule


def _reduce(watch: _Watch, call: Call) -> None:
    if isinstance(call.arguments.get("other"), Tensor):  # the larger of two values, place by place
        _pointwise(watch, call)
        return
    value = call.first
    labels = watch.labels_of(value)
    dims = call.get("dim")
    chosen = range(value.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    axes = {dim % value.ndim for dim in chosen} if value.ndim else set()
    if any(labels.shape[axis] > 1 for axis in axes):
        watch.mix(labels, call)
        labels = unlabelled(labels.ndim)
    kept = [axis for axis in range(labels.ndim) if axis not in axes or call.arguments.get("keepdim")]
    reduced = labels.reshape([labels.shape[axis] for axis in kept])
    for output in call.outputs:
        watch.give(output, reduced if output.ndim == reduced.ndim else unlabelled(output.ndim))


def _over(watch: _Watch, call: Call) -> None:
    """A softmax, a sorting or a running sum: keeps the shape, mixes along one axis."""
    labels = watch.labels_of(call.first)
    if call.first.ndim and labels.shape[int(call.arguments.get("dim", -1))] > 1:
        watch.mix(labels, call)
    _give_all(watch, call, labels)


# values that change their place -------------------------------------------------------------------------------------


def _move(watch: _Watch, call: Call) -> None:
    labels = watch.labels_of(call.first)
    results = call.outputs
    if not is_labelled(labels):
        for output in results:
            watch.give(output, unlabelled(output.ndim))
        return
    found = call.repeat(labels.expand(call.first.shape))
    for output, one in zip(results, [found] if isinstance(found, Tensor) else found, strict=True):
        watch.give(output, compact(one))


def _permute(watch: _Watch, call: Call) -> None:
    watch.give(call.result, call.repeat(watch.labels_of(call.first)))


def _view(watch: _Watch, call: Call) -> None:
    labels = watch.labels_of(call.first)
    if not is_labelled(labels):
        watch.give(call.result, unlabelled(call.result.ndim))
        return
    result = moved(lambda whole: whole.reshape(call.result.shape), labels, call.first.shape)
    watch.give(call.result, result)
    watch.note_size(labels)
    dims = [dim for dim, size in enumerate(result.shape) if size > 1]
    if len(dims) > 1 and sum(size > 1 for size in labels.shape) < len(dims):
        # one axis became several: all but the longest are taken to keep their sizes when channels go
        longest = max(dims, key=lambda dim: (result.shape[dim], dim))
        first = result
        for dim in dims:
            if dim != longest:
                first = first.narrow(dim, 0, 1)
        watch.tie(result, first.expand(result.shape))
        watch.note_size(first)
        return
    watch.note_size(result)


def _take(watch: _Watch, call: Call) -> None:
    """A slice: equal shares of the channels must lose the same positions."""
    labels, value = watch.labels_of(call.first), call.first
    dim = int(call.arguments.get("dim", 0)) % value.ndim
    if not is_labelled(labels) or labels.shape[dim] == 1:
        watch.give(call.result, labels)
        return
    size, step = value.shape[dim], int(call.arguments.get("step", 1))
    start = int(call.get("start") or 0)
    share = step if step > 1 else call.result.shape[dim]
    watch.give(call.result, compact(call.repeat(labels)))
    if share < size and size % share == 0 and (step > 1 or start % share == 0):
        _tie_shares(watch, labels, dim, step if step > 1 else size // share, is_strided=step > 1)
    watch.note_size(watch.labels_of(call.result))


def _tie_shares(watch: _Watch, labels: Tensor, dim: int, shares: int, is_strided: bool) -> None:
    """Tie the places at the same position of each of a number of equal shares along an axis."""
    each = labels.shape[dim] // shares
    shape = (each, shares) if is_strided else (shares, each)
    parts = labels.unflatten(dim, shape)
    axis = dim + 1 if is_strided else dim
    watch.tie(parts, parts.narrow(axis, 0, 1).expand(parts.shape))


def _select(watch: _Watch, call: Call) -> None:
    labels, value = watch.labels_of(call.first), call.first
    dim = int(call.arguments.get("dim", 0)) % value.ndim
    watch.give(call.result, labels.squeeze(dim) if labels.shape[dim] == 1 else compact(call.repeat(labels)))


def _split(watch: _Watch, call: Call) -> None:
    labels, value = watch.labels_of(call.first), call.first
    dim = int(call.arguments.get("dim", 0)) % value.ndim
    pieces = call.outputs
    if labels.shape[dim] == 1:
        for piece in pieces:
            watch.give(piece, labels)
        return
    sizes = [piece.shape[dim] for piece in pieces]
    for piece, one in zip(pieces, labels.split(sizes, dim), strict=True):
        watch.give(piece, compact(one))
        watch.note_size(one)
    if len(set(sizes)) == 1 and len(sizes) > 1:
        _tie_shares(watch, labels, dim, len(sizes), is_strided=False)


def _unbind(watch: _Watch, call: Call) -> None:
    labels = watch.labels_of(call.first)
    dim = int(call.arguments.get("dim", 0)) % call.first.ndim
    for position, piece in enumerate(call.outputs):
        watch.give(piece, compact(labels.select(dim, position if labels.shape[dim] > 1 else 0)))


def _squeeze(watch: _Watch, call: Call) -> None:
    watch.give(call.result, watch.labels_of(call.first).reshape(_without_ones(watch.labels_of(call.first), call)))


def _without_ones(labels: Tensor, call: Call) -> list[int]:
    """Return the sizes of the labels along the axes that a squeeze leaves."""
    value = call.first
    dims = call.get("dim")
    chosen = range(value.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % value.ndim for dim in chosen if value.shape[dim] == 1} if value.ndim else set()
    return [size for axis, size in enumerate(labels.shape) if axis not in gone]


def _unsqueeze(watch: _Watch, call: Call) -> None:
    watch.give(call.result, call.repeat(watch.labels_of(call.first)))


def _expand(watch: _Watch, call: Call) -> None:
    watch.give(call.result, padded(watch.labels_of(call.first), call.result.ndim))


def _cat(watch: _Watch, call: Call) -> None:
    tensors = [t for t in call.arguments["tensors"] if t.numel() or t.ndim > 1]
    dim = int(call.arguments.get("dim", 0)) % call.result.ndim
    labels = [watch.labels_of(tensor) for tensor in tensors]
    if not any(is_labelled(one) for one in labels):
        watch.give(call.result, unlabelled(call.result.ndim))
        return
    if any(one.shape[dim] > 1 or tensor.shape[dim] == 1 for one, tensor in zip(labels, tensors, strict=True)
           if is_labelled(one)):
        watch.give(call.result, joined(labels, [tensor.shape[dim] for tensor in tensors], dim))
        return
    result, seen = labels[0], list(tensors[0].shape)  # side by side along another axis: the channels are the same
    for one, tensor in zip(labels[1:], tensors[1:], strict=True):
        result = _met(watch, result, seen, one, tensor.shape)
    watch.give(call.result, result)


def _stack(watch: _Watch, call: Call) -> None:
    tensors = call.arguments["tensors"]
    dim = int(call.arguments.get("dim", 0)) % call.result.ndim
    labels = [watch.labels_of(tensor).unsqueeze(dim) for tensor in tensors]
    for one in labels[1:]:
        if one.shape == labels[0].shape:
            watch.match(one, labels[0])
        else:
            watch.mix(one, call)
            watch.mix(labels[0], call)
    watch.give(call.result, labels[0])


def _pad(watch: _Watch, call: Call) -> None:
    labels, amounts = watch.labels_of(call.first), [int(amount) for amount in call.arguments["pad"]]
    if not is_labelled(labels):
        watch.give(call.result, unlabelled(call.result.ndim))
        return
    fill = ZERO if float(call.arguments.get("value", 0)) == 0 else NONE
    for position in range(0, len(amounts), 2):
        dim = labels.ndim - 1 - position // 2
        before, after = amounts[position : position + 2]
        if labels.shape[dim] > 1 and (before or after):
            pads = [0] * (2 * (labels.ndim - dim - 1)) + [before, after]
            labels = torch.nn.functional.pad(labels, pads, value=fill)
    watch.give(call.result, labels)


def _index(watch: _Watch, call: Call) -> None:
    """Indexing with tensors: fixed positions among channels cannot follow a cut."""
    labels, value = watch.labels_of(call.first), call.first
    places = call.get("indices", "index")
    dims = (
        [dim for dim, index in enumerate(places) if index is not None]
        if isinstance(places, (list, tuple))
        else [int(call.arguments["dim"]) % value.ndim]
    )
    if any(dim < labels.ndim and labels.shape[dim] > 1 for dim in dims):
        watch.freeze(labels, f"its channels are picked by fixed positions in {_where(watch.place)}")
    _move(watch, call)


def _columns(watch: _Watch, call: Call) -> None:
    """The places under a kernel, as channels."""
    labels = watch.labels_of(call.first)
    channels = vector(labels, 1, call.first.shape[1])
    if channels is None:
        watch.mix(labels, call)
        watch.give(call.result, unlabelled(call.result.ndim))
        return
    each = call.result.shape[1] // len(channels)
    watch.give(call.result, along(1, call.result.ndim, channels.repeat_interleave(each)))


def _copy(watch: _Watch, call: Call) -> None:
    """Values written into a part of another tensor: what the rest of it holds is not followed."""
    for tensor in call.tensors:
        labels = watch.labels_of(tensor)
        watch.freeze(labels, f"it is written into another tensor in {_where(watch.place)}")


def _create(watch: _Watch, call: Call) -> None:
    for output in call.outputs:
        watch.give(output, unlabelled(output.ndim))


def _unknown(watch: _Watch, call: Call) -> None:
    for tensor in call.tensors:
        watch.mix(watch.labels_of(tensor), call)
    for output in call.outputs:
        watch.give(output, unlabelled(output.ndim))


def _rules() -> dict[str, Rule]:
    table: dict[Rule, str] = {
        _convolution: "convolution",
        _matrix_product: "mm addmm",
        _transpose_matrix: "t",
        _batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm",
        _group_norm: "native_group_norm",
        _layer_norm: "native_layer_norm",
        _pointwise: "_prelu_kernel prelu hardswish hardswish_ hardtanh hardtanh_ leaky_relu leaky_relu_ glu_jvp "
        "log_sigmoid_forward rrelu_with_noise native_dropout elu elu_ celu celu_ selu selu_ softplus hardsigmoid "
        "hardsigmoid_ hardshrink softshrink mish mish_ silu silu_ relu6 threshold threshold_ gelu gelu_ where addcmul",
        _keep: "clone alias detach detach_ lift_fresh lift_fresh_copy _to_copy contiguous zeros_like ones_like empty_like "
        "full_like rand_like randn_like bernoulli bernoulli_ dropout zero_ fill_ _reshape_alias_copy",
        _reduce: "mean sum amax amin max min var std var_mean std_mean prod linalg_vector_norm norm logsumexp argmax "
        "argmin any all median count_nonzero",
        _over: "_softmax _log_softmax softmax log_softmax cumsum cumprod sort topk",
        _move: "repeat flip roll pixel_shuffle pixel_unshuffle channel_shuffle repeat_interleave "
        "native_channel_shuffle unfold as_strided diagonal triu tril",
        _permute: "permute transpose movedim swapaxes transpose_",
        _view: "view _unsafe_view reshape _reshape_alias view_copy",
        _take: "slice",
        _select: "select",
        _split: "split split_with_sizes chunk unsafe_split unsafe_split_with_sizes unsafe_chunk",
        _unbind: "unbind",
        _squeeze: "squeeze squeeze_",
        _unsqueeze: "unsqueeze unsqueeze_",
        _expand: "expand",
        _cat: "cat",
        _stack: "stack",
        _pad: "constant_pad_nd",
        _index: "index index_select gather",
        _columns: "im2col",
        _copy: "copy_ index_put_ scatter_ masked_fill_ index_copy_ slice_scatter",
        _create: "empty zeros ones full arange new_zeros new_ones new_full new_empty empty_strided scalar_tensor "
        "linspace rand randn eye",
    }
    found = {name: rule for rule, names in table.items() for name in names.split()}
    for count in (1, 2, 3):
        rule = _spatial(count)
        found |= {
            f"{name}{count}d{suffix}": rule
            for name, suffix in (
                ("max_pool", "_with_indices"),
                ("max_pool", ""),
                ("avg_pool", ""),
                ("_adaptive_avg_pool", ""),
                ("adaptive_avg_pool", ""),
                ("adaptive_max_pool", ""),
                ("fractional_max_pool", ""),
                ("upsample_nearest", ""),
                ("_upsample_nearest_exact", ""),
                ("reflection_pad", ""),
                ("replication_pad", ""),
            )
        }
    two = _spatial(2)
    found |= dict.fromkeys(
        "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d "
        "roi_align roi_pool".split(),
        two,
    )
    found |= {"upsample_linear1d": _spatial(1), "upsample_trilinear3d": _spatial(3), "grid_sampler_3d": _spatial(3)}
    return found


RULES = _rules()
