"""What a run keeps, and what it needs: packages, records on disk, work that was done before a kill."""

import signal
import sys
from pathlib import Path

import pytest
import smallrun
from smallrun import World, statuses

import compress.catalog as packages
from compress.storage.digest import digest_file

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

import kept_files
import yaml_values

DYING = """
import os
from compress.search.parts import Parts
add, made = Parts.add, []
def dying(self, key, part):
    kept = add(self, key, part)
    made.append(key)
    if len(made) == {after}:
        os.kill(os.getpid(), 9)
    return kept
Parts.add = dying
from compress.cli.commands import app
app(["run", {path!r}, "--runs-dir", {runs!r}])
"""


def test_a_run_learns_of_a_missing_package_before_its_first_stage(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**world.values(), "seed": 99}
    values["stages"][0]["model"] = {"timm": "resnet18"}
    real = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "timm" else real(name))
    monkeypatch.setattr("compress.engine.runner._Run._make", lambda *_: pytest.fail("a stage ran"))
    done = world.call("run", values)
    assert done.exit_code == 5
    assert (
        "model.timm: resnet18 needs the package timm, which is not installed.\nHint: pip install 'timm" in done.stderr
    )


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_prune_that_is_killed_goes_on_where_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole suite of moments is in tests/search/test_parts.py; here the process dies."""
    from compress.search.parts import Parts

    values = world.values()
    values["stages"][1] |= {"score_images": 16, "criterion": "taylor"}
    path = world.write(values)
    for after in (1, 2):
        with smallrun.start(code=DYING.format(after=after, path=str(path), runs=str(world.runs))) as process:
            process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
    made: list[str] = []
    add = Parts.add
    monkeypatch.setattr(Parts, "add", lambda self, key, part: made.append(str(key["part"])) or add(self, key, part))
    progress = smallrun.Notes()
    outcome = world.run(values, progress=progress)
    assert statuses(outcome)[:2] == ["load unchanged", "prune ran"]
    assert "Parts that an interrupted run has finished are not done again." in progress.notes
    assert not list(world.store.glob(".work/*"))
    resumed, kept = digest_file(world.runs / "chain" / "slim" / "weights.safetensors"), len(made)
    outcome = world.run(values, "stages.prune.max_removed_ratio=0.89")  # another key, nothing of it is kept
    assert statuses(outcome)[1] == "prune ran"
    assert len(made) - kept == kept + 3
    assert digest_file(world.runs / "chain" / "slim" / "weights.safetensors") == resumed


def test_changed_bits_of_what_is_kept_never_pass(world: World) -> None:
    """A sample; `python tests/fuzz/kept_files.py` tries hundreds."""
    world.write(world.values())
    said: list[str] = []
    assert kept_files.fuzz(world, 30, said.append) == []
    assert said == ["30 changed bits: {'try_store': 12, 'try_report': 6, 'try_slim': 6, 'try_rest': 6}, 0 wrong"]
    assert statuses(world.run(world.values())) == [f"{stage} unchanged" for stage in
                                                   ("load", "prune", "finetune", "export", "verify")]  # fmt: skip


def test_odd_values_in_a_pipeline_file_end_with_a_sentence(world: World) -> None:
    """A sample; `python tests/fuzz/yaml_values.py` tries hundreds, with --run through whole runs."""
    said: list[str] = []
    assert yaml_values.fuzz(world, 150, ("validate", "plan"), said.append) == []
    assert said[-1].startswith("150 values: ")
