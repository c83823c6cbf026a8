"""Every pipeline, command and Python block of the tutorial and of the pages on pipeline files is checked."""

import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision import models
from typer.main import get_command
from typer.testing import CliRunner

from compress.cli.commands import app
from compress.config.load import load_pipeline, parse_pipeline
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.pipeline import ExportConfig
from compress.config.schema.prune import CutConfig, PruneConfig, SlimConfig
from compress.config.schema.verify import DeployConfig

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("tutorial", "pipeline-files", "latency-budgets")


def _text(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", _text(page), flags=re.DOTALL)


def _commands(page: str) -> list[list[str]]:
    lines = "".join(_blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the tutorial asks for: weights, and pictures in folders of classes."""
    content = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(content, "JPEG")
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                (folder / f"{number}.jpg").write_bytes(content.getvalue())
    (tmp_path / "resnet18.pth").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pipelines_of_the_tutorial_validate(project: Path) -> None:
    blocks = _blocks("tutorial", "yaml")
    assert len(blocks) == 2
    for block in blocks:
        path = project / f"{yaml.safe_load(block)['name']}.yaml"
        path.write_text(block, encoding="utf-8")
        done = CliRunner().invoke(app, ["validate", str(path)], prog_name="compress")
        assert done.exit_code == 0, done.output


def test_init_of_the_tutorial_writes_a_valid_file(project: Path) -> None:
    torch.save(models.resnet18(num_classes=2).state_dict(), project / "resnet18.pth")
    (init,) = [command for command in _commands("tutorial") if command[1] == "init"]
    for arguments in (init[1:], ["validate", init[init.index("--out") + 1]]):
        done = CliRunner().invoke(app, arguments, prog_name="compress")
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str, project: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = [command[command.index("compress") :] for command in _commands(page)]
    assert found
    for _, name, *arguments in found:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        used = {argument for argument in arguments if argument.startswith("-")}
        assert name == "check" or used <= known, (name, used - known)


@pytest.mark.parametrize("page", PAGES)
def test_overrides_change_the_first_pipeline_of_their_page(page: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(_blocks(page, "yaml")[0], encoding="utf-8")
    for command in _commands(page):
        overrides = [command[at + 1] for at, word in enumerate(command) if word == "--set"]
        if overrides and "weights" not in overrides[0]:
            assert load_pipeline(path, overrides).config != load_pipeline(path).config


@pytest.mark.parametrize("page", PAGES)
def test_pipelines_of_other_pages_are_valid(page: str, tmp_path: Path) -> None:
    blocks = _blocks(page, "yaml")
    assert blocks
    for block in blocks:
        assert parse_pipeline(block, tmp_path / "p.yaml").config.stages[-1].stage == "verify"


def test_python_of_the_tutorial_makes_weights_that_load(project: Path) -> None:
    make, load = _blocks("tutorial", "python")
    exec(compile(make, "tutorial.md", "exec"), {})
    assert (project / "resnet18.pth").stat().st_size > 40_000_000
    assert 'compress.load("runs/resnet18")' in load


def test_settings_named_on_the_page_of_stages_exist() -> None:
    text = _text("stages")
    schemas = {"prune": PruneConfig, "slim": SlimConfig, "low_rank": LowRankConfig, "export": ExportConfig}
    for title, schema in schemas.items():
        section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        cells = re.findall(r"^\| (`[^|]+`) \|", section, flags=re.MULTILINE)
        named = {name.partition(":")[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
        assert named
        assert named <= set(schema.model_fields), (title, named - set(schema.model_fields))
    assert {"criterion", "damage", "allocation"} <= set(CutConfig.model_fields)
    named = set(re.findall(r"^\| `(\w+)", _text("latency-budgets"), flags=re.MULTILINE))
    assert named <= set(DeployConfig.model_fields)
