"""Observer of a forward pass: finds which channels of a network's parameters are the same channel.

    axis        the outputs, the inputs, or the scaled channels of one parameter; each position has a label
    label       follows the values from operation to operation (`value_labels.py`)
    fact        two axes meet in an operation: their positions are the same, tied or frozen (`facts.py`)

Operations are observed as PyTorch's dispatcher carries them out, so the style of the network's code does not matter.
Each result is tried on a copy before it is used (`trial.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.cost.macs import COUNTED, find_products
from compress.model.tensors import held_tensors
from compress.onnx_file.counting import is_fixed_weight
from compress.pruning.tracing.call import Call
from compress.pruning.tracing.facts import Facts, where
from compress.pruning.tracing.record import Counted, Trace, vector
from compress.pruning.tracing.value_labels import ValueLabels

_MOST_FACTORS = 2  # numbers of channels that one product's MACs can depend on


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that applies a rule to every operation of a forward pass.

    Args:
        module: The network.
        find_rule: Returns the rule of an operation, from its name and whether it is elementwise.
        paths: Paths of the modules whose code is running, innermost last.

    Attributes:
        trace: Trace with all facts found.
        labels: Channel labels of values.
        facts: Recorder of the facts that an operation reveals.
    """

    def __init__(self, module: nn.Module, find_rule: "Callable[[str, bool], Rule]", paths: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.facts = Facts(self.trace, paths)
        self.labels = ValueLabels(module, self.facts)
        self._find_rule = find_rule
        self._fixed = {id(buffer) for name, buffer in module.named_buffers() if is_fixed_weight(name)}
        self._odd: list[tuple[nn.Module, str]] = []

    @property
    def place(self) -> str:
        """Path of the module whose code is running."""
        return self.facts.place

    def note_output(self, name: str, part: nn.Module, _inputs: object, output: object) -> None:
        """Note the feature map that a module returns; a layer that returns no tensor is remembered as odd."""
        if isinstance(part, COUNTED) and not isinstance(output, Tensor):
            kind = f"{type(part).__name__} returns a {type(output).__name__}"
            self._odd.append((part, f"layer '{name}' is no plain layer: {kind}"))
        if isinstance(output, Tensor) and output.ndim > 2:
            labels = vector(self.labels.of(output), 1, output.shape[1])
            if labels is not None:
                self.trace.maps[name] = labels

    def freeze_odd_layers(self) -> None:
        """Note that layers which return no tensor can lose neither inputs nor outputs."""
        for part, reason in self._odd:
            own = {id(value) for value in held_tensors(part).values()}
            for axis in self.trace.axes:
                if id(axis.tensor) in own:
                    self.facts.freeze(axis.labels, reason)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        call = Call(operation, args, kwargs or {}, result)
        self._find_rule(call.name, torch.Tag.pointwise in operation.tags)(self, call)
        self._count(call)
        return result

    def _count(self, call: Call) -> None:
        """Record the products of an operation, and the channels that their MACs depend on."""
        for product in find_products(call.name, call.arguments, call.result):
            weights = [self.labels.untransposed(one) for one in product.operands]
            if any(id(one) in self._fixed for one in weights):
                continue
            self.trace.multiplied.update(id(one) for one in weights if self.labels.is_known(one))
            found = [_labels_along(self.labels.of(value), axis) for value, axis in product.axes]
            followed = [labels for labels in found if bool((labels >= 0).any())]
            for labels in followed[_MOST_FACTORS:]:
                self.facts.freeze(
                    labels, f"the MACs of {call.name} follow too many numbers of channels, in {where(self.place)}"
                )
            if followed:
                self.trace.counted.append(Counted(self.place, product.macs, tuple(followed[:_MOST_FACTORS])))


Rule = Callable[[Watch, Call], None]


def _labels_along(labels: Tensor, axis: int) -> Tensor:
    """Return (n,) the labels of a value along an axis; (0,) if they do not differ along it."""
    if labels.shape[axis] == 1:
        return torch.empty(0, dtype=torch.int64)
    for other in range(labels.ndim):
        if other != axis:
            labels = labels.narrow(other, 0, 1)
    return labels.flatten()
