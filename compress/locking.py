"""How does a second run of one folder learn who holds it?"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from compress.errors import ArtifactError, RunLocked

HOLDER_FILE = ".holder"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run folder, created if need be, until the block ends or the process dies.

    Raises:
        RunLocked: Another process holds it; says which, and since when.
        ArtifactError: The folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / HOLDER_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"Run folder '{folder}' must be writable: {error.strerror or error}.") from error
    with file:
        if not _try_lock(file):
            raise RunLocked(
                f"Run folder '{folder}' is held by {_describe(file)}.",
                hint="Wait for that run to end, or give this one another name.",
            )
        file.seek(0)
        file.truncate()
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        json.dump({"pid": os.getpid(), "host": platform.node(), "since": since}, file)
        file.flush()
        yield


def _try_lock(file: IO[str]) -> bool:
    """Take an exclusive lock that the operating system drops when the process ends, however it ends."""
    try:
        if os.name == "nt":
            import msvcrt  # exists on Windows only

            file.seek(4096)  # beyond the text, which others may read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl  # exists everywhere else

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _describe(file: IO[str]) -> str:
    try:
        file.seek(0)
        holder = json.load(file)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, OSError):
        return "another process"
