"""Marks of tables made by a command, and their places in Markdown files.

    python benchmarks/made.py README.md docs/experiments/*.md      lists the marks, and which are of another source

    <!-- NAME: begin -->
    <!-- made 2026-11-29 by `COMMAND` with source 0123456789ab -->
    the table
    <!-- NAME: end -->

The mark says when, by which command and with which source of the package a table was made.
"""

import argparse
import hashlib
import re
from datetime import date
from pathlib import Path

import compress

MARK = re.compile(r"^<!-- made (\d{4}-\d{2}-\d{2}) by `([^`]+)` with source ([0-9a-f]{12}) -->$", re.MULTILINE)
PLACE = re.compile(r"^<!-- ([\w-]+): begin -->\n(.*?)^<!-- \1: end -->", re.MULTILINE | re.DOTALL)
VALUE = re.compile(r"\d\s?(%|×|ms|MB|GB|s\b)|\d of \d|\dx\b")
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
IMAGE = re.compile(r"^!\[.*$", re.MULTILINE)


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


def unmarked(text: str) -> list[str]:
    """Return the first line of every table of measured values and every picture that has no mark.

    Args:
        text: Of a Markdown file.
    """
    rest, missing = text, []
    for _, content in PLACE.findall(text):
        if MARK.match(content):
            rest = rest.replace(content, "")
    for table in TABLE.findall(rest + "\n"):
        if VALUE.search(table):
            missing.append(table.partition("\n")[0])
    return missing + IMAGE.findall(rest)


def marks(text: str) -> list[tuple[str, str, str]]:
    """Return date, command and source of every mark in a Markdown file."""
    return MARK.findall(text)


def main() -> None:
    """List the marks of files; exit 1 where a table has none or was made with another source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    present, wrong = source_digest(), 0
    for path in parser.parse_args().files:
        text = path.read_text(encoding="utf-8")
        for made, command, source in marks(text):
            wrong += source != present
            print(f"{path}: {made}, {'this source' if source == present else f'source {source}'}: {command}")
        for line in unmarked(text):
            wrong += 1
            print(f"{path}: no mark: {line}")
    raise SystemExit(int(bool(wrong)))


if __name__ == "__main__":
    main()
