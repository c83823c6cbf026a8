"""Units of a network that can be run alone: residual blocks, and chunks of plain chains of layers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.cost.macs import COUNTED
from compress.model.modes import hooked

MOST_LAYERS = 16
CHUNK_LAYERS = 3


@dataclass(frozen=True)
class Unit:
    """One module, or consecutive modules of an `nn.Sequential`, that takes one tensor and returns one.

    Attributes:
        name: Module paths of the first and the last module; of the one module otherwise.
        modules: Module paths, in the order of their calls.
    """

    name: str
    modules: tuple[str, ...]

    @property
    def first(self) -> str:
        """Path of the module that takes the input."""
        return self.modules[0]

    @property
    def last(self) -> str:
        """Path of the module that returns the output."""
        return self.modules[-1]

    def is_in(self, network: nn.Module) -> bool:
        """Return whether a network has all modules of the unit."""
        names = dict(network.named_modules())
        return all(path in names for path in self.modules)

    def shares_any(self, shared: Iterable[str]) -> bool:
        """Return whether any of the module paths in `shared` is in the unit."""
        return any(name == path or name.startswith(f"{path}.") for name in shared for path in self.modules)

    def build(self, network: nn.Module) -> nn.Module:
        """Return one module that runs the unit, with the modules of the network."""
        parts = [network.get_submodule(path) for path in self.modules]
        return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def find_units(network: nn.Module, example: Tensor) -> list[Unit]:
    """Return the units of a network in the order in which a forward pass enters them.

    A module is a unit if it is called once, with one tensor, returns one tensor, and has at most `MOST_LAYERS`
    convolutions and linear layers. An `nn.Sequential` is divided into its children; consecutive single layers in it
    become chunks of `CHUNK_LAYERS` convolutions and linear layers. A larger module is divided likewise.

    Args:
        network: A network in eval mode; left unchanged.
        example: One input, (1, ...).
    """
    calls = _Calls(network, example)
    units = list(_units(network, "", calls))
    return sorted(units, key=lambda unit: calls.order[unit.first])


class _Calls:
    """Modules that a forward pass calls once with one tensor and that return one tensor."""

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        self.order: dict[str, int] = {}
        counts: dict[str, int] = {}
        is_plain: dict[str, bool] = {}

        def before(name: str):  # type: ignore[no-untyped-def]
            def hook(_part: nn.Module, _inputs: tuple[object, ...]) -> None:
                counts[name] = counts.get(name, 0) + 1
                self.order.setdefault(name, len(self.order))

            return hook

        def after(name: str):  # type: ignore[no-untyped-def]
            def hook(_part: nn.Module, inputs: tuple[object, ...], output: object) -> None:
                is_plain[name] = len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)

            return hook

        parts = [(name, part) for name, part in network.named_modules() if name]
        with (
            hooked(before=[(part, before(name)) for name, part in parts]),
            hooked(after=[(part, after(name)) for name, part in parts]),
            torch.no_grad(),
        ):
            network(example)
        self.plain = {name for name, count in counts.items() if count == 1 and is_plain.get(name, False)}


def _units(module: nn.Module, path: str, calls: _Calls) -> Iterator[Unit]:
    children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
    if isinstance(module, nn.Sequential) and path in calls.plain | {""}:
        yield from _chunks(children, calls)
        return
    for child_path, child in children:
        yield from _unit(child, child_path, calls)


def _unit(module: nn.Module, path: str, calls: _Calls) -> Iterator[Unit]:
    """Yield a module as a unit, or the units inside it."""
    layers = _count_layers(module)
    if layers == 0:
        return
    is_divided = isinstance(module, nn.Sequential) and any(any(child.children()) for child in module)
    if path in calls.plain and layers <= MOST_LAYERS and not is_divided:
        yield Unit(path, (path,))
    else:
        yield from _units(module, path, calls)


def _chunks(children: list[tuple[str, nn.Module]], calls: _Calls) -> Iterator[Unit]:
    """Yield the units of the children of an `nn.Sequential`."""
    chunk: list[str] = []
    layers = 0

    def closed() -> Iterator[Unit]:
        nonlocal layers
        if layers:
            yield Unit(chunk[0] if len(chunk) == 1 else f"{chunk[0]} to {chunk[-1]}", tuple(chunk))
        chunk.clear()
        layers = 0

    for path, child in children:
        is_single = not any(child.children())
        if not is_single or path not in calls.plain:
            yield from closed()
            yield from _unit(child, path, calls)
            continue
        if isinstance(child, COUNTED) and layers == CHUNK_LAYERS:
            yield from closed()
        chunk.append(path)
        layers += isinstance(child, COUNTED)
    yield from closed()


def _count_layers(module: nn.Module) -> int:
    return sum(isinstance(part, COUNTED) for part in module.modules())
