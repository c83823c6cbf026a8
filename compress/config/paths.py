"""Absolute paths in place of the relative ones of a pipeline file or a file of gates.

A path in the file is relative to the file. A path from the command line or the environment is relative to the current
folder.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from compress.config.document import Document
from compress.config.problems import KeyPath, Origin, Problem
from compress.config.schema.base import PathKind, Section
from compress.config.schema.data import ArraysSource
from compress.config.schema.pipeline import PipelineConfig
from compress.config.schema.verify import DeployConfig

PRETRAINED = "pretrained"  # in place of a path: the weights that the network's library offers
UNTRAINED = "none"  # in place of a path: a seeded initialisation
_ARRAY_FILES = {"train": "train.npz", "evaluation": "test.npz"}

S = TypeVar("S", bound=Section)


def resolve_paths(section: S, document: Document, folder: Path) -> S:
    """Return a checked section with absolute paths.

    Args:
        section: Complete pipeline, or file of gates; its settings with a `PathKind` are paths.
        document: Document that records which values came from the command line.
        folder: Folder of the file.
    """
    return _Resolver(document, folder).resolve_section(section, ())


@dataclass(frozen=True)
class _Resolver:
    document: Document
    folder: Path

    def resolve_section(self, section: S, path: KeyPath) -> S:
        changed = {}
        for name, field in type(section).model_fields.items():
            value, place = getattr(section, name), (*path, name)
            kind = next((one for one in field.metadata if isinstance(one, PathKind)), None)
            resolved = self._resolve(value, place) if kind is None else self._resolve_text(value, kind, place)
            if resolved is not value:
                changed[name] = resolved
        if isinstance(section, DeployConfig) and section.command is not None and section.command_folder is None:
            changed["command_folder"] = os.path.abspath(self.folder)
        return section.model_copy(update=changed) if changed else section

    def _resolve(self, value: Any, path: KeyPath) -> Any:
        """Return a setting that is no path itself, with absolute paths in the sections it holds."""
        if isinstance(value, Section):
            return self.resolve_section(value, path)
        if isinstance(value, tuple) and any(isinstance(one, Section) for one in value):
            return tuple(self._resolve(one, (*path, index)) for index, one in enumerate(value))
        if isinstance(value, dict) and any(isinstance(one, Section) for one in value.values()):
            return {key: self._resolve(one, (*path, key)) for key, one in value.items()}
        return value

    def _resolve_text(self, text: str | None, kind: PathKind, path: KeyPath) -> str | None:
        if text is None or (kind is PathKind.WEIGHTS and text in (PRETRAINED, UNTRAINED)):
            return text
        if kind is PathKind.CODE and not text.rpartition(":")[0].endswith(".py"):
            return text
        return _absolute(self.folder if self.document.origin(path).in_file else Path(), text)


def use_array_folder(config: PipelineConfig, document: Document, environ: Mapping[str, str]) -> PipelineConfig:
    """Return a pipeline that reads its images from `data.array_folder`, or from the environment variable it names.

    Args:
        config: Checked, with absolute paths.
        document: A folder without the two files is added to its problems.
        environ: Environment variables.

    Returns:
        A pipeline without array folder; `data.train` and `data.evaluation` are its files where one is given.
    """
    data = config.data
    folder, variable = data.array_folder, data.array_folder_env
    origin, label = document.origin(("data", "array_folder")), "data.array_folder"
    if folder is None and variable is not None and environ.get(variable):
        folder = _absolute(Path(), environ[variable])
        origin, label = Origin(2, 0, 0, f"environment variable {variable}"), "it"
    update: dict[str, Any] = {"array_folder": None, "array_folder_env": None}
    if folder is not None:
        files = {half: os.path.join(folder, name) for half, name in _ARRAY_FILES.items()}
        update |= {half: ArraysSource(arrays=file) for half, file in files.items()}
        missing = [os.path.basename(file) for file in files.values() if not os.path.isfile(file)]
        if missing:
            state = f"which has no {' and no '.join(missing)}" if os.path.isdir(folder) else "which is no folder"
            text = f"{label} must be a folder with train.npz and test.npz, got '{folder}', {state}."
            document.problems.append(Problem(origin, text))
    return config.model_copy(update={"data": data.model_copy(update=update)})


def _absolute(base: Path, text: str) -> str:
    return os.path.abspath(os.path.join(base, os.path.expanduser(text)))
