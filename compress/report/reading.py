"""Reports of finished runs, read from disk, and the page that `compress report` makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from compress.errors import ArtifactError, ConfigError
from compress.report.build import REPORT_SCHEMA, write_page
from compress.report.comparability import list_caveats
from compress.report.compare import comparison_rows, name_runs, render_comparison
from compress.report.model import Report, read_report
from compress.report.page import render_report
from compress.storage.digest import DIGEST_KEY, RecordDamaged, check_digest, read_json
from compress.storage.files import require_output

REPORT_FILE = "report.json"
_MARKS = ("lock", "pipeline.yaml")  # a run folder holds these before there is a report
_KEYS_OF_OLD = {  # without a digest
    "schema", "name", "verdict", "non_finite", "provenance", "environment", "config", "details", "stages", "baseline",
    "slim",
}  # fmt: skip
_AGAIN = "Run the pipeline to write it anew; stages that are done are not repeated."


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes:
        given: Path that the user named.
        path: Path of the run's `report.json`.
        report: Content of this file.
        is_sealed: Whether the file has a digest of itself; older versions wrote none.
    """

    given: str
    path: Path
    report: Report
    is_sealed: bool = True


def read_runs(places: Sequence[Path]) -> list[Run]:
    """Read the reports of one run or more.

    Args:
        places: Run folders or `report.json` files.

    Raises:
        ConfigError: No path is given, or a run is given twice.
        ArtifactError: A path is no run folder, or has no readable report.
    """
    if not places:
        raise ConfigError("At least one run folder must be given, got none.")
    runs: dict[Path, Run] = {}
    for place in places:
        path = _find_report(place)
        if path.resolve() in runs:
            earlier = runs[path.resolve()].given
            raise ConfigError(
                f"Each run must be given once, got '{earlier}' and '{place}', which are the same.",
                hint="name different runs, or one alone to write its page anew.",
            )
        values = read_values(path)
        is_sealed = values.pop(DIGEST_KEY, None) is not None
        runs[path.resolve()] = Run(str(place), path, read_report(values, f"'{path}'"), is_sealed)
    return list(runs.values())


def read_values(path: Path) -> dict[str, Any]:
    """Return the plain values of a `report.json` after a comparison with its digest; early versions wrote none.

    Raises:
        ArtifactError: The file is missing, no JSON, damaged or edited, no report of a run, or has another schema.
    """
    try:
        values = read_json(path)
    except RecordDamaged as error:
        raise ArtifactError(error.message, hint="Run the pipeline to write it anew.") from error
    if not isinstance(values, dict) or "schema" not in values:
        raise ArtifactError(f"'{path}' must be the report of a run, it has no schema number.")
    if values["schema"] != REPORT_SCHEMA:
        raise ArtifactError(
            f"'{path}' must have schema {REPORT_SCHEMA}, got {values['schema']!r}.",
            hint="It was written by another version of this program; run the pipeline with this one.",
        )
    if DIGEST_KEY in values or not set(values) <= _KEYS_OF_OLD:
        try:
            check_digest(values, str(path))
        except RecordDamaged as error:
            raise ArtifactError(error.message, hint=_AGAIN) from error
    return values


def _find_report(place: Path) -> Path:
    """Return the report of a run folder, or the file itself."""
    try:
        is_file, is_folder, exists = place.is_file(), place.is_dir(), place.exists()
    except OSError as error:
        raise ArtifactError(f"Run '{place}' must be readable: {error.strerror}.") from error
    if is_file:
        return place
    if not is_folder:
        what = "is neither" if exists else "does not exist"
        raise ArtifactError(f"Run '{place}' must be a run folder or a {REPORT_FILE}, it {what}.")
    path = place / REPORT_FILE
    if path.is_file():
        return path
    if any((place / mark).exists() for mark in _MARKS):
        raise ArtifactError(
            f"Run '{place}' has no {REPORT_FILE} yet: it is unfinished.",
            hint=f"compress run {place / 'pipeline.yaml'} --runs-dir {place.parent} goes on from where it stopped.",
        )
    hint = None
    if (place / "sweep.json").is_file():
        hint = "It holds a sweep; name the folders of its runs, which lie beside it."
    elif found := sorted(path.parent.name for path in place.glob(f"*/{REPORT_FILE}")):
        hint = f"There are runs in it: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}."
    raise ArtifactError(f"'{place}' must be a run folder, it holds no {REPORT_FILE}.", hint=hint)


SINGLE, SEVERAL = "report.html", "comparison.html"
_SUFFIXES = (".html", ".htm")


class Printer(Protocol):
    """Console that results are printed to."""

    def say(self, text: str) -> None:
        """Print the requested output."""

    def warn(self, text: str) -> None:
        """Print a warning."""

    def print_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table."""


def write_pages(places: Sequence[Path], out: Path | None, printer: Printer) -> Path:
    """Write the page of one run anew, or one that compares several, and return its path.

    Args:
        places: Run folders or `report.json` files.
        out: Folder, created if missing, or file name that ends in .html. None: beside the `report.json` of one run, in
            the current folder for several.
        printer: Console for the metrics of several runs and the caveats of their comparison.

    Raises:
        ConfigError: A run is given twice, or no page can be written to `out`.
        ArtifactError: A run has no complete report, or the page cannot be written.
    """
    if out is not None:
        _require_place(out)
    runs = read_runs(places)
    for run in runs:
        if not run.is_sealed:
            printer.warn(f"'{run.path}' has no digest of itself, an older version wrote it: damage is not noticed.")
    target = _find_target(runs, out)
    if target.parent.is_dir():
        require_output("The page" if out is None else "--out", target, "page")
    page = render_report(runs[0].report) if len(runs) == 1 else _compare(runs, printer)
    write_page(page, target)
    printer.say(f"Report: {target}")
    return target


def _compare(runs: Sequence[Run], printer: Printer) -> str:
    reports = [run.report for run in runs]
    names = name_runs(reports, [run.given for run in runs])
    page = render_comparison(reports, names)
    printer.print_table("Runs", *comparison_rows(reports, names))
    for caveat in list_caveats(reports, names):
        printer.warn(caveat)
    return page


def _find_target(runs: Sequence[Run], out: Path | None) -> Path:
    name = SINGLE if len(runs) == 1 else SEVERAL
    if out is None:
        return runs[0].path.with_name(name) if len(runs) == 1 else Path(name)
    return out if _is_page(out) else out / name


def _is_page(out: Path) -> bool:
    return out.suffix.lower() in _SUFFIXES and not out.is_dir()


def _require_place(out: Path) -> None:
    """Refuse a path that no page can be written to, before any report is read."""
    if not _is_page(out) and out.exists() and not out.is_dir():
        raise ConfigError(f"--out must be a folder or a file that ends in .html, got '{out}', which is another file.")
    for folder in out.parents:
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"--out must lie in a folder, got '{out}', where '{folder}' is a file.")
