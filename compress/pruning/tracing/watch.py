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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from compress.cost.macs import COUNTED, find_products
from compress.model.tensors import attribute_names, held_tensors
from compress.onnx_file.counting import is_fixed_weight
from compress.pruning.tracing.record import (
    Axis,
    Counted,
    Shaped,
    Sized,
    Trace,
    along,
    is_labelled,
    of_channels,
    unlabelled,
    vector,
)

_MOST_FACTORS = 2  # numbers of channels that one product's MACs can follow


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows labels from operation to operation.

    Args:
        module: The network whose forward pass is watched.
        find_rule: Returns what is done about an operation, by its name and whether it is one for each value alone.
    """

    def __init__(self, module: nn.Module, find_rule: "Callable[[str, bool], Rule]") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self._find_rule = find_rule
        self._module = module
        self._known = {id(value): value for part in module.modules() for value in held_tensors(part).values()}
        self._attributes = attribute_names(module)
        self._fixed = {id(buffer) for name, buffer in module.named_buffers() if is_fixed_weight(name)}
        self._axes: dict[tuple[int, str, int], Axis] = {}
        self._labels = WeakIdKeyDictionary()
        self._transposed = WeakIdKeyDictionary()
        self._direct = WeakIdKeyDictionary()
        self._path: list[str] = [""]
        self._odd: list[tuple[nn.Module, str]] = []

    @contextmanager
    def places(self) -> Iterator[None]:
        """Keep track of whose code is running."""
        handles = []
        for name, part in self._module.named_modules():
            handles.append(part.register_forward_pre_hook(lambda *_, name=name: self._path.append(name)))
            leave = partial(self._leave, name)
            handles.append(part.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, name: str, part: nn.Module, _inputs: object, output: object) -> None:
        self._path.pop()
        if isinstance(part, COUNTED) and not isinstance(output, Tensor):
            kind = f"{type(part).__name__} returns a {type(output).__name__}"
            self._odd.append((part, f"layer '{name}' is no plain layer: {kind}"))
        if isinstance(output, Tensor) and output.ndim > 2:
            labels = vector(self.labels_of(output), 1, output.shape[1])
            if labels is not None:
                self.trace.maps[name] = labels

    def freeze_odd_layers(self) -> None:
        """Note that layers which return something else than a tensor can lose neither inputs nor outputs."""
        for part, reason in self._odd:
            own = {id(value) for value in held_tensors(part).values()}
            for axis in self.trace.axes:
                if id(axis.tensor) in own:
                    self.freeze(axis.labels, reason)

    def name_of(self, value: Tensor) -> str:
        """Return how messages name a value that belongs to no channel: by its attribute where it is one."""
        place = self._attributes.get(id(value))
        return f"attribute '{place}'" if place else "values that follow no channel"

    @property
    def place(self) -> str:
        """The path of the module whose code is running."""
        return self._path[-1]

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        call = Call(operation, args, kwargs or {}, result)
        self._find_rule(call.name, torch.Tag.pointwise in operation.tags)(self, call)
        self._count(call)
        return result

    def _count(self, call: "Call") -> None:
        """Note the products of an operation, and which numbers of channels their MACs follow."""
        for product in find_products(call.name, call.arguments, call.result):
            weights = [self._transposed.get(one, one) for one in product.operands]  # type: ignore[no-untyped-call]
            if any(id(one) in self._fixed for one in weights):
                continue
            self.trace.multiplied.update(id(one) for one in weights if self.is_known(one))
            found = [self._labels_along(value, axis) for value, axis in product.axes]
            followed = [labels for labels in found if bool((labels >= 0).any())]
            for labels in followed[_MOST_FACTORS:]:
                self.freeze(
                    labels, f"the MACs of {call.name} follow too many numbers of channels, in {where(self.place)}"
                )
            if followed:
                self.trace.counted.append(Counted(self.place, product.macs, tuple(followed[:_MOST_FACTORS])))

    def _labels_along(self, value: Tensor, axis: int) -> Tensor:
        """Return (n,) the labels of the places along an axis of a value, (0,) where they do not differ along it."""
        labels = self.labels_of(value)
        if labels.shape[axis] == 1:
            return torch.empty(0, dtype=torch.int64)
        for other in range(labels.ndim):
            if other != axis:
                labels = labels.narrow(other, 0, 1)
        return labels.flatten()

    # labels ---------------------------------------------------------------------------------------------------------

    def labels_of(self, value: Tensor) -> Tensor:
        """Return a value's labels; those of a parameter that differs along one dimension are its own."""
        found = self._labels.get(value)  # type: ignore[no-untyped-call]
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
        """Whether a value is a parameter, a buffer or a plain tensor of the network."""
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
            for (of, _, along_dim), other in list(self._axes.items()):
                if (of, along_dim) == (id(tensor), dim) and other is not axis:
                    self._share(axis, other)
        found = self._axes[key]
        if found.size != size:
            self.freeze(found.labels, f"a parameter of it is used in two different ways in {where(self.place)}")
        return found

    def _share(self, one: Axis, other: Axis) -> None:
        """Note that a dimension of a parameter is used in two ways: its places go together, or not at all."""
        if one.size == other.size:
            self.match(one.labels, other.labels)
            return
        for axis in (one, other):
            self.freeze(axis.labels, f"a parameter of it is used in two different ways in {where(self.place)}")

    # facts ----------------------------------------------------------------------------------------------------------

    def join(self, one: Tensor, other: Tensor) -> None:
        """Note that two vectors of labels are the same channels, place by place."""
        self.match(one, other)
        reason = f"it meets values that follow no channel, in {where(self.place)}"
        self.freeze(one[(one >= 0) & (other < 0)], reason)
        self.freeze(other[(one < 0) & (other >= 0)], reason)

    def match(self, one: Tensor, other: Tensor) -> None:
        """Note that places are the same channel, wherever both belong to one."""
        self._pair(self.trace.same, one, other)

    def require(self, own: Tensor, source: Tensor) -> None:
        """Note that each channel of its own must go with the channel it is computed from."""
        self.tie(own, source)
        self.freeze(own[source < 0], f"it is computed from values that follow no channel, in {where(self.place)}")

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Note that places must go together."""
        self._pair(self.trace.tied, one, other)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Note that channels cannot go."""
        channels = of_channels(labels)
        if len(channels):
            self.trace.frozen.append((channels, reason))

    def channels_of(self, labels: Tensor, size: int) -> Tensor | None:
        """Return (size,) the labels along axis 1, or None where they differ along other axes only.

        Places that differ along other axes as well (a vector that was reshaped to a feature map) must go together.
        """
        if labels.shape[1] == 1 or labels.numel() == labels.shape[1]:
            return vector(labels, 1, size)
        first = labels
        for axis in range(labels.ndim):
            first = first if axis == 1 else first.narrow(axis, 0, 1)
        self.tie(labels, first.expand(labels.shape))
        return first.flatten()

    def mix(self, labels: Tensor, call: "Call") -> None:
        """Note that an operation mixes channels in a way that a cut would change."""
        if is_labelled(labels):
            self.freeze(labels, f"its channels are mixed by '{call.name}' in {where(self.place)}")

    def note_size(self, *labels: Tensor) -> None:
        """Note that the code that runs may have numbers of channels written down."""
        self.trace.sized.append(Sized(self.place, tuple(of_channels(one) for one in labels)))

    def note_shape(self, labels: Tensor, shape: Sequence[int], dim: int) -> None:
        """Note that the code that runs may have the sizes of a value written down, one of which follows its channels.

        Args:
            labels: The channels along `dim`.
            shape: Of the value.
            dim: The axis whose size goes down with its channels.
        """
        self.trace.shaped.append(Shaped(self.place, tuple(shape), dim, of_channels(labels)))

    def note_direct(self, value: Tensor, weight: Tensor) -> None:
        """Note what a layer's output is."""
        self._direct[value] = (weight, self.place)

    def note_norm(self, value: Tensor, parameter: Tensor) -> None:
        """Note that a norm reads a value."""
        found = self._direct.get(value)  # type: ignore[no-untyped-call]
        if found is not None:
            self.trace.behind.append((found, (parameter, self.place)))

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


Rule = Callable[[Watch, Call], None]


def where(place: str) -> str:
    """Return a module's path as messages name it."""
    return f"'{place}'" if place else "the network's own forward pass"
