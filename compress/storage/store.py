"""Content-addressed store of finished stages; a process killed at any moment loses only the running stage.

    root/KEY/            finished entry: files, and entry.json with their digests and its own, written last
    root/.partial/NAME/  entry being written, with NAME.lock held by its writer; renamed to root/KEY when complete,
                         removed by the next run if nobody holds the lock
    root/.work/KEY/      state of a running stage, such as training state; removed when its entry is finished
    root/.locks/KEY/     lock of a running stage; not in .work/KEY, whose removal would remove the lock

The store knows keys, files and digests, but not artifacts.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError, InternalError
from compress.storage.digest import DIGEST_KEY, add_digest, check_digest, digest_file, digest_value, read_json
from compress.storage.lock import try_lock

ENTRY_SCHEMA = 2  # version 1 had no digest of entry.json


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
    """

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        self.root = root
        self.warn = warn

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
            values = read_json(folder / "entry.json", allows_nan=True)
            if isinstance(values, dict) and DIGEST_KEY not in values and values.get("schema") == 1:
                return None  # written without a digest of the record
            values = check_digest(values, "entry.json")
            if values["schema"] != ENTRY_SCHEMA:
                return None
            damaged = [name for name, digest in values["files"].items() if _digest_or_none(folder / name) != digest]
            if not (isinstance(values["digest"], str) and isinstance(values["meta"], dict)):
                raise TypeError("no digest or no record in it")
            entry = Entry(folder, values["digest"], values["meta"])
        except ArtifactError as error:
            damaged = [f"entry.json ({error})"]
        except (KeyError, TypeError, AttributeError) as error:
            damaged = [f"entry.json ({error!r})"]
        if damaged:
            if warns:
                self.warn(f"A stored stage is damaged ({', '.join(damaged)}) and will be made again: {folder}")
            return None
        return entry

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
        partial = self.root / ".partial" / f"{key}.{secrets.token_hex(4)}"
        lock_file = _lock_file(partial)
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            lock = try_lock(lock_file)
            if lock is None:
                raise InternalError(f"The new lock file '{lock_file}' is held already.")
            with lock:
                return self._write(key, partial, write, meta, volatile)
        except OSError as error:
            raise ArtifactError(
                f"The result of the stage could not be written to '{self.root}': {error.strerror or error}.",
                hint="Stages that are done stay; make room and give the same command again.",
            ) from error
        finally:
            lock_file.unlink(missing_ok=True)  # no other writer has this name

    def _write(
        self, key: str, partial: Path, write: Callable[[Path], None], meta: dict[str, Any], volatile: tuple[str, ...]
    ) -> Entry:
        try:
            partial.mkdir()
            write(partial)
            files = {
                path.relative_to(partial).as_posix(): digest_file(path)
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            stable = {name: digest for name, digest in files.items() if Path(name).name not in volatile}
            digest = digest_value(stable)
            values = {"schema": ENTRY_SCHEMA, "files": files, "digest": digest, "meta": meta}
            (partial / "entry.json").write_text(json.dumps(add_digest(values), indent=1), encoding="utf-8")
            folder = self.root / key
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # absent after a successful rename
        shutil.rmtree(self.work_folder(key), ignore_errors=True)
        return Entry(folder, digest, meta)

    def work_folder(self, key: str) -> Path:
        """Return the folder for the state of a running stage that must survive a kill."""
        return self.root / ".work" / key

    def lock_folder(self, key: str) -> Path:
        """Return the folder that the process running the stage with this key locks."""
        return self.root / ".locks" / key

    def sweep(self) -> None:
        """Remove unfinished entries whose writer, on any host, no longer holds their lock."""
        folder = self.root / ".partial"
        for partial in {path.with_suffix("") if path.suffix == ".lock" else path for path in folder.glob("*")}:
            try:
                lock = try_lock(_lock_file(partial))
            except (OSError, ArtifactError):
                continue
            if lock is not None:
                with lock:
                    shutil.rmtree(partial, ignore_errors=True)
                    _lock_file(partial).unlink(missing_ok=True)


def _lock_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.lock")


def _digest_or_none(path: Path) -> str | None:
    try:
        return digest_file(path)
    except ArtifactError:
        return None
