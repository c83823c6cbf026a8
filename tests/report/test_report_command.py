"""`compress report RUN...`: where the page goes, and what is refused."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from report_samples import CONFIG, ENVIRONMENT, failing_verdict, passing_verdict, sample_stages
from typer.testing import CliRunner, Result

from compress.cli.commands import app
from compress.errors import ArtifactError
from compress.report import plots
from compress.report.build import build_report, write_report
from compress.report.page import render
from compress.report.reading import read_values
from compress.storage.digest import add_digest

PROVENANCE = {"data": {"train": "1" * 64, "evaluation": "2" * 64}}
REPORT = build_report("gentle", passing_verdict(), sample_stages(), CONFIG, ENVIRONMENT, PROVENANCE)
OTHER = build_report("harder", failing_verdict(), sample_stages(), CONFIG, ENVIRONMENT)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is drawn, for speed; what is written without a place goes to the test's folder."""
    monkeypatch.setattr(plots, "render_svg", lambda key, title, height_inches, draw: Markup("<svg></svg>"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for report in (REPORT, OTHER):
        write_report(report, tmp_path / "runs" / report["name"], page=False)
        (tmp_path / "runs" / report["name"] / "pipeline.yaml").write_text("name: x\n")
    return tmp_path / "runs"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)], prog_name="compress")


def test_one_run_gets_its_page_anew(runs: Path) -> None:
    done = call(runs / "gentle")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"Report: {runs / 'gentle' / 'report.html'}\n"
    page = (runs / "gentle" / "report.html").read_text(encoding="utf-8")
    assert "<title>gentle: passed</title>" in page
    assert json.loads((runs / "gentle" / "report.json").read_text(encoding="utf-8")) == add_digest(REPORT)


def test_several_runs_get_one_page_and_a_table(runs: Path, tmp_path: Path) -> None:
    done = call(runs / "gentle", runs / "harder" / "report.json")
    assert (done.exit_code, done.stderr) == (0, ""), "a failed verdict is shown, not passed on"
    assert "<title>2 runs compared</title>" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "Report: comparison.html" in done.stdout
    assert "gentle" in done.stdout.splitlines()[1]
    assert not (runs / "gentle" / "report.html").exists()


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("new/folder", "new/folder/comparison.html"),
        ("page.html", "page.html"),
        ("new/Page.HTM", "new/Page.HTM"),
        ("folder.html", "folder.html/comparison.html"),
        (".", "comparison.html"),
    ],
)
def test_the_page_goes_where_it_is_wanted(runs: Path, tmp_path: Path, out: str, expected: str) -> None:
    (tmp_path / "folder.html").mkdir()
    assert call(runs / "gentle", runs / "harder", "-o", out).exit_code == 0
    assert (tmp_path / expected).is_file()


def test_one_run_goes_where_it_is_wanted(runs: Path, tmp_path: Path) -> None:
    assert call(runs / "gentle", "--out", "there").exit_code == 0
    assert (tmp_path / "there" / "report.html").is_file()
    assert not (runs / "gentle" / "report.html").exists()


def test_what_is_not_comparable_is_said_on_the_terminal_too(runs: Path) -> None:
    other = copy.deepcopy(OTHER)
    other["environment"]["cpu"] = "Other"
    write_report(other, runs / "harder", page=False)
    done = call(runs / "gentle", runs / "harder")
    assert done.exit_code == 0
    assert "Warning: The runs were measured on different machines (gentle: Imaginary" in done.stderr


@pytest.mark.parametrize(
    ("spelling"), ["runs/gentle", "runs/gentle/report.json", "runs/../runs/gentle", "link", "{runs}/gentle"]
)
def test_a_run_given_twice_is_refused(runs: Path, tmp_path: Path, spelling: str) -> None:
    (tmp_path / "link").symlink_to(runs / "gentle")
    done = call("runs/gentle", "runs/harder", spelling.format(runs=runs))
    assert done.exit_code == 2
    assert "Each run must be given once, got 'runs/gentle' and" in done.stderr
    assert not (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("nowhere", "Run 'nowhere' must be a run folder or a report.json, it does not exist."),
        ("runs", "'runs' must be a run folder, it holds no report.json.\nHint: There are runs in it: gentle, harder."),
        ("empty", "'empty' must be a run folder, it holds no report.json."),
        ("swept", "Hint: It holds a sweep; name the folders of its runs, which lie beside it."),
        ("begun", "Run 'begun' has no report.json yet: it is unfinished.\nHint: compress run begun/pipeline.yaml"),
        ("locked", "Run 'locked' has no report.json yet: it is unfinished."),
        ("pipe", "Run 'pipe' must be a run folder or a report.json, it is neither."),
        ("x" * 5000, "must be readable: File name too long."),
    ],
)
def test_what_is_no_finished_run_is_refused(runs: Path, tmp_path: Path, place: str, text: str) -> None:
    for name, file in (("empty", None), ("swept", "sweep.json"), ("begun", "pipeline.yaml"), ("locked", "lock")):
        (tmp_path / name).mkdir()
        if file is not None:
            (tmp_path / name / file).write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    for arguments in ([place], [runs / "gentle", place]):
        done = call(*arguments)
        assert done.exit_code == 4
        assert text in done.stderr
    assert not (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "must be readable JSON: Expecting value"),
        (b'{"schema": 1, "verdict"', "must be readable JSON: "),
        (b"\xff\xfe", "must be readable JSON: 'utf-8' codec can't decode"),
        (b"[" * 200_000, "must be readable JSON: it is nested too deeply."),
        (b'{"schema": 1, "x": NaN}', "must be readable JSON: NaN is no number in JSON."),
        (b"[]", "must be the report of a run, it has no schema number."),
        (b"7", "must be the report of a run, it has no schema number."),
        (b"{}", "must be the report of a run, it has no schema number."),
        (b'{"schema": 2}', "must have schema 1, got 2.\nHint: It was written by another version"),
        (b'{"schema": "1"}', "must have schema 1, got '1'."),
        (b'{"schema": 1}', "report.json' is not as a run writes it: 'verdict' is missing.\nHint: Run the pipeline"),
        (b'{"schema": 1, "verdict": []}', "'verdict' must be an object, got []."),
        (b'{"schema": 1, "verdict": {}}', "'verdict.checks' is missing."),
        (b'{"schema": 1, "verdict": {"checks": [3]}}', "'verdict.checks[0]' must be an object, got 3."),
        (b'{"schema": 1, "verdict": {"checks": [{"status": "x"}]}}', "'skipped', got 'x'."),
        (b'{"schema": 1, "verdict": {"checks": [], "passed": "yes"}}', "'verdict.passed' must be true or false, got"),
        (b'{"schema": 1, "verdict": {"checks": []}, "stages": {}}', "'stages' must be a list, got {}."),
        (b'{"schema": 1, "verdict": {"checks": []}, "stages": [1]}', "'stages[0]' must be an object, got 1."),
        (b'{"schema": 1, "verdict": {"checks": []}, "slim": 3}', "'slim' must be an object, got 3."),
        (b'{"schema": 1, "verdict": {"checks": []}, "slim": {"macs": -1}}', "'slim.macs' must be at least 0, got -1."),
        (
            b'{"schema": 1, "verdict": {"checks": []}, "slim": {"latency_ms": {"p50": 1e999}}}',
            "must be a finite number",
        ),
        (b'{"schema": 1, "verdict": {"checks": []}, "details": 3}', "'details' must be an object, got 3."),
        (b'{"schema": 1, "verdict": {"checks": []}, "detaims": {}}', "has no digest of itself"),
        (b'{"schema": 1, "verdict": {"checks": []}, "record_digest": 7}', "it was damaged or edited."),
        (b'{"schema": 1, "schema": 1, "verdict": {"checks": []}}', "a key stands in it twice."),
    ],
)
def test_a_report_that_is_not_whole_is_refused(runs: Path, content: bytes, text: str) -> None:
    (runs / "harder" / "report.json").write_bytes(content)
    for arguments in ([runs / "harder"], [runs / "gentle", runs / "harder"]):
        done = call(*arguments)
        assert done.exit_code == 4
        assert text in done.stderr
        assert "harder" in done.stderr
    assert not (runs / "harder" / "report.html").exists()


def test_a_report_with_next_to_nothing_is_shown(runs: Path) -> None:
    (runs / "harder" / "report.json").write_text('{"schema": 1, "verdict": {"checks": []}}')
    done = call(runs / "harder")
    assert done.exit_code == 0
    assert "has no digest of itself, an older version wrote it: damage is not noticed." in done.stderr
    assert "Failed" in (runs / "harder" / "report.html").read_text(encoding="utf-8")
    assert call(runs / "gentle", runs / "harder").exit_code == 0


def test_every_changed_bit_of_a_report_is_refused(runs: Path) -> None:
    path = runs / "gentle" / "report.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            report = read_values(path)
        except ArtifactError:
            continue
        assert report == json.loads(whole), bytes(changed[place - 20 : place + 20])


def test_a_report_that_cannot_be_read_is_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    done = call(runs / "gentle")
    assert done.exit_code == 4
    assert "report.json' must be a readable file: Permission denied." in done.stderr


def test_places_where_no_page_can_go_are_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    done = call(runs / "gentle", "-o", "file")
    assert done.exit_code == 2
    assert "--out must be a folder or a file that ends in .html, got 'file', which is another file." in done.stderr
    for out in ("file/page.html", "file/deeper/folder"):
        done = call(runs / "gentle", "-o", out)
        assert done.exit_code == 4
        assert f"--out must lie in a folder, got '{out}', where 'file" in done.stderr
    assert (tmp_path / "file").read_text() == "kept"
    assert call(runs / "gentle", "-o", runs / "gentle" / "report.json").exit_code == 2


def test_a_full_disk_leaves_the_old_page(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = render("page.html.j2", "old", "old")
    (runs / "gentle" / "report.html").write_text(old, encoding="utf-8")

    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.storage.files.os.replace", refuse)
    done = call(runs / "gentle")
    assert done.exit_code == 4
    assert "report.html, got: No space left on device." in done.stderr
    assert (runs / "gentle" / "report.html").read_text(encoding="utf-8") == old


def test_no_run_is_wrong_usage() -> None:
    assert call().exit_code == 2


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value, of lists only the first."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places_in(entry, (*path, key))


@pytest.mark.parametrize(
    "part", ["verdict", "baseline", "slim", "stages", "environment", "config", "details", "provenance"]
)
def test_a_value_of_another_kind_is_shown_or_refused_but_no_crash(runs: Path, part: str) -> None:
    places = [place for place in places_in(REPORT) if place[0] == part]
    assert places
    outcomes = set()
    for place in places:
        for value in (None, "text", -3, [[]], {"x": [None]}):
            report = copy.deepcopy(REPORT)
            inner = report
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            (runs / "harder" / "report.json").write_text(json.dumps(add_digest(report)), encoding="utf-8")
            for arguments in ([runs / "harder"], [runs / "gentle", runs / "harder"]):
                done = call(*arguments)
                assert done.exit_code in (0, 4), (place, value, done.stderr)
                outcomes.add(done.exit_code)
    assert 0 in outcomes


def test_torch_is_not_imported(runs: Path) -> None:
    code = (
        "import sys\nfrom compress.cli.commands import app\n"
        "try: app(['report', 'runs/gentle', 'runs/harder'])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'onnxruntime', 'onnx'} & set(sys.modules)\n"
    )
    import compress

    environment = os.environ | {"PYTHONPATH": str(Path(compress.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=runs.parent, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "<svg" in (runs.parent / "comparison.html").read_text(encoding="utf-8")
