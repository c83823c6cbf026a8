"""Content-addressed store of finished stages; a process killed at any moment loses only the running stage.

    root/KEY/            finished entry: files, and entry.json with their digests and its own, written last
    root/.partial/NAME/  entry being written, with NAME.lock held by its writer; renamed to root/KEY when complete,
                         removed by the next run on its host if nobody holds the lock
    root/.work/KEY/      state of a running stage, such as training state; removed when its entry is finished
    root/.locks/KEY/     lock of a running stage; not in .work/KEY, whose removal would remove the lock

NAME is KEY.HOST.TIME.PID.TOKEN. The store knows keys, files and digests, but not artifacts.
"""

import errno
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError, InternalError
from compress.storage.digest import (
    DIGEST_KEY,
    RecordDamaged,
    add_digest,
    check_digest,
    digest_file,
    digest_value,
    read_json,
)
from compress.storage.files import file_system_time
from compress.storage.lock import NATIVE, Locks, lease_file

ENTRY_FILE, ENTRY_SCHEMA = "entry.json", 2  # version 1 had no digest of entry.json
FOREIGN_S = 86_400.0  # age from which unfinished entries of other hosts are removed
_TRIES = 5
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)  # another host has replaced the same entry in between


@dataclass(frozen=True, slots=True)
class Entry:
    """Finished entry whose files match their digests.

    Attributes:
        folder: Folder of the files; read-only by convention.
        digest: Digest of all files that are not volatile.
        meta: Plain values kept with the files.
    """

    folder: Path
    digest: str
    meta: dict[str, Any]


class Store:
    """Folders by key, each complete or absent.

    Args:
        root: Folder of the store, created by the first `put`.
        warn: Receives the warning that an entry is damaged and will be computed again.
        locks: Locks that all hosts of the store use.
    """

    def __init__(self, root: Path, warn: Callable[[str], None], locks: Locks = NATIVE) -> None:
        self.root = root
        self.warn = warn
        self.locks = locks

    def get(self, key: str, *, warns: bool = True) -> Entry | None:
        """Return an entry if all its files match their digests; None if it is absent or damaged.

        Args:
            key: Key of the entry.
            warns: False to pass over a damaged entry without a warning.
        """
        folder = self.root / key
        if not folder.is_dir():
            return None
        try:
            return _read_entry(folder)
        except RecordDamaged as error:
            if warns:
                self.warn(f"A stored stage is damaged ({error.message}) and will be made again: {folder}")
            return None

    def put(
        self, key: str, write: Callable[[Path], None], meta: dict[str, Any], volatile: tuple[str, ...] = ()
    ) -> Entry:
        """Write an entry atomically, in place of an earlier one.

        Args:
            key: Key of the entry.
            write: Function that fills an empty folder.
            meta: Plain values kept with the files.
            volatile: Names of files that are not part of the entry's digest.

        Raises:
            ArtifactError: The disk is full, or the folder is not writable.
        """

        def fill(partial: Path) -> None:
            write(partial)
            files = _digests(partial)
            stable = {name: digest for name, digest in files.items() if Path(name).name not in volatile}
            values = {"schema": ENTRY_SCHEMA, "files": files, "digest": digest_value(stable), "meta": meta}
            (partial / ENTRY_FILE).write_text(json.dumps(add_digest(values), indent=1), encoding="utf-8")

        with self._refused(), self.scratch(key) as partial:
            fill(partial)
            values = read_json(partial / ENTRY_FILE, allows_nan=True)
            self._place(key, partial)
        return Entry(self.root / key, values["digest"], meta)

    def adopt(self, key: str, fill: Callable[[Path], None]) -> Entry:
        """Put an entry in place that another store has written, after a check of all its files.

        Args:
            key: Key of the entry.
            fill: Function that fills an empty folder with the files of the entry, entry.json included.

        Raises:
            RecordDamaged: A file is missing, superfluous, or differs from its digest.
            ArtifactError: The disk is full, or the folder is not writable.
        """
        with self._refused(), self.scratch(key) as partial:
            fill(partial)
            entry = _read_entry(partial)
            if entry is None:
                raise RecordDamaged(f"{ENTRY_FILE} has another schema than {ENTRY_SCHEMA}")
            listed = read_json(partial / ENTRY_FILE, allows_nan=True)["files"]
            if superfluous := sorted({*_digests(partial)} - {*listed, ENTRY_FILE}):
                raise RecordDamaged(f"{', '.join(superfluous)[:200]} not in {ENTRY_FILE}")
            self._place(key, partial)
        return Entry(self.root / key, entry.digest, entry.meta)

    @contextmanager
    def scratch(self, key: str) -> Iterator[Path]:
        """Yield a new empty folder beside the entries, locked and removed afterwards.

        Raises:
            OSError: The disk is full, or the store is not writable.
        """
        folder = self.root / ".partial"
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            partial = folder / _partial_name(key)
            lock = self.locks.try_lock(_lock_file(partial))
            if lock is not None:
                break  # a process that sweeps may have taken the lock of the first name
        else:
            raise InternalError(f"The new lock file '{_lock_file(partial)}' is held already.")
        try:
            with lock:
                try:
                    partial.mkdir()
                    yield partial
                finally:
                    shutil.rmtree(partial, ignore_errors=True)  # absent after a successful rename
        finally:
            _lock_file(partial).unlink(missing_ok=True)  # no other writer has this name

    def _place(self, key: str, partial: Path) -> None:
        """Rename a complete folder to its entry; an earlier one is moved aside first, and removed."""
        folder, aside = self.root / key, partial.with_name(f"{partial.name}.old")
        for tries_left in reversed(range(_TRIES)):
            try:
                if folder.exists():
                    os.rename(folder, aside)
                os.rename(partial, folder)
                break
            except OSError as error:
                if error.errno not in _TAKEN or not tries_left:
                    raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(self.work_folder(key), ignore_errors=True)

    @contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(
                f"The result of the stage could not be written to '{self.root}': {error.strerror or error}.",
                hint="Stages that are done stay; make room and give the same command again.",
            ) from error

    def work_folder(self, key: str) -> Path:
        """Return the folder for the state of a running stage that must survive a kill."""
        return self.root / ".work" / key

    def lock_folder(self, key: str) -> Path:
        """Return the folder that the process running the stage with this key locks."""
        return self.root / ".locks" / key

    def sweep(self) -> None:
        """Remove unfinished entries whose writer no longer holds their lock.

        Those of another host are removed when they are a day old, by the clock of the file system: where locks do not
        reach other hosts, their writers cannot be seen.
        """
        names = [path for path in (self.root / ".partial").glob("*") if not path.name.startswith(".")]
        for partial in sorted({_without_lock(path) for path in names}):
            try:
                is_foreign = _is_foreign(partial)
                if is_foreign and _age_s(partial) < FOREIGN_S:
                    continue
                lock = self.locks.try_lock(_lock_file(partial))
            except (OSError, ArtifactError):
                continue
            if lock is not None:
                with lock:
                    _remove(partial)
            elif is_foreign and self.locks.kind == "lease":  # a lease that was not renewed for a day
                _remove(partial)
                lease_file(_lock_file(partial)).unlink(missing_ok=True)


def _read_entry(folder: Path) -> Entry | None:
    """Return the entry in a folder; None if an earlier or later version of this program has written it.

    Raises:
        RecordDamaged: A file is missing or differs from its digest; the message names it.
    """
    try:
        values = read_json(folder / ENTRY_FILE, allows_nan=True)
        if isinstance(values, dict) and DIGEST_KEY not in values and values.get("schema") == 1:
            return None  # written without a digest of the record
        values = check_digest(values, ENTRY_FILE)
        if values["schema"] != ENTRY_SCHEMA:
            return None
        damaged = [name for name, digest in values["files"].items() if _digest_or_none(folder / name) != digest]
        if not (isinstance(values["digest"], str) and isinstance(values["meta"], dict)):
            raise TypeError("no digest or no record in it")
        entry = Entry(folder, values["digest"], values["meta"])
    except ArtifactError as error:
        raise RecordDamaged(f"{ENTRY_FILE} ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordDamaged(f"{ENTRY_FILE} ({error!r})") from error
    if damaged:
        raise RecordDamaged(", ".join(damaged))
    return entry


def _digests(folder: Path) -> dict[str, str]:
    """Return relative name -> digest of all files below a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in paths}


def _partial_name(key: str) -> str:
    started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    return f"{key}.{_host()}.{started}.{os.getpid()}.{secrets.token_hex(4)}"


def _host() -> str:
    """Return the name of this host, in characters of a file name without dots."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", platform.node())[:60] or "host"


def _is_foreign(partial: Path) -> bool:
    """Return whether the name of an unfinished entry has another host; names of earlier versions have none."""
    parts = partial.name.split(".")
    return len(parts) >= 5 and parts[1] != _host()


def _age_s(partial: Path) -> float:
    """Return the seconds since an unfinished entry or its lock was last written, by the clock of the file system.

    One that its writer has finished in between is of age 0.
    """
    lock = _lock_file(partial)
    paths = (partial, lock, lease_file(lock))
    now = file_system_time(partial.parent)
    return now - max((path.stat().st_mtime for path in paths if path.exists()), default=now)


def _remove(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    _lock_file(partial).unlink(missing_ok=True)


def _lock_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.lock")


def _without_lock(path: Path) -> Path:
    """Return the unfinished entry that a file in its folder belongs to."""
    return path.with_name(re.sub(r"\.lock(\.lease.*)?$", "", path.name))


def _digest_or_none(path: Path) -> str | None:
    try:
        return digest_file(path)
    except ArtifactError:
        return None
