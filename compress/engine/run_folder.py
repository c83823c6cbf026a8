"""Files of a run folder for its user: the ONNX file and the slim torch checkpoint."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from compress.catalog import ONNX_MODEL
from compress.checkpoint.layout import write_slim
from compress.errors import ArtifactError, InternalError
from compress.model.artifacts import FactorySpec
from compress.storage.digest import digest_file
from compress.storage.store import Entry

MODEL_FILE = "model.onnx"
RECIPE_FILE = "slim/recipe.json"


def publish(folder: Path, entries: Sequence[Entry], kinds: Sequence[str], factory: FactorySpec) -> dict[str, Path]:
    """Copy the result of the last export into the run folder; files that are the same already stay.

    Args:
        folder: The run folder.
        entries: One for each stage.
        kinds: What each stage produced.
        factory: How the baseline is built.

    Returns:
        Name in the run folder -> file, of the ONNX model's files and the recipe.

    Raises:
        ArtifactError: The file system refused.
    """
    exported = [entry for entry, kind in zip(entries, kinds, strict=True) if kind == ONNX_MODEL]
    if not exported:
        raise InternalError("A pipeline was run that exports nothing.")
    source = exported[-1].folder
    try:
        names = sorted(file.name for file in source.glob(f"{MODEL_FILE}*"))
        for name in names:
            copy_if_other(source / name, folder / name)
        part = folder / ".slim.part"
        shutil.rmtree(part, ignore_errors=True)
        write_slim(source / "reference", part, factory)
        shutil.rmtree(folder / "slim", ignore_errors=True)
        os.rename(part, folder / "slim")
    except OSError as error:
        raise ArtifactError(f"Run folder '{folder}' must be writable: {error.strerror or error}.") from error
    return {name: folder / name for name in (*names, RECIPE_FILE)}


def copy_if_other(source: Path, target: Path) -> None:
    """Copy a file unless the target has the same content; whole or not at all."""
    if target.is_file() and digest_file(target) == digest_file(source):
        return
    part = target.with_name(f"{target.name}.part")
    shutil.copyfile(source, part)
    os.replace(part, target)
