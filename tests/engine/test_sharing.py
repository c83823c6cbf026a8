"""Two clones share finished stages by a remote store; whatever happens to it, the local store has everything."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import smallrun
from moto_server import S3Server, needs_moto, s3_server
from smallrun import Notes, World, make_world, statuses

import compress
from compress.engine import runner, sharing
from compress.engine.keys import build_steps
from compress.engine.runner import plan, run
from compress.engine.sharing import shared_name
from compress.engine.sweep import Grid, sweep
from compress.errors import InternalError, RunLocked
from compress.storage.lock import hold
from compress.storage.remote import open_remote

STAGES = ("load", "prune", "finetune", "export", "verify")
ALL_RAN = [f"{stage} ran" for stage in STAGES]
NONE_RAN = [f"{stage} unchanged" for stage in STAGES]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose run is shared in the folder `shared`."""
    made = make_world(tmp_path_factory.mktemp("sharing") / "world")
    progress = Notes()
    outcome = run(made.load(made.values()), made.runs, progress, open_remote(url_of(made)))
    assert statuses(outcome) == ALL_RAN
    assert progress.warnings == []
    return made


def url_of(world: World) -> str:
    return f"file://{world.folder}/shared"


def clone(world: World, folder: Path) -> World:
    """Return a clone with the same inputs, in another folder and with an empty store."""
    shutil.copytree(world.folder, folder, ignore=shutil.ignore_patterns("runs", "shared"))
    return World(folder)


def never(*_: object, **__: object) -> None:
    raise InternalError("a stage was computed")


def test_a_second_clone_computes_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, progress = clone(world, tmp_path / "other"), Notes()
    planned = plan(other.load(other.values()), other.runs, open_remote(url_of(world)))
    assert [(one.stage, one.status) for one in planned] == [(stage, "download") for stage in STAGES]
    assert not other.runs.exists()
    monkeypatch.setattr(runner._Run, "_make", never)
    outcome = run(other.load(other.values()), other.runs, progress, open_remote(url_of(world)))
    assert statuses(outcome) == NONE_RAN
    downloads = [note for note in progress.notes if "downloaded from" in note]
    assert downloads[0] == f"[1/5] load: downloaded from {url_of(world)}"
    assert len(downloads) == 5
    assert progress.warnings == []
    name = "chain/model.onnx"
    assert (other.runs / name).read_bytes() == (world.runs / name).read_bytes()
    assert [one.status for one in plan(other.load(other.values()), other.runs)] == ["unchanged"] * 5


def test_a_verdict_of_another_machine_is_measured_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Milliseconds of one machine are not those of another."""
    monkeypatch.setattr(sharing, "_machine", lambda: {"machine": "another"})
    other = clone(world, tmp_path / "other")
    planned = plan(other.load(other.values()), other.runs, open_remote(url_of(world)))
    assert [one.status for one in planned] == ["download"] * 4 + ["run"]
    *steps, verify = build_steps(other.load(other.values()))
    assert all(shared_name(step, "key") == "key" for step in steps)
    assert shared_name(verify, "key") != "key"


def test_a_damaged_object_is_made_again_and_replaced(world: World, tmp_path: Path) -> None:
    other, progress = clone(world, tmp_path / "other"), Notes()
    key = smallrun.read_lock(world, "chain")[1]["key"]
    shared = tmp_path / "shared"
    shutil.copytree(world.folder / "shared", shared)
    path = shared / f"{key}.entry"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5000] + bytes([whole[-5000] ^ 1]) + whole[-4999:])
    outcome = run(other.load(other.values()), other.runs, progress, open_remote(f"file://{shared}"))
    assert statuses(outcome) == ["load unchanged", "prune ran", *NONE_RAN[2:]]
    assert [text.partition(": ")[0] for text in progress.warnings] == [
        f"'file://{path}' is damaged and not used",
    ]
    again = Notes()
    assert statuses(run(clone(world, tmp_path / "third").load(other.values()), tmp_path / "runs", again,
                        open_remote(f"file://{shared}"))) == NONE_RAN  # fmt: skip
    assert again.warnings == []


def test_stages_made_without_the_remote_store_are_uploaded_by_the_next_run(world: World, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/later"
    outcome = run(world.load(world.values()), world.runs, None, open_remote(url))
    assert statuses(outcome) == NONE_RAN
    assert len(list((tmp_path / "later").glob("*.entry"))) == 5


class KillsServer(Notes):
    """Kills a server when a stage begins."""

    def __init__(self, server: S3Server, at: str) -> None:
        super().__init__()
        self.server, self.at = server, at

    def note(self, text: str) -> None:
        super().note(text)
        if text.startswith(self.at):
            self.server.kill()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server() as running:
        for name, value in running.environ.items():
            monkeypatch.setenv(name, value)
        running.client().mkdir("bucket")
        yield running


@needs_moto
def test_a_server_killed_in_the_middle_loses_nothing(world: World, tmp_path: Path, server: S3Server) -> None:
    url, other = "s3://bucket/ci", clone(world, tmp_path / "other")
    progress = KillsServer(server, "[3/5] finetune: runs")
    outcome = run(other.load(other.values()), other.runs, progress, open_remote(url))
    assert statuses(outcome) == ALL_RAN
    assert len(progress.warnings) == 2, "one in the middle, one for the last try"
    assert all(text.startswith(f"Remote store '{url}' failed: Could not connect") for text in progress.warnings)
    assert (other.runs / "chain" / "report.json").is_file()

    server.start()
    server.client().mkdir("bucket")
    outcome = run(other.load(other.values()), other.runs, None, open_remote(url))
    assert statuses(outcome) == NONE_RAN
    third = clone(world, tmp_path / "third")
    outcome = run(third.load(third.values()), third.runs, None, open_remote(url))
    assert statuses(outcome) == NONE_RAN


def test_a_store_out_of_reach_is_a_warning(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.storage.remote.Remote._touch", _refuse)
    monkeypatch.setattr("compress.storage.remote.Remote._size", _refuse)
    progress = Notes()
    outcome = run(world.load(world.values()), world.runs, progress, open_remote(url_of(world)))
    assert statuses(outcome) == NONE_RAN
    assert progress.warnings[0] == (
        f"Remote store '{url_of(world)}' is out of reach: Connection refused. The run goes on without it."
    )


def _refuse(*_: object) -> None:
    from compress.storage.remote import RemoteFailed

    raise RemoteFailed("Connection refused")


def test_run_of_the_python_api_takes_a_url(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner._Run, "_make", never)
    path = world.write(world.values())
    done = compress.run(path, runs_dir=tmp_path / "runs", store=url_of(world), progress=False)
    assert done.report["name"] == "chain"


def test_a_run_without_file_locks_is_held_by_leases(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_flock)
    progress = Notes()
    outcome = run(world.load(world.values()), tmp_path / "runs", progress, open_remote(url_of(world)))
    assert statuses(outcome) == NONE_RAN
    assert len(progress.warnings) == 1
    assert "is held by leases, renewed every 5 s, not by file locks: the file system answers" in progress.warnings[0]


def test_two_sweeps_of_one_pipeline_on_one_store_do_not_mix(world: World) -> None:
    path = world.write(world.values())
    with (
        hold(world.runs / "chain-sweep"),
        pytest.raises(RunLocked, match="chain-sweep' is held by process"),
    ):
        sweep(path, Grid([0.8]), world.runs)
    with hold(world.runs / "chain-search"):
        done = world.call("search", world.values(), "--runs", "1")
    assert done.exit_code == 4
    assert "chain-search' is held by process" in done.stderr
