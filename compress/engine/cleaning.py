"""Removal of stored stages that no run uses any more: `compress clean`."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compress.errors import ArtifactError, RunLocked
from compress.storage.lock import hold

STORE, WORK, TABLES = ".store", ".work", ".latency"
_DAY_S = 86_400


@dataclass(frozen=True)
class Leftover:
    """A stored folder that can be removed.

    Attributes:
        path: Path of the folder.
        kind: "stage" for a finished stage that no run names, "unfinished" for the state of a killed stage.
        size_bytes: Size of its files, including hard links that other entries share.
        age_days: Days since the last change.
    """

    path: Path
    kind: str
    size_bytes: int
    age_days: float


def find_leftovers(runs_dir: Path, older_than_days: float = 0.0) -> list[Leftover]:
    """Return stored stages that no run folder names, and the state of stages that were killed.

    Args:
        runs_dir: Folder of the run folders.
        older_than_days: Least age in days; younger folders are left out.

    Raises:
        ArtifactError: The runs folder does not exist, or a lock cannot be read.
    """
    store = runs_dir / STORE
    if not runs_dir.is_dir():
        raise ArtifactError(f"Runs folder '{runs_dir}' does not exist.", hint="--runs-dir names it.")
    used = set(_used_keys(runs_dir))
    found = [
        _leftover(path, "stage") for path in _folders(store) if path.name not in used and not path.name.startswith(".")
    ]
    found += [_leftover(path, "unfinished") for path in _folders(store / WORK)]
    return [one for one in found if one.age_days >= older_than_days]


def remove(leftovers: list[Leftover], runs_dir: Path) -> list[Leftover]:
    """Remove leftovers, and return those that were removed; a stage that a process is running is kept.

    Raises:
        ArtifactError: A folder could not be removed.
    """
    removed = []
    for one in leftovers:
        try:
            with hold(runs_dir / STORE / ".locks" / one.path.name):
                shutil.rmtree(one.path)
        except RunLocked:
            continue
        except OSError as error:
            raise ArtifactError(f"'{one.path}' could not be removed: {error.strerror or error}.") from error
        removed.append(one)
    return removed


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


def _leftover(path: Path, kind: str) -> Leftover:
    stats = [file.stat() for file in path.rglob("*") if file.is_file()]
    changed = max((stat.st_mtime for stat in stats), default=path.stat().st_mtime)
    return Leftover(path, kind, sum(stat.st_size for stat in stats), (time.time() - changed) / _DAY_S)
