"""Files of a run folder for its user: the ONNX file and the slim torch checkpoint."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from compress.catalog import ONNX_MODEL
from compress.checkpoint.layout import write_slim
from compress.errors import ArtifactError, InternalError
from compress.formats import FOLDER as FORMATS
from compress.model.artifacts import FactorySpec
from compress.storage.digest import digest_file
from compress.storage.store import Entry

MODEL_FILE = "model.onnx"
RECIPE_FILE = "slim/recipe.json"
LOADER_FILE = "load_slim.py"
_LOADER = '''"""Slim network of this run. Train it, save its state dict, and continue the run with it."""

from pathlib import Path

import compress

model = compress.load(Path(__file__).parent, own_class=True)
# torch.save(model.state_dict(), "trained.pt")
# compress run pipeline.yaml --weights trained.pt
'''


def publish(folder: Path, entries: Sequence[Entry], kinds: Sequence[str], factory: FactorySpec) -> dict[str, Path]:
    """Copy the result of the last export into the run folder; identical files are not rewritten.

    Args:
        folder: The run folder.
        entries: Stored result of each stage.
        kinds: Kind of artifact that each stage produced.
        factory: Factory of the baseline.

    Returns:
        Name in the run folder -> path, for the files of the ONNX model and of its further formats, and the recipe.

    Raises:
        ArtifactError: The run folder cannot be written.
    """
    exported = [entry for entry, kind in zip(entries, kinds, strict=True) if kind == ONNX_MODEL]
    if not exported:
        raise InternalError("A pipeline was run that exports nothing.")
    source = exported[-1].folder
    try:
        names = sorted(file.name for file in source.glob(f"{MODEL_FILE}*"))
        for name in names:
            copy_if_other(source / name, folder / name)
        formats = _replace_formats(folder, source)
        _replace_slim(folder, source / "reference", factory)
    except OSError as error:
        raise ArtifactError(f"Run folder '{folder}' must be writable: {error.strerror or error}.") from error
    return {name: folder / name for name in (*names, *formats, RECIPE_FILE)}


def publish_slim(folder: Path, entry: Entry, factory: FactorySpec) -> None:
    """Write the slim network of an unfinished run, and a script that loads it, into the run folder.

    Args:
        folder: The run folder.
        entry: Stored result of a stage that returned a torch network.
        factory: Factory of the baseline.

    Raises:
        ArtifactError: The run folder cannot be written.
    """
    try:
        _replace_slim(folder, entry.folder, factory)
        (folder / LOADER_FILE).write_text(_LOADER, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"Run folder '{folder}' must be writable: {error.strerror or error}.") from error


def _replace_formats(folder: Path, source: Path) -> list[str]:
    """Make the further formats of the ONNX file those of the stored result; return the names of their files."""
    shutil.rmtree(folder / FORMATS, ignore_errors=True)
    if not (source / FORMATS).is_dir():
        return []
    shutil.copytree(source / FORMATS, folder / FORMATS)
    return sorted(file.relative_to(folder).as_posix() for file in (folder / FORMATS).rglob("*") if file.is_file())


def _replace_slim(folder: Path, source: Path, factory: FactorySpec) -> None:
    part = folder / ".slim.part"
    shutil.rmtree(part, ignore_errors=True)
    write_slim(source, part, factory)
    shutil.rmtree(folder / "slim", ignore_errors=True)
    os.rename(part, folder / "slim")


def copy_if_other(source: Path, target: Path) -> None:
    """Copy a file atomically, unless the target has the same content."""
    if target.is_file() and digest_file(target) == digest_file(source):
        return
    part = target.with_name(f"{target.name}.part")
    shutil.copyfile(source, part)
    os.replace(part, target)
