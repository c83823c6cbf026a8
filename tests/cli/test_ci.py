"""What a CI system reads says what the verdict says."""

import json
from datetime import datetime, timezone
from pathlib import Path

import pytest
from junitparser import Failure, JUnitXml, Skipped

import compress
from compress.cli.ci import github_annotations, require_places, to_junit, to_markdown, write_for_ci
from compress.errors import ArtifactError, ConfigError
from compress.model.artifacts import CheckResult, ModelMetrics, Verdict

CHECKS = (
    CheckResult("parity", "pass", 1e-6, 1e-3, "", "64 images"),
    CheckResult("min_speedup", "fail", 1.1, 1.3, "x", "too slow | <by far>\x00"),
    CheckResult("max.churn", "skipped", None, 0.1, "share", "no baseline file"),
    CheckResult("weights_agree", "skipped", None, None, "", "no torch network"),
)
FIGURES = [ModelMetrics(macs, macs, macs, {"top1": 0.9}, {"p50": 1.0}) for macs in (200, 100)]
VERDICT = Verdict(CHECKS, ("parity", "min_speedup", "max.churn", "never_made"), *FIGURES[::-1], {"odd": float("nan")})


def read(verdict, tmp_path):
    path = tmp_path / "out.xml"
    path.write_bytes(to_junit(verdict, "run 'a' <b>"))
    (suite,) = JUnitXml.fromfile(str(path))
    return suite


def test_each_check_is_a_case_and_what_was_required_but_not_made_fails(tmp_path):
    suite = read(VERDICT, tmp_path)
    assert (suite.name, suite.tests, suite.failures, suite.skipped, suite.errors) == ("run 'a' <b>", 5, 3, 1, 0)
    kinds = {case.name: case.result for case in suite}
    assert kinds["parity"] == []
    assert [type(kinds[name][0]) for name in ("min_speedup", "max.churn", "never_made")] == [Failure] * 3
    assert isinstance(kinds["weights_agree"][0], Skipped)
    assert kinds["min_speedup"][0].message == "too slow | <by far>?"
    assert "limit 1.3" in kinds["min_speedup"][0].text
    assert kinds["max.churn"][0].type == "required but skipped"


def test_names_that_xml_cannot_hold_are_cleaned(tmp_path):
    """Data sets and places from elsewhere have names of the user's."""
    check = CheckResult("also.a\x1bb", "fail", None, None, "", "no")
    suite = read(Verdict((check,), ("also.c\x00d",), None, None), tmp_path)
    assert [case.name for case in suite] == ["also.a?b", "also.c?d"]


def test_a_verdict_of_nothing_is_a_failure(tmp_path):
    suite = read(Verdict((), (), None, None), tmp_path)
    assert (suite.tests, suite.failures) == (1, 1)


def test_a_verdict_that_passed_has_no_failure(tmp_path):
    suite = read(Verdict(CHECKS[:1], ("parity",), None, None), tmp_path)
    assert (suite.tests, suite.failures, suite.skipped) == (1, 0, 0)


def test_markdown_has_the_sentence_and_both_tables():
    text = to_markdown(VERDICT, "run")
    sentence = "FAILED: min_speedup failed and max.churn, never_made not made, of 2 checks made."
    assert text.startswith(f"## run\n\n{sentence}\n")
    assert "| min_speedup | fail | 1.1 | 1.3 | x | too slow \\| <by far>\x00 |" in text
    assert "| MACs | 200 | 100 | 2.00x fewer |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") in (5, 7) for line in tables)


def test_checks_that_did_not_pass_come_first_in_the_summary():
    text = to_markdown(VERDICT, "run")
    places = [text.index(f"| {name} |") for name in ("min_speedup", "max.churn", "weights_agree", "parity")]
    assert places == sorted(places)


def test_annotations_name_the_failed_checks():
    undecided = CheckResult("drop,top1", "inconclusive", 0.01, 0.02, "share", "50 % of\nthe images", "more images")
    verdict = Verdict((CHECKS[0], undecided, CHECKS[1]), (), None, None)
    assert github_annotations(verdict, "run: a") == [
        "::error title=run%3A a%3A min_speedup::too slow | <by far>\x00 (value 1.1, limit 1.3 x)",
        "::warning title=run%3A a%3A drop%2Ctop1::50 %25 of%0Athe images (value 0.01, limit 0.02 share). Next step: "
        "more images",
    ]
    assert github_annotations(Verdict(CHECKS[:1], ("parity",), None, None), "run") == []


def test_junit_has_the_time_of_the_command(tmp_path):
    (tmp_path / "out.xml").write_bytes(to_junit(VERDICT, "run", 12.5))
    (suite,) = JUnitXml.fromfile(str(tmp_path / "out.xml"))
    assert suite.time == 12.5
    assert datetime.fromisoformat(suite.timestamp).tzinfo is not None


def test_json_for_standard_output(capsys):
    require_places(None, Path("-"), False)
    write_for_ci(VERDICT, "run", None, Path("-"), False)
    values = json.loads(capsys.readouterr().out)
    assert (values["schema"], values["name"]) == (1, "run")
    assert values["made"]["tool"] == "compress"
    assert values["made"]["version"] == compress.__version__
    assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(values["made"]["date"])).total_seconds() < 600
    with pytest.raises(ConfigError, match="--junit must be a file"):
        require_places(Path("-"), None, False)


def test_what_is_asked_for_is_written(tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    write_for_ci(VERDICT, "run", tmp_path / "out.xml", tmp_path / "out.json", True)
    assert len(JUnitXml.fromfile(str(tmp_path / "out.xml"))) == 1
    values = json.loads((tmp_path / "out.json").read_text())
    assert (values["name"], values["verdict"]["passed"]) == ("run", False)
    assert [check["name"] for check in values["verdict"]["checks"]] == [check.name for check in CHECKS]
    assert (values["details"]["odd"], values["non_finite"]) == (None, ["details.odd: nan"])
    assert summary.read_text() == "before\n" + to_markdown(VERDICT, "run")
    write_for_ci(VERDICT, "run", None, None, False)


def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    require_places(tmp_path / "out.xml", None, False)
    with pytest.raises(ConfigError, match=r"--junit must be a file to write, .* is a folder"):
        require_places(tmp_path, None, False)
    with pytest.raises(ConfigError, match=r"--json must be a file to write, .* in a folder that does not exist"):
        require_places(None, tmp_path / "no" / "out.json", False)
    with pytest.raises(ConfigError, match="GITHUB_STEP_SUMMARY, it is not set"):
        require_places(None, None, True)


def test_an_earlier_file_does_not_stay_for_this_verdict_and_others_are_not_touched(tmp_path):
    (tmp_path / "out.xml").write_bytes(to_junit(VERDICT, "old"))
    (tmp_path / "model.onnx").write_text("dear", encoding="utf-8")
    require_places(tmp_path / "out.xml", None, False)
    assert not (tmp_path / "out.xml").exists()
    with pytest.raises(ConfigError, match=r"--json must be a file whose name ends in \.json, got '.*model\.onnx'\."):
        require_places(None, tmp_path / "model.onnx", False)
    assert (tmp_path / "model.onnx").read_text(encoding="utf-8") == "dear"


def test_a_file_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_for_ci(VERDICT, "run", tmp_path / "taken", None, False)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "taken"))
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_for_ci(VERDICT, "run", None, None, True)
