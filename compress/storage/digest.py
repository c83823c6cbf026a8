"""SHA-256 digests of values, files and image sources, and JSON records that hold their own digest.

    {"schema": 1, ..., "record_digest": "SHA-256 of the canonical JSON of everything else"}

Digests are hexadecimal. The digest of a record reveals damage and edits by hand; it is no signature.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError

_CHUNK_BYTES = 1 << 20
_CONTENT_KEYS = ("arrays", "idx", "labels", "coco")
_FOLDER_KEYS = ("folder", "masks", "images", "yolo")
_ADDED = {"polygons": False, "keypoints": None}  # settings added since -> the default that digests leave out
_PATH_KEYS = (*_CONTENT_KEYS, *_FOLDER_KEYS, "root", "unlabelled", "own")


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of a plain value: sorted keys, no spaces, ASCII.

    Raises:
        ValueError: A number is not finite.
        TypeError: A value has no form in JSON.

    >>> canonical_json({"b": (1, 2.5), "a": None})
    '{"a":null,"b":[1,2.5]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_value(value: Any) -> str:
    """Return the digest of a plain value, independent of the order of keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's bytes, read in chunks of 1 MiB.

    Raises:
        ArtifactError: The file is missing, unreadable, or no regular file.
    """
    digest = hashlib.sha256()
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():  # a read may block for ever
            raise ArtifactError(f"'{path}' must be a regular file, it is a device, a pipe or a socket.")
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ArtifactError(f"'{path}' must be a readable file: {error.strerror}.") from error
    return digest.hexdigest()


def digest_evaluation(data: Mapping[str, Any]) -> str:
    """Return the digest of the evaluation images, those taken from the training source included.

    Args:
        data: Plain values of a checked `data` section with absolute paths.
    """
    if isinstance(data["evaluation"], dict):
        return digest_data(data["evaluation"])
    sizes = {name: data[name] for name in ("calibration", "validation", "evaluation", "split_seed")}
    sizes["validation"] = sizes["validation"] if isinstance(sizes["validation"], int) else None
    return digest_value({"of": digest_data(data["train"]), **sizes})


def without_added(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source without the settings that were added later and have their default."""
    return {key: value for key, value in source.items() if key not in _ADDED or value != _ADDED[key]}


def digest_data(source: Mapping[str, Any]) -> str:
    """Return the digest of the content of an image source, independent of the paths of its files.

    - arrays, idx, coco: bytes of the files.
    - folder, masks, yolo: relative name, size and modification time of each file; reading all images takes minutes.
    - unlabelled: bytes of a file, or listing of a folder.
    - own: keyword arguments, and the files and folders that they name. The code has a digest of its own.
    - torchvision: name and half. Without `download`, also the listing of `root`. With it, files may be missing, and
      torchvision checks their digests.

    Args:
        source: Plain values of a checked source (`data.train` or `data.evaluation`) with absolute paths.

    Raises:
        ArtifactError: A file or folder is missing.
    """
    parts = {key: value for key, value in without_added(source).items() if key not in _PATH_KEYS}
    for key in _CONTENT_KEYS:
        if source.get(key) is not None:
            parts[key] = digest_file(Path(source[key]))
    for key in _FOLDER_KEYS:
        if source.get(key) is not None:
            parts[key] = _digest_listing(Path(source[key]))
    if source.get("unlabelled") is not None:
        parts["unlabelled"] = _digest_place(Path(source["unlabelled"]))
    if source.get("own") is not None:
        texts = {key: Path(value) for key, value in source["kwargs"].items() if isinstance(value, str)}
        parts["named"] = {key: _digest_place(path) for key, path in texts.items() if _is_data(path)}
    if source.get("torchvision") is not None and not source.get("download"):
        parts["root"] = _digest_listing(Path(source["root"]))
    return digest_value(parts)


def _is_data(path: Path) -> bool:
    """Return whether a text names a file or folder, other than one around the current folder, such as "" or "/"."""
    return path.exists() and not Path.cwd().resolve().is_relative_to(path.resolve())


def _digest_place(path: Path) -> str:
    """Return the digest of the bytes of a file, or of the listing of a folder."""
    return _digest_listing(path) if path.is_dir() else digest_file(path)


def _digest_listing(root: Path) -> str:
    """Return the digest of the relative names, sizes and modification times of all files below a folder."""
    if not root.is_dir():
        raise ArtifactError(f"Data folder '{root}' does not exist.")
    entries = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            state = path.stat() if path.exists() else path.lstat()  # a dangling link has no target
            entries.append((path.relative_to(root).as_posix(), state.st_size, state.st_mtime_ns))
    return digest_value(sorted(entries))


DIGEST_KEY = "record_digest"


def sealed(content: bytes) -> bytes:
    """Return content behind its SHA-256, 32 bytes, for files whose format does not notice changed bits."""
    return hashlib.sha256(content).digest() + content


def unsealed(content: bytes) -> bytes | None:
    """Return the content of `sealed`; None if it differs from its digest."""
    size = hashlib.sha256().digest_size
    whole = content[size:]
    return whole if hashlib.sha256(whole).digest() == content[:size] else None


class RecordDamaged(ArtifactError):
    """A JSON record is unreadable, or differs from its digest."""


def add_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record, as JSON reads it back, with its digest as the last value.

    Args:
        values: Plain values; numbers may be NaN or infinite.

    Raises:
        TypeError: A value has no form in JSON.
    """
    plain: dict[str, Any] = json.loads(json.dumps(values))
    plain.pop(DIGEST_KEY, None)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return {**plain, DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()}


def check_digest(values: Any, where: str) -> dict[str, Any]:
    """Return a record whose digest is right.

    Args:
        values: Values that were read from JSON.
        where: Name of the file in messages.

    Raises:
        RecordDamaged: The values are no JSON object, have no digest, or differ from it.
    """
    if not isinstance(values, dict):
        raise RecordDamaged(f"'{where}' must hold a JSON object.")
    if DIGEST_KEY not in values:
        raise RecordDamaged(f"'{where}' has no digest of itself ({DIGEST_KEY}).")
    try:
        is_intact = add_digest(values)[DIGEST_KEY] == values[DIGEST_KEY]
    except (ValueError, TypeError, RecursionError):
        is_intact = False
    if not is_intact:
        raise RecordDamaged(f"'{where}' differs from its digest: it was damaged or edited.")
    return values


def read_json(path: Path, *, allows_nan: bool = False) -> Any:
    """Return the values of a JSON file without repeated keys.

    Args:
        path: The JSON file.
        allows_nan: True to read NaN and Infinity, which are not in the JSON standard, as numbers.

    Raises:
        RecordDamaged: The file is missing, unreadable, no JSON, or repeats a key.
    """
    try:
        return parse_json(path.read_bytes(), str(path), allows_nan=allows_nan)
    except FileNotFoundError as error:
        raise RecordDamaged(f"'{path}' does not exist.") from error
    except OSError as error:
        raise RecordDamaged(f"'{path}' must be a readable file: {error.strerror or error}.") from error


def parse_json(content: bytes, where: str, *, allows_nan: bool = False) -> Any:
    """Return the values of JSON in UTF-8 without repeated keys.

    Args:
        content: The JSON.
        where: Name of the file in messages.
        allows_nan: True to read NaN and Infinity, which are not in the JSON standard, as numbers.

    Raises:
        RecordDamaged: It is no JSON, or repeats a key.
    """
    refusal = None if allows_nan else _refuse_constant
    try:
        return json.loads(content.decode("utf-8"), parse_constant=refusal, object_pairs_hook=_unique)
    except RecursionError as error:
        raise RecordDamaged(f"'{where}' must be readable JSON: it is nested too deeply.") from error
    except ValueError as error:
        raise RecordDamaged(f"'{where}' must be readable JSON: {str(error)[:200]}.") from error


def read_record(path: Path) -> dict[str, Any]:
    """Return the record in a JSON file, whose digest is right.

    Raises:
        RecordDamaged: The file is missing or unreadable, has no digest, or differs from it.
    """
    return check_digest(read_json(path, allows_nan=True), str(path))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands in it twice")
    return values
