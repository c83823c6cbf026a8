"""The README is short, its code is executed or checked, and its commands and exit codes are those of the program."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from report_samples import passing_verdict
from typer.main import get_command

from compress import errors
from compress.catalog import STAGES
from compress.cli.commands import app
from compress.cli.console import Console
from compress.config.load import load_pipeline, parse_pipeline

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OWN_PROJECT = (ROOT / "docs" / "own-project.md").read_text(encoding="utf-8")


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def _section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert len(re.findall(r"^- \*\*", README.partition("\n## ")[0], flags=re.MULTILINE)) == 4


def test_quickstart_is_the_pipeline_of_the_repository() -> None:
    (block,) = _blocks("yaml", _section("Quickstart"))
    path = ROOT / "pipelines" / "quickstart.yaml"
    assert parse_pipeline(block, path).config == load_pipeline(path).config
    assert len(block.splitlines()) <= 20


def test_output_of_the_quickstart_has_the_form_of_the_console() -> None:
    (block,) = _blocks("text", _section("Quickstart"))
    printed = io.StringIO()
    Console(stdout=printed).print_verdict(passing_verdict())
    lines = printed.getvalue().splitlines()
    title = next(number for number, line in enumerate(lines) if line == block.splitlines()[0])
    labels = {re.split(r"  +", line.strip())[0] for line in lines[title:] if line.startswith("  ")}
    rows = [line for line in block.splitlines() if line.startswith("  ") and line != "  ..."]
    assert len(rows) >= 6
    assert {re.split(r"  +", row.strip())[0] for row in rows} <= labels
    assert re.search(r"^PASSED: \d+ checks made, none failed\.$", block, flags=re.MULTILINE)


def test_picture_of_the_report_is_drawn_from_a_report() -> None:
    (place,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", _section("Quickstart"))
    text = (ROOT / place).read_text(encoding="utf-8")
    assert text.startswith("<svg ")
    assert "quickstart: passed" in text
    assert "var(--" not in text
    assert len(text) < 300_000


def test_own_network_and_data_take_fifteen_lines(tmp_path: Path) -> None:
    (block,) = _blocks("yaml", _section("Your own network and data"))
    config = parse_pipeline(block, tmp_path / "pipeline.yaml").config
    assert [stage.stage for stage in config.stages] == ["load", "prune", "finetune", "export", "verify"]
    assert len(block.splitlines()) <= 15


def test_every_stage_has_one_line() -> None:
    rows = re.findall(r"^\| \[`(\w+)`\]", _section("Stages"), flags=re.MULTILINE)
    assert set(rows) == set(STAGES)
    assert len(rows) == len(STAGES)


def test_own_project_works_as_it_is_written(tmp_path: Path) -> None:
    (code,), (pipeline,), (commands,) = (_blocks(language, OWN_PROJECT) for language in ("python", "yaml", "sh"))
    assert len(code.splitlines()) <= 75
    (tmp_path / "my_project.py").write_text(code, encoding="utf-8")
    (tmp_path / "spots.yaml").write_text(pipeline, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    assert commands == "python my_project.py\ncompress run spots.yaml\n"
    for command in (["my_project.py"], ["-m", "compress", "run", "spots.yaml"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "runs" / "spots" / "report.json").read_text(encoding="utf-8"))
    assert report["baseline"]["quality"]["found"] > 0.9
    assert report["slim"]["quality"]["found"] > 0.8
    assert report["slim"]["macs"] <= 0.61 * report["baseline"]["macs"]


def test_commands_named_exist() -> None:
    named = set(re.findall(r"compress ([a-z]+)", README)) - {"import"}
    existing = set(get_command(app).commands)  # type: ignore[attr-defined]
    table = _section("Commands").partition("Exit codes")[0]
    listed = set(re.findall(r"`(?:compress )?([a-z]+)[^`]*`", table))
    assert listed >= existing
    assert named - {"on"} <= existing


def test_exit_codes_are_those_of_the_errors() -> None:
    stated = {int(code) for code in re.findall(r"\*\*(\d+)\*\*\s", _section("Commands"))}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CompressError)]
    raised = {kind.exit_code for kind in kinds}
    assert stated == raised | set(errors.OUTCOME_EXIT_CODES.values())


@pytest.mark.parametrize("verb", ["demo", "test", "check", "docs", "bench", "setup"])
def test_makefile_has_the_verbs(verb: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{verb}: .*## ", makefile, flags=re.MULTILINE)


def test_ci_runs_what_the_readme_says() -> None:
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "make test" in commands
    assert "make test" in "".join(_blocks("sh"))
