"""What a run keeps, and what it needs: packages, records on disk, work that was done before a kill."""

import pytest
from smallrun import World

import compress.packages as packages


def test_a_run_learns_of_a_missing_package_before_its_first_stage(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**world.values(), "seed": 99}
    values["stages"][0]["model"] = {"timm": "resnet18"}
    real = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "timm" else real(name))
    monkeypatch.setattr("compress.runner._Run._make", lambda *_: pytest.fail("a stage ran"))
    done = world.call("run", values)
    assert done.exit_code == 5
    assert (
        "model.timm: resnet18 needs the package timm, which is not installed.\nHint: pip install 'timm" in done.stderr
    )
