"""Machine-wide lock that keeps latency measurements undisturbed by other runs of the same sweep or search.

Stages that measure latency hold the lock alone; all other stages share it. A waiting measurement holds back stages that
begin later, so that it starts as soon as the running ones have ended. The operating system releases the lock of a
process that ends, however it ends.

    TMP/compress-timing-USER/gate    held by a stage while it waits for its turn
    TMP/compress-timing-USER/stages  read-write lock: shared by computing stages, exclusive for a measurement
"""

import getpass
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, ReadWriteLock, Timeout

from compress.catalog import STAGES, VERDICT
from compress.config.schema.pipeline import PipelineConfig
from compress.engine.keys import needs_latency, times_formats
from compress.errors import ArtifactError


class Turns:
    """Turns of the stages on a machine; without a lock, every stage begins at once."""

    def hold(self, alone: bool, note: Callable[[str], None]) -> AbstractContextManager[None]:
        """Return the context manager to run a stage in.

        Args:
            alone: True for a measurement of latency, False for any other work.
            note: Receives a sentence if the stage has to wait.
        """
        return nullcontext()


class TimingLock(Turns):
    """Turns by the machine-wide lock.

    Args:
        folder: Folder of the lock, the same for all processes that must not disturb each other.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or default_folder()

    @contextmanager
    def hold(self, alone: bool, note: Callable[[str], None]) -> Iterator[None]:
        """Hold the lock for the duration of this context.

        Args:
            alone: True for a measurement of latency, False for any other work.
            note: Receives a sentence if this process has to wait.

        Raises:
            ArtifactError: The lock cannot be created.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            gate = FileLock(str(self._folder / "gate"))
            lock = ReadWriteLock(self._folder / "stages", is_singleton=False)
        except OSError as error:
            raise ArtifactError(
                f"The timing lock '{self._folder}' must be writable: {error.strerror or error}.",
                hint="TMPDIR names another folder for temporary files.",
            ) from error
        acquire = lock.acquire_write if alone else lock.acquire_read
        try:
            with gate.acquire(timeout=0):
                acquire(timeout=0)
        except Timeout:
            note(f"waits until other runs on this machine have ended their {'stages' if alone else 'measurements'}")
            with gate:
                acquire(timeout=-1)
        try:
            yield
        finally:
            lock.release()
            lock.close()


def default_folder() -> Path:
    """Return the folder of this user's lock on this machine."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()  # a user in a container may have no name
    return Path(tempfile.gettempdir()) / f"compress-timing-{user}"


def measures_latency(config: PipelineConfig, index: int) -> bool:
    """Return whether a stage measures latency.

    Args:
        config: The pipeline.
        index: Position of the stage, from 0.
    """
    stage = config.stages[index]
    if STAGES[stage.stage].produces == VERDICT or times_formats(stage):
        return True
    if config.deploy is None:
        return False
    return needs_latency(stage) or getattr(stage, "rewrites", None) == "measured"
