"""Store of finished stages by key; a kill at any moment loses only the stage at work.

    root/KEY/            a finished entry: its files and entry.json with their digests and its own, written last
    root/.partial/NAME/  an entry being written, and NAME.lock beside it, held by its writer; renamed into place when
                         whole, removed by the next run when nobody holds the lock
    root/.work/KEY/      scratch of a stage at work (training state); removed when its entry is in place
    root/.locks/KEY/     the hold of a stage at work; outside of .work/KEY, whose removal would take the lock away

The store knows keys, files and digests; it knows nothing of artifacts.
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
from compress.storage.digest import DIGEST_KEY, check_seal, digest_file, digest_value, read_json, sealed
from compress.storage.files import try_lock

ENTRY_SCHEMA = 2  # 1 had no digest of the record itself


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished, checked entry.

    Attributes:
        folder: Where its files are; not to be written to.
        digest: Of its files, less those that were declared volatile.
        meta: What `put` was given to keep.
    """

    folder: Path
    digest: str
    meta: dict[str, Any]


class Store:
    """Folders by key, whole or absent.

    Args:
        root: Created when first written to.
        warn: Told when an entry is corrupt and will be made again.
    """

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        self.root = root
        self.warn = warn

    def get(self, key: str, *, warns: bool = True) -> Entry | None:
        """Return the entry if it is there and every file and record has its digest; a damaged one is a miss.

        Args:
            key: Of the entry.
            warns: Whether a damaged entry is told of.
        """
        folder = self.root / key
        if not folder.is_dir():
            return None
        try:
            values = read_json(folder / "entry.json", allows_nan=True)
            if isinstance(values, dict) and DIGEST_KEY not in values and values.get("schema") == 1:
                return None  # of a version whose records nobody can check
            values = check_seal(values, "entry.json")
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
        """Write an entry so that it is whole or absent; one that is there already is replaced.

        Args:
            key: Of the entry.
            write: Fills the empty folder it is given.
            meta: Kept beside the files; JSON-ready.
            volatile: File names left out of the entry's digest.

        Raises:
            ArtifactError: The file system refused (full disk, no permission).
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
            lock_file.unlink(missing_ok=True)  # its name is nobody else's

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
            (partial / "entry.json").write_text(json.dumps(sealed(values), indent=1), encoding="utf-8")
            folder = self.root / key
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well
        shutil.rmtree(self.work_folder(key), ignore_errors=True)
        return Entry(folder, digest, meta)

    def work_folder(self, key: str) -> Path:
        """Return where the stage with this key keeps what must survive a kill."""
        return self.root / ".work" / key

    def lock_folder(self, key: str) -> Path:
        """Return the folder that whoever makes the result with this key holds."""
        return self.root / ".locks" / key

    def sweep(self) -> None:
        """Remove entries that were never finished and whose writer, on whichever host, holds their lock no more."""
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
