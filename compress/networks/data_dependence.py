"""What does a network do that a fixed graph cannot: draw random numbers, decide by the values of its input?

One run is watched operator by operator. A tensor that was computed from the input is followed, so that a decision by a
constant (a flag in a buffer) is not taken for one by the image.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(slots=True)
class Observed:
    """What was seen, each as "layer (Class): operator", in the order of the run.

    Attributes:
        random: Random numbers were drawn.
        decisions: A value that depends on the input became a number of Python, or decided the shape of a tensor.
    """

    random: list[str] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)


def observe(module: nn.Module, *inputs: Tensor) -> Observed:
    """Run a network once, without gradients, and return what was seen; random state is left as it is.

    Args:
        module: Any network; training flags stay as they are.
        inputs: What it is called with.

    Raises:
        Whatever the network raises.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _watch(module) as watch:
        watch.follow(inputs)
        with watch:
            module(*inputs)
    return watch.seen


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Observed()
        self.place = [""]
        self._from_input: Any = WeakIdKeyDictionary()

    def follow(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._from_input[value] = True

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        depends = any(value in self._from_input for value in given)
        name = operator.overloadpacket.__name__.strip("_")
        if torch.Tag.nondeterministic_seeded in operator.tags:
            _add(self.seen.random, f"{self.place[-1]}: {name}")
        if depends and {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operator.tags):
            _add(self.seen.decisions, f"{self.place[-1]}: {name}")
        result = operator(*args, **(kwargs or {}))
        if depends:
            self.follow(tree_leaves(result))
        return result


@contextmanager
def _watch(module: nn.Module) -> Iterator[_Watch]:
    """Give a mode that knows which layer is at work."""
    watch = _Watch()
    handles = []
    for name, part in module.named_modules():
        place = f"'{name}' ({type(part).__name__})" if name else f"the network itself ({type(part).__name__})"
        handles.append(part.register_forward_pre_hook(lambda *_, place=place: watch.place.append(place)))
        handles.append(part.register_forward_hook(lambda *_: (watch.place.pop(), None)[1], always_call=True))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _add(found: list[str], entry: str) -> None:
    if entry not in found:
        found.append(entry)
