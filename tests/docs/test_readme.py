"""What the README shows is executed, and what it states about exit codes and commands is compared with the code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from compress import errors
from compress.cli.commands import app
from compress.config.load import parse_pipeline

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_yaml_blocks_are_valid_pipelines(tmp_path: Path) -> None:
    blocks = _blocks("yaml")
    assert len(blocks) == 3
    for block in blocks:
        pipeline = parse_pipeline(block, tmp_path / "pipeline.yaml")
        assert [stage.stage for stage in pipeline.config.stages][-1] == "verify"


def test_bring_your_own_works_as_it_stands(tmp_path: Path) -> None:
    section = README.partition("## Bring your own")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    (pipeline,) = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    assert len(code.splitlines()) <= 75  # about sixty lines of a stranger's, with room for what explains them
    (tmp_path / "my_project.py").write_text(code, encoding="utf-8")
    (tmp_path / "spots.yaml").write_text(pipeline, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
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
    assert {"run", "plan", "profile", "validate", "verify", "inspect", "list", "schema", "init"} <= existing
    assert named <= existing


def test_exit_codes_are_those_of_the_errors() -> None:
    stated = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    raised = {error.exit_code for error in vars(errors).values() if isinstance(error, type)}
    assert stated == raised | set(errors.OUTCOME_EXIT_CODES.values())


@pytest.mark.parametrize("verb", ["demo", "test", "check", "bench", "setup"])
def test_makefile_has_the_verbs(verb: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{verb}: .*## ", makefile, flags=re.MULTILINE)


def test_ci_runs_what_the_readme_says() -> None:
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "make test" in commands
    assert "make test" in "".join(_blocks("sh"))
