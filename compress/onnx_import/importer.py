"""Import of an ONNX file as a torch network that computes the same.

file --read_source--> Source --Builder--> fx.GraphModule --require_parity--> the network, or ModelError
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from compress.errors import ModelError
from compress.onnx_file.io import reading_graph
from compress.onnx_import.build import Builder
from compress.onnx_import.names import argument_names
from compress.onnx_import.parity import require_parity, rounding_error
from compress.onnx_import.preconditions import Source, read_source
from compress.onnx_import.values import as_float32


def import_onnx(
    path: Path,
    shapes: Mapping[str, Sequence[int]] | None = None,
    images: Sequence[np.ndarray] | None = None,
) -> fx.GraphModule:
    """Return a torch network equivalent to an ONNX file, in eval mode, for any number of images.

    Layers (`nn.Conv2d`, `nn.Linear`, ...) are submodules with the names in the file. Weights of any precision become
    float32. Several outputs become a tuple. `meta["import_error"]` of the network holds the largest relative error of
    the comparison with ONNX Runtime. A QDQ graph is read as its float form (`onnx_file/dequantize.py`); then
    `meta["rounding_error"]` holds the difference to the file's outputs, otherwise None.

    Args:
        path: The .onnx file.
        shapes: Input name -> shape of one image, for inputs with open sizes.
        images: One array (N, ...) for each input, for a comparison besides the one on random images.

    Raises:
        ArtifactError: The file is missing, corrupt, or has weights outside its folder.
        ModelError: The file has unsupported nodes, all listed in the message; or the outputs differ from ONNX Runtime,
            with the first node that differs in the message.
        NonFinite: ONNX Runtime returns NaN or infinity.
    """
    with reading_graph(path):
        source = read_source(path, shapes)
        module = build_network(source)
        module.meta["import_error"] = require_parity(module, source, images)
        module.meta["rounding_error"] = rounding_error(source, images)
        return module


def build_imported(path: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> fx.GraphModule:
    """Return the network of a file without the comparison with ONNX Runtime, such as for a file without weights.

    Raises:
        ArtifactError, ModelError: As `import_onnx`.
    """
    with reading_graph(path):
        return build_network(read_source(path, shapes))


def build_network(source: Source) -> fx.GraphModule:
    """Return the network of a file that has been read.

    Raises:
        ModelError: Some nodes cannot be built; the message lists all of them.
    """
    model = ir.from_proto(source.model)
    builder = Builder(source.opset, source.has_open_batch)
    names = argument_names([spec.name for spec in source.inputs])
    for spec, argument in zip(source.inputs, names, strict=True):
        dtype = torch.from_numpy(as_float32(np.zeros(1, spec.dtype))).dtype
        builder.add_input(spec.name, argument, source.shapes(spec), dtype)
    builder.add_nodes(list(model.graph))
    if builder.problems:
        raise ModelError(
            f"'{source.path}' must consist of operators that can be imported; "
            f"{len(builder.problems)} of {len(model.graph)} nodes cannot: {_listed(builder.problems)}.",
            hint="Export the part of the network that has the weights, without what is done to its outputs after it.",
        )
    return builder.finish(source.outputs)


def _listed(problems: Sequence[tuple[ir.Node, str]]) -> str:
    """Return each reason with its operator and nodes, as one text."""
    nodes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node, reason in problems:
        nodes[node.op_type, reason].append(f"'{node.name or node.outputs[0].name}'")
    return "; ".join(f"{operator} {', '.join(names)} {reason}" for (operator, reason), names in nodes.items())
