"""A remote store shares whole entries, refuses damaged ones, and never costs a run anything when it fails."""

import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from fixtures import RecordingProgress
from moto_server import S3Server, needs_moto, s3_server

from compress.errors import ArtifactError, ConfigError, PackageMissing
from compress.storage.remote import Remote, RemoteFailed, RemoteRefused, open_remote
from compress.storage.store import Store

KEY = "0" * 64


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        running.client().mkdir("bucket")
        yield running


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    return server


def make_store(folder: Path, size: int = 10, *keys: str) -> Store:
    store = Store(folder, pytest.fail)
    for key in keys or (KEY,):
        store.put(key, lambda folder: (folder / "weights").write_bytes(bytes(size)), {"seconds": 1.0})
    return store


def shared(remote: Remote, store: Store, progress: RecordingProgress | None = None) -> bool:
    return remote.share(KEY, store, KEY, progress or RecordingProgress(), "[1/1] load")


def fetched(remote: Remote, store: Store, progress: RecordingProgress | None = None) -> object:
    return remote.fetch(KEY, store, KEY, progress or RecordingProgress(), "[1/1] load")


@pytest.mark.parametrize("place", ["file", pytest.param("s3", marks=needs_moto)])
def test_an_entry_goes_up_and_comes_down(tmp_path: Path, place: str, request: pytest.FixtureRequest) -> None:
    url = f"file://{tmp_path}/shared" if place == "file" else "s3://bucket/up/and/down/"
    if place == "s3":
        request.getfixturevalue("s3")
    mine, other = make_store(tmp_path / "mine", 3 << 20), Store(tmp_path / "other", pytest.fail)
    remote, progress = open_remote(url), RecordingProgress()
    assert remote.record(KEY) is None
    assert fetched(remote, other, progress) is None
    assert shared(remote, mine, progress)
    theirs = open_remote(url)
    record, entry = theirs.record(KEY), mine.get(KEY)
    assert entry is not None
    assert record is not None
    assert record["digest"] == entry.digest
    assert fetched(theirs, other, progress) == other.get(KEY) != None  # noqa: E711
    assert progress.tasks == ["[1/1] load: upload (MB)", "[1/1] load: download (MB)"]
    assert progress.warnings == []
    assert [(one.path.rpartition("/")[2], one.is_part) for one in theirs.files()] == [(f"{KEY}.entry", False)]
    theirs.remove(theirs.files()[0])
    assert theirs.files() == []
    assert list((mine.root / ".partial").iterdir()) == list((other.root / ".partial").iterdir()) == []


@pytest.mark.parametrize("place", ["file", pytest.param("s3", marks=needs_moto)])
def test_a_flipped_or_half_written_object_is_refused_and_replaced(
    tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    url = f"file://{tmp_path}/shared" if place == "file" else "s3://bucket/flipped"
    server = request.getfixturevalue("s3") if place == "s3" else None
    mine, other = make_store(tmp_path / "mine"), Store(tmp_path / "other", pytest.fail)
    assert shared(open_remote(url), mine)

    def change(content: bytes | None = None) -> bytes:
        if server is None:
            path = tmp_path / "shared" / f"{KEY}.entry"
            before = path.read_bytes()
            path.write_bytes(before if content is None else content)
        else:
            fs, name = server.client(), f"bucket/flipped/{KEY}.entry"
            before = fs.cat_file(name)
            fs.pipe_file(name, before if content is None else content)
        return before

    whole = change()
    middle = len(whole) // 2
    remote = open_remote(url)
    for damaged in (whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :], whole[:middle], b""):
        change(damaged)
        progress = RecordingProgress()
        remote._present.clear()
        assert fetched(remote, other, progress) is None
        assert other.get(KEY) is None
        assert len(progress.warnings) == 1
        assert progress.warnings[0].startswith(f"'{url}/{KEY}.entry' is damaged and not used: its ")
        assert shared(remote, mine, progress), "whoever makes the stage again replaces it"
        assert change() == whole


def test_an_entry_under_another_name_is_refused(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    mine, progress = make_store(tmp_path / "mine"), RecordingProgress()
    assert shared(open_remote(url), mine)
    other = "1" * 64
    os.link(tmp_path / "shared" / f"{KEY}.entry", tmp_path / "shared" / f"{other}.entry")
    assert open_remote(url).fetch(other, mine, other, progress, "load") is None
    assert "is damaged and not used: its first line must be" in progress.warnings[0]
    assert open_remote(url).record(other) is None


@needs_moto
def test_a_server_that_is_killed_is_a_warning_and_gets_the_rest_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, progress = make_store(tmp_path / "mine"), RecordingProgress()
    with s3_server() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        server.client().mkdir("bucket")
        remote = open_remote("s3://bucket/x")
        server.kill()
        assert not shared(remote, mine, progress)
        assert fetched(remote, mine, progress) is None
        assert remote.record(KEY) is None
        assert len(progress.warnings) == 1, "not asked again, not warned again"
        assert "Remote store 's3://bucket/x' failed: Could not connect to the endpoint URL" in progress.warnings[0]
        assert "Finished stages are in the local store" in progress.warnings[0]
        assert mine.get(KEY) is not None
        down = open_remote("s3://bucket/x")
        assert down.failure is not None
        with pytest.raises(RemoteFailed, match="Could not connect"):
            down.files()
        server.start()
        server.client().mkdir("bucket")
        remote.retry()
        assert shared(remote, mine, progress)
        assert fetched(open_remote("s3://bucket/x"), Store(tmp_path / "other", pytest.fail)) is not None


@needs_moto
def test_a_bucket_that_is_not_there_is_an_error_before_any_work(s3: S3Server) -> None:
    with pytest.raises(
        RemoteRefused, match=r"'s3://none/x' must be in a bucket that exists: .*bucket does not"
    ) as caught:
        open_remote("s3://none/x")
    assert (caught.value.exit_code, caught.value.hint) == (4, "Create the bucket.")


@needs_moto
def test_missing_credentials_are_an_error_that_names_the_variables(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RemoteRefused, match="needs credentials, none were found") as caught:
        open_remote("s3://bucket/x")
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.hint)


@needs_moto
def test_a_bucket_with_no_name_is_an_error(s3: S3Server) -> None:
    with pytest.raises(RemoteRefused, match=r"cannot be addressed so: .*Invalid bucket name"):
        open_remote("s3://UPPER_case!/x")


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (PermissionError("The difference between the request time and the current time is too large."),
         "refuses access: The difference", "Set the clock of this host."),
        (PermissionError("Access Denied"), "refuses access: Access Denied", "Check the credentials, and their"),
        (FileNotFoundError("The specified bucket does not exist"), "in a bucket that exists", "Create the bucket."),
    ],
)  # fmt: skip
def test_a_refusal_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, hint: str
) -> None:
    def refuse(remote: Remote) -> None:
        raise error

    monkeypatch.setattr(Remote, "_touch", refuse)
    with pytest.raises(RemoteRefused, match=said) as caught:
        open_remote(f"file://{tmp_path}")
    assert str(caught.value.hint).startswith(hint)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "must be a URL with a protocol and a bucket or folder, got ''"),
        ("bucket", "must be a URL with a protocol"),
        ("s3:/bucket", "must be a URL with a protocol"),
        ("s3://", "must be a URL with a protocol"),
        ("s3:///", "must be a URL with a protocol"),
        ("s3://a b", "must be a URL with a protocol"),
        ("://x", "must be a URL with a protocol"),
        ("simplecache::s3://x", "must be a URL with a protocol"),
        ("s4://bucket", "a protocol that fsspec knows, got 's4://bucket'"),
        ("https://example.org/x", "must be a URL that can be written to"),
    ],
)
def test_a_bad_url_is_an_error_of_the_command_line(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        open_remote(url)
    assert caught.value.exit_code == 2


def test_a_missing_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "s3fs"] + ["s3fs"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PackageMissing, match="--store 's3://b/x' needs a package that is not installed") as caught:
        open_remote("s3://b/x")
    assert caught.value.exit_code == 5
    assert "pip install 's3fs>=" in str(caught.value.hint)
    assert "extra 'remote'" in str(caught.value.hint)


def test_a_password_in_a_url_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"got 's4://me:\*\*\*@host/x'"):
        open_remote("s4://me:secret@host/x")


class Broken:
    """A file system whose transfers break in the middle."""

    def __init__(self, fs: object, error: Exception) -> None:
        self.fs, self.error = fs, error

    def __getattr__(self, name: str) -> object:
        return getattr(self.fs, name)

    def put_file(self, source: str, target: str, **options: object) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:100])
        raise self.error

    def get_file(self, source: str, target: str, **options: object) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:100])
        raise self.error


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), TimeoutError("slow"), RuntimeError("odd")])
def test_a_transfer_that_breaks_in_the_middle_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    url = f"file://{tmp_path}/shared"
    mine, other = make_store(tmp_path / "mine"), Store(tmp_path / "other", pytest.fail)
    remote, progress = open_remote(url), RecordingProgress()
    remote._fs = Broken(remote._fs, error)
    assert not shared(remote, mine, progress)
    assert list((tmp_path / "shared").iterdir()) == []
    assert shared(open_remote(url), mine)
    remote.retry()
    assert fetched(remote, other, progress) is None
    assert list(other.root.glob("*")) == [other.root / ".partial"]
    assert list((other.root / ".partial").iterdir()) == list((mine.root / ".partial").iterdir()) == []
    assert len(progress.warnings) == 2


def test_an_entry_that_is_removed_while_it_is_read_is_a_warning(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    mine, other = make_store(tmp_path / "mine"), Store(tmp_path / "other", pytest.fail)
    assert shared(open_remote(url), mine)
    remote, progress = open_remote(url), RecordingProgress()
    remote._fs = Broken(remote._fs, FileNotFoundError("gone"))
    assert fetched(remote, other, progress) is None
    assert "the entry was removed while it was read" in progress.warnings[0]
    gone = open_remote(url)
    gone._fs = Broken(gone._fs, FileNotFoundError("The specified bucket does not exist"))
    gone._damaged.add(KEY)
    assert not shared(gone, mine, progress)
    assert "The specified bucket does not exist" in progress.warnings[1]


def test_a_full_disk_here_is_an_error_of_the_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}/shared"
    assert shared(open_remote(url), make_store(tmp_path / "mine"))
    other = Store(tmp_path / "other", pytest.fail)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.storage.remote.unpack", refuse)
    with pytest.raises(ArtifactError, match=r"could not be written to '.*other': No space left"):
        fetched(open_remote(url), other)


def test_age_is_that_of_the_upload(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    assert shared(open_remote(url), make_store(tmp_path / "mine"))
    path = tmp_path / "shared" / f"{KEY}.entry"
    os.utime(path, (time.time() - 7200,) * 2)
    (tmp_path / "shared" / ".k.1.part").write_bytes(b"half")
    (tmp_path / "shared" / "README").write_bytes(b"not ours")
    part, entry = open_remote(url).files()
    assert (part.is_part, part.size_bytes, entry.is_part) == (True, 4, False)
    assert entry.modified is not None
    assert abs(time.time() - 7200 - entry.modified.timestamp()) < 2
