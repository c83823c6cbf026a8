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
from compress.report.build import describe_verdict, write_json
from compress.storage.files import remove_earlier, write_whole

if TYPE_CHECKING:  # the artifacts import numpy
    from compress.model.artifacts import Verdict

GITHUB_SUMMARY = "GITHUB_STEP_SUMMARY"
_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(verdict: Verdict, name: str) -> bytes:
    """Return a JUnit report with one test case for each check.

    A check that was required and skipped is a failure, an inconclusive one an error.

    Args:
        verdict: Outcome of the verification.
        name: Of the test suite.
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
    suites = ElementTree.Element("testsuites", {key: str(value) for key, value in counts.items()})
    suites.append(cases)
    ElementTree.indent(suites)
    content: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return content


def to_markdown(verdict: Verdict, name: str) -> str:
    """Return a verdict as a heading, a sentence and tables."""
    parts = [f"## {_cell(name)}", verdict_sentence(verdict)]
    if steps := next_steps(verdict):
        parts.append("\n".join(f"- Next step for {step}" for step in steps))
    parts.append(_table(CHECK_COLUMNS, check_rows(verdict)))
    if values := value_rows(verdict):
        parts.append(_table(VALUE_COLUMNS, values))
    return "\n\n".join(parts) + "\n"


def write_for_ci(verdict: Verdict, name: str, junit: Path | None, json_file: Path | None, summary: bool) -> None:
    """Write a verdict in the forms that were asked for.

    Args:
        verdict: Outcome of the verification.
        name: Of the run or the file.
        junit: File for JUnit XML; None for none.
        json_file: File for JSON; None for none.
        summary: Whether Markdown is added to the file that GitHub Actions names in GITHUB_STEP_SUMMARY.

    Raises:
        ArtifactError: A file cannot be written.
    """
    if junit is not None:
        try:
            write_whole(junit, to_junit(verdict, name))
        except OSError as error:
            raise ArtifactError(f"'{junit}' cannot be written: {error.strerror}.") from error
    if json_file is not None:
        write_json(describe_verdict(name, verdict), json_file)
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
    if path is None:
        return
    if not path.is_dir() and path.suffix.lower() != suffix:
        raise ConfigError(f"{option} must be a file whose name ends in {suffix}, got '{path}'.")
    remove_earlier(option, path, kind)


def _clean(text: str) -> str:
    """Return text without characters that XML cannot hold."""
    return _NOT_IN_XML.sub("?", text)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
