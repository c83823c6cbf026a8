"""What does an ONNX file say about itself: its files, its inputs and outputs, its preprocessing? No torch."""

import json
from dataclasses import dataclass
from pathlib import Path

import onnx

from compress.artifacts import Signature, TensorSpec
from compress.data.preprocessing import Preprocessing
from compress.errors import ArtifactError

PREPROCESSING_KEY = "compress.preprocessing"
CLASSES_KEY = "compress.classes"


@dataclass(frozen=True, slots=True)
class OnnxMetadata:
    """What this program writes into the files it exports.

    Attributes:
        preprocessing: What happens to an image first; None when the file does not say.
        classes: Class names, or ().
    """

    preprocessing: Preprocessing | None
    classes: tuple[str, ...]


def load_onnx(path: Path, *, weights: bool = False) -> onnx.ModelProto:
    """Read an ONNX file.

    Args:
        path: The .onnx file.
        weights: Whether weights that lie in another file are read too.

    Raises:
        ArtifactError: The file is missing or no ONNX model, or a file with its weights is missing.
    """
    if not path.is_file():
        raise ArtifactError(f"ONNX file '{path}' does not exist.")
    try:
        model = onnx.load(path, load_external_data=weights)
    except Exception as error:  # protobuf, onnx.checker and the file system each raise types of their own
        raise ArtifactError(f"'{path}' must be a readable ONNX model: {first_line(error)}") from error
    if not model.graph.node or not model.graph.output:
        raise ArtifactError(f"'{path}' must be an ONNX model with nodes and outputs, it has none.")
    return model


def save_onnx(model: onnx.ModelProto, path: Path, external: bool) -> None:
    """Write a model; with `external`, its larger weights go into `<name>.data` beside it."""
    if not external:
        onnx.save_model(model, path)
        return
    copy = onnx.ModelProto()  # saving external data takes the weights out of the model it is given
    copy.CopyFrom(model)
    onnx.save_model(copy, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


def external_files(model: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    """Return the files beside `path` that hold weights of `model`, whether they exist or not."""
    places = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(path.parent / place for place in sorted(places))


def model_files(path: Path) -> tuple[Path, ...]:
    """Return every file that must be handed over for the model to work: the .onnx file first.

    Raises:
        ArtifactError: The file is missing or no ONNX model.
    """
    return (path, *external_files(load_onnx(path), path))


def file_bytes(path: Path) -> int:
    """Return the bytes of all files of the model, external data included.

    Raises:
        ArtifactError: One of them is missing, or the first is no ONNX model.
    """
    files = model_files(path)
    for file in files[1:]:
        if not file.is_file():
            raise ArtifactError(f"'{path}' keeps weights in '{file.name}', which must lie beside it and is missing.")
    return sum(file.stat().st_size for file in files)


def read_signature(model: onnx.ModelProto) -> Signature:
    """Return inputs and outputs of a model; an open first axis is "batch", other open axes keep their names.

    Raises:
        ArtifactError: An input or output has no tensor type or no shape.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_spec(value) for value in model.graph.input if value.name not in weights)
    return Signature(inputs, tuple(_spec(value) for value in model.graph.output))


def read_metadata(model: onnx.ModelProto) -> OnnxMetadata:
    """Return what `compress` wrote into the file; nothing is assumed where it wrote nothing.

    Raises:
        ArtifactError: The entries are there and damaged.
    """
    entries = {entry.key: entry.value for entry in model.metadata_props}
    try:
        written = json.loads(entries.get(PREPROCESSING_KEY, "null"))
        classes = tuple(str(name) for name in json.loads(entries.get(CLASSES_KEY, "[]")))
        return OnnxMetadata(None if written is None else Preprocessing.from_dict(written), classes)
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"The metadata '{PREPROCESSING_KEY}' and '{CLASSES_KEY}' must be JSON: {error}") from error


def is_quantized(model: onnx.ModelProto) -> bool:
    """Return whether values are rounded to whole numbers anywhere in the graph."""
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)


def is_half(model: onnx.ModelProto) -> bool:
    """Return whether there are weights in half precision."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)


def default_opset(model: onnx.ModelProto) -> int | None:
    """Return the version of the default operator set, None when the model names none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise ArtifactError(f"Input or output '{value.name}' of an ONNX model must be a tensor with a shape.")
    shape: list[int | str] = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.HasField("dim_value"):
            shape.append(int(dim.dim_value))
        else:
            shape.append("batch" if axis == 0 else dim.dim_param or f"axis{axis}")
    return TensorSpec(value.name, tuple(shape), str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
