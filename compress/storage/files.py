"""Atomic writes, and checks of the output files that command-line options name.

An output may be a new file, an empty file, or an earlier output of the same kind. Other files, links, devices and pipes
are never replaced.
"""

import json
import os
import secrets
import time
import zipfile
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError, ConfigError

_HEAD_BYTES = 4096
_MOST_JSON_BYTES = 2**28


def write_atomic(path: Path, content: str | bytes | memoryview, *, is_shared: bool = False) -> None:
    """Write a temporary file beside `path` and rename it, so that `path` is complete or unchanged.

    Args:
        path: File to write; missing folders are created.
        content: Bytes, or text to encode as UTF-8.
        is_shared: True if several processes may write this file at once; their temporary files then differ in name.

    Raises:
        OSError: The folder is not writable, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part" if is_shared else f".{path.name}.part")
    try:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def file_system_time(folder: Path) -> float:
    """Return the time of a folder's file system, in seconds, to compare times of its files with.

    A network drive has a clock of its own. The clock of this host takes its place where the folder is not writable.
    """
    probe = folder / f".clock.{secrets.token_hex(4)}"
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def require_output(option: str, path: Path, kind: str) -> None:
    """Check, before any long work, that an output can be written and replaces no other file.

    Args:
        option: Name of the command-line option in messages.
        path: Value of the option.
        kind: Kind of output, a key of `KINDS`.

    Raises:
        ConfigError: The path is a folder, a link, a device or a file of another kind, or its folder does not exist.
    """
    try:
        if path.is_dir() or not path.absolute().parent.is_dir():
            what = "is a folder" if path.is_dir() else "is in a folder that does not exist"
            raise ConfigError(f"{option} must be a file to write, '{path}' {what}.")
        try:
            path.lstat()
        except FileNotFoundError:
            return
        if path.is_symlink():
            raise ConfigError(
                f"{option} must be a regular file, '{path}' is a symbolic link to '{path.readlink()}'.",
                hint="Name the file itself.",
            )
        if not path.is_file():
            raise ConfigError(f"{option} must be a regular file, '{path}' is a device, a pipe or a socket.")
        if path.stat().st_size and not KINDS[kind](path):
            raise ConfigError(
                f"{option} replaces only a {kind} that was written before, '{path}' is another file.",
                hint="Name a file that does not exist, or remove that one.",
            )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{option} must be a file to write, '{str(path)[:200]}' cannot be one: {reason}.") from error


def remove_earlier(option: str, path: Path, kind: str) -> None:
    """Check an output as `require_output` does, and remove the file of an earlier command.

    Raises:
        ConfigError: As `require_output`.
        ArtifactError: The earlier file cannot be removed.
    """
    require_output(option, path, kind)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be replaced: {error.strerror}.") from error


def _is_json(keys: Collection[str], without: Collection[str] = ()) -> Callable[[Path], bool]:
    def check(path: Path) -> bool:
        values = _read_object(path)
        return all(key in values for key in keys) and not any(key in values for key in without)

    return check


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if the file holds no JSON object."""
    if path.stat().st_size > _MOST_JSON_BYTES:
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _head(path: Path) -> str:
    with path.open("rb") as stream:
        return stream.read(_HEAD_BYTES).decode("utf-8", "replace")


def _is_junit(path: Path) -> bool:
    return _head(path).startswith("<?xml") and "<testsuites" in _head(path)


def _is_page(path: Path) -> bool:
    return "Content-Security-Policy" in _head(path) and "<!doctype html>" in _head(path).lower()


def _is_verdict_page(path: Path) -> bool:
    """Return whether a file is a page of this program, other than the page of a run beside its `report.json`."""
    return _is_page(path) and not (path.name == "report.html" and path.with_name("report.json").exists())


def _is_bundle(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return {"manifest.json", "model.onnx"} <= set(archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def _is_pipeline(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except ValueError:
        return False
    return path.suffix.lower() in (".yaml", ".yml")


KINDS: dict[str, Callable[[Path], bool]] = {
    "JSON verdict": _is_json(("name", "verdict"), without=("signature", "stages")),
    "JSON overview": _is_json(("target", "potential", "latency", "nodes")),
    "JUnit file": _is_junit,
    "page": _is_page,
    "page of a verdict": _is_verdict_page,
    "latency table": _is_json(("kind", "conditions", "samples")),
    "bundle": _is_bundle,
    "pipeline file (.yaml, .yml)": _is_pipeline,
}
