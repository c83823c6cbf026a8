"""Executor of jobs on a Ray cluster: every part of a run is a task.

A run is divided where stages that measure latency follow stages that do not:

    load, prune, finetune, export    any node with the cores and GPUs of a run
    verify                           a node with the resource "timing", or "device:NAME"

Tasks pass on nothing but short records. Their results are in the store, so that a task of a lost node is repeated on
another one from its last finished stage, and the next sweep goes on after a lost driver. On each machine the timing
lock keeps measurements alone, whatever the nodes are.
"""

import logging
import os
import platform
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from typing_extensions import Self

from compress.catalog import STAGES
from compress.config.load import Pipeline
from compress.engine.job_log import JobLog
from compress.engine.jobs import (
    CompareJob,
    Failure,
    Job,
    JobResult,
    enter_folder,
    execute,
    from_plain,
    to_plain,
)
from compress.engine.keys import LIBRARIES, package_version
from compress.engine.resources import Resources
from compress.engine.timing_lock import TimingLock, measures_latency
from compress.errors import (
    ArtifactError,
    CompressError,
    InternalError,
    RuntimeUnavailable,
    StageError,
    attempt,
    first_line,
    translated,
)
from compress.progress import Progress
from compress.storage.files import file_system_time, write_atomic

LOCAL = "local"
TIMING = "timing"
RETRIES = 3  # of a task whose node or process has died
_ON_CPU = "CPUExecutionProvider"
_TOKEN, _TOKEN_S = ".ray-token", 30 * 86_400.0  # the latter: longer than any sweep
_LOCAL_STORE_BYTES = 100 * 2**20  # nothing large passes through Ray
_CONNECT_S, _PROBE_S, _NOTICED_S = 10.0, 120.0, 60.0


class RayCluster:
    """Executor that runs jobs as tasks of a Ray cluster.

    Args:
        resources: Address of the cluster, and cores and GPUs of a job.
        runs_dir: Parent folder of all run folders, which all nodes must see under this path.
        progress: Receives a note on the cluster.

    Attributes:
        capacity: Number of jobs that are submitted at the same time.
        words: Phrase for messages.
    """

    capacity = 1
    words = "on Ray"

    def __init__(self, resources: Resources, runs_dir: Path, progress: Progress) -> None:
        self._resources, self._runs_dir, self._progress = resources, runs_dir.absolute(), progress
        self._facts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Connect to the cluster, and check its nodes.

        Raises:
            RuntimeUnavailable: The cluster cannot be reached, has another version of Ray or Python, lacks a resource,
                or a node has other versions of the libraries.
            ArtifactError: A node does not see the runs folder.
        """
        _connect(self._resources)
        try:
            self._facts = _place_token(self._runs_dir)
            nodes = _usable_nodes()
            _require_resources(self._resources)
            _check_nodes(nodes, self._facts)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        slots = max(1, int(sum(node["Resources"]["CPU"] for node in nodes) / max(self._resources.cpus, 0.1)))
        self.capacity = self._resources.jobs or 2 * slots
        self.words = f"on Ray {ray.__version__} with {len(nodes)} node{'s' * (len(nodes) != 1)}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect; tasks that have not ended are cancelled by that."""
        if "token" in self._facts:
            Path(self._facts["token"]).unlink(missing_ok=True)
        ray.shutdown()

    def submit(self, job: Job) -> "Future[JobResult]":
        """Submit the parts of a job, each of which begins when the one before it is done."""
        reference = None
        remote = ray.remote(_execute)
        for part, is_timing, needs_gpu in _parts(job):
            options = self._options(is_timing, needs_gpu)
            reference = remote.options(name=part.name, **options).remote(to_plain(part), reference, self._facts)
        if reference is None:
            raise InternalError("A job without parts was submitted.")
        future: Future[JobResult] = Future()

        def end(done: "Future[Any]") -> None:
            error = done.exception()
            future.set_result(JobResult.from_plain(done.result()) if error is None else JobResult(_failure(job, error)))

        reference.future().add_done_callback(end)
        return future

    def _options(self, is_timing: bool, needs_gpu: bool) -> dict[str, Any]:
        """Return the resources of a task."""
        wanted = self._resources
        options = {"num_cpus": wanted.cpus, "max_retries": RETRIES}
        if not is_timing:
            return options | {"num_gpus": wanted.gpus}
        return options | {"num_gpus": wanted.gpus if needs_gpu else 0, "resources": {_timing_resource(wanted): 1}}


def _timing_resource(wanted: Resources) -> str:
    return TIMING if wanted.device is None else f"device:{wanted.device}"


def _connect(wanted: Resources) -> None:
    """Connect to a cluster, or start one on this machine."""
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = wanted.ray
    if address == LOCAL:
        resources = {TIMING: 1.0} | ({} if wanted.device is None else {_timing_resource(wanted): 1.0})
        common |= {"include_dashboard": False, "object_store_memory": _LOCAL_STORE_BYTES, "resources": resources}
        common["_system_config"] = {"task_oom_retries": 0}  # a run that lacks memory fails, and the others go on
    with translated(lambda error: _refusal(str(address), error)), _kept_handler(signal.SIGTERM):
        _require_listener(str(address))
        ray.init(address=address, **common)


@contextmanager
def _kept_handler(number: signal.Signals) -> Iterator[None]:
    """Restore the handler of a signal after this context: that of Ray ends the driver like a fault of user code."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread has handlers
        yield
        return
    before = signal.getsignal(number)
    yield
    signal.signal(number, before)


def _require_listener(address: str) -> None:
    """Check that something listens at an address; Ray itself waits for minutes.

    Raises:
        OSError: Nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host, int(port)), timeout=_CONNECT_S):
            pass


def _refusal(address: str, error: Exception) -> CompressError:
    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        return RuntimeUnavailable(
            f"The Ray cluster at '{address}' has another version of Ray or Python than this host: {text[:300]}",
            hint=f"Install ray {ray.__version__} and Python {platform.python_version()} on all nodes.",
        )
    return RuntimeUnavailable(
        f"The Ray cluster at '{address}' cannot be reached: {first_line(error)}",
        hint="`ray status` on the head node prints its address; --ray local starts a cluster on this machine.",
    )


def _usable_nodes() -> list[dict[str, Any]]:
    """Return the nodes that can execute tasks."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    if not nodes:
        raise RuntimeUnavailable("The Ray cluster has no node with a core.", hint="ray start --address=... on a node")
    return nodes


def _require_resources(wanted: Resources) -> None:
    """Check that some node can measure, and that some node has the cores and GPUs of a run.

    Raises:
        RuntimeUnavailable: No node can.
    """
    present = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    name = _timing_resource(wanted)
    if not any(one.get(name, 0) >= 1 for one in present):
        raise RuntimeUnavailable(
            f"No node of the Ray cluster has the resource '{name}', which stages that measure latency ask for.",
            hint=f"ray start --address=... --resources='{{\"{name}\": 1}}'",
        )
    if not any(one.get("CPU", 0) >= wanted.cpus and one.get("GPU", 0) >= wanted.gpus for one in present):
        raise RuntimeUnavailable(
            f"No node of the Ray cluster has {wanted.cpus:g} cores and {wanted.gpus:g} GPUs (--cpus, --gpus)."
        )


def _place_token(runs_dir: Path) -> dict[str, Any]:
    """Write a file that all nodes must see; return it with the versions of this host."""
    path, value = runs_dir / f"{_TOKEN}-{secrets.token_hex(4)}", secrets.token_hex(16)
    try:
        write_atomic(path, value)
        now = file_system_time(runs_dir)
        for old in runs_dir.glob(f"{_TOKEN}-*"):  # of drivers that were killed
            if now - old.stat().st_mtime > _TOKEN_S:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(f"Runs folder '{runs_dir}' must be writable: {error.strerror or error}.") from error
    return {"token": str(path), "value": value, "versions": _versions(), "folder": str(Path.cwd())}


def _versions() -> dict[str, str]:
    """Return the versions that results depend on: of libraries, and of the stages of this program."""
    found = {name: one for name in LIBRARIES if (one := package_version(name)) is not None}
    return found | {f"stage {entry.name}": str(entry.version) for entry in STAGES.values()}


def _check_nodes(nodes: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Check folder and versions on each node.

    Raises:
        ArtifactError: A node does not see the runs folder.
        RuntimeUnavailable: A node has other versions, or does not answer.
    """
    remote = ray.remote(_find_problem)
    probes = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        probes[remote.options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(facts)] = node
    problems = []
    for reference, node in probes.items():
        name = f"Node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        found = _answer(reference, node["NodeID"])
        if found is not None:
            problems.append((name, found))
    if problems:
        text = "\n".join(f"{name}: {found}" for name, found in problems)
        kind = ArtifactError if any(_NOT_SEEN in found for _, found in problems) else RuntimeUnavailable
        raise kind(text, hint="All nodes need the same folders under the same paths, and the same libraries.")


def _answer(reference: Any, node_id: str) -> str | None:
    """Return what a node finds at fault with itself, or why it does not answer; None for a good or a lost node.

    A node that has just died counts as present for some seconds, until Ray notices.
    """
    lost: list[bool] = []

    def unanswered(error: Exception) -> str:
        lost.append(not isinstance(error, ray.exceptions.GetTimeoutError) and _is_lost(node_id))
        return first_line(error)

    found: str | None = attempt(lambda: ray.get(reference, timeout=_PROBE_S), unanswered)
    return None if any(lost) else found


def _is_lost(node_id: str) -> bool:
    """Return whether a node leaves the cluster within `_NOTICED_S`."""
    end = time.monotonic() + _NOTICED_S
    while any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes()):
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True


_NOT_SEEN = "does not see"


def _find_problem(facts: dict[str, Any]) -> str | None:
    """Return the reason why this node cannot execute jobs; None if it can."""
    token = Path(facts["token"])
    try:
        is_seen = token.read_text(encoding="ascii") == facts["value"]
    except (OSError, ValueError):
        is_seen = False
    if not is_seen:
        return f"it {_NOT_SEEN} the runs folder '{token.parent}' of the driver"
    ours, theirs = _versions(), facts["versions"]
    other = [
        f"{name} {ours.get(name, 'is missing')} (driver: {theirs.get(name, 'none')})"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    return f"it has {', '.join(other)}" if other else None


def _parts(job: Job) -> list[tuple[Job, bool, bool]]:
    """Return the parts of a job, each with whether it measures latency and whether that needs a GPU."""
    if isinstance(job, CompareJob):
        return [(job, True, _measures_on_gpu(job.pipeline()))]
    pipeline = job.pipeline()
    timed = [measures_latency(pipeline.config, index) for index in range(len(pipeline.config.stages))]
    ends = [index + 1 for index in range(len(timed) - 1) if timed[index] != timed[index + 1]]
    on_gpu = _measures_on_gpu(pipeline)
    parts: list[tuple[Job, bool, bool]] = [(replace(job, stages=end), timed[end - 1], on_gpu) for end in ends]
    return [*parts, (replace(job, stages=None), timed[-1], on_gpu)]


def _measures_on_gpu(pipeline: Pipeline) -> bool:
    sections = [pipeline.resolved["stages"][-1], pipeline.resolved.get("deploy") or {}]
    return any(section.get("provider", _ON_CPU) != _ON_CPU for section in sections)


def _execute(values: dict[str, Any], previous: dict[str, Any] | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Execute a part of a job on this node, unless the part before it has failed; return the result of both."""
    before = None if previous is None else JobResult.from_plain(previous)
    if previous is not None and before is not None and before.failure is not None:
        return previous
    problem = _find_problem(facts)
    if problem is not None:
        failure = Failure("failed", f"Node {platform.node()}: {problem}.", None, ArtifactError.exit_code)
        return asdict(JobResult(failure, platform.node()))
    enter_folder(facts["folder"])
    job = from_plain(values)
    log = JobLog(job.log)
    log.note(f"part {'whole' if isinstance(job, CompareJob) else job.stages or 'last'} on {_node_name()}")
    found = execute(job, log, TimingLock(), catches_all=True)
    return asdict(replace(found, ran=(*(() if before is None else before.ran), *found.ran)))


def _node_name() -> str:
    return f"{platform.node()} {ray.get_runtime_context().get_node_id()[:12]} process {os.getpid()}"


def _failure(job: Job, error: BaseException) -> Failure:
    """Return an error of Ray as the failure of a job."""
    cause = getattr(error, "cause", None) or error
    kind = type(cause).__name__
    if kind == "OutOfMemoryError":
        text, hint = "Its process was ended by Ray: memory was short on its node.", "More --cpus: fewer runs on a node."
        return Failure("failed", text, hint, StageError.exit_code)
    if kind == "WorkerCrashedError":
        text = f"Its process died {RETRIES + 1} times, as for lack of memory or by user code; see '{job.log}'."
        return Failure("failed", text, None, StageError.exit_code)
    text, hint = (
        f"Ray could not finish it ({kind}: {first_line(cause)}).",
        "The same command again keeps finished stages.",
    )
    return Failure("failed", text, hint, RuntimeUnavailable.exit_code)
