"""Where do the paths of a pipeline lead?

A path written in the file is relative to the file; one given on the command line or in the environment is relative
to the current folder, as everywhere on a command line.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.config.document import Document
from compress.config.problems import KeyPath, Origin, Problem

PRETRAINED = "pretrained"  # in place of a path: what the network's library offers
UNTRAINED = "none"  # in place of a path: a seeded initialisation
_SOURCE_KEYS = ("arrays", "labels", "idx", "folder", "root", "masks", "images", "coco", "yolo", "unlabelled")
_TASK_KEYS = ("own", "postprocess", "loss")
_HALVES = {"train": "train.npz", "evaluation": "test.npz"}


def resolve_paths(values: dict[str, Any], document: Document, folder: Path) -> None:
    """Make every path in the plain values of a checked pipeline absolute, in place.

    Args:
        values: Dumped PipelineConfig.
        document: Tells which values came from the command line.
        folder: Of the pipeline file.
    """
    _resolve(_path_values(values), document, folder)


def resolve_gate_paths(values: dict[str, Any], document: Document, folder: Path) -> None:
    """Do the same for the plain values of a checked file of gates."""
    evaluation = values["evaluation"] or {}
    task = _references(("task",), values["task"], _TASK_KEYS)
    _resolve([*task, *_source_paths(("evaluation",), evaluation), *_shifted_paths((), values)], document, folder)


def _resolve(found: Iterable[tuple[KeyPath, dict[str, Any], str]], document: Document, folder: Path) -> None:
    for path, container, key in found:
        base = folder if document.origin(path).in_file else Path()
        container[key] = _absolute(base, container[key])


def use_array_folder(values: dict[str, Any], document: Document, folder: Path, environ: Mapping[str, str]) -> None:
    """Let `data.array_folder`, or the environment variable it names, take the place of train and evaluation.

    Args:
        values: Dumped PipelineConfig, changed in place; afterwards it names no array folder any more.
        document: A folder that lacks its files goes to its problems.
        folder: Of the pipeline file.
        environ: Environment variables.
    """
    data = values["data"]
    given, variable = data.pop("array_folder"), data.pop("array_folder_env")
    if given is not None:
        origin, what = document.origin(("data", "array_folder")), "data.array_folder"
        base = folder if origin.in_file else Path()
    elif variable is not None and environ.get(variable):
        given, base = environ[variable], Path()
        origin, what = Origin(2, 0, 0, f"environment variable {variable}"), "it"
    else:
        return
    found = _absolute(base, given)
    missing = [name for name in _HALVES.values() if not os.path.isfile(os.path.join(found, name))]
    if missing:
        state = f"which has no {' and no '.join(missing)}" if os.path.isdir(found) else "which is no folder"
        text = f"{what} must be a folder with train.npz and test.npz, got '{found}', {state}."
        document.problems.append(Problem(origin, text))
    for half, name in _HALVES.items():
        data[half] = {"arrays": os.path.join(found, name)}


def _path_values(values: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any], str]]:
    """Yield key path, container and key of every value that is a path."""
    for part in (*_HALVES, "validation"):
        source = values["data"][part]
        if isinstance(source, dict):  # validation may be a number of training images
            yield from _source_paths(("data", part), source)
    yield from _references(("task",), values["task"], _TASK_KEYS)
    if (values["deploy"] or {}).get("table") is not None:
        yield ("deploy", "table"), values["deploy"], "table"
    for index, stage in enumerate(values["stages"]):
        if stage["stage"] == "load":
            if stage["weights"] not in (None, PRETRAINED, UNTRAINED):
                yield ("stages", index, "weights"), stage, "weights"
            if "onnx" in stage["model"]:
                yield ("stages", index, "model", "onnx"), stage["model"], "onnx"
            if stage["model"].get("factory", "").rpartition(":")[0].endswith(".py"):
                yield ("stages", index, "model", "factory"), stage["model"], "factory"
        if stage["stage"] == "finetune" and stage["rewind_to"] is not None:
            yield ("stages", index, "rewind_to"), stage, "rewind_to"
        if isinstance(stage.get("criterion"), dict):
            yield from _references(("stages", index, "criterion"), stage["criterion"], ("torch_pruning",))
        if stage["stage"] == "verify":
            yield from _shifted_paths(("stages", index), stage)


def _shifted_paths(path: KeyPath, verify: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any], str]]:
    for name, source in ((verify["robustness"] or {}).get("shifted") or {}).items():
        yield from _source_paths((*path, "robustness", "shifted", name), source)


def _source_paths(path: KeyPath, source: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any], str]]:
    for key in _SOURCE_KEYS:
        if source.get(key) is not None:
            yield (*path, key), source, key
    yield from _references(path, source, ("own",))


def _references(
    path: KeyPath, values: dict[str, Any], keys: Iterable[str]
) -> Iterator[tuple[KeyPath, dict[str, Any], str]]:
    """Yield the references to Python files, which begin with a path."""
    for key in keys:
        if (values.get(key) or "").rpartition(":")[0].endswith(".py"):
            yield (*path, key), values, key


def _absolute(base: Path, text: str) -> str:
    return os.path.abspath(os.path.join(base, os.path.expanduser(text)))
