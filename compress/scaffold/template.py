"""Text of a new pipeline file for `compress init`: a commented template, filled in for a network and its data."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.config.document import dump_document
from compress.config.load import Pipeline, parse_pipeline
from compress.config.paths import PRETRAINED
from compress.engine.preflight import images_for
from compress.errors import ConfigError, ConfigValueError, DataError
from compress.progress import Progress, SilentProgress
from compress.scaffold.data_contents import DataSurvey
from compress.scaffold.data_survey import survey_data
from compress.scaffold.model_survey import ModelSurvey, require_one_class_for_each, survey_model
from compress.scaffold.trial import FoundNormalization, find_normalization, try_pipeline
from compress.storage.files import require_output

_TEMPLATE = """\
# yaml-language-server: $schema={schema}
# From a trained network to a smaller, checked ONNX file:  compress run {file}
# Paths are relative to this file. `compress schema` prints every key that may stand here.
name: {name}
seed: 0
{task}
data:
{data}
  calibration: {calibration}    # training images for scores and batch-norm statistics
{validation}
  preprocessing:       # {origin}
{preprocessing}

stages:
  - stage: load        # build the network, load its weights strictly, measure the baseline
    model:
{model}{weights}

  - stage: prune       # remove channels down to a budget
    target:
      macs: {target}        # kept share of the baseline's MACs; also latency, latency_ms, params, size_mb
    # criterion: reconstruction    # the default; `compress list criteria` shows all

  - stage: finetune    # train the slim network; the best epoch is chosen on validation images
    epochs: {epochs}
    batch_size: {batch_size}
    learning_rate: {learning_rate}
    distillation: {{weight: 0.9, temperature: 4.0}}

  - stage: export      # write and check the ONNX file

  - stage: verify      # measure the file in ONNX Runtime
    gates:
{gates}
      # min_speedup: 1.2        # baseline latency / slim latency
"""
_PATHS = ("arrays", "folder", "unlabelled", "idx", "labels", "images", "masks", "root")
_RISE = 0.05  # share of the targets' spread that a regression's error may rise by
_FEWEST_STEPS, _MOST_EPOCHS = 100, 20
_MOST_DROP = 0.15  # limit of a drop, for any number of images
_COARSE = 0.1  # drop that a gate should be able to show
_IMAGENET_CLASSES = 1000
_DISAGREEMENT = 0.1  # share of images that baseline and slim network judge differently, for the gate's resolution
_FEWEST, _LEAST = 2, 12  # images of calibration and evaluation, and of all data
_SMALL, _CROP, _RESIZE = 64, 224, 256  # pixels


@dataclass(frozen=True)
class Scaffold:
    """Options of `compress init`.

    Attributes:
        data: Folder, .npz file or torchvision data set, see `data_survey.FORMS`.
        model: Spelling of a network, see `model_survey.SPELLINGS`.
        weights: Path of a checkpoint; None if `model` is one, or for the weights that a library offers.
        target_macs: Kept ratio of the MACs, in (0, 1].
        input_shape: (C, H, W) of the network's input; None for that of the images.
    """

    data: str
    model: str
    weights: str | None = None
    target_macs: float = 0.5
    input_shape: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Written:
    """Result of `compress init`.

    Attributes:
        found: Sentences on data and network.
        warnings: Sentences on what may be wrong.
    """

    found: tuple[str, ...]
    warnings: tuple[str, ...]


def write_pipeline(path: Path, scaffold: Scaffold, force: bool = False, progress: Progress | None = None) -> Written:
    """Look at data and checkpoint, try both together, and write a commented pipeline file that runs as it is.

    Args:
        path: New file.
        scaffold: Options, with paths relative to the current folder.
        force: True to replace an existing file.
        progress: Receives progress by part.

    Raises:
        ConfigError: The file exists, its folder does not, or an option is wrong.
        DataError, ArtifactError, ModelError, NonFinite: Data or checkpoint cannot be used, or not together.
    """
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already and must not be overwritten.", hint="--force replaces it.")
    require_output("--out", path, "pipeline file (.yaml, .yml)")
    data = survey_data(scaffold.data)
    model = survey_model(scaffold.model, scaffold.weights, data.classes)
    require_one_class_for_each(model, data.classes if data.task == "classification" else None)
    _require_own_weights(data, model)
    progress, notes = progress or SilentProgress(), [*_describe(data), *([model.note] if model.note else [])]
    normalization = None
    if model.module is not None and data.images is not None and data.task == "classification" and data.is_labelled:
        pipeline = _parse(_render(path, scaffold, data, model), path)
        normalization = find_normalization(pipeline, model.module)
        notes += [] if normalization is None else [normalization.note]
    text = _render(path, scaffold, data, model, normalization)
    warnings = try_pipeline(_parse(text, path), progress) if data.images is not None else []
    try:
        path.write_text(text, encoding="utf-8")
        _write_schema(path.parent / SCHEMA_FILE)
    except OSError as error:
        raise ConfigError(f"{path}: the pipeline file cannot be written: {error.strerror}.") from error
    return Written(tuple(notes), (*data.notes, *_doubts(data, model), *warnings))


def _parse(text: str, path: Path) -> Pipeline:
    try:
        return parse_pipeline(text, path)
    except ConfigError as error:
        raise ConfigValueError(f"No pipeline can be written from these options:\n{error}") from error


SCHEMA_FILE = ".compress-schema.json"


def _write_schema(path: Path) -> None:
    from compress.config.json_schema import json_schema

    path.write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")


def _require_own_weights(data: DataSurvey, model: ModelSurvey) -> None:
    if model.weights == PRETRAINED and data.classes is not None and data.classes != _IMAGENET_CLASSES:
        raise ConfigError(
            f"--weights must be given: the weights of the library have 1,000 classes, the data {data.classes}.",
            hint="--weights best.pt, the checkpoint of the network trained on this data",
        )


def _describe(data: DataSurvey) -> list[str]:
    if data.images is None:
        return []
    kind = {
        "classification": f"of {data.classes} classes",
        "segmentation": f"with masks of {data.classes} classes",
        "regression": "with numbers",
    }[data.task]
    if not data.is_labelled:
        kind = "without labels: the slim network's outputs are compared with the baseline's"
    sizes = f"{data.sizes[0][0]} x {data.sizes[0][1]}" if len(data.sizes) == 1 else f"{len(data.sizes)} sizes or more"
    own = f", {data.evaluation_images:,} more for evaluation" if data.evaluation_images else ""
    return [f"{data.images:,} images ({sizes}) {kind}{own}"]


def _doubts(data: DataSurvey, model: ModelSurvey) -> list[str]:
    """Return sentences on evaluation images that decide hardly anything, and on outputs without images."""
    if data.images is None or data.task != "classification" or not data.is_labelled:
        return []
    sizes, doubts = _sizes(data), []
    if model.classes is not None and data.classes is not None and model.classes > data.classes:
        doubts = [
            f"The network has {model.classes} classes, the data {data.classes}. The first outputs are taken for the "
            "classes of the data, in the order of their names"
        ]
    if sizes.shown <= _COARSE:
        return doubts
    return [
        *doubts,
        f"{sizes.evaluation} evaluation images show drops of {100 * sizes.shown:.0f} percentage points and more. "
        f"A gate of 0.05 needs {images_for(0.05):,} images, one of 0.01 {images_for(0.01):,}.",
    ]


@dataclass(frozen=True)
class _Sizes:
    """Numbers of images that follow from the size of the data set."""

    calibration: int
    validation: int
    evaluation: int
    train: int

    @property
    def batch_size(self) -> int:
        """Batch size with at least sixteen batches an epoch, where the images suffice."""
        return max(8, min(128, 1 << (max(8, self.train // 16).bit_length() - 1)))

    @property
    def epochs(self) -> int:
        """Epochs with at least a hundred optimiser steps."""
        steps = max(1, self.train // self.batch_size)
        return min(_MOST_EPOCHS, max(2, math.ceil(_FEWEST_STEPS / steps)))

    @property
    def learning_rate(self) -> float:
        """Peak learning rate, lower for batches below 64."""
        return float(f"{0.02 * min(1.0, math.sqrt(self.batch_size / 64)):.1g}")

    @property
    def drop(self) -> float:
        """Limit of the accuracy drop: the shown one, as far as a drop is acceptable at all."""
        return min(_MOST_DROP, self.shown)

    @property
    def shown(self) -> float:
        """Accuracy drop that the evaluation images can tell from none, at least one percentage point."""
        return max(0.01, math.ceil(100 * 1.96 * math.sqrt(_DISAGREEMENT / self.evaluation)) / 100)


def _sizes(data: DataSurvey) -> _Sizes:
    if data.images is None:
        return _Sizes(1000, 2000, 10_000, 40_000)
    evaluation = data.evaluation_images or max(1, min(5000, data.images // 4))
    rest = data.images - (0 if data.evaluation_images else evaluation)
    calibration = max(_FEWEST, min(1000, rest // 4))
    validation = 0 if data.validation is not None else max(1, min(2000, rest // 5))
    if (train := rest - calibration - validation) < 1 or min(calibration, evaluation) < _FEWEST:
        raise DataError(
            f"The data must hold at least {_LEAST} images, they hold {data.images}.",
            hint="A verdict on accuracy takes hundreds of evaluation images.",
        )
    return _Sizes(calibration, validation, evaluation, train)


def _render(
    path: Path, scaffold: Scaffold, data: DataSurvey, model: ModelSurvey, found: FoundNormalization | None = None
) -> str:
    sizes, folder = _sizes(data), path.parent
    evaluation: Any = data.evaluation or sizes.evaluation
    sources = {"train": data.train, "evaluation": evaluation}
    lines = [f"  {name}: {_flow(_relative_source(source, folder))}" for name, source in sources.items()]
    if data.evaluation is None:
        lines[1] += "    # taken from train: right only if the network was trained without them"
    if data.validation is None:
        validation = f"  validation: {sizes.validation}    # training images that choose the best epoch"
    else:
        validation = f"  validation: {_flow(_relative_source(data.validation, folder))}"
    weights = "" if model.weights is None else f"\n    weights: {_scalar(_weights(model.weights, folder))}"
    preprocessing = _preprocessing(scaffold, data, model) | ({} if found is None else found.settings)
    return _TEMPLATE.format(
        schema=SCHEMA_FILE,
        file=path.name,
        name=_scalar(re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "pipeline"),
        task="" if data.task == "classification" else f"task: {data.task}\n",
        data="\n".join(lines),
        calibration=sizes.calibration,
        validation=validation,
        origin="use what the network was trained with" if found is None else found.origin,
        preprocessing=_indent(4, preprocessing),
        model=_indent(6, _model(model, folder, preprocessing, data)),
        weights=weights,
        target=scaffold.target_macs,
        epochs=sizes.epochs,
        batch_size=sizes.batch_size,
        learning_rate=sizes.learning_rate,
        gates=_gates(data, sizes),
    )


def _gates(data: DataSurvey, sizes: _Sizes) -> str:
    points = f"{100 * sizes.drop:.0f} percentage point{'' if sizes.drop == 0.01 else 's'}"
    if not data.is_labelled:
        agreement = 1 - max(0.05, sizes.drop)
        return f"      min: {{agreement: {agreement:g}}}    # share of images with the baseline's class"
    if data.task == "regression":
        rise = float(f"{_RISE * data.spread:.2g}") or _RISE
        return f"      max_rise: {{rmse: {rise:g}}}    # {_RISE:.0%} of the spread of the targets"
    if data.task == "segmentation":
        return f"      max_drop: {{miou: {sizes.drop:g}}}    # {points} of mIoU"
    images = "" if data.images is None else f"; {sizes.evaluation:,} images cannot tell smaller drops from none"
    if sizes.drop < sizes.shown:
        images = f"; {sizes.evaluation} images are too few to decide it"
    return f"      max_drop: {{top1: {sizes.drop:g}}}    # {points} of top-1{images if sizes.drop > 0.01 else ''}"


def _preprocessing(scaffold: Scaffold, data: DataSurvey, model: ModelSurvey) -> dict[str, object]:
    given = scaffold.input_shape or model.input_shape
    channels = given[0] if given is not None else model.channels or 3
    values: dict[str, object] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    if channels == 1:
        values = {"mean": [0.5], "std": [0.5], "channels": "L"}
    if model.layout != "NCHW":
        values["layout"] = model.layout
    return values | _geometry(given, data, "factory" in model.model or model.open_input is not None)


def _geometry(given: tuple[int, int, int] | None, data: DataSurvey, is_own: bool) -> dict[str, object]:
    """Return `resize` and `crop`; {} for images that go into the network in their size."""
    if given is not None and ((given[1], given[2]) not in data.sizes[:1] or len(data.sizes) > 1):
        return {"resize": max(given[1], given[2]), "crop": [given[1], given[2]]}
    is_small = all(max(size) <= _SMALL for size in data.sizes)
    if not data.sizes or (len(data.sizes) == 1 and (is_small or is_own)):
        return {}
    if not is_small:
        return {"resize": _RESIZE, "crop": [_CROP, _CROP]}
    side = min(min(size) for size in data.sizes)
    return {"resize": side, "crop": [side, side]}


def _model(survey: ModelSurvey, folder: Path, preprocessing: dict[str, Any], data: DataSurvey) -> dict[str, object]:
    values: dict[str, object] = dict(survey.model)
    if "onnx" in survey.model:
        values["onnx"] = _relative(survey.model["onnx"], folder)
    if survey.open_input is not None and data.sizes:
        height, width = preprocessing.get("crop", data.sizes[0])
        channels = 1 if preprocessing.get("channels") == "L" else 3
        shape = [height, width, channels] if survey.layout == "NHWC" else [channels, height, width]
        values["inputs"] = {_text(survey.open_input): shape}
    place, _, name = str(survey.model.get("factory", "")).rpartition(":")
    if place.endswith(".py"):
        values["factory"] = f"{_relative(place, folder)}:{name}"
    return values


def _weights(text: str, folder: Path) -> str:
    return text if text == "pretrained" else _relative(text, folder)


def _relative_source(source: Any, folder: Path) -> Any:
    if not isinstance(source, dict):
        return source
    return {key: _relative(value, folder) if key in _PATHS else value for key, value in source.items()}


def _relative(text: str, folder: Path) -> str:
    """Return a path relative to `folder` in place of the current folder; paths from ~ are unchanged."""
    if text.startswith("~") or os.path.isabs(text):
        return text
    try:
        return Path(os.path.relpath(text, folder)).as_posix()
    except ValueError:  # another drive
        return os.path.abspath(text)


def _indent(spaces: int, values: dict[str, object]) -> str:
    """Return a mapping as YAML, one key a line, without the last line break."""
    return "\n".join(f"{' ' * spaces}{key}: {_flow(value)}" for key, value in values.items())


def _flow(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(_flow(inner) for inner in value)}]"
    return _scalar(value)


def _scalar(value: object) -> str:
    """Return a value on one line, quoted if it needs quotes inside braces."""
    return dump_document([value]).removeprefix("- ").strip() if not isinstance(value, str) else _text(value)


def _text(value: str) -> str:
    """Return text plain if that is safe everywhere in YAML, otherwise in double quotes."""
    plain = re.fullmatch(r"[A-Za-z_./~][A-Za-z0-9_./:~+-]*", value) and not value.endswith(":")
    is_word = value.lower() in ("true", "false", "null", "~")
    return value if plain and not is_word and not value.startswith(".") else json.dumps(value, ensure_ascii=False)
