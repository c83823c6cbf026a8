"""Sweeps on Ray. What needs a cluster runs in a process of its own: Ray can end or stop the process that uses it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
from smallrun import ROOT, Notes, World

from compress.engine.jobs import CompareJob, RunJob
from compress.engine.resources import Resources

pytest.importorskip("ray", reason="ray is not installed")

from compress.engine import ray_cluster
from compress.engine.ray_cluster import RayCluster

CASES = Path(__file__).with_name("ray_cases.py")
ATTEMPTS, LIMIT_S = 3, 400.0
MARK = "RAY_CASES_MARK"


@pytest.mark.timeout(ATTEMPTS * LIMIT_S + 100)
def test_a_sweep_on_three_nodes() -> None:
    ends = []
    for _ in range(ATTEMPTS):
        code, output = run_cases()
        counts = re.findall(r"(\d+) (failed|error|passed|skipped)", output.rpartition("\n=")[2])
        if counts:
            break
        ends.append(f"exit code {code}: {output[-1500:]}")
    else:
        pytest.skip(f"Ray ends or stops its driver on this machine, {ATTEMPTS} times of {ATTEMPTS}: {ends[-1]}")
    assert code == 0, output
    if "skipped" in {what for _, what in counts}:
        pytest.skip("Ray cannot start three nodes on this machine: " + "".join(re.findall("SKIPPED.*", output)[:1]))
    assert counts == [(str(number_of_cases()), "passed")], output


def run_cases() -> tuple[int, str]:
    """Run the cases, and end all processes that they have left; return exit code and output."""
    mark = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {MARK: mark, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(CASES), "-v", "-p", "no:cacheprovider", "-p", "no:xdist"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:  # a pipe may stay open in lost nodes
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            end_marked(mark)
        log.seek(0)
        return process.returncode, log.read()


def end_marked(mark: str) -> None:
    """Kill every process whose environment has the mark."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or of another user
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


def number_of_cases() -> int:
    """Return the number of cases in the file, with three of the one that has parameters."""
    return len(re.findall("^def test_", CASES.read_text(encoding="utf-8"), re.MULTILINE)) + 2


def test_a_run_is_one_task_for_training_and_one_for_timing(tmp_path: Path) -> None:
    world = World(tmp_path)
    job = RunJob.of(world.load(world.values()), tmp_path)
    parts = ray_cluster._parts(job)
    assert [(part.stages, is_timing) for part, is_timing, _ in parts] == [(4, False), (None, True)]
    values = world.values() | {"deploy": {"repeats": 5, "provider": "CUDAExecutionProvider"}}
    values["stages"][1]["target"] = {"latency": 0.6}
    parts = ray_cluster._parts(RunJob.of(world.load(values), tmp_path))
    assert [(part.stages, timed, gpu) for part, timed, gpu in parts] == [
        (2, True, True),
        (4, False, True),
        (None, True, True),
    ]
    compared = CompareJob("s", job.text, job.path, job.runs_dir, ("a", "b"))
    assert ray_cluster._parts(compared) == [(compared, True, False)]


def test_resources_of_tasks() -> None:
    cluster = RayCluster(Resources(ray="auto", cpus=4, gpus=1, device="board"), Path(), Notes())
    assert cluster._options(False, False) == {"num_cpus": 4, "num_gpus": 1, "max_retries": 3}
    timing = {"num_cpus": 4, "max_retries": 3, "resources": {"device:board": 1}}
    assert cluster._options(True, False) == timing | {"num_gpus": 0}
    assert cluster._options(True, True) == timing | {"num_gpus": 1}


def test_another_version_of_ray_is_said() -> None:
    error = RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.9.1")
    refusal = ray_cluster._refusal("head:6379", error)
    assert "'head:6379' has another version of Ray or Python than this host: Version mismatch" in refusal.message
    assert "Ray: 2.9.0 Python: 3.9.1" in refusal.message
    assert refusal.exit_code == 5


def test_errors_of_ray_are_failures_of_the_run(tmp_path: Path) -> None:
    from ray.exceptions import NodeDiedError, OutOfMemoryError

    job = RunJob("one", "", "p", str(tmp_path))
    assert "memory was short" in ray_cluster._failure(job, OutOfMemoryError("x")).message
    lost = ray_cluster._failure(job, NodeDiedError("the node is gone"))
    assert lost.message == "Ray could not finish it (NodeDiedError: the node is gone)."
    assert lost.exit_code == 5
