"""Survey of a network for a new pipeline file: spelling of a model, header of a checkpoint, architecture."""

import ast
import inspect
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.catalog import NETWORKS
from compress.config.paths import PRETRAINED
from compress.errors import ConfigError, ModelError
from compress.model.artifacts import FactorySpec
from compress.networks.architectures import CHECKPOINTS, Shapes, count_outputs, find_architecture

if TYPE_CHECKING:  # imports torch
    from torch import nn

SPELLINGS = """MODEL is one of these:
  a checkpoint of a torchvision network, such as best.pt
  resnet18 (torchvision), timm:NAME, file.py:build or pkg.module:build, with --weights FILE
  model.onnx, which holds its weights"""
_CLASSES = ("num_classes", "classes", "n_classes", "nb_classes", "num_class", "nc")


@dataclass(frozen=True)
class ModelSurvey:
    """A network and its weights, as a pipeline file names them.

    Attributes:
        model: Section `model`.
        weights: Path of the weights, or "pretrained"; None for an ONNX file, which holds them.
        classes: Outputs of the last layer; None if they are not known.
        input_shape: (C, H, W) that the network was made for; None if it is not known.
        channels: Input channels, 1 or 3; None if they are not known.
        layout: "NCHW" or "NHWC".
        open_input: Name of an ONNX file's only input whose height and width are open, or None.
        note: Sentence on how the network was found; "" if it was named.
        module: The network with its weights; None for an ONNX file and for pretrained weights.
    """

    model: dict[str, Any]
    weights: str | None
    classes: int | None = None
    input_shape: tuple[int, int, int] | None = None
    channels: int | None = None
    layout: str = "NCHW"
    open_input: str | None = None
    note: str = field(default="")
    module: "nn.Module | None" = field(default=None, compare=False)


def survey_model(text: str, weights: str | None, classes: int | None) -> ModelSurvey:
    """Read the spelling of a model and its checkpoint, build the network, and load the weights strictly.

    Args:
        text: Spelling, see `SPELLINGS`.
        weights: Path of a checkpoint; None if `text` is one, or for the weights that a library offers.
        classes: Classes of the data; None if they are not known.

    Raises:
        ConfigError: The spelling is unknown, a file is missing, or weights are.
        ModelError: No architecture has the layers of the checkpoint, or the network cannot be built.
        ArtifactError: The checkpoint cannot be read, holds a module in place of a state dict, or does not fit.
    """
    path = Path(text).expanduser()
    if path.suffix.lower() == ".onnx":
        return _survey_onnx(path, text)
    if path.suffix.lower() in CHECKPOINTS:
        if weights is not None:
            raise ConfigError(f"MODEL must name a network where --weights is given, got the checkpoint '{text}'.")
        return _opened(_survey_checkpoint(path, text), classes)
    model = _parse_spelling(text, path)
    if weights is None:
        if "factory" in model:
            raise ConfigError(f"--weights must be given for the network of '{text}'.", hint="--weights best.pt")
        return ModelSurvey(model, PRETRAINED)
    outputs = count_outputs(_read_shapes(Path(weights).expanduser()))
    if "factory" not in model and outputs is not None:
        model["kwargs"] = {"num_classes": outputs}
    return _opened(ModelSurvey(model, weights, outputs), classes)


def _parse_spelling(text: str, path: Path) -> dict[str, Any]:
    """Return the section `model` of a named network."""
    place, colon, name = text.rpartition(":")
    file = Path(place if colon else text).expanduser()
    if file.suffix == ".py":
        if not file.is_file():
            raise ConfigError(f"MODEL file '{file}' does not exist.", hint=SPELLINGS)
        if not colon:
            defined = _defined_names(file)
            known = f" The file defines {', '.join(defined[:6])}." if defined else ""
            raise ConfigError(
                f"MODEL '{text}' must name the function or class that builds the network.{known}",
                hint=f"{text}:{defined[0] if defined else 'build'}",
            )
    elif not colon and (path.exists() or path.suffix.lower() in (".h5", ".keras", ".tflite", ".pb", ".engine")):
        raise ConfigError(f"MODEL '{text}' is no checkpoint that can be read, and no network.", hint=SPELLINGS)
    kind = place if place in NETWORKS else "factory" if colon else "torchvision"
    return {kind: text if kind == "factory" else name}


def _defined_names(file: Path) -> list[str]:
    """Return the public functions and classes of a Python file, without running it."""
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError):
        return []
    named = (node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return [name for name in named if not name.startswith("_")]


def _survey_onnx(path: Path, text: str) -> ModelSurvey:
    if not path.is_file():
        raise ConfigError(f"MODEL file '{text}' does not exist.", hint=SPELLINGS)
    from compress.onnx_file.io import load_onnx, read_signature

    signature = read_signature(load_onnx(path))
    first, last = signature.inputs[0].shape[1:], signature.outputs[0].shape
    classes = last[1] if len(last) == 2 and isinstance(last[1], int) else None
    found = ModelSurvey({"onnx": text}, None, classes)
    if len(first) != 3 or len(signature.inputs) > 1:
        return found
    is_last = first[0] not in (1, 3) and first[2] in (1, 3)
    channels, height, width = (first[2], *first[:2]) if is_last else first
    found = replace(found, layout="NHWC" if is_last else "NCHW", channels=channels if channels in (1, 3) else None)
    if isinstance(channels, int) and isinstance(height, int) and isinstance(width, int):
        return replace(found, input_shape=(channels, height, width))
    return replace(found, open_input=signature.inputs[0].name)


def _survey_checkpoint(path: Path, text: str) -> ModelSurvey:
    if not path.is_file():
        raise ConfigError(f"MODEL file '{text}' does not exist.", hint=SPELLINGS)
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


def _opened(survey: ModelSurvey, classes: int | None) -> ModelSurvey:
    """Build the network, load its weights, and add what only the network knows."""
    from torch import nn

    from compress.stages.load import load_network  # imports torch

    model = dict(survey.model)
    if "factory" in model and (kwargs := _class_kwargs(_absolute(model["factory"]), survey.classes or classes)):
        model["kwargs"] = kwargs
    place = {"factory": _absolute(model["factory"])} if "factory" in model else {}
    spec = FactorySpec.from_model({"kwargs": {}, "inputs": {}, "outputs": (), **model, **place})
    assert survey.weights is not None
    module = load_network(spec, str(Path(survey.weights).expanduser()))
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    channels = first.in_channels if first is not None and first.in_channels in (1, 3) else None
    known = None if "factory" in model else survey.classes  # the last layer of other networks may not be their output
    return replace(survey, model=model, classes=known, channels=channels, module=module)


def _class_kwargs(reference: str, classes: int | None) -> dict[str, int]:
    """Return the keyword argument for the number of classes, if a factory has one without the right default."""
    from compress.user_code import import_callable

    try:
        parameters = inspect.signature(import_callable(reference)).parameters
    except (TypeError, ValueError):
        return {}
    name = next((name for name in _CLASSES if name in parameters), None)
    return {} if name is None or classes is None or parameters[name].default == classes else {name: classes}


def _absolute(reference: str) -> str:
    place, _, name = reference.rpartition(":")
    return f"{Path(place).expanduser().absolute()}:{name}" if place.endswith(".py") else reference


def require_one_class_for_each(model: ModelSurvey, classes: int | None) -> None:
    """Refuse data with more classes than the network has.

    Raises:
        ModelError: The network has one output, or fewer outputs than the data have classes.
    """
    if classes is None or model.classes is None or classes <= model.classes:
        return
    if model.classes == 1:
        raise ModelError(
            f"The network has one output for {classes} classes; a classifier must have one output for each.",
            hint="Write a task of your own for a single logit: docs/tasks.md, section A task of your own.",
        )
    raise ModelError(
        f"The data have {classes} classes, the network {model.classes}.",
        hint="Give the data that the network was trained on, in the same order of classes.",
    )


def _read_shapes(path: Path) -> Shapes:
    from compress.networks.weights import read_weights  # imports torch

    return {name: tuple(value.shape) for name, value in read_weights(path).items()}
