"""One run holds a folder; the next one learns who; a dead one holds nothing."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from compress.errors import ArtifactError, RunLocked
from compress.storage.lock import HOLDER_FILE, hold
from compress.storage.store import Store

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys, pathlib\nfrom compress.storage.lock import hold\n"
    "with hold(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold the folder until its standard input is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_second_learns_who_holds_the_folder_and_the_first_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    with holder(folder) as process:
        for _ in range(2):  # the refused one must not have taken or broken the lock
            with (
                pytest.raises(
                    RunLocked, match=rf"'{folder}' is held by process {process.pid} on {platform.node()} since 2"
                ) as caught,
                hold(folder),
            ):
                pytest.fail("held by two")
        assert caught.value.exit_code == 4
        assert caught.value.hint == "Wait for that run to end, or give this one another name."
        process.communicate("")
        assert process.returncode == 0
    with hold(folder):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert str(process.pid) in (tmp_path / HOLDER_FILE).read_text(encoding="utf-8")
        with hold(tmp_path):
            assert json.loads((tmp_path / HOLDER_FILE).read_text(encoding="utf-8"))["pid"] == os.getpid()


def test_one_process_does_not_hold_a_folder_twice(tmp_path: Path) -> None:
    with (
        hold(tmp_path),
        pytest.raises(RunLocked, match=f"held by process {os.getpid()} "),
        hold(tmp_path),
    ):
        pytest.fail("held twice")


def test_the_folder_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        raise ZeroDivisionError
    with hold(tmp_path):
        pass


def test_a_holder_that_cannot_be_read_is_still_a_holder(tmp_path: Path) -> None:
    with holder(tmp_path):
        (tmp_path / HOLDER_FILE).write_text("?", encoding="utf-8")
        with pytest.raises(RunLocked, match="is held by another process"), hold(tmp_path):
            pytest.fail("held by two")


def test_a_folder_that_cannot_be_made_or_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ArtifactError, match="file/x' must be writable: Not a directory"), hold(tmp_path / "file" / "x"):
        pytest.fail("held")

    def refuse(path: Path, *_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ArtifactError, match="must be writable: Permission denied"), hold(tmp_path / "x"):
        pytest.fail("held")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_other_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """ENOLCK of a network drive means that nothing can be held, not that somebody holds it."""

    def refuse(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(ArtifactError, match="must support file locks, it does not") as caught, hold(tmp_path):
        pytest.fail("held")
    assert type(caught.value) is ArtifactError
    assert "--runs-dir" in str(caught.value.hint)


def test_the_lock_of_a_stage_outlives_its_work_folder(tmp_path: Path) -> None:
    """A finished entry removes the work folder; whoever waits must not find a new lock in its place."""
    store = Store(tmp_path, warn=pytest.fail)
    with hold(store.lock_folder("k")):
        store.work_folder("k").mkdir(parents=True)
        store.put("k", lambda folder: None, {})
        assert not store.work_folder("k").exists()
        with pytest.raises(RunLocked), hold(store.lock_folder("k")):
            pytest.fail("held by two")


MANY = """
import sys, pathlib, os, time
from compress.errors import RunLocked
from compress.storage.lock import hold
folder, held = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
done = 0
while done < 10:
    try:
        with hold(folder):
            os.close(os.open(held, os.O_CREAT | os.O_EXCL))  # fails where somebody else is in here
            time.sleep(0.002)
            held.unlink()
            done += 1
    except RunLocked:
        time.sleep(0.001)
"""


def test_of_many_that_want_a_folder_never_two_hold_it(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", MANY, str(tmp_path / "folder"), str(tmp_path / "held")]
    many = [subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": str(ROOT)}) for _ in range(3)]
    assert [one.wait(timeout=100) for one in many] == [0, 0, 0]
