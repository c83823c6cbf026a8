"""Cases of a sweep on a Ray cluster of three small nodes; test_ray.py runs them in a process of their own."""

import json
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from smallrun import Notes, World, make_world, start

from compress.config.load import load_pipeline
from compress.engine.executors import run_all
from compress.engine.jobs import RunJob
from compress.engine.resources import Resources
from compress.errors import ArtifactError, RuntimeUnavailable, first_line

pytest.importorskip("ray", reason="ray is not installed")

from ray.cluster_utils import Cluster

from compress.engine import ray_cluster
from compress.engine.ray_cluster import RayCluster

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "resources": {"timing": 1}}
PATIENCE_S = 200.0  # a machine with other work is slow
SWEEP = ("--budgets", "0.8,0.5", "--seeds", "0,1", "--cpus", "1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes with one core each; the second also stands for a device."""
    made = start_cluster(tries=3)
    try:
        yield made
    finally:
        made.shutdown()


def start_cluster(tries: int) -> Any:
    """Start the nodes; Ray gives each half a minute, which is little on a machine with other work."""
    made = Cluster()
    try:
        made.add_node(**NODE, include_dashboard=False)
        made.add_node(**(NODE | {"resources": {"timing": 1, "device:board": 1}}))
        made.add_node(**NODE)
    except Exception as error:
        made.shutdown()
        if tries == 1:
            pytest.skip(f"Ray cannot start three nodes on this machine: {first_line(error)}")
        return start_cluster(tries - 1)
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("ray") / "world")


def lines(world: World, pattern: str) -> list[str]:
    """Return the lines of all logs that match a pattern."""
    logs = [path.read_text(encoding="utf-8") for path in sorted(world.runs.glob("*/job.log"))]
    return [line for text in logs for line in text.splitlines() if re.search(pattern, line)]


def wait_for(world: World, count: int, driver: "subprocess.Popen[str]") -> None:
    """Wait until so many `prune` stages are done."""
    ends = time.monotonic() + PATIENCE_S
    while len(lines(world, "prune: done in")) < count:
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < ends
        time.sleep(0.2)


@pytest.fixture(scope="module")
def swept(world: World, cluster: Any) -> World:
    """The world after a sweep whose driver was killed once and one of whose nodes was lost."""
    path = world.write(world.values())
    arguments = ["sweep", str(path), *SWEEP, "--runs-dir", str(world.runs), "--ray", cluster.address]
    first = start(*arguments)
    wait_for(world, 1, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = start(*arguments)
    try:
        wait_for(world, 2, second)
        lost = cluster.worker_nodes.copy().pop()
        cluster.remove_node(lost, allow_graceful=False)
        output, errors = second.communicate(timeout=2 * PATIENCE_S)
    finally:
        if second.poll() is None:
            second.kill()
            second.communicate()
    assert second.returncode == 0, errors + output
    (world.folder / "output.txt").write_text(output, encoding="utf-8")
    return world


def test_a_lost_driver_and_a_lost_node_change_nothing(swept: World) -> None:
    names = [f"chain-{budget}-seed{seed}" for budget in (0.8, 0.5) for seed in (0, 1)]
    report = json.loads((swept.runs / "chain-sweep" / "sweep.json").read_text(encoding="utf-8"))
    assert [run["run"] for run in report["runs"]] == names
    assert all(run["passed"] for run in report["runs"])
    assert set(report["comparison"]["runs"]) == set(names)
    output = (swept.folder / "output.txt").read_text(encoding="utf-8")
    assert re.search(r"4 runs of chain, on Ray [\d.]+ with 3 nodes\.", output)
    assert "raylet" not in output, "standard output may hold JSON"

    alone = swept.folder / "alone"  # the same run, undisturbed, in one process
    overrides = ["stages.1.target.macs=0.5", "name=chain-0.5-seed1"]
    pipeline = load_pipeline(swept.folder / "chain.yaml", overrides, 1)
    assert RunJob.of(pipeline, alone).execute(Notes(), ray_cluster.TimingLock()).failure is None
    quiet = json.loads((alone / names[3] / "report.json").read_text(encoding="utf-8"))["slim"]
    busy = report["runs"][3]
    assert (busy["macs"], busy["top1"]) == (quiet["macs"], quiet["quality"]["top1"])


def test_no_stage_is_computed_twice(swept: World) -> None:
    done = Counter(line.split(" ")[4] for line in lines(swept, r" \[\d/\d\] \w+: done in"))
    keys: dict[str, set[str]] = {}
    for lock in swept.runs.glob("chain-*/lock"):
        for stage in json.loads(lock.read_text(encoding="utf-8"))["stages"]:
            keys.setdefault(f"{stage['stage']}:", set()).add(stage["key"])
    assert set(done) == set(keys)
    assert all(done[stage] <= len(of_stage) for stage, of_stage in keys.items()), (done, keys)


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"device": "phone"}, "No node of the Ray cluster has the resource 'device:phone'"),
        ({"cpus": 64}, "No node of the Ray cluster has 64 cores and 0 GPUs"),
        ({"gpus": 1}, "No node of the Ray cluster has 1 cores and 1 GPUs"),
    ],
)
def test_a_resource_that_no_node_has_is_named(
    cluster: Any, tmp_path: Path, resources: dict[str, Any], message: str
) -> None:
    executor = RayCluster(Resources(ray=cluster.address, **resources), tmp_path, Notes())
    with pytest.raises(RuntimeUnavailable, match=re.escape(message)):
        executor.__enter__()
    assert not list(tmp_path.iterdir()), "the token is removed"


def test_a_node_with_other_versions_is_named(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = ray_cluster._versions()
    monkeypatch.setattr(ray_cluster, "_versions", lambda: versions | {"torch": "1.0"})
    executor = RayCluster(Resources(ray=cluster.address), tmp_path, Notes())
    with pytest.raises(RuntimeUnavailable, match=r"Node \S+ \(\S+\): it has torch \S+ \(driver: 1\.0\)"):
        executor.__enter__()


def test_a_node_without_the_folder_is_named(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ray_cluster._place_token
    monkeypatch.setattr(ray_cluster, "_place_token", lambda path: place(path) | {"value": "of another folder"})
    executor = RayCluster(Resources(ray=cluster.address), tmp_path, Notes())
    with pytest.raises(ArtifactError, match=r"Node .*: it does not see the runs folder '.*' of the driver"):
        executor.__enter__()


def test_a_worker_that_dies_is_a_failed_run_and_the_others_go_on(
    cluster: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "RETRIES", 0)
    values = world.values()
    code = "import os, signal\ndef build(**_):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    (tmp_path / "dying.py").write_text(code, encoding="utf-8")
    values["stages"][0]["model"] = {"factory": f"{tmp_path}/dying.py:build"}
    dying = RunJob.of(world.load(values | {"name": "dying"}), tmp_path / "runs")
    unmet = world.values()
    unmet["stages"][1]["target"] = {"macs": 0.001}
    other = RunJob.of(world.load(unmet | {"name": "unmet"}), tmp_path / "runs")
    with RayCluster(Resources(ray=cluster.address), tmp_path / "runs", Notes()) as executor:
        results = {job.name: result for job, result in run_all(executor, iter([dying, other]))}
    assert results["dying"].failure is not None
    assert results["dying"].failure.message.startswith("Its process died 1 times, as for lack of memory")
    assert results["unmet"].failure is not None
    assert results["unmet"].failure.kind == "not met", results["unmet"].failure


LOCAL = """
import subprocess, sys, time
from pathlib import Path
from compress.engine.ray_cluster import RayCluster
from compress.engine.resources import Resources
from compress.progress import SilentProgress
with RayCluster(Resources(ray="local", device="board"), Path(sys.argv[0]), SilentProgress()) as executor:
    from ray._private.worker import _global_node
    pids = [one.process.pid for each in _global_node.all_processes.values() for one in each]
    print(executor.words, "|", *pids, flush=True)
    time.sleep(600)
"""


def test_a_local_cluster_ends_with_its_driver(tmp_path: Path) -> None:
    driver = start(code=LOCAL.replace("sys.argv[0]", repr(str(tmp_path))))
    assert driver.stdout is not None
    words, _, pids = driver.stdout.readline().partition("|")
    assert re.fullmatch(r"on Ray [\d.]+ with 1 node ", words), words + driver.communicate()[1]
    processes = [Path(f"/proc/{pid}") for pid in pids.split()]
    assert any(process.exists() for process in processes)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    ends = time.monotonic() + 120
    while any(process.exists() for process in processes) and time.monotonic() < ends:
        time.sleep(0.5)
    assert not any(process.exists() for process in processes)


def test_an_address_where_nothing_listens_is_refused_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        with pytest.raises(RuntimeUnavailable, match=rf"The Ray cluster at '{address}' cannot be reached: .*refused"):
            RayCluster(Resources(ray=address), tmp_path, Notes()).__enter__()
    assert time.monotonic() - started < 30
