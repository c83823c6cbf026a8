"""The tables of benchmarks have all their rows, and each is a pipeline that loads."""

import sys
from pathlib import Path

import pytest

from compress.catalog import CRITERIA, METHODS
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


@pytest.mark.parametrize("letter", ["a", "b", "c"])
def test_every_criterion_and_method_has_a_row_that_loads(tables, letter, tmp_path, monkeypatch):
    for name in ("train.npz", "test.npz"):
        (tmp_path / name).touch()
    monkeypatch.setenv("CIFAR10_ARRAYS", str(tmp_path))
    table = tables[0].TABLES[letter]
    for epochs in table.epochs:
        path = tables[0].pipeline_file(table, 0.45, epochs, [], tmp_path)
        values = load_pipeline(path, []).resolved
        prune = next(stage for stage in values["stages"] if stage["stage"] == "prune")
        assert prune["target"]["macs"] == 0.45
        assert any(stage["stage"] == "finetune" for stage in values["stages"]) == (epochs > 0)
        rows = tables[0].rows(values, epochs, table.has_methods)
        names = [row.name for row in rows]
        assert len(names) == len(set(names))
        wanted = {*(set(CRITERIA) - {"random", "reconstruction"}), "low_rank", "random channels", "uniform widths"}
        assert set(names) >= wanted | ({*METHODS, "trp", "random weights"} if epochs else set())
        for row in rows:
            assert load_pipeline(path, row.overrides).resolved["stages"]


def test_an_interval_by_hand(tables):
    one = tables[0].Result("x", top1=(0.9,), images=100)
    assert one.interval == pytest.approx((0.8256, 0.9448), abs=1e-4)
    several = tables[0].Result("x", top1=(0.5, 0.9), images=100_000)
    assert several.interval == (0.5, 0.9)


def test_a_table_says_which_rows_are_not_told_apart(tables):
    results = [
        tables[0].Result("far", None, 1.0, 0.9, (0.5,), 10_000, 2.0, (3.0,)),
        tables[0].Result("best", None, 0.5, 0.1, (0.9,), 10_000, 2.0, (3.0,)),
        tables[0].Result("near", None, None, 0.1, (0.899,), 10_000, 2.0, (3.0,)),
        tables[0].Result("none", "It cannot be run."),
    ]
    lines = tables[0].markdown(results, "Title").splitlines()[4:]
    assert [line.rpartition("| ")[2] for line in lines] == [
        "best |",
        "not told apart |",
        "worse |",
        "It cannot be run. |",
    ]
    assert "0.500 → 0.100" in lines[0]
    assert "– → 0.100" in lines[1]


def test_a_setting_of_zero_is_one_for_methods_too(tables):
    path = ROOT / "pipelines" / "quickstart.yaml"
    values = load_pipeline(path, ["stages.finetune.weight_decay=0"]).resolved
    row = next(row for row in tables[0].rows(values, 4, True) if row.name == "gsm")
    prune = next(stage for stage in load_pipeline(path, row.overrides).resolved["stages"] if stage["stage"] == "prune")
    assert prune["training"]["weight_decay"] == 0


def test_every_row_of_the_recipe_loads(tables):
    path = ROOT / "pipelines" / "resnet20_cifar10.yaml"
    for row in tables[1].ROWS:
        assert load_pipeline(path, row.overrides).resolved["stages"]
