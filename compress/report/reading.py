"""Which run is meant, and is its report whole? Reads `report.json` of run folders, and refuses everything else.

Where does a page go that is made from finished runs? Used by `compress report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from compress.errors import ArtifactError, ConfigError
from compress.report.build import REPORT_SCHEMA, write_page
from compress.report.caveats import list_caveats
from compress.report.compare import comparison_rows, name_runs, render_comparison
from compress.report.page import render_html
from compress.storage.digest import DIGEST_KEY, RecordDamaged, check_digest, read_json
from compress.storage.files import require_output

REPORT_FILE = "report.json"
_MARKS = ("lock", "pipeline.yaml")  # a run folder holds these before there is a report
_SECTIONS = {"environment": dict, "config": dict, "details": dict, "stages": list, "non_finite": list}
_FIGURES = ("baseline", "slim")
_KEYS_OF_OLD = {"schema", "name", "verdict", "non_finite", "provenance", *_SECTIONS, *_FIGURES}  # without a digest


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes:
        given: What the user called it by.
        path: Of its `report.json`.
        report: The content.
        is_sealed: Whether it had a digest of itself; older versions wrote none.
    """

    given: str
    path: Path
    report: dict[str, Any]
    is_sealed: bool = True


def read_runs(places: Sequence[Path]) -> list[Run]:
    """Read the reports of one run or more.

    Args:
        places: Run folders or `report.json` files.

    Raises:
        ConfigError: None is given, or one twice.
        ArtifactError: One is no run folder, has no report yet, or a report that cannot be read.
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
        report = read_report(path)
        runs[path.resolve()] = Run(str(place), path, report, report.pop(DIGEST_KEY, None) is not None)
    return list(runs.values())


def read_report(path: Path) -> dict[str, Any]:
    """Read a `report.json` and compare it with its digest; one of an older version may be without.

    Raises:
        ArtifactError: It is missing, no JSON, damaged or edited, no report of a run, or of another schema.
    """
    try:
        report = read_json(path)
    except RecordDamaged as error:
        raise ArtifactError(error.message, hint="Run the pipeline to write it anew.") from error
    if not isinstance(report, dict) or "schema" not in report:
        raise ArtifactError(f"'{path}' must be the report of a run, it has no schema number.")
    if report["schema"] != REPORT_SCHEMA:
        raise ArtifactError(
            f"'{path}' must have schema {REPORT_SCHEMA}, got {report['schema']!r}.",
            hint="It was written by another version of this program; run the pipeline with this one.",
        )
    if problem := _find_problem(report):
        raise ArtifactError(f"'{path}' must be the report of a run: {problem}.")
    if DIGEST_KEY in report or not set(report) <= _KEYS_OF_OLD:
        try:
            check_digest(report, str(path))
        except RecordDamaged as error:
            hint = "Run the pipeline to write it anew; stages that are done are not repeated."
            raise ArtifactError(error.message, hint=hint) from error
    return report


def draw(render: Callable[[], T], runs: Sequence[Run]) -> T:
    """Return what `render` makes of the reports of `runs`.

    Raises:
        ArtifactError: A value in them is of a kind that no run writes, so that the page cannot be made.
    """
    try:
        return render()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        places = ", ".join(f"'{run.path}'" for run in runs)
        raise ArtifactError(
            f"Every value in {places} must be as a run writes it, got one that cannot be shown: "
            f"{type(error).__name__}: {error}.",
            hint="Run the pipeline to write the report anew; stages that are done are not repeated.",
        ) from error


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


def _find_problem(report: dict[str, Any]) -> str:
    """Return what is wrong with the outline of a report; "" when nothing is."""
    verdict = report.get("verdict")
    checks = verdict.get("checks") if isinstance(verdict, dict) else None
    if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
        return "it has no verdict with a list of checks"
    for key, kind in _SECTIONS.items():
        if not isinstance(report.get(key, kind()), (kind, type(None))):
            return f"'{key}' is no {'object' if kind is dict else 'list'}"
    for key in _FIGURES:
        if not isinstance(report.get(key), (dict, type(None))):
            return f"'{key}' is no object"
    if not all(isinstance(stage, dict) for stage in report.get("stages") or []):
        return "a stage is no object"
    return ""


SINGLE, SEVERAL = "report.html", "comparison.html"
_SUFFIXES = (".html", ".htm")


class Teller(Protocol):
    """What is told of the work."""

    def say(self, text: str) -> None:
        """Say what was asked for."""

    def warn(self, text: str) -> None:
        """Say what is amiss."""

    def print_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show a table."""


def write_pages(places: Sequence[Path], out: Path | None, teller: Teller) -> Path:
    """Write the page of one run anew, or one that compares several; return where it is.

    Args:
        places: Run folders or `report.json` files.
        out: A folder, made when missing, or a file that ends in .html. None: beside the `report.json` of one run, in
            the current folder for several.
        teller: Shown the figures of several runs and what stands between them and a fair comparison.

    Raises:
        ConfigError: A run is given twice, or `out` is no place for a page.
        ArtifactError: A run has no whole report, or the page cannot be written.
    """
    if out is not None:
        _require_place(out)
    runs = read_runs(places)
    for run in runs:
        if not run.is_sealed:
            teller.warn(f"'{run.path}' has no digest of itself, an older version wrote it: damage is not noticed.")
    target = _find_target(runs, out)
    if target.parent.is_dir():
        require_output("The page" if out is None else "--out", target, "page")
    page = draw(lambda: render_html(runs[0].report), runs) if len(runs) == 1 else _compare(runs, teller)
    write_page(page, target)
    teller.say(f"Report: {target}")
    return target


def _compare(runs: Sequence[Run], teller: Teller) -> str:
    reports = [run.report for run in runs]
    names = name_runs(reports, [run.given for run in runs])
    (columns, rows), caveats = draw(lambda: (comparison_rows(reports, names), list_caveats(reports, names)), runs)
    page = draw(lambda: render_comparison(reports, names), runs)
    teller.print_table("Runs", columns, rows)
    for caveat in caveats:
        teller.warn(caveat)
    return page


def _find_target(runs: Sequence[Run], out: Path | None) -> Path:
    name = SINGLE if len(runs) == 1 else SEVERAL
    if out is None:
        return runs[0].path.with_name(name) if len(runs) == 1 else Path(name)
    return out if _is_page(out) else out / name


def _is_page(out: Path) -> bool:
    return out.suffix.lower() in _SUFFIXES and not out.is_dir()


def _require_place(out: Path) -> None:
    """Refuse a place where no page can go, before anything is read."""
    if not _is_page(out) and out.exists() and not out.is_dir():
        raise ConfigError(f"--out must be a folder or a file that ends in .html, got '{out}', which is another file.")
    for folder in out.parents:
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"--out must lie in a folder, got '{out}', where '{folder}' is a file.")
