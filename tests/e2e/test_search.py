"""`compress search` finds the smallest passing budget, repeats nothing, and says what it cannot do."""

import json
import re

import pytest
from smallrun import World


def test_a_pipeline_is_searched_and_what_is_known_is_not_run_again(world: World) -> None:
    values = world.values() | {"name": "searched"}
    values["stages"][-1]["gates"] = {"parity": 0.01}
    done = world.call("search", values, "--runs", "3", "--between", "0.4,0.9", "--json", str(world.folder / "v.json"))
    folder = world.runs / "searched-search"
    found = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    budgets = [run["budget"] for run in found["runs"]]
    assert done.exit_code == 0, done.stderr
    assert 1 <= len(budgets) <= 3
    assert budgets == sorted(budgets, reverse=True)
    passing = [run for run in found["runs"] if run["passed"]]
    assert found["best"] == min(passing, key=lambda run: run["budget"])["run"]
    assert f"({found['best']})" in done.stdout
    assert "passed, smallest" in done.stdout
    assert json.loads((world.folder / "v.json").read_text(encoding="utf-8"))["verdict"]["passed"] is True
    assert "compress search" in (folder / "search.html").read_text(encoding="utf-8")
    again = world.call("search", values, "--runs", "3", "--between", "0.4,0.9")
    assert again.exit_code == 0
    assert not re.search(r"^\[.*done in", again.stdout, re.MULTILINE)


def test_gates_that_no_network_passes_are_exit_code_1(world: World) -> None:
    values = world.values() | {"name": "never"}
    values["stages"][-1]["gates"] = {"max_size_mb": 1e-6}
    file = world.folder / "never.xml"
    done = world.call("search", values, "--runs", "2", "--between", "0.5,0.9", "--quiet", "--junit", str(file))
    assert done.exit_code == 1
    assert "<failure" in file.read_text(encoding="utf-8")
    assert "No budget of macs up to 0.9 passes." in done.stdout


@pytest.mark.parametrize("between", ["", "0.5", "0.9,0.5", "0,1", "a,b", "0.1,inf", "0.1,0.5,0.9"])
def test_a_wrong_range_is_refused(world: World, between: str) -> None:
    done = world.call("search", world.values(), "--between", between)
    assert done.exit_code == 2
    assert f"--between must be two numbers above 0, the smaller one first, got '{between}'." in done.stderr
