"""ONNX files of a network with fewer channels, written to be timed.

A variant keeps the first channels of every layer, so its outputs are of no use. Its operators, shapes and memory layout
are those of a network pruned to the same widths, and its speed depends on nothing else.

    site    a convolution or matrix product with a weight, and the nodes after it up to the next site
    sizes   layer -> (outputs, inputs)

Every node and value of a variant is named after its site ("site3.1"). So nodes that the runtime fuses and renames can
still be assigned to a site.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from compress.onnx_file.counting import rows_of

Sizes = Mapping[str, tuple[int, int]]
SITE = "site"
_FLATTEN = np.asarray([0, -1])
_SITE_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class Site:
    """One layer as the runtime sees it.

    Attributes:
        layer: Module path of its weight.
        kind: Operator, attributes, input size and the operators that follow: two sites of one kind and the same sizes
            take the same time.
        sizes: Full (outputs, inputs).
        is_depthwise: Whether the operator is a depthwise convolution, whose inputs and outputs are the same channels.
        work: MACs, elements of the input and of the output for one image at full sizes; zeros where not known.
    """

    layer: str
    kind: str
    sizes: tuple[int, int]
    is_depthwise: bool
    work: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class _Cut:
    """One axis of a constant with as many entries as a layer's outputs (side 0) or inputs (side 1), over `divisor`."""

    layer: str
    side: int
    axis: int
    divisor: int = 1


class VariantWriter:
    """Writer of variants of one network.

    Args:
        model: Model with all weights; it is not changed.

    Attributes:
        sites: Sites in the order of the graph; site i is named "site<i>" in the variants.

    Raises:
        ModelError: Shapes cannot be inferred.
    """

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self._owners, self._heads = _owners(model, set(self._arrays))
        self._flattening = _flattening_shapes(model, self._arrays)
        self._cuts: dict[str, list[_Cut]] = {}
        self.sites = tuple(self._find_sites())
        self._layers = {site.layer for site in self.sites}

    def write(self, sizes: Sizes, full: Sizes) -> ModelProto:
        """Return a variant.

        Args:
            sizes: New sizes of layers, including norms and activations with channels; other layers keep their sizes.
            full: Sizes of the same layers in the baseline.
        """
        variant = self._skeleton()
        cuts = dict(self._cuts)
        for layer in sizes:
            if layer not in self._layers:
                cuts.update(self._cuts_of_others(layer, full[layer][0]))
        for name, array in self._arrays.items():
            cut = _FLATTEN if name in self._flattening else _cut_array(array, cuts.get(name, ()), sizes)
            variant.graph.initializer.append(numpy_helper.from_array(cut, name))
        for node, head in zip(variant.graph.node, self._heads, strict=True):
            if head is not None and self.sites[head].is_depthwise:
                group = next(attribute for attribute in node.attribute if attribute.name == "group")
                group.i = sizes.get(self.sites[head].layer, self.sites[head].sizes)[0]
        return variant

    def _find_sites(self) -> Iterator[Site]:
        rows = rows_of(self._model)
        tails = self._tails()
        for number, index in enumerate(i for i, head in enumerate(self._heads) if head is not None):
            node, row = self._model.graph.node[index], rows[index]
            out, inp, cuts, depthwise = _layer_cuts(node, row.name, self._arrays)
            for name, cut in cuts:
                self._cuts.setdefault(name, []).append(cut)
            kind = _kind(node, depthwise, row.input_shape, tails.get(number, ()))
            work = row.macs, math.prod(row.input_shape or ()), math.prod(row.output_shape or ())
            yield Site(row.name, kind, (out, inp), depthwise, work)

    def _tails(self) -> dict[int, tuple[str, ...]]:
        tails: dict[int, list[str]] = {}
        for node, owner, head in zip(self._model.graph.node, self._owners, self._heads, strict=True):
            if owner is not None and head is None:
                tails.setdefault(owner, []).append(node.op_type)
        return {owner: tuple(ops) for owner, ops in tails.items()}

    def _cuts_of_others(self, layer: str, full: int) -> dict[str, list[_Cut]]:
        """Return the cuts of a layer that is no site: its constants have one value for each channel."""
        names = [name for name in self._arrays if name.startswith(f"{layer}.")]
        return {name: [_Cut(layer, 0, 0)] for name in names if self._arrays[name].shape[:1] == (full,)}

    def _skeleton(self) -> ModelProto:
        """Return the model without weights and inferred shapes, with names after the sites."""
        model = ModelProto()
        model.CopyFrom(self._model)
        for field in ("initializer", "value_info"):
            model.graph.ClearField(field)
        outputs = {value.name for value in model.graph.output}
        renamed: dict[str, str] = {}
        for number, (node, owner) in enumerate(zip(model.graph.node, self._owners, strict=True)):
            prefix = f"{SITE}{'' if owner is None else owner}."
            node.name = f"{prefix}{number}"
            node.input[:] = [renamed.get(name, name) for name in node.input]
            for position, name in enumerate(node.output):
                if name and name not in outputs:
                    renamed[name] = f"{prefix}{number}.{position}"
            node.output[:] = [renamed.get(name, name) for name in node.output]
            if node.op_type == "Reshape" and node.input[1] in self._flattening:
                del node.attribute[:]  # allowzero would give the 0 of the new shape another meaning
        return model


def site_of(name: str) -> int | None:
    """Return the number of the site in a node name, possibly renamed by the runtime; None for other names.

    >>> site_of("site12.40_nchwc"), site_of("fused site3.7.0"), site_of("ReorderOutput_token_3"), site_of("site.0")
    (12, 3, None, None)
    """
    _, found, rest = name.partition(SITE)
    number = rest.partition(".")[0]
    return int(number) if found and number.isdigit() else None


def _owners(model: ModelProto, constants: set[str]) -> tuple[list[int | None], list[int | None]]:
    """Return for each node the number of its site, and the number of the site that it begins; None for no site.

    A node belongs to the latest site that its inputs come from; nodes before the first site belong to no site.
    """
    owners: list[int | None] = []
    heads: list[int | None] = []
    owner_of: dict[str, int] = {}
    count = 0
    for node in model.graph.node:
        is_head = node.op_type in _SITE_OPS and any(name in constants for name in node.input[1:2])
        if is_head:
            owner: int | None = count
            count += 1
        else:
            owner = max((owner_of[name] for name in node.input if name in owner_of), default=None)
        owners.append(owner)
        heads.append(owner if is_head else None)
        if owner is not None:
            owner_of.update(dict.fromkeys(node.output, owner))
    return owners, heads


def _flattening_shapes(model: ModelProto, arrays: Mapping[str, np.ndarray]) -> set[str]:
    """Return the shape constants of each Reshape to (batch, columns), where columns depend on the channels."""
    found = set()
    for node in model.graph.node:
        shape = arrays.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is not None and shape.shape == (2,) and shape[0] in (-1, 0, 1) and shape[1] > 0:
            found.add(node.input[1])
    return found


def _layer_cuts(
    node: NodeProto, layer: str, arrays: Mapping[str, np.ndarray]
) -> tuple[int, int, list[tuple[str, _Cut]], bool]:
    """Return outputs, inputs, the axes of constants that depend on them, and whether the node is depthwise."""
    weight = node.input[1]
    shape = arrays[weight].shape
    attributes = {attribute.name: attribute for attribute in node.attribute}
    group = int(attributes["group"].i) if "group" in attributes else 1
    out_axis, in_axis = (0, 1) if node.op_type == "Conv" or _is_set(attributes, "transB") else (1, 0)
    out, inp = shape[out_axis], shape[in_axis]
    depthwise = group > 1 and shape[:2] == (group, 1)
    if node.op_type == "Conv":
        inp *= group
    elif node.op_type == "ConvTranspose":
        out *= group
    cuts = [(weight, _Cut(layer, 0, out_axis, group if node.op_type == "ConvTranspose" else 1))]
    if not depthwise:
        cuts.append((weight, _Cut(layer, 1, in_axis, group if node.op_type == "Conv" else 1)))
    for bias in node.input[2:3]:
        if bias in arrays and arrays[bias].ndim and arrays[bias].shape[-1] == out:
            cuts.append((bias, _Cut(layer, 0, arrays[bias].ndim - 1)))
    return int(out), int(inp), cuts, depthwise


def _is_set(attributes: Mapping[str, onnx.AttributeProto], name: str) -> bool:
    return name in attributes and bool(attributes[name].i)


def _cut_array(array: np.ndarray, cuts: "tuple[_Cut, ...] | list[_Cut]", sizes: Sizes) -> np.ndarray:
    for cut in cuts:
        if cut.layer in sizes:
            kept = sizes[cut.layer][cut.side] // cut.divisor
            array = np.take(array, range(kept), axis=cut.axis)
    return np.ascontiguousarray(array)


def _kind(node: NodeProto, is_depthwise: bool, input_shape: tuple[int, ...] | None, tail: tuple[str, ...]) -> str:
    """Return a description of everything besides sizes that the time of a site depends on."""
    parts = [node.op_type, *(["depthwise"] if is_depthwise else [])]
    for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, (int, list)) and not (attribute.name == "group" and is_depthwise):
            parts.append(f"{attribute.name}={'x'.join(map(str, value)) if isinstance(value, list) else value}")
    if input_shape is not None and len(input_shape) > 2:
        parts.append(f"input={'x'.join(str(size) for size in input_shape[2:])}")
    return " ".join([*parts, *(f"+{operator}" for operator in tail)])
