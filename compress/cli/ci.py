"""Verdicts for CI systems: JUnit XML, JSON, and a summary in Markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from compress.cli.text import CHECK_COLUMNS, VALUE_COLUMNS, check_rows, next_steps, value_rows, verdict_sentence
from compress.errors import ArtifactError, ConfigError
from compress.report.build import STDOUT, VERDICT_SCHEMA, describe_verdict, write_json
from compress.report.stamp import stamp
from compress.storage.files import remove_earlier, write_atomic

if TYPE_CHECKING:  # the artifacts import numpy
    from compress.model.artifacts import CheckResult, Verdict

GITHUB_SUMMARY = "GITHUB_STEP_SUMMARY"
_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(verdict: Verdict, name: str, seconds: float | None = None) -> bytes:
    """Return a JUnit report with one test case for each check.

    A check that was required and skipped is a failure, an inconclusive one an error.

    Args:
        verdict: Outcome of the verification.
        name: Of the test suite.
        seconds: Time of the command, which the checks share; None if it is not known.
    """
    cases = ElementTree.Element("testsuite", name=_clean(name))
    failures = errors = skips = 0
    for check in verdict.checks:
        case = ElementTree.SubElement(cases, "testcase", classname=_clean(name), name=_clean(check.name))
        said = _clean(f"{check.detail} (value {check.value}, limit {check.limit}, unit {check.unit or '-'})")
        said += f"\nNext step: {_clean(check.remedy)}" if check.remedy else ""
        if check.status == "fail" or (check.status == "skipped" and check.name in verdict.required):
            kind = "failure" if check.status == "fail" else "required but skipped"
            ElementTree.SubElement(case, "failure", message=_clean(check.detail), type=kind).text = said
            failures += 1
        elif check.status == "inconclusive":
            ElementTree.SubElement(case, "error", message=_clean(check.detail), type="inconclusive").text = said
            errors += 1
        elif check.status == "skipped":
            ElementTree.SubElement(case, "skipped", message=_clean(check.detail))
            skips += 1
        else:
            ElementTree.SubElement(case, "system-out").text = said
    made = {check.name for check in verdict.checks}
    for missing in (name for name in verdict.required if name not in made):
        case = ElementTree.SubElement(cases, "testcase", classname=_clean(name), name=_clean(missing))
        ElementTree.SubElement(case, "failure", message="required, but not made", type="not made")
        failures += 1
    if not len(cases):
        case = ElementTree.SubElement(cases, "testcase", classname=_clean(name), name="checks")
        ElementTree.SubElement(case, "failure", message="nothing was checked", type="not made")
        failures += 1
    counts = {"tests": len(cases), "failures": failures, "errors": errors, "skipped": skips}
    cases.attrib |= {key: str(value) for key, value in counts.items()}
    if seconds is not None:
        cases.attrib |= {"time": f"{seconds:.3f}", "timestamp": stamp()["date"]}
    suites = ElementTree.Element("testsuites", {key: str(value) for key, value in counts.items()})
    suites.append(cases)
    ElementTree.indent(suites)
    content: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return content


def to_markdown(verdict: Verdict, name: str) -> str:
    """Return a verdict as a heading, a sentence and tables; checks that did not pass come first."""
    parts = [f"## {_cell(name)}", verdict_sentence(verdict)]
    if steps := next_steps(verdict):
        parts.append("\n".join(f"- Next step for {step}" for step in steps))
    order = sorted(range(len(verdict.checks)), key=lambda index: _urgency(verdict.checks[index]))
    rows = check_rows(verdict)
    parts.append(_table(CHECK_COLUMNS, [rows[index] for index in order]))
    if values := value_rows(verdict):
        parts.append(_table(VALUE_COLUMNS, values))
    return "\n\n".join(parts) + "\n"


def github_annotations(verdict: Verdict, name: str) -> list[str]:
    """Return a GitHub annotation for each check that keeps the verdict from passing, failed ones first."""
    kinds = {"fail": "error", "skipped": "error", "inconclusive": "warning"}
    return [
        f"::{kinds[check.status]} title={_property(f'{name}: {check.name}')}::{_message(check)}"
        for check in sorted(verdict.open_checks, key=_urgency)
    ]


def write_for_ci(
    verdict: Verdict,
    name: str,
    junit: Path | None,
    json_file: Path | None,
    summary: bool,
    seconds: float | None = None,
) -> None:
    """Write a verdict in the forms that were asked for.

    Args:
        verdict: Outcome of the verification.
        name: Of the run or the file.
        junit: File for JUnit XML; None for none.
        json_file: File for JSON, "-" for standard output; None for none.
        summary: Whether Markdown is added to the file that GitHub Actions names in GITHUB_STEP_SUMMARY.
        seconds: Time of the command; None if it is not known.

    Raises:
        ArtifactError: A file cannot be written.
    """
    if junit is not None:
        try:
            write_atomic(junit, to_junit(verdict, name, seconds))
        except OSError as error:
            raise ArtifactError(f"'{junit}' cannot be written: {error.strerror}.") from error
    if json_file is not None:
        write_json({"schema": VERDICT_SCHEMA, **describe_verdict(name, verdict), "made": stamp()}, json_file)
    if summary:
        place = Path(os.environ[GITHUB_SUMMARY])
        try:
            with place.open("a", encoding="utf-8") as file:
                file.write(to_markdown(verdict, name))
        except OSError as error:
            raise ArtifactError(f"'{place}' cannot be written: {error.strerror}.") from error


def require_places(junit: Path | None, json_file: Path | None, summary: bool) -> None:
    """Check before any long work that the files can be written.

    Raises:
        ConfigError: A path is a folder or in none, or no file for the summary is named.
    """
    require_place("--junit", junit, ".xml", "JUnit file")
    require_place("--json", json_file, ".json", "JSON verdict")
    if summary and not os.environ.get(GITHUB_SUMMARY):
        raise ConfigError(
            f"--github-summary needs the environment variable {GITHUB_SUMMARY}, it is not set.",
            hint="GitHub Actions sets it; elsewhere use --junit or --json.",
        )


def require_place(option: str, path: Path | None, suffix: str, kind: str) -> None:
    """Check that the file of an option can be written, and remove an earlier one: it must not pass for this one's.

    Args:
        option: Name of the option.
        path: Its value; None where it is not given.
        suffix: Of the file name.
        kind: Of the file, as in `compress.storage.files`.

    Raises:
        ConfigError: It is a folder or in none, a link, a device or another file, or its name ends otherwise.
        ArtifactError: An earlier one cannot be removed.
    """
    if path is None or (path == STDOUT and suffix == ".json"):
        return
    if not path.is_dir() and path.suffix.lower() != suffix:
        raise ConfigError(f"{option} must be a file whose name ends in {suffix}, got '{path}'.")
    remove_earlier(option, path, kind)


def _urgency(check: CheckResult) -> int:
    """Return the place of a check by its status: failed, inconclusive, skipped, passed."""
    return ("fail", "inconclusive", "skipped", "pass").index(check.status)


def _message(check: CheckResult) -> str:
    text = check.detail or check.status
    if check.limit is not None and check.value is not None:
        text += f" (value {check.value:g}, limit {check.limit:g}{f' {check.unit}' if check.unit else ''})"
    return _escaped(f"{text}. Next step: {check.remedy}" if check.remedy else text)


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")


def _escaped(text: str) -> str:
    """Return text as a workflow command of GitHub takes it."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _clean(text: str) -> str:
    """Return text without characters that XML cannot hold."""
    return _NOT_IN_XML.sub("?", text)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
