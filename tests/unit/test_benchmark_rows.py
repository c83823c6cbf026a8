"""The tables of benchmarks have all their rows, and each is a pipeline that loads."""

import sys
from pathlib import Path

import pytest

from compress.catalog import METHODS
from compress.config.load import load_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch):
    """The modules of the two tables, which lie beside each other outside the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import methods
    import recipe

    yield methods, recipe
    for name in ("methods", "recipe", "rows", "results"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["quickstart", "resnet20_cifar10"])
def test_every_method_has_a_row_that_loads(tables, name):
    path = ROOT / "pipelines" / f"{name}.yaml"
    rows = tables[0].rows(load_pipeline(path, []).resolved, 4)
    names = [row.name for row in rows]
    assert len(names) == len(set(names)) >= 16
    assert {name.partition(",")[0] for name in names} >= {*METHODS, "low_rank", "trp"}
    for row in rows:
        assert load_pipeline(path, row.overrides).resolved["stages"]


def test_a_setting_of_zero_is_one_for_methods_too(tables):
    path = ROOT / "pipelines" / "quickstart.yaml"
    values = load_pipeline(path, ["stages.finetune.weight_decay=0"]).resolved
    row = next(row for row in tables[0].rows(values, 4) if row.name == "gsm")
    prune = next(stage for stage in load_pipeline(path, row.overrides).resolved["stages"] if stage["stage"] == "prune")
    assert prune["training"]["weight_decay"] == 0


def test_every_row_of_the_recipe_loads(tables):
    path = ROOT / "pipelines" / "resnet20_cifar10.yaml"
    for row in tables[1].ROWS:
        assert load_pipeline(path, row.overrides).resolved["stages"]
