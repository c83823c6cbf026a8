"""One run holds a folder; the next one learns who; a dead one holds nothing."""

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
from compress.locking import HOLDER_FILE, hold

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys, pathlib\nfrom compress.locking import hold\n"
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
