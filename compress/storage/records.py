"""JSON records that carry a digest of themselves, so that a change of one bit is noticed.

    {"schema": 1, ..., "record_digest": "sha256 of the canonical JSON of everything else"}

The digest tells of damage and of edits by hand; it is no signature.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError

DIGEST_KEY = "record_digest"


class RecordDamaged(ArtifactError):
    """A JSON record is not what was written."""


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record, as JSON reads it, with its digest as the last value; numbers may be NaN or infinite.

    Raises:
        TypeError: A value has no place in JSON.
    """
    plain: dict[str, Any] = json.loads(json.dumps(values))
    plain.pop(DIGEST_KEY, None)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return {**plain, DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()}


def check_seal(values: Any, where: str) -> dict[str, Any]:
    """Return a record after a comparison with its digest.

    Args:
        values: What was read.
        where: The file, for messages.

    Raises:
        RecordDamaged: It is no object, has no digest, or differs from it.
    """
    if not isinstance(values, dict):
        raise RecordDamaged(f"'{where}' must hold a JSON object.")
    if DIGEST_KEY not in values:
        raise RecordDamaged(f"'{where}' has no digest of itself ({DIGEST_KEY}).")
    try:
        is_whole = sealed(values)[DIGEST_KEY] == values[DIGEST_KEY]
    except (ValueError, TypeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise RecordDamaged(f"'{where}' differs from its digest: it was damaged or edited.")
    return values


def read_json(path: Path, *, allows_nan: bool = False) -> Any:
    """Return the values of a JSON file; a repeated key is refused.

    Args:
        path: The file.
        allows_nan: Whether NaN and Infinity, which JSON does not know, are read as numbers.

    Raises:
        RecordDamaged: The file is missing or cannot be read.
    """
    refusal = None if allows_nan else _refuse_constant
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refusal, object_pairs_hook=_unique)
    except FileNotFoundError as error:
        raise RecordDamaged(f"'{path}' does not exist.") from error
    except OSError as error:
        raise RecordDamaged(f"'{path}' must be a readable file: {error.strerror or error}.") from error
    except RecursionError as error:
        raise RecordDamaged(f"'{path}' must be readable JSON: it is nested too deeply.") from error
    except ValueError as error:
        raise RecordDamaged(f"'{path}' must be readable JSON: {str(error)[:200]}.") from error


def read_sealed(path: Path) -> dict[str, Any]:
    """Return a record after a comparison with its digest.

    Raises:
        RecordDamaged: The file is missing, cannot be read, has no digest or differs from it.
    """
    return check_seal(read_json(path, allows_nan=True), str(path))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands in it twice")
    return values
