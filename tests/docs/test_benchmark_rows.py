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
        wanted = {
            *(set(CRITERIA) - {"random", "reconstruction"}),
            "low_rank, energy",
            "random channels",
            "uniform widths",
        }
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


def test_a_table_is_made_of_what_is_in_the_results_file(tables, tmp_path, monkeypatch, capsys):
    methods, path, begin = tables[0], tmp_path / "methods.jsonl", ("a", 0.4, 0)
    rest = {"before": 1.0, "after": 0.2, "images": 10_000, "macs": 2.5, "seconds": 4.0}
    for row, seed, top1, source in (
        ("taylor", 0, 0.5, "old"),
        ("taylor", 0, 0.97, "old"),
        ("taylor", 1, 0.99, "new"),
        ("l1", 0, 0.96, "new"),
    ):
        methods.append_run(path, methods.Run(*begin, row, seed, source, "2026-11-29", top1=top1, **rest))
    methods.append_run(path, methods.Run(*begin, "grasp", 0, "new", "2026-11-29", refused="It cannot be run."))
    monkeypatch.setattr(methods, "measure", lambda *_: pytest.fail("nothing is to be measured"))
    arguments = ["a", "--kept", "0.4", "--epochs", "0", "--no-run", "--results", str(path), "--runs-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["methods.py", *arguments])
    methods.main()
    text = capsys.readouterr().out
    assert "| taylor | 98.00 % (97.00 to 99.00, 2 seeds) | 1.000 → 0.200 | 2.50× fewer | 4 | best |" in text
    assert "| l1 | 96.00 %" in text
    assert "| grasp | – | – | – | – | It cannot be run. |" in text
    assert text.rstrip().endswith("Measured with the sources new, old.")


def test_a_run_in_the_results_file_is_not_measured_again(tables, tmp_path, monkeypatch):
    methods, path, asked = tables[0], tmp_path / "methods.jsonl", []
    methods.append_run(path, methods.Run("a", 0.4, 0, "l1", 0, "old", "2026-11-29", top1=0.9, images=100, seconds=1.0))

    def measure(table, pipeline, row, overrides, seed, *rest):
        asked.append((row.name, seed))
        return "It cannot be run."

    monkeypatch.setattr(methods, "measure", measure)
    arguments = ["a", "--kept", "0.4", "--epochs", "0", "--only", "l1", "taylor", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", ["methods.py", *arguments, "--results", str(path), "--runs-dir", str(tmp_path)])
    methods.main()
    assert asked == [("taylor", 0), ("taylor", 1), ("l1", 1)]
    assert [(run.row, run.seed) for run in methods.read_runs(path)] == [("l1", 0), *asked]
    asked.clear()
    methods.main()
    assert asked == []
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--fresh", "--seeds", "0"])
    methods.main()
    assert asked == [("l1", 0)]
