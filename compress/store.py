"""Where do finished stages stay, so that a kill at any moment loses only the stage at work?

    root/KEY/          a finished entry: its files and entry.json with their digests, written last
    root/.partial/...  entries being written; renamed into place when whole, swept when stale
    root/.work/KEY/    scratch of a stage at work (training state); removed when its entry is in place

The store knows keys, files and digests; it knows nothing of artifacts.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.config.digest import digest_file, digest_value
from compress.errors import ArtifactError

ENTRY_SCHEMA = 1


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

    def get(self, key: str) -> Entry | None:
        """Return the entry if it is there and every file has its digest; a corrupt one is a miss with a warning."""
        folder = self.root / key
        if not folder.is_dir():
            return None
        try:
            values = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
            if values["schema"] != ENTRY_SCHEMA:
                return None
            files = values["files"]
            damaged = [name for name, digest in files.items() if _digest_or_none(folder / name) != digest]
            digest, meta = values["digest"], values["meta"]
            if not (isinstance(digest, str) and isinstance(meta, dict)):
                raise TypeError("no digest or no record in it")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged = [f"entry.json ({error})"]
        if damaged:
            self.warn(f"A stored stage is damaged ({', '.join(damaged)}) and will be made again: {folder}")
            return None
        return Entry(folder, digest, meta)

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
        partial = self.root / ".partial" / f"{key}.{os.getpid()}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            files = {
                path.relative_to(partial).as_posix(): digest_file(path)
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            stable = {name: digest for name, digest in files.items() if Path(name).name not in volatile}
            digest = digest_value(stable)
            values = {"schema": ENTRY_SCHEMA, "files": files, "digest": digest, "meta": meta}
            (partial / "entry.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
            folder = self.root / key
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(partial, folder)
        except OSError as error:
            raise ArtifactError(
                f"The result of the stage could not be written to '{self.root}': {error.strerror or error}.",
                hint="Stages that are done stay; make room and give the same command again.",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well
        shutil.rmtree(self.work_folder(key), ignore_errors=True)
        return Entry(folder, digest, meta)

    def work_folder(self, key: str) -> Path:
        """Return where the stage with this key keeps what must survive a kill."""
        return self.root / ".work" / key

    def sweep(self) -> None:
        """Remove entries that were never finished, unless the process that writes them is alive."""
        for partial in (self.root / ".partial").glob("*"):
            if not _is_alive(partial.suffix.removeprefix(".")):
                shutil.rmtree(partial, ignore_errors=True)


def _digest_or_none(path: Path) -> str | None:
    try:
        return digest_file(path)
    except ArtifactError:
        return None


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
