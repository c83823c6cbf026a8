"""Exclusive locks on files and folders (filelock), shared by all hosts that use a folder.

    FOLDER/.lock         native lock; the operating system releases it when the process ends, however it ends
    FOLDER/.lock.lease   lease, where the file system has no locks; its holder renews it, and it ends unless renewed
    FOLDER/.holder       process, host and time of the last holder, for messages only
    STORE/.locks/.kind   kind of lock that all hosts of this store use: "native" or "lease"

Only the lock decides who holds a folder. Process ids are never compared: they may be of another host. Leases are judged
by the clock of the process that waits, not by times that another host has written.
"""

import errno
import json
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

from compress.errors import ArtifactError, RunLocked
from compress.storage.files import write_atomic

Kind = Literal["native", "lease"]
HOLDER_FILE, LOCK_FILE, LEASE_SUFFIX, KIND_FILE = ".holder", ".lock", ".lease", ".kind"
LEASE_S, HEARTBEAT_S = 120.0, 5.0  # the same on all hosts; long exports and solvers can delay a heartbeat
POLL_S = 0.2
_WRITING_S = 3.0  # within which another host writes a file of one word
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
_MOUNTS = Path("/proc/self/mountinfo")
_OWN_LOCKS = {  # file system -> mount options that keep locks on the host that asks for them
    "nfs": ("nolock", "local_lock=all", "local_lock=flock"),
    "nfs4": ("nolock", "local_lock=all", "local_lock=flock"),
    "lustre": ("localflock",),
    "cifs": ("nobrl",),
    "smb3": ("nobrl",),
}


class Locks:
    """Locks of one kind.

    Args:
        kind: "native" for locks of the operating system; "lease" for files that their holder renews.
        warn: Receives the warning that a lease was lost while it was held.
    """

    def __init__(self, kind: Kind = "native", warn: Callable[[str], None] | None = None) -> None:
        self.kind = kind
        self._warn = warn
        self._contenders: dict[Path, SoftFileLease] = {}  # each remembers since when a lease has not been renewed

    def try_lock(self, path: Path) -> AbstractContextManager[None] | None:
        """Acquire an exclusive file lock without waiting.

        Args:
            path: Lock file, created if missing; its content does not matter.

        Returns:
            Context manager that releases the lock; None if another process, or another call, holds it.

        Raises:
            ArtifactError: The file system does not support locks.
            OSError: The lock file cannot be created.
        """
        lock = self._contender(path) if self.kind == "lease" else FileLock(str(path), fallback_to_soft=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS or self.kind == "lease":
                raise
            raise ArtifactError(
                f"The file system of '{path.parent}' must support file locks, it does not: {error.strerror}.",
                hint="Keep runs on a local disk (--runs-dir), or mount the network drive with locks.",
            ) from error
        self._contenders.pop(path, None)
        return _held(lock)

    @contextmanager
    def hold(self, folder: Path) -> Iterator[None]:
        """Lock a folder, created if missing, for the duration of this context.

        A lease of another process is watched until it is renewed, for a few seconds.

        Raises:
            RunLocked: Another process holds the folder; the message names it and the time it began.
            ArtifactError: The folder cannot be created or written to, its file system does not support locks, or a
                lease that nobody renews cannot be taken over.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / LOCK_FILE
            lock = self.try_lock(path)
            if lock is None and self.kind == "lease":
                lock = self._outlast(path, folder)
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

    def _contender(self, path: Path) -> SoftFileLease:
        """Return the lease that this process asks for; the same until it is held."""
        if path not in self._contenders:
            self._contenders[path] = SoftFileLease(
                str(lease_file(path)),
                lease_duration=LEASE_S,
                heartbeat_interval=HEARTBEAT_S,
                thread_local=False,
                on_compromise=lambda loss: self._report_loss(path, loss.reason),
            )
        return self._contenders[path]

    def _outlast(self, path: Path, folder: Path) -> AbstractContextManager[None] | None:
        """Wait until a lease is renewed or free; None if it is renewed, or held by a new process.

        Raises:
            ArtifactError: Nobody renews the lease, and the file system cannot replace it atomically.
        """
        before, started = _state(lease_file(path)), time.monotonic()
        while _state(lease_file(path)) in (before, None):
            if (lock := self.try_lock(path)) is not None:
                return lock
            if time.monotonic() - started > LEASE_S + 2 * HEARTBEAT_S:
                raise ArtifactError(
                    f"The lease of '{folder}' by {_describe(folder)} was not renewed for {LEASE_S:.0f} s, and this "
                    "file system cannot replace it.",
                    hint=f"If that process has ended, remove '{lease_file(path)}'.",
                )
            time.sleep(POLL_S)
        return None

    def _report_loss(self, path: Path, reason: str) -> None:
        if self._warn is not None:
            self._warn(
                f"The lease of '{path.parent}' was lost ({reason}): this process was stopped for too long, or its "
                "network drive was. Another process may do the same work; stored results are not damaged by that."
            )


NATIVE = Locks()


def try_lock(path: Path) -> AbstractContextManager[None] | None:
    """Acquire a native lock as `Locks.try_lock` does."""
    return NATIVE.try_lock(path)


def hold(folder: Path) -> AbstractContextManager[None]:
    """Lock a folder by a native lock as `Locks.hold` does."""
    return NATIVE.hold(folder)


def open_locks(store: Path, warn: Callable[[str], None]) -> Locks:
    """Return the locks for a store and its runs, after a probe of the file system.

    All hosts of a store use one kind. The first that opens the store decides it.

    Args:
        store: Folder of the store, created if missing.
        warn: Receives the warning that leases take the place of locks.

    Raises:
        ArtifactError: The store is not writable, or other hosts lock it in a way that this host cannot.
    """
    folder = store / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lack = find_lack(folder)
        agreed = _agree(folder / KIND_FILE, "native" if lack is None else "lease")
    except OSError as error:
        raise ArtifactError(f"Store '{store}' must be writable: {error.strerror or error}.") from error
    if agreed == "native" and lack is not None:
        raise ArtifactError(
            f"Other hosts, or earlier runs, hold store '{store}' by file locks, which this host cannot use: {lack}.",
            hint=f"Mount the drive with locks; or end all runs on this store, and remove '{folder / KIND_FILE}'.",
        )
    if agreed == "lease":
        reason = lack or "another host cannot use them"
        warn(f"Store '{store}' is held by leases, renewed every {HEARTBEAT_S:.0f} s, not by file locks: {reason}.")
    return Locks(agreed, warn)


def find_lack(folder: Path) -> str | None:
    """Return the reason why native locks of a folder do not hold for all hosts; None if they do.

    A lock is taken, and the options that the file system is mounted with are read (Linux).
    """
    probe = folder / f".probe.{secrets.token_hex(4)}"
    try:
        with FileLock(str(probe), fallback_to_soft=False, timeout=0):
            pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return f"the file system answers '{error.strerror}'"
    finally:
        probe.unlink(missing_ok=True)
    return _local_option(folder.resolve())


def _local_option(folder: Path) -> str | None:
    """Return the mount option that keeps locks of a folder on this host; None if no such option is found."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    deepest, found = -1, None
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 6 or len(kind) < 3:
            continue
        point = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        if folder.is_relative_to(point) and len(point.parts) >= deepest:
            given = {*fields[5].split(","), *kind[2].split(",")}
            option = next((one for one in _OWN_LOCKS.get(kind[0], ()) if one in given), None)
            deepest, found = len(point.parts), option and f"{kind[0]} is mounted with {option}"
    return found


def _agree(path: Path, wanted: Kind) -> Kind:
    """Return the kind in a file; write the wanted one if no host has written any."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    if not path.exists():
        try:
            part.write_text(f"{wanted}\n", encoding="ascii")
            os.link(part, path)
        except FileExistsError:  # another host was faster
            pass
        except OSError:  # no hard links, as on some network drives
            with suppress(FileExistsError), path.open("x", encoding="ascii") as stream:
                stream.write(f"{wanted}\n")
        finally:
            part.unlink(missing_ok=True)
    ends = time.monotonic() + _WRITING_S
    while not (text := path.read_text(encoding="ascii", errors="replace").strip()) and time.monotonic() < ends:
        time.sleep(POLL_S)
    if text not in ("native", "lease"):
        raise ArtifactError(
            f"'{path}' must hold 'native' or 'lease', got '{text[:40]}'.",
            hint="End all runs on this store, and remove the file.",
        )
    return "lease" if text == "lease" else "native"


@contextmanager
def _held(lock: BaseFileLock) -> Iterator[None]:
    try:
        yield
    finally:
        lock.release()


def lease_file(path: Path) -> Path:
    """Return the file that takes the place of a lock file where leases are used."""
    return path.with_name(f"{path.name}{LEASE_SUFFIX}")


def _state(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a lease is renewed or taken; None if there is no lease."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _describe(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"
