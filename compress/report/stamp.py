"""Stamp of a JSON file: program, version, commit and date."""

from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.report.provenance import find_commit


def stamp() -> dict[str, Any]:
    """Return the stamp of a file that is written now.

    Returns:
        Keys tool ("compress"), version, commit (of the source folder; None where the package is installed without
        one) and date (UTC, ISO 8601, to the second).
    """
    root = Path(__file__).resolve().parents[2]
    found = find_commit(root) if (root / ".git").exists() else None
    return {
        "tool": "compress",
        "version": _version(),
        "commit": None if found is None else found["commit"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version() -> str:
    try:
        return version("compress")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
