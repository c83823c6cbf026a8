"""Walks through a cut network and the original, block by block, with the tensors at each block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.model.modes import eval_mode, hooked
from compress.model.tensors import find_shared
from compress.pruning.repair.lockstep import Lockstep
from compress.pruning.repair.segments import (
    Segment,
    SegmentModule,
    find_segments,
    joined,
    marked,
    trainable_parameters,
)
from compress.pruning.repair.units import Unit, find_units

Tensors = tuple[Tensor, ...]
_COPIES = 4  # of both networks' tensors, waiting and joined

Surviving = Callable[[nn.Module], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Block:
    """One block of a cut network, and what it should return.

    Attributes:
        name: Module path, or names of the first and the last module or node.
        module: Takes the inputs as positional arguments; its layers are those of the network.
        trainable: Parameters that no other part of the network uses.
        inputs: (N, ...) each, in the cut network.
        wanted: (N, ...) each: outputs of the original, without the channels that are gone.
    """

    name: str
    module: nn.Module
    trainable: tuple[nn.Parameter, ...]
    inputs: Tensors
    wanted: Tensors

    def run(self) -> Tensors:
        """Return the outputs of the block, (N, ...) each."""
        outputs = self.module(*(one.clone() for one in self.inputs))  # a block may change its input in place
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def part(self, images: slice | Tensor) -> "Block":
        """Return the block with some of the images."""
        return replace(
            self, inputs=tuple(one[images] for one in self.inputs), wanted=tuple(one[images] for one in self.wanted)
        )


@dataclass(frozen=True)
class Pair:
    """A cut network and the network before the cut.

    Attributes:
        slim: The cut network, in eval mode.
        original: The network before the cut, with the same module names, in eval mode.
        surviving: Takes a network with the layers of the original, and returns module path -> (n,) channels of its
            output that the cut keeps, where some are gone.
    """

    slim: nn.Module
    original: nn.Module
    surviving: Surviving


class ModuleWalk:
    """Walk by modules that take one tensor and return one.

    Args:
        pair: The networks.
        example: One input, (1, ...).
    """

    def __init__(self, pair: Pair, example: Tensor) -> None:
        self.pair = pair
        shared = find_shared(pair.slim)
        self.units: list[Unit] = [
            unit for unit in find_units(pair.slim, example) if unit.is_in(pair.original) and not unit.shares_any(shared)
        ]
        self._kept = pair.surviving(pair.original) if self.units else {}

    def __len__(self) -> int:
        return len(self.units)

    def live_bytes(self, example: Tensor) -> int:
        """Return roughly the largest number of bytes of one image's tensors at a block, in both networks."""
        network, most = self.pair.original, 0

        def watch(_part: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> None:
            nonlocal most
            most = max(most, sum(_bytes(value) for value in (*inputs, output) if isinstance(value, Tensor)))

        with hooked(
            before=[(network.get_submodule(unit.first), watch) for unit in self.units],
            after=[(network.get_submodule(unit.last), watch) for unit in self.units],
        ):
            network(example)
        return _COPIES * most

    def blocks(self, batches: Sequence[Tensor]) -> Iterator[Block]:
        """Yield the blocks front to back; each must be trained before the next is asked for."""
        slim, original = self.pair.slim, self.pair.original
        lasts = [unit.last for unit in self.units]
        with (
            Lockstep(slim, [unit.first for unit in self.units], batches) as ours,
            Lockstep(original, lasts, batches, after=lasts) as theirs,
        ):
            for unit in self.units:
                inputs = torch.cat([seen[0] for seen in ours.reach(unit.first)])
                wanted = torch.cat([_narrowed(seen[1], self._kept.get(unit.last)) for seen in theirs.reach(unit.last)])
                module = unit.build(slim)
                yield Block(unit.name, module, tuple(module.parameters()), (inputs,), (wanted,))


class GraphWalk:
    """Walk by segments of two traced networks with the same nodes.

    Args:
        slim: The cut network, with one input.
        original: The network before the cut.
        surviving: As in `Pair`.
        example: One input, (1, ...).
    """

    def __init__(self, slim: fx.GraphModule, original: fx.GraphModule, surviving: Surviving, example: Tensor) -> None:
        self.slim, self.original = slim, original
        found = find_segments(original, example)
        copied, paths = marked(original, [name for segment in found for name in segment.outputs])
        kept = surviving(copied)
        self._kept = {name: kept[path] for name, path in paths.items() if path in kept}
        self.segments = self._with_equal_shapes(found, example)

    def __len__(self) -> int:
        return len(self.segments)

    def live_bytes(self, example: Tensor) -> int:
        """Return roughly the largest number of bytes of one image's tensors at a segment, in both networks."""
        original, most = self.original, 0
        values = {_entry(original): example}
        for index, segment in enumerate(self.segments):
            later = {name for one in self.segments[index + 1 :] for name in one.inputs}
            _advance(SegmentModule(original, segment), [values], later | {*segment.inputs, *segment.outputs})
            most = max(most, sum(_bytes(value) for value in values.values()))
        return _COPIES * most

    def blocks(self, batches: Sequence[Tensor]) -> Iterator[Block]:
        """Yield the blocks front to back; each must be trained before the next is asked for."""
        slim, original = self.slim, self.original
        entry = _entry(slim)
        ours: list[dict[str, Tensor]] = [{entry: images} for images in batches]
        theirs: list[dict[str, Tensor]] = [{entry: images} for images in batches]
        for index, segment in enumerate(self.segments):
            later = {name for one in self.segments[index + 1 :] for name in one.inputs}
            _advance(SegmentModule(original, segment), theirs, later | set(segment.outputs))
            module = SegmentModule(slim, segment)
            inputs = tuple(torch.cat([values[name] for values in ours]) for name in segment.inputs)
            wanted = tuple(
                torch.cat([_narrowed(values[name], self._kept.get(name)) for values in theirs])
                for name in segment.outputs
            )
            parameters = tuple(trainable_parameters(slim, module))
            if parameters and inputs and wanted:
                yield Block(segment.name, module, parameters, inputs, wanted)
            _advance(module, ours, later)
            for values in theirs:
                for name in [name for name in values if name not in later]:
                    del values[name]

    def _with_equal_shapes(self, segments: Sequence[Segment], example: Tensor) -> list[Segment]:
        """Return the segments; two are joined where the outputs of the first differ from the expected shapes."""
        slim, original = self.slim, self.original
        result: list[Segment] = []
        before: Segment | None = None
        entry = _entry(slim)
        ours, theirs = [{entry: example}], [{entry: example}]
        for number, segment in enumerate(segments):
            whole = segment if before is None else joined(before, segment, original)
            needed = {name for one in (whole, *segments[number:]) for name in (*one.inputs, *one.outputs)}
            _advance(SegmentModule(original, segment), theirs, needed)
            _advance(SegmentModule(slim, segment), ours, needed)
            fits = all(
                _narrowed(theirs[0][name], self._kept.get(name)).shape == ours[0][name].shape for name in whole.outputs
            )
            before = None if fits else whole
            if fits:
                result.append(whole)
        return result


def find_walk(pair: Pair, example: Tensor) -> ModuleWalk | GraphWalk:
    """Return the walk that suits the networks.

    Args:
        pair: The networks.
        example: One input, (1, ...).
    """
    slim, original = pair.slim, pair.original
    with eval_mode(slim), eval_mode(original):
        if (
            isinstance(slim, fx.GraphModule)
            and isinstance(original, fx.GraphModule)
            and sum(node.op == "placeholder" for node in slim.graph.nodes) == 1
        ):
            return GraphWalk(slim, original, pair.surviving, example)
        return ModuleWalk(pair, example)


def _entry(network: fx.GraphModule) -> str:
    """Return the name of the node of the network's input."""
    return next(str(node.name) for node in network.graph.nodes if node.op == "placeholder")


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


@torch.no_grad()
def _advance(module: SegmentModule, batches: Sequence[dict[str, Tensor]], needed: set[str]) -> None:
    """Run a segment on the values of each batch, add its outputs and drop the values that nothing needs."""
    segment = module.segment
    for values in batches:
        outputs = module(*(values[name] for name in segment.inputs))
        values.update(zip(segment.outputs, outputs, strict=True))
        for name in [name for name in values if name not in needed]:
            del values[name]


def _narrowed(output: Tensor, channels: Tensor | None) -> Tensor:
    return output.clone() if channels is None else output.index_select(1, channels)
