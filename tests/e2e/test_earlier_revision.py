"""Files of an earlier revision: run folder, slim checkpoint, recipe, bundle and pipeline still load.

`earlier/` was written on 2026-11-29 by the revision before the modules moved to their present rooms.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import compress
from compress.cli.commands import app
from compress.config.load import load_pipeline
from compress.engine.keys import build_steps
from compress.model.recipe import Factorize, Recipe, RemoveChannels

EARLIER = Path(__file__).parent / "earlier"
WRITTEN_AT = "/home/user/small"  # where the files of the pipeline lay


@pytest.fixture
def earlier(tmp_path) -> Path:
    """A copy of the files, with the paths that the run wrote down leading into it."""
    folder = tmp_path / "small"
    shutil.copytree(EARLIER, folder)
    path = folder / "run" / "pipeline.yaml"
    text = path.read_text(encoding="utf-8")
    assert text.count(WRITTEN_AT) == 4
    path.write_text(text.replace(WRITTEN_AT, str(folder)), encoding="utf-8")
    return folder


def command(*arguments: object) -> str:
    """Give a command, which must succeed, and return what it prints."""
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("factory", [None, f"{EARLIER / 'model.py'}:small"])
def test_a_slim_checkpoint_loads_with_the_same_outputs(earlier, factory):
    module = compress.load(earlier / "run", factory)
    images = torch.tensor(np.load(earlier / "test.npz")["x"][:16]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        found = module((images - 0.5) / 0.25).numpy()
    np.testing.assert_allclose(found, np.load(earlier / "outputs.npz")["logits"], rtol=1e-4, atol=1e-4)


def test_a_recipe_reads_as_the_same_edits(earlier):
    recipe = Recipe.from_json((earlier / "run" / "slim" / "recipe.json").read_text(encoding="utf-8"))
    kinds = [type(edit) for edit in recipe.edits]
    assert set(kinds) == {RemoveChannels, Factorize}
    assert kinds.index(RemoveChannels) < kinds.index(Factorize)


def test_a_bundle_proves_itself(earlier):
    assert "16" in command("check", earlier / "small.zip")


def test_a_report_is_compared(earlier):
    page = earlier / "page.html"
    shown = command("report", earlier / "run", "--out", page)
    assert "small" in shown
    assert "100.00" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["pipeline.yaml", "run/pipeline.yaml"])
def test_a_pipeline_file_is_valid_and_means_the_same(earlier, file):
    pipeline = load_pipeline(earlier / file, [])
    assert [stage["stage"] for stage in pipeline.resolved["stages"]] == [
        "load",
        "prune",
        "low_rank",
        "finetune",
        "export",
        "verify",
    ]
    written = json.loads((earlier / "run" / "lock").read_text(encoding="utf-8"))["stages"]
    for step, one in zip(build_steps(pipeline), written, strict=True):
        now = step.components("")
        if one["stage"] == "low_rank" and file == "pipeline.yaml":  # the default has changed, a stated value has not
            assert now["config"].pop("allocation") == "energy"
            assert one["components"]["config"].pop("allocation") == "shared_error"
        differing = {name for name in one["components"] if now[name] != one["components"][name]}
        # A stage's version is raised where its results change; what the pipeline asks for must not read otherwise.
        assert differing <= {"libraries", "input", "version"}
