"""`torchrun -m compress run`: several processes train together, one runs the pipeline, and a kill costs little."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from smallrun import ROOT, make_world

from compress.training.state import read_state

TOGETHER = "2 processes train together"
PRUNE = {
    "stage": "prune",
    "target": {"macs": 0.6},
    "multiple_of": 1,
    "method": "gsm",
    "training": {"steps": 60, "batch_size": 32, "learning_rate": 0.02, "momentum": 0.5, "sync_batch_norm": True},
}
FINETUNE = {"stage": "finetune", "steps": 12, "batch_size": 32, "learning_rate": 0.02, "sync_batch_norm": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("torchrun") / "world", "linear_head")


TIMED = {
    "stage": "prune",
    "target": {"latency": 0.6},
    "multiple_of": 1,
    "method": "gsm",
    "training": PRUNE["training"],
}
TRP = {
    "stage": "low_rank",
    "target": {"latency": 0.5},
    "multiple_of": 1,
    "method": "trp",
    "trp": {"interval": 5},
    "training": {"steps": 20, "batch_size": 32, "learning_rate": 0.02},
}
SLIM = {
    "stage": "slim",
    "target": {"macs": 0.8},
    "moves": ["channels"],
    "multiple_of": 1,
    "score_images": 32,
    "steps": 2,
    "between": {"steps": 12, "batch_size": 32, "learning_rate": 0.02, "sync_batch_norm": True},
}


def start(world, values, runs, processes=2, restarts=0, program=("-m", "compress")):
    """Start a run by torchrun, in a group of processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    command += [*program, "run", str(world.write(values)), "--runs-dir", str(world.folder / runs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)


def finish(process):
    said, _ = process.communicate(timeout=400)
    return process.returncode, said


def saved_step(runs):
    """Return the step of the training's state, 0 where there is none."""
    try:
        states = (read_state(path) for path in (runs / ".store").rglob("training_state.pt"))
        return max(torch.load(state, weights_only=True)["step"] for state in states)
    except (OSError, ValueError):  # none there, or no longer
        return 0


def result(world, values, runs):
    """Return the report of a run and the weights of its slim network."""
    folder = world.folder / runs / values["name"]
    return json.loads((folder / "report.json").read_text()), load_file(folder / "slim" / "weights.safetensors")


def test_two_processes_come_to_the_same_network_as_one(world):
    values = world.values("linear_head", (PRUNE, FINETUNE))
    codes = {}
    for processes in (1, 2):
        codes[processes], said = finish(start(world, values, f"runs{processes}", processes))
        assert (TOGETHER in said) == (processes == 2), said
        assert said.count("PASSED") == 1, said
    assert codes == {1: 0, 2: 0}
    (one, _), (two, _) = (result(world, values, f"runs{processes}") for processes in (1, 2))
    assert one["slim"]["macs"] == two["slim"]["macs"]
    losses = [report["stages"][1]["record"]["method"]["loss_before_cut"] for report in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert abs(one["slim"]["quality"]["top1"] - two["slim"]["quality"]["top1"]) <= 1.5 / 64
    code, said = finish(start(world, values, "runs2"))
    assert code == 0
    assert "Nothing to do: every stage is unchanged." in said


def test_a_process_that_is_killed_costs_a_restart_from_the_saved_state(world):
    training = {"steps": 240, "batch_size": 8, "learning_rate": 0.02, "save_minutes": 0}
    values = world.values("linear_head", ({"stage": "finetune", **training},))
    undisturbed = start(world, values, "whole")
    assert finish(undisturbed)[0] == 0
    process, deadline = start(world, values, "killed", restarts=1), time.monotonic() + 300
    while saved_step(world.folder / "killed") < 200:  # in an epoch's middle, late: a difference has no time to fade
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    code, said = finish(process)
    assert code == 0, said
    assert "Training goes on after" in said
    whole, again = (result(world, values, runs)[1] for runs in ("whole", "killed"))
    assert all((value == again[name]).all() for name, value in whole.items())


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        ((FINETUNE | {"batch_size": 33},), "batch_size must be divisible by the number of processes (2)"),
        (({"stage": "prune", "target": {"macs": 0.001}},), "cannot be reached"),
    ],
    ids=["in all processes", "in one"],
)
def test_an_error_in_a_stage_ends_all_processes(world, middle, message):
    code, said = finish(start(world, world.values("linear_head", middle), "wrong"))
    assert code != 0
    assert message in said
    assert said.count(message) == 1, said  # one process prints
    assert "/engine/" not in said  # no traceback but that of torchrun itself
    assert "ternal error" not in said


def test_a_failure_in_one_process_is_printed_by_another(world):
    factory = world.folder / "lonely.py"
    factory.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport nets\n\n\ndef build():\n"
        "    if os.environ.get('RANK') == '1':\n        raise ValueError('no such disk here')\n"
        "    return nets.build('linear_head')\n"
    )
    values = world.values("linear_head", (FINETUNE,))
    values["stages"][0]["model"] = {"factory": f"{factory}:build"}
    code, said = finish(start(world, values, "lonely"))
    assert code != 0
    assert said.count("Process 2 of 2 has failed: ") == 1, said
    assert said.count("no such disk here") == 1
    assert "/engine/" not in said


def test_all_processes_train_between_steps_and_under_a_latency_budget_while_one_times(world):
    values = world.values("linear_head", (SLIM, TIMED, TRP)) | {"deploy": {"threads": 1, "repeats": 5}}
    timed = world.folder / "timed"
    timed.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIMED", str(timed))
        code, said = finish(start(world, values, "steady", program=(str(ROOT / "tests" / "steady_run.py"),)))
    assert code == 0, said
    assert said.count(TOGETHER) == 3, said
    assert [path.name for path in timed.iterdir()] == ["0"]
    slim, prune, low_rank = (stage["record"] for stage in result(world, values, "steady")[0]["stages"][1:4])
    assert slim["steps"][0]["training"]["steps"] == SLIM["between"]["steps"]
    assert prune["reached"]["latency"] == pytest.approx(TIMED["target"]["latency"], rel=0.05)
    assert low_rank["latency"]["measured_ratio"] <= TRP["target"]["latency"] * 1.03
