"""Eviction by age and size, here and in a remote store; entries that a run uses stay."""

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from compress.cli.commands import app
from compress.engine.cleaning import Limits, find_leftovers, find_old
from compress.storage.remote import open_remote


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], prog_name="compress")


def make_entry(store: Path, name: str, days: float, size: int = 1_000_000) -> Path:
    folder = store / name
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(size))
    stamp = time.time() - days * 86_400
    os.utime(folder / "weights", (stamp, stamp))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a folder with one used entry and three unused ones of 9, 5 and 1 days, of 1 MB each."""
    runs = tmp_path / "runs"
    for name, days in (("used", 20), ("old", 9), ("middle", 5), ("young", 1)):
        make_entry(runs / ".store", name, days)
    (runs / "net").mkdir()
    (runs / "net" / "lock").write_text(json.dumps({"schema": 1, "stages": [{"key": "used"}]}), encoding="utf-8")
    return runs


def labels(runs: Path, days: float | None, size: int | None) -> list[str]:
    return [one.label for one in find_leftovers(runs, Limits(days, size))]


def test_the_oldest_go_first_until_the_store_has_its_size(runs: Path) -> None:
    assert labels(runs, None, 4_000_000) == []
    assert labels(runs, None, 3_999_999) == ["old"]
    assert labels(runs, None, 2_000_000) == ["old", "middle"]
    assert labels(runs, None, 0) == ["old", "middle", "young"]
    assert labels(runs, 4, 4_000_000) == ["old", "middle"], "too old, whatever the size"
    assert labels(runs, 8, 2_000_000) == ["old", "middle"]
    assert labels(runs, 8, None) == ["old"]


def test_files_that_entries_share_are_counted_once(runs: Path) -> None:
    (runs / ".store" / "young" / "weights").unlink()
    os.link(runs / ".store" / "old" / "weights", runs / ".store" / "young" / "weights")
    os.link(runs / ".store" / "old" / "weights", runs / ".store" / "young" / "again")
    assert labels(runs, None, 3_000_000) == []
    assert labels(runs, None, 2_500_000) == ["old", "young"], "the first alone frees nothing"


def test_ages_are_by_the_clock_of_the_file_system(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for hours in (-1, 1, 24 * 30):
        monkeypatch.setattr(time, "time", lambda hours=hours: now + 3600 * hours)
        assert labels(runs, 4.9, None) == ["middle", "old"]
    assert not list((runs / ".store").glob(".clock*"))


def test_clean_with_a_largest_size(runs: Path) -> None:
    listed = call("clean", "--runs-dir", runs, "--max-size", "0.0025")
    assert listed.exit_code == 0, listed.output
    assert "2 folders, 2.0 MB; --yes removes them." in listed.stdout
    done = call("clean", "--runs-dir", runs, "--max-size", "0.0025", "--yes")
    assert "2 folders removed, 2.0 MB." in done.stdout
    assert sorted(path.name for path in (runs / ".store").iterdir() if path.name[0] != ".") == ["used", "young"]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Return the URL of a store with objects of 9 and 1 days, abandoned uploads and a foreign file."""
    shared = tmp_path / "shared"
    shared.mkdir()
    for name, days in (("old.entry", 9), ("young.entry", 1), (".k.1.part", 2), (".k.2.part", 0), ("README", 99)):
        (shared / name).write_bytes(bytes(1_000_000))
        os.utime(shared / name, (time.time() - days * 86_400,) * 2)
    return f"file://{shared}"


def test_a_remote_store_is_cleaned_by_age_and_size(url: str, tmp_path: Path) -> None:
    def found(days: float | None, size: int | None) -> list[str]:
        return [one.label for one in find_old(open_remote(url), Limits(days, size))]

    assert found(8, None) == ["k.1.part", "old.entry"]
    assert found(None, 2_000_000) == ["k.1.part"]
    assert found(None, 1_000_000) == ["k.1.part", "old.entry"]
    assert found(0.5, 0) == ["k.1.part", "old.entry", "young.entry"]
    listed = call("clean", "--store", url, "--older-than", 8)
    assert listed.exit_code == 0, listed.output
    assert "2 files, 2.0 MB; --yes removes them." in listed.stdout
    done = call("clean", "--store", url, "--older-than", 8, "--yes")
    assert "2 files removed, 2.0 MB." in done.stdout
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == [".k.2.part", "README", "young.entry"]
    assert call("clean", "--store", url, "--older-than", 8).stdout == "Nothing to remove.\n"


def test_a_remote_store_is_never_cleaned_without_a_limit(url: str) -> None:
    done = call("clean", "--store", url, "--yes")
    assert done.exit_code == 2
    assert "needs --older-than DAYS or --max-size GB: it cannot know which entries others use." in done.stderr


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [("s3:bucket", 2, "must be a URL with a protocol"), ("nope://x", 2, "a protocol that fsspec knows")],
)
def test_a_bad_url_ends_each_command_with_exit_code_2(tmp_path: Path, given: str, code: int, said: str) -> None:
    """The pipeline is read first, then the URL; neither imports torch."""
    done = call("clean", "--store", given, "--older-than", 1)
    assert (done.exit_code, said in done.stderr) == (code, True), done.output


def test_no_command_with_a_remote_store_imports_torch_before_it_is_opened(tmp_path: Path) -> None:
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    code = (
        "import sys\nfrom compress.storage.remote import open_remote\nimport compress.cli.commands\n"
        f"import compress.engine.cleaning\nopen_remote('file://{tmp_path}')\n"
        "assert not {'torch', 's3fs', 'botocore'} & set(sys.modules), 'torch'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pipeline = root / "pipelines" / "quickstart.yaml"
    for command in ("run", "plan", "search"):
        done = call(command, pipeline, "--store", "nope://x", "--runs-dir", tmp_path / "runs")
        assert done.exit_code == 2, done.output
        assert "fsspec knows, got 'nope://x'" in done.stderr
    assert not (tmp_path / "runs").exists()
