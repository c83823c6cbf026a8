"""Writer of `report.json`, a public interface, and of the page beside it.

Numbers that are NaN or infinite have no JSON spelling: they become null and are listed under "non_finite".
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Any, Literal

from compress.errors import ArtifactError, InternalError
from compress.model.artifacts import CheckResult, Verdict
from compress.report.model import read_report
from compress.report.page import render_report
from compress.report.stamp import stamp
from compress.storage.digest import add_digest
from compress.storage.files import write_atomic

REPORT_SCHEMA = 1
VERDICT_SCHEMA = 1
STDOUT = Path("-")


@dataclass(frozen=True, slots=True)
class StageRun:
    """Outcome of one stage of a run.

    Attributes:
        stage: Name of the stage, such as "prune".
        status: "ran", or "unchanged" when its result came from the store.
        seconds: Wall time in this run, restoring included.
        record: Plain values on its work.
    """

    stage: str
    status: Literal["ran", "unchanged"]
    seconds: float
    record: dict[str, Any]


def build_report(
    name: str,
    verdict: Verdict,
    stages: Sequence[StageRun],
    config: dict[str, Any],
    environment: dict[str, Any],
    provenance: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of `report.json`: plain values only, safe for `json.dumps(allow_nan=False)`.

    Args:
        name: Name of the run.
        verdict: Outcome of the last verification.
        stages: Outcomes of the stages, in order.
        config: Settings of the resolved pipeline file.
        environment: Result of `describe_environment`.
        provenance: Result of `describe_provenance`.

    Returns:
        Keys schema, made (the stamp), name, verdict, baseline, slim, stages, environment, config, provenance, details,
        non_finite.
        `baseline` and `slim` are None if verify could not measure. Every number that was NaN or infinite is None,
        and its key path is in `non_finite` ("details.parity.max_abs: nan").

    Raises:
        InternalError: A value is not plain (numbers, text, paths, lists, dicts); the message names its key path.
    """
    non_finite: list[str] = []
    report: dict[str, Any] = {
        "schema": REPORT_SCHEMA,
        "made": stamp(),
        "name": name,
        **_describe(verdict),
        "stages": [asdict(run) for run in stages],
        "environment": environment,
        "config": config,
        "provenance": provenance,
    }
    plain: dict[str, Any] = _to_plain(report, "", non_finite)
    plain["non_finite"] = non_finite
    return plain


def describe_verdict(name: str, verdict: Verdict) -> dict[str, Any]:
    """Return the part of `build_report` that follows from the verdict alone.

    Args:
        name: Name of the run or the file.
        verdict: Outcome of the verification.

    Raises:
        InternalError: A value is not plain; the message names its key path.
    """
    non_finite: list[str] = []
    plain: dict[str, Any] = _to_plain({"name": name, **_describe(verdict)}, "", non_finite)
    plain["non_finite"] = non_finite
    return plain


def _describe(verdict: Verdict) -> dict[str, Any]:
    return {
        "verdict": {
            "passed": verdict.passed,
            "outcome": verdict.outcome,
            "required": verdict.required,
            "checks": [_describe_check(check) for check in verdict.checks],
        },
        "baseline": None if verdict.baseline is None else verdict.baseline.to_dict(),
        "slim": None if verdict.slim is None else verdict.slim.to_dict(),
        "details": verdict.details,
    }


def write_report(report: dict[str, Any], folder: Path, page: bool = True) -> None:
    """Write `report.json`, with a digest of itself, and `report.html` into `folder`; each file is complete or absent.

    Args:
        report: Result of `build_report`.
        folder: Folder of the files, created if missing.
        page: Whether `report.html` is written; drawing it takes a second or two.

    Raises:
        ArtifactError: A file cannot be written.
    """
    write_json(add_digest(report), folder / "report.json")
    if page:
        write_page(render_report(read_report(report)), folder / "report.html")


def write_verdict_page(name: str, verdict: Verdict, path: Path) -> None:
    """Write a page on a verdict alone, without a run around it.

    Raises:
        ArtifactError: The file cannot be written.
    """
    write_page(render_report(read_report(describe_verdict(name, verdict))), path)


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write plain values as JSON, to a file that is complete or absent, or to standard output for the path "-".

    Raises:
        ArtifactError: The file cannot be written.
    """
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    if path == STDOUT:
        sys.stdout.write(f"{text}\n")
        return
    # A lone surrogate (an undecodable byte of a file name) has no UTF-8; as "\udc80" it is valid JSON.
    _write_atomically(path, (text + "\n").encode("utf-8", "backslashreplace"))


def write_page(text: str, path: Path) -> None:
    """Write a page; the file is complete or absent.

    Raises:
        ArtifactError: The file cannot be written.
    """
    _write_atomically(path, text.encode("utf-8", "replace"))


def _describe_check(check: CheckResult) -> dict[str, Any]:
    """Return the plain values of a check; its detail names a number without a form in JSON."""
    values = asdict(check)
    for key in ("value", "limit"):
        if values[key] is not None and not math.isfinite(values[key]):
            values["detail"] = f"{values['detail']} (the {key} was {float(values[key])})".lstrip()
    return values


def _to_plain(value: Any, place: str, non_finite: list[str]) -> Any:
    """Return `value` as JSON-ready data; non-finite numbers become None and are added to `non_finite`."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):  # numpy scalars are registered as Integral and Real, too
        return int(value)
    if isinstance(value, Real):
        if math.isfinite(value):
            return float(value)
        non_finite.append(f"{place}: {float(value)}")
        return None
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, dict):
        prefix = f"{place}." if place else ""
        return {str(key): _to_plain(entry, f"{prefix}{key}", non_finite) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(entry, f"{place}[{index}]", non_finite) for index, entry in enumerate(value)]
    raise InternalError(f"The report must hold plain values, got {type(value).__name__} at {place}.")


def _write_atomically(path: Path, content: bytes) -> None:
    try:
        write_atomic(path, content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(
            f"The report must be written to {path}, got: {reason}.",
            hint="free some space or make the folder writable; finished stages are kept.",
        ) from error
