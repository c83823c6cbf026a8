"""Remote store of finished stages, for hosts without a common folder (fsspec).

    URL/NAME.entry           a finished stage in one file (archive.py), complete or absent
    URL/.NAME.TOKEN.part     an upload under way, where the file system is no object store

The local store stays the truth: what a remote store cannot do is a warning, and the run goes on. Only a remote store
that cannot work as it is configured is an error, before any stage runs.
"""

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.callbacks import Callback

from compress.errors import ArtifactError, ConfigError, PackageMissing, attempt, first_line, translated
from compress.progress import Progress, Task
from compress.storage.archive import pack, read_record, unpack
from compress.storage.digest import RecordDamaged
from compress.storage.store import Entry, Store

SUFFIX, PART_SUFFIX = ".entry", ".part"
SHOWN_BYTES = 1 << 20  # transfers of less show no progress
INSTALL_HINT = (
    "pip install 's3fs>=2025.3' for S3 (the extra 'remote' of this project), gcsfs for Google, adlfs for Azure"
)
_MB = 1 << 20
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_S3 = ("s3", "s3a")
_OBJECT_STORES = (*_S3, "gs", "gcs", "az", "abfs", "abfss", "oss")  # an object is complete or absent
_READ_ONLY = ("http", "https", "data", "github", "git", "zip", "tar")
_S3_OPTIONS = {
    "use_listings_cache": False,
    "skip_instance_cache": True,
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 20, "retries": {"max_attempts": 1}},
}
_S3_TRIES = 3
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws, give them."
_MODIFIED = ("LastModified", "mtime", "last_modified", "updated", "modified", "created")


class RemoteFailed(ArtifactError):
    """A remote store did not do what it was asked for; nothing local is lost."""


class RemoteRefused(ArtifactError):
    """A remote store cannot be used as it is configured: no credentials, no access, no bucket."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """File of a remote store.

    Attributes:
        path: Path for the file system of fsspec.
        size_bytes: Size.
        modified: Time of the upload by the clock of the remote store; None if it is not known.
        is_part: True for an unfinished upload.
    """

    path: str
    size_bytes: int
    modified: datetime | None
    is_part: bool


class Remote:
    """Remote store at a URL.

    Args:
        url: URL without a password, for messages.
        fs: File system of fsspec.
        root: Path of the store in it.
        protocol: First part of the URL.

    Attributes:
        failure: Reason why the store is not asked any more; None while it answers.
    """

    def __init__(self, url: str, fs: Any, root: str, protocol: str) -> None:
        self.url = url
        self.failure: str | None = None
        self._fs, self._root, self._protocol = fs, root.rstrip("/"), protocol
        self._present: set[str] = set()
        self._damaged: set[str] = set()

    def fetch(self, name: str, store: Store, key: str, progress: Progress, label: str) -> Entry | None:
        """Download an entry, check it, and put it into a local store; None if it is absent, damaged or out of reach.

        Args:
            name: Name in the remote store.
            store: The local store.
            key: Key in the local store.
            progress: Receives progress, and a warning if the entry is damaged or the remote store fails.
            label: Name of the stage in messages.

        Raises:
            ArtifactError: The local store cannot be written.
        """
        if self.failure is not None:
            return None
        try:
            size = self._size(name)
            if size is None:
                return None
            with _transfer(progress, f"{label}: download", size) as callback:
                entry = store.adopt(key, lambda folder: self._download(name, folder, callback))
        except RemoteFailed as error:
            self._fail(error, progress)
            return None
        except RecordDamaged as error:
            self._damaged.add(name)
            progress.warn(f"'{self.url}/{name}{SUFFIX}' is damaged and not used: {error.message}.")
            return None
        self._present.add(name)
        return entry

    def share(self, name: str, store: Store, key: str, progress: Progress, label: str) -> bool:
        """Upload an entry of a local store unless it is there; a damaged one is replaced.

        Args:
            name: Name in the remote store.
            store: The local store.
            key: Key in the local store.
            progress: Receives progress, and a warning if the remote store fails.
            label: Name of the stage in messages.

        Returns:
            True if the remote store has the entry now.
        """
        if name in self._present:
            return True
        if self.failure is not None:
            return False
        try:
            if name in self._damaged or self._size(name) is None:
                self._upload(name, store, key, progress, label)
        except (ArtifactError, FileNotFoundError) as error:
            self._fail(RemoteFailed(first_line(error)), progress)
            return False
        self._present.add(name)
        self._damaged.discard(name)
        return True

    def record(self, name: str) -> dict[str, Any] | None:
        """Return the record of an entry, downloaded alone; None if it is absent, damaged or out of reach."""
        if self.failure is not None:
            return None
        try:
            with self._remotely(), self._open(name) as stream:
                return read_record(stream, name)
        except (FileNotFoundError, RecordDamaged):
            return None
        except RemoteFailed as error:
            self.failure = error.message
            return None

    def files(self) -> list[RemoteFile]:
        """Return the entries and the unfinished uploads.

        Raises:
            RemoteFailed: The remote store cannot be read.
        """
        try:
            with self._remotely():
                found: Mapping[str, Any] = self._fs.find(self._root, detail=True)
        except FileNotFoundError:
            return []
        return [
            RemoteFile(path, int(info["size"]), _modified(info), path.endswith(PART_SUFFIX))
            for path, info in sorted(found.items())
            if path.endswith((SUFFIX, PART_SUFFIX))
        ]

    def remove(self, file: RemoteFile) -> None:
        """Remove a file; one that is gone already is no error.

        Raises:
            RemoteFailed: The remote store refuses.
        """
        with suppress(FileNotFoundError), self._remotely():
            self._fs.rm_file(file.path)

    def check(self) -> None:
        """Ask the remote store for one name; it is not asked again in this run if it is out of reach.

        Raises:
            RemoteRefused: No credentials, no access, or no bucket.
        """
        error = attempt(self._touch, lambda error: error, MemoryError)
        if isinstance(error, Exception):
            if (refused := _refusal(error, self.url)) is not None:
                raise refused from error
            self.failure = first_line(error)

    def retry(self) -> None:
        """Ask the remote store again from now on."""
        self.failure = None

    def _touch(self) -> None:
        if self._protocol in _S3:
            bucket, prefix, _ = self._fs.split_path(self._root)
            self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
            return
        with suppress(FileNotFoundError):
            self._fs.ls(self._root, detail=False)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}{SUFFIX}"

    def _open(self, name: str) -> Any:
        opened: IO[bytes] = self._fs.open(self._path(name), "rb", block_size=1 << 16)
        return opened

    def _size(self, name: str) -> int | None:
        """Return the bytes of an entry; None if it is absent."""
        try:
            with self._remotely():
                return int(self._fs.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def _download(self, name: str, folder: Path, callback: Callback) -> None:
        part = folder / ".download"
        try:
            with self._remotely():
                self._fs.get_file(self._path(name), str(part), callback=callback)
        except FileNotFoundError as error:
            raise RemoteFailed("the entry was removed while it was read") from error
        unpack(part, name, folder)
        part.unlink()

    def _upload(self, name: str, store: Store, key: str, progress: Progress, label: str) -> None:
        with self._remotely(), store.scratch(key) as folder:
            file = folder / "upload"
            pack(store.root / key, name, file)
            with _transfer(progress, f"{label}: upload", file.stat().st_size) as callback:
                if self._protocol in _OBJECT_STORES:
                    self._fs.put_file(str(file), self._path(name), callback=callback)
                else:
                    self._put_and_rename(file, name, callback)

    def _put_and_rename(self, file: Path, name: str, callback: Callback) -> None:
        part = f"{self._root}/.{name}.{secrets.token_hex(4)}{PART_SUFFIX}"
        self._fs.makedirs(self._root, exist_ok=True)
        try:
            self._fs.put_file(str(file), part, callback=callback)
            self._fs.mv(part, self._path(name))
        except BaseException:
            with suppress(OSError):
                self._fs.rm_file(part)
            raise

    @contextmanager
    def _remotely(self) -> Iterator[None]:
        """Translate errors of the file system, whatever its library raises, other than for a missing file."""
        with translated(lambda error: RemoteFailed(first_line(error)), FileNotFoundError):
            yield

    def _fail(self, error: ArtifactError, progress: Progress) -> None:
        self.failure = error.message
        progress.warn(
            f"Remote store '{self.url}' failed: {error.message.rstrip('.')}. Finished stages are in the local store; "
            "this run, or a later one with --store, uploads them."
        )


def open_remote(url: str) -> Remote:
    """Open a remote store, and ask it for one name.

    Raises:
        ConfigError: The URL has no protocol, an unknown one, or no bucket.
        PackageMissing: The library for this protocol is not installed.
        RemoteRefused: There are no credentials, no access or no bucket.
    """
    protocol, place = _parse(url)
    shown = re.sub(r"(//[^/@:]*):[^/@]*@", r"\1:***@", url.rstrip("/"))
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise PackageMissing(
            f"--store '{shown}' needs a package that is not installed: {first_line(error)}.", hint=INSTALL_HINT
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"--store must be a URL of a protocol that fsspec knows, got '{shown}'.", hint="such as s3://BUCKET/FOLDER"
        ) from error
    options = _S3_OPTIONS if protocol in _S3 else {}
    with translated(lambda error: RemoteRefused(f"Remote store '{shown}' cannot be opened: {first_line(error)}.")):
        fs, root = fsspec.url_to_fs(f"{protocol}://{place}", **options)
    if protocol in _S3:
        fs.retries = _S3_TRIES
    remote = Remote(shown, fs, root, protocol)
    remote.check()
    return remote


def _parse(url: str) -> tuple[str, str]:
    match = _URL.fullmatch(url)
    protocol = match[1].lower() if match else ""
    if match is None or not match[2].strip("/") or any(ord(character) <= 32 for character in url):
        hint = "s3://BUCKET/FOLDER, or file:///FOLDER for a folder of this host"
        raise ConfigError(
            f"--store must be a URL with a protocol and a bucket or folder, got '{url[:200]}'.", hint=hint
        )
    if protocol in _READ_ONLY:
        raise ConfigError(
            f"--store must be a URL that can be written to, got '{url[:200]}'.", hint="such as s3://BUCKET/FOLDER"
        )
    return protocol, match[2]


def _refusal(error: Exception, url: str) -> RemoteRefused | None:
    """Return the error for a remote store that is reached but cannot be used; None if it is out of reach."""
    said = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    if "Credential" in type(error).__name__ or type(error).__name__ in ("ProfileNotFound", "NoAuthTokenError"):
        return RemoteRefused(f"Remote store '{url}' needs credentials, none were found: {said}.", hint=_CREDENTIALS)
    if isinstance(error, FileNotFoundError):
        return RemoteRefused(
            f"Remote store '{url}' must be in a bucket that exists: {said}.", hint="Create the bucket."
        )
    if isinstance(error, PermissionError):
        is_late = "request time" in said
        hint = "Set the clock of this host." if is_late else "Check the credentials, and their rights on the bucket."
        return RemoteRefused(f"Remote store '{url}' refuses access: {said}.", hint=hint)
    if type(error).__name__ in ("ParamValidationError", "InvalidEndpoint", "NoRegionError"):
        return RemoteRefused(f"Remote store '{url}' cannot be addressed so: {said}.", hint="Check bucket and endpoint.")
    return None


class _Megabytes(Callback):  # type: ignore[misc]
    """Progress of a transfer in MiB."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task, self._done, self._shown = task, 0, 0

    def relative_update(self, inc: int = 1) -> None:
        self._done += inc
        if (whole := self._done // _MB) > self._shown:
            self._task.advance(whole - self._shown)
            self._shown = whole


@contextmanager
def _transfer(progress: Progress, label: str, size: int) -> Iterator[Callback]:
    """Yield the listener of a transfer; small ones are not shown."""
    if size < SHOWN_BYTES:
        yield Callback()
        return
    with progress.task(f"{label} (MB)", max(1, size // _MB)) as task:
        yield _Megabytes(task)


def _modified(info: Mapping[str, Any]) -> datetime | None:
    """Return the time in a file's information; None if its file system gives none."""
    value = next((info[key] for key in _MODIFIED if info.get(key) is not None), None)
    if isinstance(value, str):
        value = attempt(lambda: datetime.fromisoformat(str(value).replace("Z", "+00:00")), lambda error: None)
    if isinstance(value, (int, float)):
        return datetime.fromtimestamp(value, timezone.utc)
    if isinstance(value, datetime):
        return value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)
    return None
