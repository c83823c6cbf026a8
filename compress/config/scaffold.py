"""New pipeline files for `compress init`: a commented template, filled in for a network and its data."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from compress.catalog import NETWORKS
from compress.config.document import dump_document
from compress.config.load import parse_pipeline
from compress.errors import ConfigError, ConfigValueError
from compress.storage.files import require_output

_TEMPLATE = """\
# From a trained network to a smaller, checked ONNX file:  compress run {file}
# Paths are relative to this file. `compress schema` prints every key that may stand here.
name: {name}
seed: 0

data:
{data}
  calibration: 1000    # training images for scores and batch-norm statistics; lower it for small sets
  validation: 2000     # training images that choose the best epoch
  preprocessing:       # use what the network was trained with
{preprocessing}

stages:
  - stage: load        # build the network, load its weights strictly, measure the baseline
    model:
{model}
    weights: {weights}

  - stage: prune       # remove channels down to a budget
    target:
      macs: {target}        # kept share of the baseline's MACs
    # criterion: reconstruction    # the default; `compress list criteria` shows all

  - stage: finetune    # train the slim network; the best epoch is chosen on validation images
    epochs: 2
    learning_rate: 0.02
    distillation: {{weight: 0.9, temperature: 4.0}}

  - stage: export      # write and check the ONNX file

  - stage: verify      # measure the file in ONNX Runtime
    gates:
      max_drop: {{top1: 0.01}}    # one percentage point of top-1
      # min_speedup: 1.2        # baseline latency / slim latency
"""


@dataclass(frozen=True)
class Scaffold:
    """Options of `compress init`.

    Attributes:
        model: "pkg.module:callable", "file.py:callable", "timm:NAME" or a torchvision name.
        weights: Path of the weights.
        data: A folder with train.npz and test.npz, or with train/ and test/ (or val/), or a torchvision data set name.
        target_macs: Kept ratio of the MACs, in (0, 1].
        input_shape: (C, H, W) of the network's input.
    """

    model: str
    weights: str
    data: str
    target_macs: float = 0.5
    input_shape: tuple[int, int, int] = (3, 32, 32)


def write_pipeline(path: Path, scaffold: Scaffold, force: bool = False) -> None:
    """Write a commented pipeline file that `compress validate` accepts.

    Args:
        path: New file.
        scaffold: Options, with paths relative to the current folder.
        force: True to replace an existing file.

    Raises:
        ConfigError: The file exists, its folder does not, or a value is out of range.
    """
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already and must not be overwritten.", hint="--force replaces it.")
    require_output("PATH", path, "pipeline file (.yaml, .yml)")
    text = render_pipeline(path, scaffold)
    try:
        parse_pipeline(text, path)
    except ConfigError as error:
        raise ConfigValueError(f"No pipeline can be written from these options:\n{error}") from error
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the pipeline file cannot be written: {error.strerror}.") from error


def render_pipeline(path: Path, scaffold: Scaffold) -> str:
    """Return the text of a pipeline file for `path`, with paths relative to its folder."""
    return _TEMPLATE.format(
        file=path.name,
        name=_scalar(re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "pipeline"),
        data=_indent(2, _data(scaffold, path.parent)),
        preprocessing=_indent(4, _preprocessing(scaffold)),
        model=_indent(6, _model(scaffold.model, path.parent)),
        weights=_scalar(_relative(scaffold.weights, path.parent)),
        target=scaffold.target_macs,
    )


def _data(scaffold: Scaffold, folder: Path) -> dict[str, object]:
    given = Path(scaffold.data).expanduser()
    if not given.exists() and re.fullmatch(r"[A-Z][A-Za-z0-9]*", scaffold.data):
        half = {"torchvision": scaffold.data, "download": True}
        return {"train": dict(half), "evaluation": dict(half)}
    if (given / "train").is_dir():
        test = "test" if (given / "test").is_dir() else "val"
        return {
            "train": {"folder": _relative(str(given / "train"), folder)},
            "evaluation": {"folder": _relative(str(given / test), folder)},
        }
    return {
        "train": {"arrays": _relative(str(given / "train.npz"), folder)},
        "evaluation": {"arrays": _relative(str(given / "test.npz"), folder)},
    }


def _preprocessing(scaffold: Scaffold) -> dict[str, object]:
    channels, height, width = scaffold.input_shape
    values: dict[str, object] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    if channels == 1:
        values = {"mean": [0.5], "std": [0.5], "channels": "L"}
    if (Path(scaffold.data).expanduser() / "train").is_dir():  # image files differ in size
        values |= {"resize": max(height, width), "crop": [height, width]}
    return values


def _model(model: str, folder: Path) -> dict[str, object]:
    place, colon, name = model.rpartition(":")
    if not colon or place in NETWORKS:
        return {place or "torchvision": name}
    return {"factory": f"{_relative(place, folder)}:{name}" if place.endswith(".py") else model}


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
