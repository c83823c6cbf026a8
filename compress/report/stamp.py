"""Stamp of a JSON file: program, version, commit and date."""

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import compress
from compress.report.provenance import find_commit


def stamp() -> dict[str, Any]:
    """Return the stamp of a file that is written now.

    Returns:
        Keys tool ("compress"), version, commit (of the source folder; None where the package is installed without
        one) and date (UTC, ISO 8601, to the second).
    """
    root = Path(compress.__file__).resolve().parents[1]
    found = find_commit(root) if (root / ".git").exists() else None
    return {
        "tool": "compress",
        "version": str(compress.__version__),
        "commit": None if found is None else found["commit"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
