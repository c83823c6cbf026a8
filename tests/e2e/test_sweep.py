"""A sweep runs a pipeline once for each budget, says what could not be met, and repeats nothing."""

import json
import re

import pytest
from smallrun import MIDDLE, World, call

from compress.report.plots import Panel, Point, plot_fronts
from compress.report.records import TOP1


def _sweep(world: World, budgets: str, *arguments: str, **changes: object):
    values = world.values() | changes
    done = world.call("sweep", values, "--budgets", budgets, *arguments)
    folder = world.runs / f"{values['name']}-sweep"
    report = json.loads((folder / "sweep.json").read_text(encoding="utf-8")) if folder.is_dir() else None
    return done, report, folder


def test_budgets_stand_side_by_side(world: World) -> None:
    stages = world.values()["stages"]
    stages[-1]["robustness"] = {"images": 16, "noise_levels": [0.1], "corruptions": ["jpeg"]}
    done, report, folder = _sweep(world, "0.5,0.8,0.001,0.8", stages=stages)
    assert done.exit_code == 3, "a budget was not met"
    assert [run["budget"] for run in report["runs"]] == [0.8, 0.5, 0.001]
    assert report["quantity"] == "macs"
    for run in report["runs"][:2]:
        single = json.loads((world.runs / run["run"] / "report.json").read_text(encoding="utf-8"))
        assert single["name"] == run["run"] == f"chain-{run['budget']:g}"
        assert run["macs"] == single["slim"]["macs"] <= run["budget"] * single["baseline"]["macs"]
        assert run["top1"] == single["slim"]["quality"]["top1"]
        assert run["fewer_macs"] == single["baseline"]["macs"] / run["macs"]
        assert run["speedup"] == 1 / single["details"]["latency"]["ratio"]["value"]
        assert run["passed"] == single["verdict"]["passed"]
    last = report["runs"][2]
    assert "Target 0.001 of the baseline's macs cannot be reached" in last["error"]
    assert last["macs"] is last["top1"] is None
    assert "cannot be reached" in done.stderr
    assert re.search(r"0\.001 +not met", done.stdout)
    page = (folder / "sweep.html").read_text(encoding="utf-8")
    assert page.count('href="../chain-') == 2
    assert set(report["prune_potential"]["distributions"]) == {"nominal", "uniform noise 0.1", "jpeg 3"}
    assert "Prune potential at a drop of 0.5 percentage points" in done.stdout
    assert "Prune potential" in page
    assert "cannot be reached" in page
    assert page.count("<svg") == 1

    again, same, _ = _sweep(world, "0.8,0.5", stages=stages)
    assert again.exit_code == 0
    assert same["runs"] == report["runs"][:2]
    assert "done in" not in re.sub(r"(?m)^(?!\[).*$", "", again.stdout), "no stage ran again"


def test_a_failed_verdict_is_exit_code_1(world: World) -> None:
    values = world.values()
    values["stages"][-1]["gates"] = {"max_size_mb": 1e-6}
    done = world.call("sweep", values, "--budgets", "0.8", "--quiet")
    assert done.exit_code == 1
    assert re.search(r"0\.8 +failed", done.stdout)


@pytest.mark.parametrize("budgets", ["", "0.5,", "half", "0.5,-1", "0", "nan", "inf"])
def test_budgets_that_are_no_numbers_are_refused(world: World, budgets: str) -> None:
    done = world.call("sweep", world.values(), "--budgets", budgets)
    assert done.exit_code == 2
    assert f"--budgets must be numbers above 0, such as 0.8,0.6,0.5, got '{budgets}'." in done.stderr


def test_a_wrong_budget_is_refused_before_anything_runs(world: World) -> None:
    done = world.call("sweep", world.values() | {"name": "fresh"}, "--budgets", "0.8,1.5")
    assert done.exit_code == 2
    assert "stages[1].target.macs must be at most 1, got 1.5" in done.stderr
    assert not (world.runs / "fresh-0.8").exists()


def test_a_pipeline_without_a_target_cannot_be_swept(world: World) -> None:
    done = world.call("sweep", world.values(middle=(MIDDLE[1],)), "--budgets", "0.8")
    assert done.exit_code == 2
    assert "must have a stage with a target to be swept, it has none." in done.stderr


def test_a_missing_pipeline_is_refused(tmp_path) -> None:
    assert call("sweep", str(tmp_path / "none.yaml"), "--budgets", "0.8").exit_code == 2


def test_the_front_is_what_no_other_run_betters() -> None:
    points = [
        Point(1.2, 99.0, "slow"),
        Point(2.0, 95.0, "fast"),
        Point(1.5, 94.0, "bettered"),
        Point(1.0, 99.5, "", is_baseline=True),
    ]
    plot = plot_fronts("front", [Panel("speed-up", points, more_is_better=True)], TOP1)
    for label in ("slow", "fast", "bettered", "baseline"):
        assert f">{label}<" in plot
    assert plot_fronts("front", [Panel("speed-up", [])], TOP1) == ""
