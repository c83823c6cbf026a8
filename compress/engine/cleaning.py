"""Removal of stored stages that no run uses any more, and of old ones in a remote store: `compress clean`."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import ArtifactError, ConfigError, RunLocked
from compress.progress import Progress
from compress.storage.files import file_system_time
from compress.storage.lock import open_locks

if TYPE_CHECKING:
    from compress.storage.remote import Remote, RemoteFile  # imports fsspec

STORE, WORK, TABLES, TEACHERS = ".store", ".work", ".latency", ".teachers"
_DAY_S = 86_400
_PART_DAYS = 1.0  # age from which an unfinished upload is taken for abandoned


@dataclass(frozen=True)
class Limits:
    """Limits of a store: whatever is beyond one of them can be removed.

    Attributes:
        days: Largest age in days; None for no limit.
        size_bytes: Largest size of the store; the oldest entries go first. None for no limit.
    """

    days: float | None = None
    size_bytes: int | None = None

    def require_some(self) -> None:
        """Check that a limit is given.

        Raises:
            ConfigError: None is.
        """
        if self.days is None and self.size_bytes is None:
            raise ConfigError(
                "clean --store needs --older-than DAYS or --max-size GB: it cannot know which entries others use.",
                hint="--older-than 30",
            )


@dataclass(frozen=True)
class Leftover:
    """A stored entry that can be removed.

    Attributes:
        label: Name in lists.
        kind: "stage" for a finished stage, "unfinished" for the state of a killed stage or an abandoned upload,
            "teacher" for outputs of a teacher, which the next training computes again.
        size_bytes: Size of its files, including hard links that other entries share.
        age_days: Days since the last change.
        path: Path of the folder; None in a remote store.
        remote: File in a remote store; None in a local one.
    """

    label: str
    kind: str
    size_bytes: int
    age_days: float
    path: Path | None = None
    remote: "RemoteFile | None" = None


def find_leftovers(runs_dir: Path, limits: Limits | None = None) -> list[Leftover]:
    """Return stored stages that no run folder names, and the state of stages that were killed.

    Args:
        runs_dir: Folder of the run folders.
        limits: Limits to keep to; without one, everything unused is returned.

    Raises:
        ArtifactError: The runs folder does not exist, or a lock cannot be read.
    """
    store, limits = runs_dir / STORE, limits or Limits()
    if not runs_dir.is_dir():
        raise ArtifactError(f"Runs folder '{runs_dir}' does not exist.", hint="--runs-dir names it.")
    used = set(_used_keys(runs_dir))
    now = file_system_time(store) if store.is_dir() else time.time()
    entries = [path for path in _folders(store) if not path.name.startswith(".")]
    found = [_leftover(path, "stage", now) for path in entries if path.name not in used]
    found += [_leftover(path, "unfinished", now) for path in _folders(store / WORK)]
    found += [_leftover(path, "teacher", now) for path in _folders(store / TEACHERS)]
    if limits.size_bytes is None:
        return [one for one in found if one.age_days >= (limits.days or 0.0)]
    places = [*entries, *_folders(store / WORK), *_folders(store / TEACHERS)]
    links = Counter(inode for path in places for inode in _inodes(path))
    return _beyond(found, limits, sum(size for _, size in links), lambda one: _freed(one, links))


def find_old(remote: "Remote", limits: Limits) -> list[Leftover]:
    """Return files of a remote store beyond its limits, and unfinished uploads that are a day old.

    Raises:
        RemoteFailed: The remote store cannot be read.
    """
    now = datetime.now(timezone.utc)
    found = [_remote_leftover(file, now) for file in remote.files()]
    parts = [one for one in found if one.kind == "unfinished" and one.age_days >= _PART_DAYS]
    stages = [one for one in found if one.kind == "stage"]
    total = sum(one.size_bytes for one in stages)
    return parts + _beyond(stages, limits, total, lambda one: one.size_bytes)


def remove(leftovers: Sequence[Leftover], runs_dir: Path) -> list[Leftover]:
    """Remove leftovers, and return those that were removed; a stage that a process is running is kept.

    Raises:
        ArtifactError: A folder could not be removed.
    """
    removed, locks = [], open_locks(runs_dir / STORE, lambda text: None)
    for one in leftovers:
        if one.path is None:
            continue
        try:
            with locks.hold(runs_dir / STORE / ".locks" / one.path.name):
                shutil.rmtree(one.path)
        except RunLocked:
            continue
        except OSError as error:
            raise ArtifactError(f"'{one.path}' could not be removed: {error.strerror or error}.") from error
        removed.append(one)
    return removed


def remove_remote(leftovers: Sequence[Leftover], remote: "Remote | None", progress: Progress) -> list[Leftover]:
    """Remove files of a remote store, and return those that were removed.

    Raises:
        RemoteFailed: The remote store refuses; files before that are removed.
    """
    removed = []
    with progress.task("remove", len(leftovers)) as task:
        for one in leftovers:
            if one.remote is not None and remote is not None:
                remote.remove(one.remote)
                removed.append(one)
            task.advance()
    return removed


def _beyond(found: list[Leftover], limits: Limits, total: int, freed: Callable[[Leftover], int]) -> list[Leftover]:
    """Return what is too old, and of the rest the oldest until the size is within its limit.

    Args:
        found: Entries that can be removed.
        limits: Limits of age and size.
        total: Size of everything in the store.
        freed: Function from an entry to the bytes that its removal frees; called in order of removal.
    """
    beyond = []
    for one in sorted(found, key=lambda one: -one.age_days):
        is_old = limits.days is not None and one.age_days >= limits.days
        if is_old or (limits.size_bytes is not None and total > limits.size_bytes):
            total -= freed(one)
            beyond.append(one)
    return beyond


def _freed(one: Leftover, links: "Counter[tuple[tuple[int, int], int]]") -> int:
    """Return the bytes that the removal of an entry frees; `links` counts the names of each file left."""
    inodes = [] if one.path is None else list(_inodes(one.path))
    links.subtract(inodes)
    return sum(size for (file, size) in set(inodes) if links[file, size] <= 0)


def _inodes(path: Path) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield identity and size of each file below a folder."""
    for file in path.rglob("*"):
        if file.is_file():
            found = file.stat()
            yield (found.st_dev, found.st_ino), found.st_size


def _used_keys(runs_dir: Path) -> Iterator[str]:
    for lock in runs_dir.rglob("lock"):
        if STORE in lock.relative_to(runs_dir).parts or not lock.is_file():
            continue
        try:
            stages = json.loads(lock.read_text(encoding="utf-8"))["stages"]
            yield from (str(stage["key"]) for stage in stages)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"'{lock}' cannot be read, so that nothing is known of the stages it uses: {error!r}.",
                hint="Run that pipeline again, or remove its folder.",
            ) from error


def _folders(path: Path) -> list[Path]:
    return sorted(one for one in path.iterdir() if one.is_dir()) if path.is_dir() else []


def _leftover(path: Path, kind: str, now: float) -> Leftover:
    stats = [file.stat() for file in path.rglob("*") if file.is_file()]
    changed = max((stat.st_mtime for stat in stats), default=path.stat().st_mtime)
    return Leftover(path.name, kind, sum(stat.st_size for stat in stats), (now - changed) / _DAY_S, path)


def _remote_leftover(file: "RemoteFile", now: datetime) -> Leftover:
    """Return a file of a remote store as a leftover; one of unknown age counts as new."""
    age = 0.0 if file.modified is None else (now - file.modified).total_seconds() / _DAY_S
    name = file.path.rpartition("/")[2].lstrip(".")
    return Leftover(name, "unfinished" if file.is_part else "stage", file.size_bytes, age, remote=file)
