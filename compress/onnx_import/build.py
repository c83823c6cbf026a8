"""Builder of a torch network from the graph of an ONNX file.

    node with weights    -> a layer (nn.Conv2d, nn.Linear, ...), a submodule with a name from the file
    node on images       -> a call of a torch function
    node on constants    -> its value, computed once with the evaluator of the ONNX standard

The result is a `torch.fx.GraphModule`: layers, and a plain forward function that can be read (`print(module.code)`).
"""

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import fx

from compress.errors import ModelError
from compress.onnx_import.graph import ONNX_VALUE, NetworkGraph
from compress.onnx_import.operation import Operation, Result
from compress.onnx_import.operators.table import OPERATORS
from compress.onnx_import.values import Computed, Fixed, KnownValues, Refused, Value, evaluate


class Builder:
    """Builder of one network, node by node.

    Args:
        opset: Version of the default operator set.
        has_open_batch: Whether the file takes any number of images; otherwise it takes 1.

    Attributes:
        problems: Pairs of a node that cannot be built and the reason.
    """

    def __init__(self, opset: int, has_open_batch: bool) -> None:
        self.problems: list[tuple[ir.Node, str]] = []
        self._opset = opset
        self._graph = NetworkGraph(has_open_batch)
        self._values = KnownValues()
        self._unknown: set[str] = set()

    def add_input(self, name: str, argument: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
        """Add an input of the file as an argument, with its shape for each number of images in `PROBES`."""
        self._values.add(name, self._graph.add_input(name, argument, shapes, dtype))

    def add_nodes(self, nodes: Sequence[ir.Node]) -> None:
        """Add nodes in their order; nodes that cannot be built are appended to `problems`."""
        for node in nodes:
            names = [value.name or "" for value in node.inputs if value is not None]
            if self._unknown.intersection(names):
                if not _is_supported(node):
                    self._refuse(node, "is not supported")
                self._unknown.update(value.name or "" for value in node.outputs)
                continue
            try:
                self._add(node)
            except Refused as reason:
                self._refuse(node, str(reason))
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
                said = str(error).strip().splitlines() or [""]  # error of a translator at an invalid node
                self._refuse(node, f"is not as the ONNX standard says ({type(error).__name__}: {said[0][:200]})")

    def finish(self, outputs: Sequence[str]) -> fx.GraphModule:
        """Return the network; several outputs become a tuple."""
        found = []
        for name in outputs:
            if name not in self._values:
                raise ModelError(f"Each output of an ONNX file must be computed by a node, '{name}' is not.")
            value = self._values[name]
            if isinstance(value, Fixed):
                value = self._graph.constant(value)
            assert isinstance(value, Computed)
            found.append(value)
        return self._graph.network(found)

    def _add(self, node: ir.Node) -> None:
        inputs = [None if value is None else self._values.of(value) for value in node.inputs]
        if node.domain not in ("", "ai.onnx"):
            raise Refused(f"is of the domain '{node.domain}', which is not supported")
        if node.op_type == "If":
            self._add_branch(node, inputs)
            return
        if node in self._values.merged:
            result: Result = self._values.merged[node]
        elif any(isinstance(value, Computed) for value in inputs):
            translator = OPERATORS.get(node.op_type)
            if translator is None:
                raise Refused("is not supported")
            result = translator(Operation(node, inputs, self._opset, self._graph, self._values))
        else:
            result = evaluate(node, [value for value in inputs if not isinstance(value, Computed)], self._opset)
        self._keep(node, result)

    def _keep(self, node: ir.Node, result: Result) -> None:
        results = [result] if isinstance(result, (Computed, Fixed)) else list(result)
        for value, output in zip(results, node.outputs, strict=False):
            name = output.name or ""
            if isinstance(value, Computed):
                value = Computed(name, value.node, value.probes)
                value.node.meta.setdefault(ONNX_VALUE, name)
            self._values.add(name, value)
        for output in node.outputs[len(results) :]:
            if output.uses() or output.is_graph_output():
                raise Refused(f"its output '{output.name}' is not supported")

    def _add_branch(self, node: ir.Node, inputs: Sequence[Value]) -> None:
        """Add the branch of an If whose condition is known."""
        condition = inputs[0]
        if not isinstance(condition, Fixed) or not condition.is_constant:
            raise Refused("depends on the images (control flow), which is not supported")
        branch = node.attributes["then_branch" if condition.array.item() else "else_branch"].as_graph()
        for value in branch.initializers.values():
            self._values.of(value)
        self.add_nodes(list(branch))
        if any(value.name not in self._values for value in branch.outputs):  # refused already
            self._unknown.update(value.name or "" for value in node.outputs)
            return
        self._keep(node, [self._known(value) for value in branch.outputs])

    def _known(self, value: ir.Value) -> Computed | Fixed:
        found = self._values.of(value)
        assert found is not None
        return found

    def _refuse(self, node: ir.Node, reason: str) -> None:
        self.problems.append((node, reason))
        self._unknown.update(value.name or "" for value in node.outputs)


def _is_supported(node: ir.Node) -> bool:
    """Return whether a node's operator is supported, whatever its inputs."""
    return node.domain in ("", "ai.onnx") and (node.op_type in OPERATORS or node.op_type in ("If", "Constant"))
