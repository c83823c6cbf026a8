"""An inconclusive verdict is told apart from a failed one wherever a verdict is read."""

import json
from io import StringIO

import numpy as np
import pytest
import smallrun
from junitparser import Error, JUnitXml
from report_samples import passing_verdict

from compress.bundle.check import Promises
from compress.checkpoint.layout import load_artifact, save_artifact
from compress.cli.ci import to_junit, to_markdown
from compress.cli.console import Console
from compress.cli.text import next_steps, verdict_sentence
from compress.errors import OUTCOME_EXIT_CODES
from compress.model.artifacts import CheckResult, Verdict
from compress.report.build import build_report, describe_verdict
from compress.report.compare import render_comparison
from compress.report.model import Report, read_report
from compress.report.page import render_report
from compress.report.sweep import Sweep, SweepRun

UNDECIDED = CheckResult("max_drop.top1", "inconclusive", 0.011, 0.01, "share", "1 image lost", "more <images>")
FAILED = CheckResult("max_size_mb", "fail", 2.0, 1.0, "MB", "2,000,000 bytes", "add a quantize stage")


def verdict_of(*checks):
    whole = passing_verdict()
    return Verdict((*whole.checks, *checks), whole.required, whole.slim, whole.baseline, whole.details)


def report_of(*checks) -> Report:
    return read_report(build_report("run", verdict_of(*checks), [], {}, {}, {}))


def test_the_sentence_and_the_next_steps():
    assert verdict_sentence(verdict_of(UNDECIDED)) == (
        "INCONCLUSIVE: max_drop.top1 can be shown neither kept nor broken, of 5 checks made; none failed."
    )
    assert verdict_sentence(verdict_of(UNDECIDED, FAILED)).startswith("FAILED: max_size_mb failed")
    assert next_steps(verdict_of(UNDECIDED, FAILED)) == [
        "max_drop.top1: more <images>",
        "max_size_mb: add a quantize stage",
    ]
    assert next_steps(verdict_of()) == []


def test_the_console_prints_them_after_the_tables():
    out = StringIO()
    Console(stdout=out).print_verdict(verdict_of(UNDECIDED))
    lines = out.getvalue().splitlines()
    assert lines[-2] == "Next step for max_drop.top1: more <images>"
    assert lines[-1].startswith("INCONCLUSIVE: ")


def test_junit_has_an_error_and_no_failure(tmp_path):
    (tmp_path / "out.xml").write_bytes(to_junit(verdict_of(UNDECIDED), "run"))
    (suite,) = JUnitXml.fromfile(str(tmp_path / "out.xml"))
    assert (suite.tests, suite.failures, suite.errors) == (6, 0, 1)
    ((result,),) = [case.result for case in suite if case.result and isinstance(case.result[0], Error)]
    assert isinstance(result, Error)
    assert (result.type, result.message) == ("inconclusive", "1 image lost")
    assert "Next step: more <images>" in result.text


def test_markdown_lists_the_next_steps():
    text = to_markdown(verdict_of(UNDECIDED, FAILED), "run")
    assert "- Next step for max_drop.top1: more <images>\n- Next step for max_size_mb: add a quantize stage" in text


def test_json_and_the_page_tell_the_outcome_and_the_next_step():
    values = describe_verdict("run", verdict_of(UNDECIDED))
    assert (values["verdict"]["passed"], values["verdict"]["outcome"]) == (False, "inconclusive")
    assert values["verdict"]["checks"][-1]["remedy"] == "more <images>"
    page = render_report(report_of(UNDECIDED))
    assert "<title>run: inconclusive</title>" in page
    assert '<div class="verdict warn" role="status"><h2>Inconclusive</h2>' in page
    assert "is inconclusive: " in page
    assert "Next step: more &lt;images&gt;" in page
    assert '<span class="badge inconclusive">inconclusive</span>' in page


def test_reports_of_older_versions_know_two_outcomes():
    reports = [read_report({"verdict": {"passed": passed, "checks": []}}) for passed in (True, False, None)]
    assert [report.verdict.outcome for report in reports] == ["passed", "failed", "failed"]


def test_a_comparison_and_a_sweep_tell_it():
    reports = [report_of(), report_of(UNDECIDED), report_of(FAILED)]
    page = render_comparison(reports, ["a", "b", "c"])
    for status, word in (("pass", "passed"), ("inconclusive", "inconclusive"), ("fail", "failed")):
        assert f'<span class="badge {status}">{word}</span>' in page
    assert "1 inconclusive" in page
    swept = Sweep("run", "macs", tuple(SweepRun(0.1 * place, "run", one) for place, one in enumerate(reports)))
    assert [row[1] for row in swept.rows] == ["passed", "inconclusive", "failed"]


def test_it_is_stored_with_its_next_steps_and_without_as_older_versions_did(tmp_path):
    verdict = verdict_of(UNDECIDED)
    save_artifact(verdict, tmp_path)
    assert load_artifact("Verdict", tmp_path).checks == verdict.checks
    values = json.loads((tmp_path / "verdict.json").read_text())
    for check in values["checks"]:
        del check["remedy"]
    (tmp_path / "verdict.json").write_text(json.dumps(values))
    assert load_artifact("Verdict", tmp_path).checks[-1].remedy == ""


def test_exit_codes():
    assert OUTCOME_EXIT_CODES == {"passed": 0, "failed": 1, "inconclusive": 6}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return smallrun.make_world(tmp_path_factory.mktemp("inconclusive"))


def test_a_command_ends_with_its_own_exit_code_and_nothing_is_handed_over(world, tmp_path):
    """One image in all that is lost, with a limit that no image may break, cannot be decided."""
    arrays = np.load(world.folder / "test.npz")
    np.savez(world.folder / "test.npz", x=arrays["x"][:24], y=arrays["y"][:24])
    values = world.values() | {"name": "undecided"}
    values["stages"][-1]["gates"] = {"max_latency_ms": 1000.0, "max_drop": {"top1": 0.01}, "judge_by": "bound"}
    done = world.call("run", values, "--quiet")
    assert done.exit_code == 6, done.stdout + done.stderr
    assert "INCONCLUSIVE: max_drop.top1" in done.stdout
    assert "Next step for max_drop.top1: evaluate on at least" in done.stdout
    bundled = smallrun.call("bundle", str(world.runs / "undecided"), "-o", str(tmp_path / "it.zip"))
    assert bundled.exit_code == 2
    assert "'undecided' did not pass: max_drop.top1 (inconclusive)." in bundled.stderr
    swept = world.call("sweep", values, "--budgets", "0.8", "--quiet")
    assert swept.exit_code == 6


def test_what_is_on_the_device_names_the_checks_that_were_not_decided():
    values = {
        "schema": 1,
        "signature": {"inputs": [{"name": "x", "shape": ["batch", 3]}], "outputs": [{"name": "y"}]},
        "promises": {"tolerance": 0.001, "max_latency_ms": None},
        "measured": {"latency_ms": None, "provider": "CPU", "machine": "m", "threads": 1, "batch_size": 1},
        "verdict": {
            "passed": False,
            "checks": [{"name": "a", "status": "inconclusive"}, {"name": "b", "status": "pass"}],
        },
    }
    promises = Promises(json.dumps(values).encode())
    assert (promises.passed, promises.failed) == (False, ["a"])
