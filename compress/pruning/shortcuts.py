"""Zero-padded shortcuts as convolutions with fixed weights, so that channels on both sides are prunable.

Such a shortcut (He et al. 2016, option A) takes every second row and column and puts zero channels around. Their number
is written down in the network's code, so no channel on either side could be removed. A convolution with fixed weights,
zeros and ones, computes the same and has input and output channels like any other. Runtimes are faster at it, too,
because they keep their blocked layout of channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compress.errors import attempt
from compress.model.modes import eval_mode, hooked
from compress.onnx_file.counting import FIXED_BUFFER
from compress.pruning.tracing.forward import trace

_NAME = "fixed_shortcut"


class FixedShortcut(nn.Module):
    """Fixed convolution that takes every n-th row and column and puts zero channels around the inputs.

    Args:
        inputs: Number of input channels.
        before: Number of zero channels before the input channels.
        after: Number of zero channels behind the input channels.
        strides: Steps between kept rows and between kept columns.
    """

    def __init__(self, inputs: int, before: int, after: int, strides: tuple[int, int]) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.strides = inputs, before + inputs + after, strides
        weight = torch.zeros(self.out_channels, inputs, 1, 1)
        weight[before + torch.arange(inputs), torch.arange(inputs)] = 1
        self.register_buffer(FIXED_BUFFER, weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, before + C + after, H / n, W / n) of (N, C, H, W)."""
        return F.conv2d(x, getattr(self, FIXED_BUFFER), stride=self.strides)

    def follow(self) -> None:
        """Set the numbers of channels to the sizes of the weight."""
        self.out_channels, self.in_channels = getattr(self, FIXED_BUFFER).shape[:2]


def write_out_shortcuts(module: nn.Module, example: Tensor) -> int:
    """Turn zero-padded shortcuts into convolutions in place, as far as the network's code can be rewritten.

    A module without weights that does nothing else is replaced. In any other module, the padding is replaced if
    torch.fx can trace the forward pass. A replacement must have bit-identical outputs for random inputs; otherwise the
    module is left unchanged.

    Args:
        module: Any network.
        example: One input, (1, ...).

    Returns:
        The number of modules that were changed.

    Raises:
        UntraceableModel: The network does not run.
    """
    count = 0
    for path in dict.fromkeys(trace(module, example).padded):
        inputs = _inputs_of(module, path, example)
        if not path or len(inputs) != 1:
            continue
        part = module.get_submodule(path)
        found = _as_shortcut(part, inputs[0]) or _with_shortcut(part, inputs[0])
        if found is not None:
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, found.train(part.training))
            count += 1
    return count


def _inputs_of(module: nn.Module, path: str, example: Tensor) -> list[Tensor]:
    """Return the inputs with which a part is called; empty if any call has other arguments than a single tensor."""
    seen: list[Tensor | None] = []

    def note(_part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        seen.append(args[0].clone() if is_one else None)

    part = module.get_submodule(path)
    with hooked(before=[(part, note)], with_kwargs=True), torch.no_grad(), eval_mode(module):
        module(example)
    return [] if None in seen else [value for value in seen if value is not None]


def _as_shortcut(part: nn.Module, given: Tensor) -> FixedShortcut | None:
    """Return the shortcut that equals a module without weights, or None."""
    if next(part.parameters(), None) is not None or next(part.buffers(), None) is not None:
        return None
    with torch.no_grad(), eval_mode(part):
        probe = _random_like(given)
        return _matching(probe, part(probe))


def _traced(part: nn.Module) -> fx.Graph | None:
    """Return the graph of a module's own operations, or None if it depends on the training flag."""
    with eval_mode(part):
        graph = _Shallow().trace(part)
        training = _Shallow().trace(part.train())
    return graph if str(graph) == str(training) else None


def _with_shortcut(part: nn.Module, given: Tensor) -> nn.Module | None:
    """Return a module with its padding of channels written as convolutions, or None where that cannot be done."""
    graph = attempt(lambda: _traced(part), lambda _: None)  # torch.fx traces some forward passes, and raises at others
    if graph is None:
        return None
    rewritten = fx.GraphModule(part, graph, type(part).__name__)
    values = _Values(rewritten)
    probe = _random_like(given)
    with torch.no_grad(), eval_mode(rewritten):
        expected = values.run(probe)
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not F.pad:
            continue
        source = _sliced(node.args[0])
        found = _matching(values.seen[source], values.seen[node])
        if found is None:
            continue
        name = _NAME if not count else f"{_NAME}{count}"
        rewritten.add_submodule(name, found)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(name, (source,)))
        graph.erase_node(node)
        count += 1
    graph.eliminate_dead_code()
    rewritten.recompile()
    with torch.no_grad(), eval_mode(rewritten):
        return rewritten if count and torch.equal(rewritten(probe), expected) else None


def _matching(source: Tensor, result: Tensor) -> FixedShortcut | None:
    """Return the shortcut that makes the result out of the source, or None."""
    if not isinstance(result, Tensor) or source.ndim != 4 or result.ndim != 4 or result.shape[1] <= source.shape[1]:
        return None
    strides = -(-source.shape[2] // result.shape[2]), -(-source.shape[3] // result.shape[3])
    for before in range(result.shape[1] - source.shape[1] + 1):
        if torch.equal(result[:, before : before + 1], source[:, :1, :: strides[0], :: strides[1]]):
            found = FixedShortcut(source.shape[1], before, result.shape[1] - source.shape[1] - before, strides)
            if torch.equal(found(source), result):  # a first channel of zeros looks like padding
                return found
    return None


def _sliced(node: fx.Node) -> fx.Node:
    """Return the source of a padding: its input, or the value that this input is a slice of."""
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem" and len(node.users) == 1:
        places = node.args[1]
        if isinstance(places, tuple) and len(places) == 4 and all(isinstance(one, slice) for one in places):
            return node.args[0]  # type: ignore[return-value]
    return node


class _Shallow(fx.Tracer):
    """Tracer of one forward pass that enters no submodule."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Values(fx.Interpreter):
    """Interpreter that keeps the result of each node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def _random_like(given: Tensor) -> Tensor:
    return torch.randn(given.shape, generator=torch.Generator().manual_seed(0))
