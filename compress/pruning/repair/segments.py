"""Segments of a traced network (`torch.fx`): consecutive nodes that read few tensors of the nodes before them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.cost.macs import COUNTED
from compress.model.tensors import find_shared
from compress.pruning.repair.units import CHUNK_LAYERS, MOST_LAYERS


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a graph.

    Attributes:
        nodes: Names of the nodes, in order.
        inputs: Names of the nodes before, or inputs of the network, whose values it reads.
        outputs: Names of its nodes whose values are read later or returned by the network.
    """

    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        """Names of the first and last node."""
        return f"{self.nodes[0]} to {self.nodes[-1]}"


class SegmentModule(nn.Module):
    """A segment as a module: takes the segment's inputs and returns the tuple of its outputs.

    Args:
        network: The traced network; its layers are used, not copied.
        segment: Nodes of the network.
    """

    def __init__(self, network: fx.GraphModule, segment: Segment) -> None:
        super().__init__()
        self.segment = segment
        by_name = {node.name: node for node in network.graph.nodes}
        self._nodes = [by_name[name] for name in segment.nodes]
        self._inputs = [by_name[name] for name in segment.inputs]
        self._outputs = [by_name[name] for name in segment.outputs]
        inside = set(self._nodes)
        read = {source for node in self._nodes for source in node.all_input_nodes}
        self._constants = [node for node in read - inside if node.op == "get_attr"]
        self._interpreter = fx.Interpreter(network, garbage_collect_values=False)
        paths = dict.fromkeys(str(node.target) for node in self._nodes if node.op == "call_module")
        self.paths = tuple(paths)
        self.layers = nn.ModuleList(network.get_submodule(path) for path in paths)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, (N, ...) each, for the inputs, (N, ...) each."""
        interpreter = self._interpreter
        interpreter.env = dict(zip(self._inputs, inputs, strict=True))
        for node in (*self._constants, *self._nodes):
            interpreter.env[node] = interpreter.run_node(node)
        outputs = tuple(interpreter.env[node] for node in self._outputs)
        interpreter.env = {}
        return outputs


def find_segments(network: fx.GraphModule, example: Tensor) -> list[Segment]:
    """Divide a traced network into segments of about `CHUNK_LAYERS` to `MOST_LAYERS` layers.

    A segment ends where the nodes behind it read one feature map alone, such as the output of a residual block. Where
    `MOST_LAYERS` convolutions and linear layers come without such a feature map, it ends where the fewest are read.

    Args:
        network: A network with one input, in eval mode.
        example: One input, (1, ...).
    """
    nodes = [node for node in network.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    values = _values(network, torch.cat([example, example]))
    live = _read_later(network, nodes)
    cuts: list[int] = []
    start = layers = 0
    is_layer = [_is_layer(network, node) for node in nodes]
    for index in range(len(nodes) - 1):
        layers += is_layer[index]
        if _is_end(network, index, nodes, live, values) and len(live[index]) == 1 and layers >= CHUNK_LAYERS:
            place = index
        elif layers >= MOST_LAYERS:
            places = [one for one in range(start, index + 1) if _is_end(network, one, nodes, live, values)]
            places = [one for one in places if any(is_layer[start : one + 1])]
            if not places:
                continue
            place = min(places, key=lambda one: (len(live[one]), -one))
        else:
            continue
        cuts.append(place + 1)
        start, layers = place + 1, sum(is_layer[place + 1 : index + 1])
    ends = [*cuts, len(nodes)]
    return [_segment(nodes[begin:end]) for begin, end in zip([0, *cuts], ends, strict=True) if end > begin]


def joined(first: Segment, second: Segment, network: fx.GraphModule) -> Segment:
    """Return two segments in a row as one."""
    by_name = {node.name: node for node in network.graph.nodes}
    return _segment([by_name[name] for name in (*first.nodes, *second.nodes)])


def trainable_parameters(network: fx.GraphModule, module: SegmentModule) -> list[nn.Parameter]:
    """Return the parameters of the layers of a segment that no other node uses."""
    calls = [str(node.target) for node in network.graph.nodes if node.op == "call_module"]
    shared = find_shared(network)
    own = [
        layer
        for path, layer in zip(module.paths, module.layers, strict=True)
        if calls.count(path) == 1 and not any(name == path or name.startswith(f"{path}.") for name in shared)
    ]
    return list(dict.fromkeys(one for layer in own for one in layer.parameters()))


def marked(network: fx.GraphModule, names: Sequence[str]) -> tuple[fx.GraphModule, dict[str, str]]:
    """Return a copy in which identity modules stand behind some nodes, and node name -> path of its identity."""
    copied = copy.deepcopy(network)
    paths: dict[str, str] = {}
    for node in list(copied.graph.nodes):
        if node.name not in names:
            continue
        path = paths[node.name] = f"marked_{len(paths)}"
        copied.add_module(path, nn.Identity())
        with copied.graph.inserting_after(node):
            marker = copied.graph.call_module(path, (node,))
        node.replace_all_uses_with(marker, delete_user_cb=lambda user, marker=marker: user is not marker)
    copied.recompile()
    return copied, paths


def _is_layer(network: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), COUNTED)


@torch.no_grad()
def _values(network: fx.GraphModule, images: Tensor) -> dict[fx.Node, Any]:
    interpreter = fx.Interpreter(network, garbage_collect_values=False)
    interpreter.run(images)
    return interpreter.env


def _read_later(network: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Return for each node the nodes up to it whose values the nodes behind it read."""
    place = {node: index for index, node in enumerate(nodes)}
    sources = [node for node in network.graph.nodes if node.op != "get_attr"]
    last = {node: max((place[user] for user in node.users if user in place), default=-1) for node in sources}
    return [[node for node in sources if place.get(node, -1) <= index < last[node]] for index in range(len(nodes))]


def _is_end(
    network: fx.GraphModule,
    index: int,
    nodes: Sequence[fx.Node],
    live: Sequence[Sequence[fx.Node]],
    values: Mapping[fx.Node, Any],
) -> bool:
    """Return whether a segment may end behind a node: all values read later are feature maps of the batch."""
    if not all(_is_feature_map(values[node]) for node in live[index]):
        return False
    following = nodes[index + 1]
    is_pointwise = (
        following.all_input_nodes == [nodes[index]]
        and isinstance(values[following], Tensor)
        and not _is_layer(network, following)
        and values[following].shape == values[nodes[index]].shape
    )
    return not is_pointwise


def _is_feature_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim in (2, 4) and len(value) == 2 and value.is_floating_point()


def _segment(nodes: Sequence[fx.Node]) -> Segment:
    inside = set(nodes)
    read: Iterator[fx.Node] = (source for node in nodes for source in node.all_input_nodes)
    inputs = dict.fromkeys(source.name for source in read if source not in inside and source.op != "get_attr")
    outputs = [node.name for node in nodes if any(user not in inside for user in node.users)]
    return Segment(tuple(node.name for node in nodes), tuple(inputs), tuple(outputs))
