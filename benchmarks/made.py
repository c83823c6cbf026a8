"""Marks of tables made by a command, and their places in Markdown files.

    <!-- NAME: begin -->
    <!-- made 2026-11-29 by `COMMAND` with source 0123456789ab -->
    the table
    <!-- NAME: end -->

The mark says when, by which command and with which source of the package a table was made.
"""

import hashlib
from datetime import date
from pathlib import Path

import compress


def source_digest() -> str:
    """Return the digest of the package's source, 12 hexadecimal digits."""
    root, digest = Path(compress.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def mark(command: str, made: str | None = None, source: str | None = None) -> str:
    """Return the mark of a table.

    Args:
        command: That made it.
        made: Date; today by default.
        source: Digest of the package's source it was made with; the present one by default.
    """
    return f"<!-- made {made or date.today().isoformat()} by `{command}` with source {source or source_digest()} -->"


def write_marked(
    path: Path, text: str, name: str, command: str, made: str | None = None, source: str | None = None
) -> None:
    """Replace what stands between the markers of a name in a Markdown file by a marked text.

    Args:
        path: The file.
        text: The table, and what belongs to it.
        name: Of the markers.
        command: As in `mark`.
        made: Likewise.
        source: Likewise.

    Raises:
        ValueError: The file lacks the markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = path.read_text(encoding="utf-8")
    head, found, rest = content.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"'{path}' has no place for a table: it must hold the lines {begin} and {end}.")
    path.write_text(f"{head}{begin}\n{mark(command, made, source)}\n{text}\n{end}{tail}", encoding="utf-8")
