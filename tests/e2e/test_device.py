"""A pipeline whose latency is measured by a command: budget, verdict, report, plan, and a connection that drops."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import device
import pytest
import smallrun

SCRIPT = str(Path(device.__file__))
COMMAND = [sys.executable, "-S", "-E", SCRIPT, "{model}", "--json", "--threads", "{threads}"]
ASKED = 0.7


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> smallrun.World:
    return smallrun.make_world(tmp_path_factory.mktemp("device"), "residual")


def values(world: smallrun.World, *options: str, **deploy: Any) -> dict[str, Any]:
    found = world.values("residual")
    found["deploy"] = {"command": [*COMMAND, *options], "device": "toy", "threads": 512, "variants": 24, **deploy}
    found["stages"][1] |= {"target": {"latency": ASKED}, "multiple_of": 2}
    found["stages"][-1]["gates"] |= {"min_speedup": 1.3, "max_latency_ms": 1.0, "max_ratio": {"p50": 0.75}}
    return found


@pytest.fixture(scope="module")
def report(world: smallrun.World) -> dict[str, Any]:
    done = world.call("run", values(world))
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads((world.runs / "residual" / "report.json").read_text(encoding="utf-8"))
    return found


def test_the_budget_is_met_on_the_device_and_in_the_verdict(report: dict[str, Any], world: smallrun.World) -> None:
    budget = report["stages"][1]["record"]["latency"]
    assert budget["measured_ratio"] == pytest.approx(ASKED, rel=0.03)
    slim = device.milliseconds((world.runs / "residual" / "model.onnx").read_bytes()) / 512
    latency = report["details"]["latency"]
    assert set(latency["slim_ms"]) == {slim}
    assert latency["ratio"]["value"] == pytest.approx(slim / latency["baseline_ms"][0])
    checks = {check["name"]: check for check in report["verdict"]["checks"]}
    assert checks["max_latency_ms"]["value"] == pytest.approx(slim)
    assert "device toy, 512 threads, batch 1" in checks["max_latency_ms"]["detail"]


def test_the_report_names_the_device_the_command_and_its_runtime(report: dict[str, Any], world: smallrun.World) -> None:
    latency = report["details"]["latency"]
    assert (latency["device"], latency["runtime"], latency["command"]) == ("toy", "simulated 1.0", shlex.join(COMMAND))
    assert latency.get("provider") is None
    budget = report["stages"][1]["record"]["latency"]
    assert (budget["device"], budget["device_runtime"]) == ("toy", "simulated 1.0")
    page = (world.runs / "residual" / "report.html").read_text(encoding="utf-8")
    assert "device toy, simulated 1.0, 512 threads" in page
    assert "complete networks timed on" in page
    assert report["details"].get("runtime") is None, "start, memory and throughput of this machine are left out"


@pytest.mark.usefixtures("report")
def test_plan_shows_the_command_and_other_waits_repeat_nothing(world: smallrun.World) -> None:
    planned = world.call("plan", values(world), "--set", "deploy.timeout_s=5", "--set", "deploy.attempts=2")
    assert planned.exit_code == 0
    assert "Device 'toy' is timed by this command, which a run executes on this machine:" in planned.output
    assert shlex.join(COMMAND) in planned.output.replace("\n  ", " ").replace("\n", "")
    assert re.findall(r"(\w+) +unchanged", planned.output) == ["load", "prune", "finetune", "export", "verify"]
    other = world.call("plan", values(world, device="another"))
    assert not {"prune", "verify"} & set(re.findall(r"(\w+) +unchanged", other.output))


@pytest.mark.usefixtures("report")
def test_a_file_is_verified_on_the_device_of_its_pipeline(world: smallrun.World) -> None:
    run = world.runs / "residual"
    path, model = world.write(values(world)), str(run / "model.onnx")
    done = smallrun.call("verify", model, "--against", model, "--pipeline", str(path))
    assert done.exit_code == 1, "it is as fast as itself"
    assert re.search(r"max_latency_ms +pass", done.output)
    assert re.search(r"min_speedup +fail +1 +1.3", done.output)


def test_a_connection_that_drops_ends_the_run_and_the_next_one_continues(world: smallrun.World) -> None:
    state = world.folder / "calls"
    options = ("--state", str(state), "--drop", "9")
    dropping = values(world, *options, device="far away", attempts=1) | {"name": "dropped"}
    done = world.call("run", dropping)
    assert done.exit_code == 5
    said = " ".join(done.output.split())
    assert "Command of the device 'far away' was tried once: exit code 1; its error output ends with: ssh: conn" in said
    assert "the same command line continues" in said
    assert len(_samples(world)) == 5, "three times the baseline, four variants, the baseline, one variant"
    again = world.call("run", dropping, "--set", "deploy.attempts=2")
    assert again.exit_code == 0, again.output
    names = state.read_text(encoding="utf-8").splitlines()
    assert [name.startswith("variant") for name in names[:10]] == [False] * 3 + [True] * 4 + [False, True, True]
    table = [name for name in names if name.startswith("variant")]
    assert len(table) >= len(_samples(world)) == 24


def _samples(world: smallrun.World) -> list[Any]:
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in (world.store / ".latency").iterdir()]
    (table,) = [one for one in kept if one["conditions"]["machine"] == "far away"]
    samples: list[Any] = table["samples"]
    return samples


def test_a_program_that_is_not_there_is_refused_before_any_stage(world: smallrun.World) -> None:
    missing = values(world) | {"name": "missing"}
    missing["deploy"] = {"command": ["./no_such_program", "{model}"], "device": "toy"}
    done = world.call("run", missing, "--seed", "7")
    assert done.exit_code == 5
    assert "program './no_such_program' is not found" in " ".join(done.output.split())
    assert "load: done" not in done.output
