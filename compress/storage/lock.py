"""Exclusive lock on a folder (filelock), with the name of the holder for messages.

    FOLDER/.lock     the lock; the operating system releases it when the process ends, however it ends
    FOLDER/.holder   process, host and time of the last holder, for messages only

Only the lock decides who holds a folder. Process ids are never compared: they may be of another host.
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from compress.errors import ArtifactError, RunLocked
from compress.storage.files import try_lock, write_atomic

HOLDER_FILE, LOCK_FILE = ".holder", ".lock"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock a folder, created if missing, for the duration of this context.

    Raises:
        RunLocked: Another process holds the folder; the message names it and the time it began.
        ArtifactError: The folder cannot be created or written to, or its file system does not support locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(folder / LOCK_FILE)
    except OSError as error:
        raise ArtifactError(f"Run folder '{folder}' must be writable: {error.strerror or error}.") from error
    if lock is None:
        raise RunLocked(
            f"Run folder '{folder}' is held by {_describe(folder)}.",
            hint="Wait for that run to end, or give this one another name.",
        )
    with lock:
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        text = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since})
        try:
            write_atomic(folder / HOLDER_FILE, text)
        except OSError as error:
            raise ArtifactError(f"Run folder '{folder}' must be writable: {error.strerror or error}.") from error
        yield


def _describe(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"
