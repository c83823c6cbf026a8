"""Doctor, clean, estimates and efforts."""

import json
import os
import time
from pathlib import Path

import pytest
from smallrun import World, make_world
from typer.testing import CliRunner, Result

from compress.cli.commands import app
from compress.config.load import load_pipeline
from compress.engine.cleaning import find_leftovers
from compress.engine.estimate import estimate_run
from compress.inspection.machine import Noise, judge_noise
from compress.storage.lock import hold
from compress.verification.latency import LatencyRatio


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("hour") / "world")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], prog_name="compress")


def test_doctor_describes_the_machine(tmp_path: Path) -> None:
    done = call("doctor", "--runs-dir", tmp_path / "runs")
    assert done.exit_code == 0, done.output
    for item in ("processor", "vector instructions", "execution providers", "torch", "free disk", "GPU for training"):
        assert item in done.stdout
    assert "CPUExecutionProvider" in done.stdout
    assert "a network against itself: " in done.output
    assert not (tmp_path / "runs").exists()


def test_doctor_refuses_more_threads_than_cores() -> None:
    done = call("doctor", "--threads", 10_000)
    assert done.exit_code == 2
    assert "threads must be at most the cores of this machine" in done.stderr


@pytest.mark.parametrize(("scatter", "error", "is_high"), [(0.02, 0.005, False), (0.4, 0.005, True), (0.02, 0.2, True)])
def test_noise_is_judged_by_scatter_and_ratio(scatter: float, error: float, is_high: bool) -> None:
    noise = Noise(1.5, scatter, LatencyRatio(1.0, 0.99, 1.01, error))
    assert noise.is_high == is_high
    assert ("can be met here" in judge_noise(noise)) != is_high


def _entry(store: Path, name: str, days: float) -> Path:
    folder = store / name
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * 1000)
    then = time.time() - 86_400 * days
    os.utime(folder / "weights", (then, then))
    return folder


def test_clean_removes_what_no_run_names(tmp_path: Path) -> None:
    runs, store = tmp_path / "runs", tmp_path / "runs" / ".store"
    used, old, young = (_entry(store, name, days) for name, days in (("used", 9), ("old", 9), ("young", 1)))
    killed, running = _entry(store / ".work", "killed", 9), _entry(store / ".work", "running", 9)
    taught = _entry(store / ".teachers", "outputs of a teacher", 1)
    (runs / "net").mkdir()
    (runs / "net" / "lock").write_text(json.dumps({"schema": 1, "stages": [{"key": "used"}]}), encoding="utf-8")
    listed = call("clean", "--runs-dir", runs, "--older-than", 2)
    assert listed.exit_code == 0, listed.output
    assert "3 folders, 0.0 MB; --yes removes them." in listed.stdout
    assert all(folder.exists() for folder in (used, old, young, killed, running))
    with hold(store / ".locks" / "running"):
        done = call("clean", "--runs-dir", runs, "--older-than", 2, "--yes")
    assert "2 folders removed" in done.stdout
    assert [folder.exists() for folder in (used, old, young, killed, running)] == [True, False, True, False, True]
    assert {one.kind for one in find_leftovers(runs)} == {"stage", "unfinished", "teacher"}
    assert taught.exists()
    assert call("clean", "--runs-dir", runs, "--yes").exit_code == 0
    assert not taught.exists()
    assert call("clean", "--runs-dir", runs).stdout == "Nothing to remove.\n"


def test_clean_removes_nothing_while_a_lock_cannot_be_read(tmp_path: Path) -> None:
    folder = _entry(tmp_path / ".store", "perhaps used", 9)
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "lock").write_text("{", encoding="utf-8")
    done = call("clean", "--runs-dir", tmp_path, "--yes")
    assert done.exit_code == 4
    assert "cannot be read, so that nothing is known of the stages it uses" in done.stderr
    assert folder.exists()
    assert call("clean", "--runs-dir", tmp_path / "none").exit_code == 4


def test_plan_estimates_minutes_and_disk(world: World) -> None:
    path = world.write(world.values())
    done = call("plan", path, "--estimate", "--runs-dir", world.runs)
    assert done.exit_code == 0, done.output
    assert "minutes (right to a factor of two)" in done.stdout
    few = world.values()
    many = world.values()
    many["stages"][2]["steps"] = 12_000
    seconds = [
        {one.stage: one.seconds for one in estimate_run(load_pipeline(world.write(values), environ={}))}
        for values in (few, many)
    ]
    assert list(seconds[0]) == ["load", "prune", "finetune", "export", "verify"]
    assert seconds[1]["finetune"] > 100 * seconds[0]["finetune"] > 0


def test_effort_changes_defaults_and_nothing_that_is_given(world: World) -> None:
    values = world.values()
    values["deploy"] = {"threads": 1}
    values["stages"][1].pop("score_images")
    values["stages"][-1] = {"stage": "verify"}

    def stages(effort: str, **prune: object):
        values["stages"][1] = {**values["stages"][1], **prune}
        return load_pipeline(world.write({**values, "effort": effort}), environ={}).config

    quick, normal, thorough = (stages(effort) for effort in ("quick", "normal", "thorough"))
    assert [one.stages[1].score_images for one in (quick, normal, thorough)] == [64, 512, 1024]
    assert [one.stages[1].blocks for one in (quick, normal, thorough)] == [0, 0, "auto"]
    assert [one.stages[-1].repeats for one in (quick, normal, thorough)] == [30, 100, 300]
    assert quick.stages[-1].resources is None
    assert stages("quick", score_images=100).stages[1].score_images == 100
    done = call("validate", world.write({**values, "effort": "heroic"}))
    assert done.exit_code == 2
    assert "effort must be one of" in done.stderr or "effort must be 'quick'" in done.stderr


def test_shells_are_offered_completion() -> None:
    assert "--install-completion" in call("--help").stdout
