"""Survey of a network for a new pipeline file: spelling of a model, header of a checkpoint, architecture."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.catalog import NETWORKS
from compress.config.paths import PRETRAINED
from compress.errors import ConfigError
from compress.networks.architectures import CHECKPOINTS, Shapes, count_outputs, find_architecture

SPELLINGS = (
    "resnet18 (torchvision), timm:NAME, file.py:build, pkg.module:build, m.onnx, or a checkpoint such as best.pt"
)


@dataclass(frozen=True)
class ModelSurvey:
    """A network and its weights, as a pipeline file names them.

    Attributes:
        model: Section `model`.
        weights: Path of the weights, or "pretrained"; None for an ONNX file, which holds them.
        classes: Outputs of the last layer; None if they are not known.
        input_shape: (C, H, W) that the network was made for; None if it is not known.
        note: Sentence on how the network was found; "" if it was named.
    """

    model: dict[str, Any]
    weights: str | None
    classes: int | None = None
    input_shape: tuple[int, int, int] | None = None
    note: str = field(default="")


def survey_model(text: str, weights: str | None, classes: int | None) -> ModelSurvey:
    """Read the spelling of a model, and the header of its checkpoint.

    Args:
        text: Spelling, see `SPELLINGS`.
        weights: Path of a checkpoint; None if `text` is one, or for the weights that a library offers.
        classes: Classes of the data; None if they are not known.

    Raises:
        ConfigError: The spelling is unknown, a file is missing, or weights are.
        ModelError: No architecture has the layers of the checkpoint.
        ArtifactError: The checkpoint cannot be read, or holds a module in place of a state dict.
    """
    path = Path(text).expanduser()
    if path.suffix.lower() == ".onnx":
        return _survey_onnx(path, text)
    if path.suffix.lower() in CHECKPOINTS:
        if weights is not None:
            raise ConfigError(f"MODEL must name a network where --weights is given, got the checkpoint '{text}'.")
        return _survey_checkpoint(path, text)
    place, colon, name = text.rpartition(":")
    kind = place if place in NETWORKS else "factory" if colon else "torchvision"
    model: dict[str, Any] = {kind: text if kind == "factory" else name}
    if kind == "factory" and place.endswith(".py") and not Path(place).expanduser().is_file():
        raise ConfigError(f"MODEL file '{place}' does not exist.", hint=f"MODEL is {SPELLINGS}.")
    if weights is None:
        if kind == "factory":
            raise ConfigError(f"--weights must be given for the network of '{text}'.", hint="--weights best.pt")
        return ModelSurvey(model, PRETRAINED)
    outputs = count_outputs(_read_shapes(Path(weights).expanduser()))
    if kind != "factory" and outputs is not None:
        model["kwargs"] = {"num_classes": outputs}
    return ModelSurvey(model, weights, outputs)


def _survey_onnx(path: Path, text: str) -> ModelSurvey:
    if not path.is_file():
        raise ConfigError(f"MODEL file '{text}' does not exist.", hint=f"MODEL is {SPELLINGS}.")
    from compress.onnx_file.io import load_onnx, read_signature

    signature = read_signature(load_onnx(path))
    first, last = signature.inputs[0].shape[1:], signature.outputs[0].shape
    sizes = tuple(size for size in first if isinstance(size, int))
    shape = (sizes[0], sizes[1], sizes[2]) if len(sizes) == len(first) == 3 else None
    classes = last[1] if len(last) == 2 and isinstance(last[1], int) else None
    return ModelSurvey({"onnx": text}, None, classes, shape)


def _survey_checkpoint(path: Path, text: str) -> ModelSurvey:
    if not path.is_file():
        raise ConfigError(f"MODEL file '{text}' does not exist.", hint=f"MODEL is {SPELLINGS}.")
    shapes = _read_shapes(path)
    outputs = count_outputs(shapes)
    name = find_architecture(shapes, outputs)
    kwargs = {} if outputs is None else {"kwargs": {"num_classes": outputs}}
    return ModelSurvey(
        {"torchvision": name, **kwargs},
        text,
        outputs,
        note=f"'{path.name}' has the layers of torchvision's {name}"
        + ("" if outputs is None else f" with {outputs} classes"),
    )


def _read_shapes(path: Path) -> Shapes:
    from compress.networks.weights import read_weights  # imports torch

    return {name: tuple(value.shape) for name, value in read_weights(path).items()}
