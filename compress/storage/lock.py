"""Exclusive locks on files and folders (filelock).

    FOLDER/.lock     the lock; the operating system releases it when the process ends, however it ends
    FOLDER/.holder   process, host and time of the last holder, for messages only

Only the lock decides who holds a folder. Process ids are never compared: they may be of another host.
"""

import errno
import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from compress.errors import ArtifactError, RunLocked
from compress.storage.files import write_atomic

HOLDER_FILE, LOCK_FILE = ".holder", ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def try_lock(path: Path) -> AbstractContextManager[None] | None:
    """Acquire an exclusive file lock without waiting.

    Args:
        path: Lock file, created if missing; its content does not matter.

    Returns:
        Context manager that releases the lock; None if another process, or another call, holds it.

    Raises:
        ArtifactError: The file system does not support locks.
        OSError: The lock file cannot be created.
    """
    lock = FileLock(str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without flock, the library warns that it locks by a marker file
            lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ArtifactError(
            f"The file system of '{path.parent}' must support file locks, it does not: {error.strerror}.",
            hint="Keep runs on a local disk (--runs-dir), or mount the network drive with locks.",
        ) from error
    return _held(lock)


@contextmanager
def _held(lock: BaseFileLock) -> Iterator[None]:
    try:
        yield
    finally:
        lock.release()


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
