"""Files that are written whole or not at all, and locks on files."""

import errno
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from compress.errors import ArtifactError

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def write_whole(path: Path, content: str | bytes | memoryview, *, is_shared: bool = False) -> None:
    """Write a file beside its place and move it there; folders that are missing are made.

    Args:
        path: Its place.
        content: Text is written as UTF-8.
        is_shared: Whether several processes may write this file at once. What a killed one leaves beside it is then
            not written over by the next.

    Raises:
        OSError: The folder or the disk does not take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part" if is_shared else f".{path.name}.part")
    try:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def try_lock(path: Path) -> AbstractContextManager[None] | None:
    """Take the exclusive lock of a file without waiting; None where another process, or another call, has it.

    Args:
        path: The lock file. It is made where it is missing, and holds nothing of use.

    Returns:
        A context manager that gives the lock back.

    Raises:
        ArtifactError: The file system has no locks.
        OSError: The file cannot be made.
    """
    lock = FileLock(str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without flock the library locks by a marker file, and says so
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
