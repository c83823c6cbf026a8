"""Two hosts on one folder: processes with other host names, started by `unshare`."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compress.storage.lock as lock_module
from compress.errors import ArtifactError, RunLocked
from compress.storage.lock import KIND_FILE, LOCK_FILE, Locks, find_lack, lease_file, open_locks
from compress.storage.store import Store

ROOT = Path(__file__).parents[2]
HOSTS = ("alpha", "beta")
UNSHARE = ["unshare", "--user", "--map-root-user", "--uts"]
CLAIMS = """
import json, os, pathlib, platform, sys, time
from compress.errors import RunLocked
from compress.storage.lock import Locks
from compress.storage.store import Store

store = Store(pathlib.Path(sys.argv[1]), print, Locks(sys.argv[2]))
count, seconds = int(sys.argv[3]), float(sys.argv[4])
held, log = store.root / "held", store.root / f"log.{platform.node()}.{os.getpid()}"
refused = taken = 0
for number in range(count):
    while True:
        try:
            with store.locks.hold(store.lock_folder("key")):
                os.close(os.open(held, os.O_CREAT | os.O_EXCL))  # fails where somebody else is in here
                time.sleep(seconds)
                held.unlink()
                taken += 1
            break
        except RunLocked:
            refused += 1
            time.sleep(0.001)
    store.put(f"{number:064x}", lambda folder: (folder / "a").write_text("1"), {})
    store.sweep()
log.write_text(json.dumps({"host": platform.node(), "taken": taken, "refused": refused}))
"""


def has_uts() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "hostname", "x"], capture_output=True, check=False).returncode == 0


needs_hosts = pytest.mark.skipif(not has_uts(), reason="needs unshare, and the right to set a host name")


def start_on(host: str, code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python in a process with its own host name."""
    command = f'hostname {host}; exec "$@"'
    return subprocess.Popen(
        [*UNSHARE, "sh", "-c", command, "sh", sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_hosts
@pytest.mark.parametrize("kind", ["native", "lease"])
def test_of_200_claims_by_two_hosts_no_two_hold_and_none_fails(tmp_path: Path, kind: str) -> None:
    """Four processes on two hosts claim one stage, and store and sweep in between."""
    started = [start_on(host, CLAIMS, tmp_path, kind, 50, 0.002) for host in HOSTS for _ in range(2)]
    outputs = [one.communicate(timeout=200) for one in started]
    assert [one.returncode for one in started] == [0] * 4, outputs
    assert outputs == [("", "")] * 4
    found = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("log.*")]
    assert sorted(one["host"] for one in found) == ["alpha", "alpha", "beta", "beta"]
    assert sum(one["taken"] for one in found) == 200
    store = Store(tmp_path, pytest.fail)
    assert all(store.get(f"{number:064x}") is not None for number in range(50))
    assert list((tmp_path / ".partial").iterdir()) == []


HOLD = """
import pathlib, sys
from compress.storage.lock import Locks
with Locks(sys.argv[2]).hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@needs_hosts
@pytest.mark.parametrize("kind", ["native", "lease"])
def test_the_holder_on_another_host_is_named(tmp_path: Path, kind: str) -> None:
    with start_on("alpha", HOLD, tmp_path, kind) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=r"is held by process \d+ on alpha since 2"), _locks(kind).hold(tmp_path):
            pytest.fail("held by two")
        holder.communicate("")
    with _locks(kind).hold(tmp_path):
        pass


def _locks(kind: str) -> Locks:
    return Locks("lease" if kind == "lease" else "native")


@needs_hosts
def test_a_lease_of_a_dead_host_is_taken_over_when_it_is_not_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times that the dead host wrote do not matter: its clock may be off by an hour."""
    monkeypatch.setattr(lock_module, "LEASE_S", 1.5)
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.3)
    short = "import compress.storage.lock as lock\nlock.LEASE_S, lock.HEARTBEAT_S = 1.5, 0.3\n"
    with start_on("alpha", short + HOLD, tmp_path, "lease") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    marker = lease_file(tmp_path / LOCK_FILE)
    for hours in (-1, 1):
        content = marker.read_bytes()
        os.utime(marker, (time.time() + 3600 * hours,) * 2)
        started = time.monotonic()
        with Locks("lease").hold(tmp_path):
            assert time.monotonic() - started > 1.4
        marker.write_bytes(content)


@needs_hosts
def test_a_store_that_others_lock_by_flock_is_not_opened_by_leases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_locks(tmp_path, pytest.fail).kind == "native"
    without_flock(monkeypatch)
    with pytest.raises(
        ArtifactError, match=r"by file locks, which this host cannot use: .*No locks available"
    ) as caught:
        open_locks(tmp_path, pytest.fail)
    assert KIND_FILE in str(caught.value.hint)


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)


def test_a_file_system_without_locks_is_held_by_leases_on_all_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    with monkeypatch.context() as patch:
        without_flock(patch)
        assert open_locks(tmp_path, warned.append).kind == "lease"
    assert warned == [
        f"Store '{tmp_path}' is held by leases, renewed every 5 s, not by file locks: the file system answers "
        "'No locks available'."
    ]
    locks = open_locks(tmp_path, warned.append)  # a host with locks follows
    assert locks.kind == "lease"
    assert warned[1].endswith("another host cannot use them.")
    with locks.hold(tmp_path / "run"):
        assert lease_file(tmp_path / "run" / LOCK_FILE).is_file()
        assert Locks("lease").try_lock(tmp_path / "run" / LOCK_FILE) is None
    assert not lease_file(tmp_path / "run" / LOCK_FILE).exists()
    assert [path.name for path in (tmp_path / ".locks").iterdir()] == [KIND_FILE]


def test_the_kind_of_locks_is_one_of_two(tmp_path: Path) -> None:
    (tmp_path / ".locks").mkdir()
    (tmp_path / ".locks" / KIND_FILE).write_text("both", encoding="ascii")
    with pytest.raises(ArtifactError, match="must hold 'native' or 'lease', got 'both'"):
        open_locks(tmp_path, pytest.fail)
    (tmp_path / "file").write_text("", encoding="ascii")
    with pytest.raises(ArtifactError, match=r"Store '.*file/store' must be writable: Not a directory"):
        open_locks(tmp_path / "file" / "store", pytest.fail)


@pytest.mark.parametrize(
    ("kind", "options", "lack"),
    [
        ("nfs4", "rw,vers=4.2,local_lock=none", None),
        ("nfs", "rw,vers=3,local_lock=all", "nfs is mounted with local_lock=all"),
        ("nfs", "rw,local_lock=flock", "nfs is mounted with local_lock=flock"),
        ("lustre", "rw,localflock", "lustre is mounted with localflock"),
        ("cifs", "rw,nobrl", "cifs is mounted with nobrl"),
        ("ext4", "rw,nobrl", None),
    ],
)
def test_locks_that_do_not_leave_their_host_are_found_by_the_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, lack: str | None
) -> None:
    shared = tmp_path / "a b"
    (shared / "runs").mkdir(parents=True)
    point = str(shared).replace(" ", "\\040")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"21 1 8:1 / / rw shared:1 - ext4 /dev/root rw\n"
        f"36 21 0:5 / {point} rw shared:2 - {kind} server:/x {options}\nbroken\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(lock_module, "_MOUNTS", mounts)
    assert find_lack(shared / "runs") == lack
    assert find_lack(tmp_path) is None
    assert list((shared / "runs").iterdir()) == []


@pytest.mark.parametrize("kind", ["native", "lease"])
def test_a_host_sweeps_its_own_and_those_of_others_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A free lock is no proof where locks do not reach other hosts, nor is the clock of this host."""
    store = Store(tmp_path, pytest.fail, _locks(kind))
    with store.scratch("k") as own:
        assert own.name.split(".")[:2] == ["k", re.sub(r"[^A-Za-z0-9_-]", "-", platform.node())]
        mine = own.name.replace(own.name[-8:], "00000000")
    names = {"own": mine, "young": "k.other.20261130T120000.7.0a", "old": "k.other.20261101T120000.7.0b"}
    folders = {name: tmp_path / ".partial" / value for name, value in names.items()}
    for name, folder in folders.items():
        folder.mkdir()
        lock = folder.with_name(f"{folder.name}.lock")
        if name != "own":
            (lock if kind == "native" else lease_file(lock)).write_bytes(LEASE_OF_OTHER)
        for path in tmp_path.glob(f".partial/{folder.name}*"):
            hours = 25 if name == "old" else 23
            os.utime(path, (time.time() - 3600 * hours,) * 2)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7200)
    store.sweep()
    assert {name: folder.exists() for name, folder in folders.items()} == {"own": False, "young": True, "old": False}
    assert {path.name.partition(".lock")[0] for path in (tmp_path / ".partial").iterdir()} == {names["young"]}


def test_an_entry_that_another_host_finishes_during_the_sweep_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / ".partial" / "k.other.20261101T120000.7.0a.lock"
    gone.parent.mkdir()
    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([gone, *listed(path, pattern)]))
    Store(tmp_path, pytest.fail).sweep()
    assert list(listed(gone.parent, "*")) == []


LEASE_OF_OTHER = b"filelock/2\npid=7\nhost=other\nmode=lease\ntoken=" + b"0" * 32 + b"\nduration=120.0\n"


def test_a_lost_lease_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "LEASE_S", 0.6)
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.05)
    warned: list[str] = []
    with Locks("lease", warned.append).hold(tmp_path):
        lease_file(tmp_path / LOCK_FILE).unlink()
        ends = time.monotonic() + 30
        while not warned and time.monotonic() < ends:
            time.sleep(0.05)
    assert "was lost (marker-missing)" in warned[0]


def test_a_lease_that_cannot_be_replaced_is_an_error_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network drives without an atomic exchange of names."""
    monkeypatch.setattr(lock_module, "LEASE_S", 0.5)
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(Locks, "try_lock", lambda self, path: None)
    lease_file(tmp_path / LOCK_FILE).write_text("", encoding="ascii")
    with pytest.raises(ArtifactError, match="was not renewed for") as caught, Locks("lease").hold(tmp_path):
        pytest.fail("held")
    assert str(lease_file(tmp_path / LOCK_FILE)) in str(caught.value.hint)
