"""A sweep over seeds in several processes: means, failed rows, a killed sweep, and no stage twice."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from smallrun import Notes, World, make_world, start

from compress.engine import executors, jobs
from compress.engine.executors import Processes, run_all
from compress.engine.jobs import CompareJob, Failure, JobResult, RunJob, execute, from_plain, to_plain
from compress.engine.sweep import Grid, sweep
from compress.engine.timing_lock import Turns
from compress.errors import StageError

BUDGETS, SEEDS = "0.8,0.5", "0,1"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world of images and weights, without runs."""
    return make_world(tmp_path_factory.mktemp("jobs") / "world")


@pytest.fixture(scope="module")
def swept(world: World) -> World:
    """The world after a sweep of two budgets and two seeds that was killed once."""
    arguments = ["sweep", str(world.write(world.values())), "--budgets", BUDGETS, "--seeds", SEEDS, "--jobs", "2"]
    arguments += ["--runs-dir", str(world.runs)]
    killed = start(*arguments)
    ends = time.monotonic() + 200
    while not any("prune: done in" in line for line in stage_lines(world)) and time.monotonic() < ends:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = start(*arguments)
    try:
        output, errors = again.communicate(timeout=500)
    finally:
        if again.poll() is None:
            again.kill()
            again.communicate()
    assert again.returncode == 0, errors
    (world.folder / "output.txt").write_text(output, encoding="utf-8")
    return world


def stage_lines(world: World) -> list[str]:
    """Return the lines of all logs on stages that were computed."""
    logs = [path.read_text(encoding="utf-8") for path in sorted(world.runs.glob("*/job.log"))]
    return [line for text in logs for line in text.splitlines() if re.search(r" \[\d/\d\] \w+: done in", line)]


def test_a_killed_sweep_goes_on_and_no_stage_is_computed_twice(swept: World) -> None:
    counts = Counter(line.split(" ")[4] for line in stage_lines(swept))
    keys = {}
    for name in ("0.8-seed0", "0.8-seed1", "0.5-seed0", "0.5-seed1"):
        lock = json.loads((swept.runs / f"chain-{name}" / "lock").read_text(encoding="utf-8"))
        for stage in lock["stages"]:
            keys.setdefault(f"{stage['stage']}:", set()).add(stage["key"])
    assert set(counts) == set(keys)
    assert all(counts[stage] <= len(of_stage) for stage, of_stage in keys.items()), (counts, keys)


def test_rows_have_mean_and_deviation_over_seeds(swept: World) -> None:
    report = json.loads((swept.runs / "chain-sweep" / "sweep.json").read_text(encoding="utf-8"))
    assert [(run["budget"], run["seed"]) for run in report["runs"]] == [(0.8, 0), (0.8, 1), (0.5, 0), (0.5, 1)]
    (first, _), values = report["rows"], [run["top1"] for run in report["runs"][:2]]
    assert first["runs"] == ["chain-0.8-seed0", "chain-0.8-seed1"]
    assert first["top1"]["mean"] == pytest.approx(sum(values) / 2)
    assert first["top1"]["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert (first["done"], first["passed"]) == (2, 2)
    output = (swept.folder / "output.txt").read_text(encoding="utf-8")
    assert re.search(r"0\.8 +2 passed +[\d.]+ % ± [\d.]+ %", output)
    assert "4 runs of chain, 2 at a time." in output
    page = (swept.runs / "chain-sweep" / "sweep.html").read_text(encoding="utf-8")
    assert '<a href="../chain-0.8-seed1/report.html">1</a>' in page


def test_all_networks_are_timed_in_turn_and_once(swept: World) -> None:
    path = swept.runs / "chain-sweep" / "sweep.json"
    comparison = json.loads(path.read_text(encoding="utf-8"))["comparison"]
    assert set(comparison["runs"]) == {f"chain-{b}-seed{s}" for b in (0.8, 0.5) for s in (0, 1)}
    for one in comparison["runs"].values():
        assert one["low"] <= one["ratio"] <= one["high"]
    low, high = comparison["control"]
    assert 0.5 < low <= high < 2
    outcome = sweep(swept.write(swept.values()), Grid([0.8, 0.5], [0, 1]), swept.runs)
    assert outcome.sweep.comparison.key == comparison["key"]
    assert json.loads(path.read_text(encoding="utf-8"))["comparison"] == comparison
    assert set(outcome.ran.values()) == {()}, "nothing was computed"


def test_a_run_that_fails_is_a_row_and_the_sweep_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = jobs.run

    def run(pipeline, *arguments):
        if pipeline.config.name.endswith("-0.5"):
            raise StageError("The disk was full.", hint="Make room.")
        return whole(pipeline, *arguments)

    monkeypatch.setattr(jobs, "run", run)
    progress = Notes()
    shutil.copytree(world.folder, tmp_path / "world", ignore=shutil.ignore_patterns("runs"))
    own = World(tmp_path / "world")
    outcome = sweep(own.write(own.values()), Grid([0.8, 0.5]), own.runs, progress=progress)
    assert outcome.exit_code == 3
    assert [run.word for run in outcome.sweep.runs] == ["passed", "failed"]
    assert outcome.sweep.rows[1][:2] == ("0.5", "failed")
    assert progress.warnings == ["chain-0.5: failed: The disk was full. Hint: Make room."]
    assert outcome.sweep.comparison is None, "one network alone is compared with no other"
    assert "The disk was full." in (own.runs / "chain-sweep" / "sweep.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "Its process was ended by signal SIGKILL."),
        ("import sys; sys.exit(9)", "Its process ended with exit code 9; see '"),
    ],
)
def test_a_process_that_dies_is_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    (tmp_path / "dying.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(executors, "_PROCESS", "dying")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    job = RunJob("one", "", "p.yaml", str(tmp_path / "runs"))
    with Processes(2) as executor:
        ((_, result),) = run_all(executor, iter([job]))
    assert result.failure is not None
    assert result.failure.message.startswith(message)
    assert result.failure.kind == "failed"


def test_the_processes_end_with_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeping.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setattr(executors, "_PROCESS", "sleeping")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    started = time.monotonic()
    with Processes(2) as executor:
        future = executor.submit(RunJob("one", "", "p.yaml", str(tmp_path)))
        while not executor._running:
            time.sleep(0.01)
    assert future.result().failure is not None
    assert time.monotonic() - started < 30


def test_a_bug_is_a_row_with_its_traceback_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(jobs, "parse_pipeline", broken)
    monkeypatch.setattr(jobs, "as_stage_error", lambda _: None)  # else this file counts as code of the user
    job, progress = RunJob("one", "", "p.yaml", str(tmp_path)), Notes()
    result = execute(job, progress, Turns(), catches_all=True)
    assert result.failure is not None
    assert result.failure.exit_code == 70
    assert f"ZeroDivisionError: by zero); see '{job.log}'" in result.failure.message
    assert "Traceback" in progress.notes[0]
    with pytest.raises(ZeroDivisionError):
        execute(job, progress, Turns())


def test_jobs_and_results_are_plain_values() -> None:
    for job in (RunJob("a", "text", "p", "runs", stages=3), CompareJob("s", "text", "p", "runs", ("a", "b"))):
        assert from_plain(json.loads(json.dumps(to_plain(job)))) == job
    failure = Failure("not met", "no", None, 3)
    plain = {"failure": {"kind": "not met", "message": "no", "hint": None, "exit_code": 3}, "host": "h", "ran": ["x"]}
    assert JobResult.from_plain(plain | {"values": None}) == JobResult(failure, "h", ("x",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,a"], "--seeds must be whole numbers of at least 0, such as 0,1,2, got '0,a'."),
        (["--seeds", ""], "--seeds must be whole numbers of at least 0, such as 0,1,2, got ''."),
        (["--seeds", "0", "--seed", "1"], "--seed and --seeds exclude each other."),
        (["--gpus", "1"], "--gpus needs --ray, it is not given."),
        (["--device", "x"], "--device needs --ray, it is not given."),
    ],
)
def test_wrong_options_are_refused(world: World, arguments: list[str], message: str) -> None:
    done = world.call("sweep", world.values(), "--budgets", "0.8", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_ray_that_is_not_installed_is_named_with_its_extra(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = world.call("sweep", world.values(), "--budgets", "0.8", "--ray", "local")
    assert done.exit_code == 5
    assert "--ray (the extra 'ray' of this project) needs the package ray, which is not installed." in done.stderr
    assert "pip install 'ray>=2.40'" in done.stderr
