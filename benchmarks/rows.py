"""One row of a table: a pipeline run with something changed, once for each seed."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress.cli.console import Console
from compress.config.load import load_pipeline
from compress.engine.runner import run
from compress.errors import StageError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """What is changed.

    Attributes:
        name: In the table.
        overrides: As after `--set`.
    """

    name: str
    overrides: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The name as part of a run's."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name).strip("-")


def measure(
    table: str, pipeline: Path, row: Row, overrides: Sequence[str], seed: int, runs_dir: Path, console: Console
) -> Any:
    """Run a pipeline as a row has it and return its report, or the message where it cannot be run.

    A run that is finished is not repeated.
    """
    name = f"{table}-{pipeline.stem}-{row.slug}-{seed}"
    loaded = load_pipeline(pipeline, [*overrides, *row.overrides, f"name={name}"], seed)
    console.note(f"\n{row.name}, seed {seed}")
    try:
        run(loaded, runs_dir, console)
    except StageError as error:
        return error.message
    return json.loads((runs_dir / name / "report.json").read_text(encoding="utf-8"))


def row_parser(description: str | None, pipeline: Path) -> argparse.ArgumentParser:
    """Return a parser of what every table of rows takes; `pipeline` is the one by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", nargs="?", type=Path, default=pipeline)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--write", type=Path, help="Markdown file with the markers")
    return parser


def named(rows: Sequence[Row], only: Sequence[str] | None, parser: argparse.ArgumentParser) -> list[Row]:
    """Return the rows that were asked for by name, all of them by default; an unknown name ends the program."""
    if unknown := set(only or ()) - {row.name for row in rows}:
        parser.error(f"rows are {', '.join(row.name for row in rows)}; got {', '.join(sorted(unknown))}")
    return [row for row in rows if not only or row.name in only]


def flow(value: Any) -> str:
    """Return a value as YAML on one line, for `--set`."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
