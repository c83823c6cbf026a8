"""The pages on clusters: job files that can be read, options that exist, and a cost table made by its program."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from compress.catalog import INSTALL
from compress.cli.commands import app

ROOT = Path(__file__).parents[2]
SCALE = ROOT / "docs" / "scale"
PAGES = sorted(SCALE.glob("*.md"))


def blocks(language: str) -> list[str]:
    return [
        block
        for page in PAGES
        for block in re.findall(
            rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
    ]


def test_shell_blocks_are_valid() -> None:
    assert len(blocks("sh")) >= 6
    for block in blocks("sh"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_the_ray_job_has_what_a_ray_job_needs() -> None:
    (text,) = blocks("yaml")
    job: Any = yaml.safe_load(text)
    assert (job["kind"], job["apiVersion"]) == ("RayJob", "ray.io/v1")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for one in spec["containers"] for mount in one["volumeMounts"]} <= volumes
    measuring = cluster["workerGroupSpecs"][1]
    assert measuring["rayStartParams"]["resources"] == '"{\\"timing\\": 1}"'


@pytest.mark.parametrize("command", ["sweep", "search"])
def test_options_of_the_pages_exist(command: str) -> None:
    text = "\n".join([*blocks("sh"), *blocks("yaml")]).replace("\\\n", " ")
    used: set[str] = set()
    for line in re.findall(rf"compress {command} [^\n]*(?:\n    --[^\n]*)*", text):
        used |= set(re.findall(r"--[a-z-]+", line))
    known = {option for one in get_command(app).commands[command].params for option in one.opts}  # type: ignore[attr-defined]
    assert used
    assert used <= known


def test_packages_are_those_of_the_hints() -> None:
    text = (SCALE / "README.md").read_text(encoding="utf-8")
    for name in ("ray", "optuna"):
        assert INSTALL[name] in text


def test_the_cost_table_is_that_of_its_program() -> None:
    program = [sys.executable, str(ROOT / "benchmarks" / "scale_cost.py")]
    made = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    text = (SCALE / "paper-plan.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- scale-cost: begin -->\n(.*?)<!-- scale-cost: end -->", text, re.DOTALL)
    assert shown is not None
    assert shown[1] == made
