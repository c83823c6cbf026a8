"""Reading and writing ONNX files: weights, signature, preprocessing. No torch."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx

from compress.config.defaults import PREPROCESSING_KEY
from compress.config.schema.data import PreprocessingConfig
from compress.data.preprocessing import Preprocessing
from compress.errors import ArtifactError, first_line, translated
from compress.model.artifacts import Signature, TensorSpec

SIZES_KEY = "compress.sizes"  # sizes of open axes besides the batch, for counts and timing: {"height": 224}
__all__ = ["CLASSES_KEY", "PREPROCESSING_KEY"]

CLASSES_KEY = "compress.classes"
_FEW_BITS = {"UINT4": 4, "INT4": 4, "FLOAT4": 4, "UINT2": 2, "INT2": 2}
_DIGITS, _SHOWN, _NAMED = 20, 80, 4
ONE_FILE_LIMIT_BYTES = 1_800_000_000  # protobuf ends at 2 GiB; the graph and its names need room too
_LARGEST = 2**31 - 1  # size of an axis
_TYPES = frozenset(
    value
    for name, value in onnx.TensorProto.DataType.items()
    if name.startswith(("FLOAT", "DOUBLE", "BFLOAT16", "INT", "UINT", "BOOL"))
)


@dataclass(frozen=True, slots=True)
class OnnxMetadata:
    """Metadata that this program writes into the files it exports.

    Attributes:
        preprocessing: Preprocessing of images; None where the file has none.
        classes: Class names; () where the file has none.
    """

    preprocessing: Preprocessing | None
    classes: tuple[str, ...]


@contextmanager
def reading_graph(path: Path | None) -> Iterator[None]:
    """Turn errors from reading a malformed graph into an ArtifactError that names the file.

    Malformed graphs cause errors of any kind: KeyError for a value that no node computes, IndexError for a missing
    input, errors of onnx, onnx_ir and protobuf.

    Args:
        path: The .onnx file; None for a model in memory.

    Raises:
        ArtifactError: The block raised an error that is not from this program.
    """
    what = "The model" if path is None else f"'{path}'"
    with translated(
        lambda error: ArtifactError(
            f"{what} must be a valid ONNX model, reading its graph ends with {type(error).__name__}: "
            f"{first_line(error)}",
            hint="python -m onnx.bin.checker FILE.onnx says what is wrong with it.",
        )
    ):
        yield


def load_onnx(path: Path, *, weights: bool = False) -> onnx.ModelProto:
    """Read an ONNX file.

    Args:
        path: The .onnx file.
        weights: Whether external weights are read too.

    Raises:
        ArtifactError: The file is missing or no ONNX model, or a file with its weights is missing.
    """
    if not path.is_file():
        raise ArtifactError(f"ONNX file '{path}' does not exist.")
    with _readable(path):
        model = onnx.load(path, load_external_data=False)
    if weights:
        _load_weights(model, path)
    if not model.graph.node or not model.graph.output:
        raise ArtifactError(f"'{path}' must be an ONNX model with nodes and outputs, it has none.")
    return model


def require_valid(path: Path) -> None:
    """Raise ArtifactError unless a file passes ONNX's checker."""
    problems = tensor_problems(load_onnx(path))
    with reading_graph(path):
        onnx.checker.check_model(path)
    if problems:
        raise ArtifactError(f"'{path}' must be a valid ONNX model: {'; '.join(problems[:_NAMED])}.")


def save_onnx(model: onnx.ModelProto, path: Path, external: bool) -> None:
    """Write a model; with `external`, its larger weights are written into `<name>.data` beside it."""
    if not external:
        onnx.save_model(model, path)
        return
    copy = onnx.ModelProto()  # saving external data removes the weights from the model passed in
    copy.CopyFrom(model)
    onnx.save_model(copy, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


def each_node(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of a model, including nodes of subgraphs and local functions."""
    yield from _nodes_within(model.graph.node)
    for function in model.functions:
        yield from _nodes_within(function.node)


def each_tensor(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model: initializers and constants, including those in subgraphs and local functions."""
    nodes = [*each_node(model)]
    for graph in (model.graph, *(graph for node in nodes for graph in subgraphs(node))):
        yield from graph.initializer
        yield from (sparse.values for sparse in graph.sparse_initializer)
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t
        elif attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
            yield attribute.sparse_tensor.values
        yield from attribute.tensors


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the subgraphs of a node, such as the branches of If and the body of Loop."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def external_files(model: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    """Return the files beside `path` that hold weights of `model`, whether they exist or not."""
    places = {_external(tensor).get("location", "") for tensor in each_tensor(model) if _is_external(tensor)}
    return tuple(path.parent / place for place in sorted(places))


def external_problems(model: onnx.ModelProto, path: Path) -> list[str]:
    """Return the problems of the files beside `path` that hold weights, one clause each; the files are not opened."""
    ends: dict[str, int] = {}
    for tensor in each_tensor(model):
        if _is_external(tensor):
            said = _external(tensor)
            place = said.get("location", "")
            end = _whole_number(said.get("offset")) + _whole_number(said.get("length"))
            ends[place] = max(end, ends.get(place, 0))
    problems = []
    for place, end in sorted(ends.items()):
        file = path.parent / place
        if not _is_beside(place, path.parent.resolve()):
            problems.append(f"its weights must lie in its folder, not in '{_shortened(place)}'")
        elif not is_present(file):
            problems.append(f"its weights in '{_shortened(place)}' are missing")
        elif not file.is_file():
            problems.append(f"its weights in '{file.name}' must be a file")
        elif file.stat().st_size < end:
            problems.append(f"its weights in '{file.name}' must be {end:,} bytes, it has {file.stat().st_size:,}")
    return problems


def tensor_problems(model: onnx.ModelProto) -> list[str]:
    """Return the tensors whose bytes do not fit their shape and type, one clause each."""
    problems = []
    for tensor in each_tensor(model):
        wanted = _raw_bytes(tensor)
        if wanted is None:
            problems.append(f"tensor '{_shortened(tensor.name)}' must have a known type and sizes of 0 or more")
        elif tensor.HasField("raw_data") and not _is_external(tensor) and len(tensor.raw_data) != wanted:
            problems.append(
                f"tensor '{_shortened(tensor.name)}' must hold {wanted:,} bytes, it holds {len(tensor.raw_data):,}"
            )
    return problems


def _raw_bytes(tensor: onnx.TensorProto) -> int | None:
    """Return the bytes that a tensor takes; None for an undefined type or a negative size."""
    known = {value: name for name, value in onnx.TensorProto.DataType.items()}
    name = known.get(tensor.data_type, "UNDEFINED")
    if name == "UNDEFINED" or any(size < 0 for size in tensor.dims):
        return None
    if name == "STRING" or name.startswith("FLOAT6"):  # of no fixed size, or packed in ways of their own
        return len(tensor.raw_data)
    whole = 8 * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    bits = next((size for text, size in _FEW_BITS.items() if name.startswith(text)), whole)
    return int(math.prod(tensor.dims) * bits + 7) // 8


def require_beside(model: onnx.ModelProto, path: Path) -> None:
    """Raise ArtifactError for weights outside the folder of the file, so that no file elsewhere is read."""
    folder = path.parent.resolve()
    for tensor in each_tensor(model):
        place = _external(tensor).get("location", "")
        if _is_external(tensor) and not _is_beside(place, folder):
            raise ArtifactError(
                f"The weights of '{path}' must lie in its folder, '{_shortened(tensor.name)}' refers to "
                f"'{_shortened(place)}'.",
                hint="Save the model again with its weights in the file or beside it.",
            )


def _is_beside(place: str, folder: Path) -> bool:
    parts = {*PurePosixPath(place).parts, *PureWindowsPath(place).parts}
    if not place or PurePosixPath(place).is_absolute() or PureWindowsPath(place).anchor or ".." in parts:
        return False
    try:
        return (folder / place).resolve().is_relative_to(folder)
    except (OSError, ValueError):  # too long a name, or one with a null byte
        return False


def require_external(model: onnx.ModelProto, path: Path) -> None:
    """Raise ArtifactError unless the files with weights beside `path` exist and are long enough."""
    if problems := external_problems(model, path):
        raise ArtifactError(f"'{path}' must have all its weights: {'; '.join(problems)}.")


def model_files(path: Path) -> tuple[Path, ...]:
    """Return every file that the model needs, the .onnx file first.

    Raises:
        ArtifactError: The file is missing or no ONNX model.
    """
    return (path, *external_files(load_onnx(path), path))


def file_bytes(path: Path) -> int:
    """Return the bytes of all files of the model, external data included.

    Raises:
        ArtifactError: A file is missing, or the first is no ONNX model.
    """
    files = model_files(path)
    for file in files[1:]:
        if not (is_present(file) and file.is_file()):
            name = _shortened(file.name)
            raise ArtifactError(f"'{path}' keeps weights in '{name}', which must lie beside it and is missing.")
    return sum(file.stat().st_size for file in files)


def read_signature(model: onnx.ModelProto) -> Signature:
    """Return inputs and outputs of a model; an open first axis is "batch", other open axes keep their names.

    Raises:
        ArtifactError: An input or output has no tensor type or no shape.
    """
    return Signature(read_inputs(model), tuple(_spec(value) for value in model.graph.output))


def read_inputs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """Return the inputs of a model without weights that are listed as inputs; axes as in `read_signature`.

    Raises:
        ArtifactError: An input has no tensor type or no shape.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    return tuple(_spec(value) for value in model.graph.input if value.name not in weights)


def read_metadata(model: onnx.ModelProto) -> OnnxMetadata:
    """Return the metadata that `compress` wrote into the file; missing entries have no defaults.

    Raises:
        ArtifactError: An entry is damaged.
    """
    entries = {entry.key: entry.value for entry in model.metadata_props}
    try:
        written = json.loads(entries.get(PREPROCESSING_KEY, "null"))
        classes = tuple(str(name) for name in json.loads(entries.get(CLASSES_KEY, "[]")))
        if written is None:
            return OnnxMetadata(None, classes)
        checked = PreprocessingConfig.model_validate(written).model_dump()
        return OnnxMetadata(Preprocessing.from_dict(checked), classes)
    except (
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ArtifactError(
            f"The metadata '{PREPROCESSING_KEY}' and '{CLASSES_KEY}' must be JSON as this program writes it: "
            f"{first_line(error)}"
        ) from error


def read_sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Return axis name -> usual size of the open axes of a file's inputs; {} where the file has no such entry.

    Raises:
        ArtifactError: The entry is damaged.
    """
    written = {entry.key: entry.value for entry in model.metadata_props}.get(SIZES_KEY, "{}")
    try:
        sizes = {str(name): int(size) for name, size in json.loads(written).items()}
        if not all(0 < size <= _LARGEST for size in sizes.values()):
            raise ValueError(f"sizes must be 1 to {_LARGEST:,}")
        return sizes
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"The metadata '{SIZES_KEY}' must be JSON of whole numbers: {first_line(error)}") from error


def at_sizes(signature: Signature, sizes: Mapping[str, int]) -> Signature:
    """Return a signature with the given sizes for open axes of these names in its inputs.

    >>> image = TensorSpec("image", ("batch", 3, "height", "width"))
    >>> at_sizes(Signature((image,), ()), {"height": 32, "width": 48}).inputs[0].shape
    ('batch', 3, 32, 48)
    """
    inputs = tuple(
        replace(spec, shape=tuple(sizes.get(size, size) if isinstance(size, str) else size for size in spec.shape))
        for spec in signature.inputs
    )
    return replace(signature, inputs=inputs)


def is_quantized(model: onnx.ModelProto) -> bool:
    """Return whether the graph has nodes that round values, or operators of integers such as QLinearConv."""
    return any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear", "QGemm") or node.op_type.startswith("QLinear")
        for node in model.graph.node
    )


def is_half(model: onnx.ModelProto) -> bool:
    """Return whether the model has weights in half precision (float16)."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)


def default_opset(model: onnx.ModelProto) -> int | None:
    """Return the version of the default operator set; None where the model states none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)


def _load_weights(model: onnx.ModelProto, path: Path) -> None:
    require_external(model, path)
    with _readable(path):
        onnx.load_external_data_for_model(model, str(path.parent))


def _readable(path: Path) -> AbstractContextManager[None]:
    return translated(lambda error: ArtifactError(f"'{path}' must be a readable ONNX model: {first_line(error)}"))


def _nodes_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from _nodes_within(graph.node)


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _whole_number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() and len(text) < _DIGITS else 0


def is_present(file: Path) -> bool:
    """Return whether a file exists; False for a name that no file can have."""
    try:
        return file.exists()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def _shortened(name: str) -> str:
    return name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise ArtifactError(f"Input or output '{value.name}' of an ONNX model must be a tensor with a shape.")
    if tensor.elem_type not in _TYPES:
        raise ArtifactError(
            f"Input or output '{value.name}' of an ONNX model must be numbers of a known type, got {tensor.elem_type}."
        )
    shape: list[int | str] = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.HasField("dim_value") and not 0 <= dim.dim_value <= _LARGEST:
            raise ArtifactError(
                f"Sizes of input or output '{value.name}' of an ONNX model must be 0 to {_LARGEST:,}, "
                f"got {dim.dim_value} at axis {axis}."
            )
        if dim.HasField("dim_value"):
            shape.append(int(dim.dim_value))
        else:
            shape.append("batch" if axis == 0 else dim.dim_param or f"axis{axis}")
    return TensorSpec(value.name, tuple(shape), str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
