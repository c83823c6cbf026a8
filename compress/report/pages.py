"""Where does a page go that is made from finished runs? Used by `compress report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from compress.errors import ArtifactError, ConfigError
from compress.report.build import write_page
from compress.report.caveats import list_caveats
from compress.report.compare import comparison_rows, name_runs, render_comparison
from compress.report.page import render_html
from compress.report.reading import Run, draw, read_runs
from compress.storage.output_files import require_output

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
