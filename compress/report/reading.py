"""Which run is meant, and is its report whole? Reads `report.json` of run folders, and refuses everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from compress.errors import ArtifactError, ConfigError
from compress.report.build import REPORT_SCHEMA
from compress.storage.records import DIGEST_KEY, RecordDamaged, check_seal, read_json

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
            check_seal(report, str(path))
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
