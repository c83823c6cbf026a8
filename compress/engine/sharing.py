"""Exchange of finished stages with a remote store during a run: `--store URL`.

A stage that the local store lacks is downloaded; a stage that was run is uploaded. At the end of a run, whatever the
remote store still lacks is uploaded, such as stages of an earlier run without it.

A verdict has milliseconds. It is shared among machines of one description only; the other stages are keyed by whatever
their results depend on.
"""

import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from compress.catalog import VERDICT
from compress.cost.conditions import present_conditions
from compress.engine.keys import Step
from compress.progress import Progress
from compress.storage.digest import digest_value
from compress.storage.store import Entry, Store

if TYPE_CHECKING:  # imports fsspec, which only runs with a remote store need
    from compress.storage.remote import Remote

_GPUS = Path("/proc/driver/nvidia/gpus")


class Sharing:
    """Exchange of one run with a remote store; without one, it does nothing.

    Args:
        remote: The remote store, if there is one.
        store: The local store.
        progress: Receives progress and warnings.
    """

    def __init__(self, remote: "Remote | None", store: Store, progress: Progress) -> None:
        self.remote, self._store, self._progress = remote, store, progress
        self._used: list[tuple[Step, str, str]] = []  # stages of this run, with keys and labels
        if remote is not None and remote.failure is not None:
            progress.warn(f"Remote store '{remote.url}' is out of reach: {remote.failure}. The run goes on without it.")

    def fetch(self, step: Step, key: str, label: str) -> Entry | None:
        """Download the result of a stage into the local store; None if that is not possible."""
        if self.remote is None:
            return None
        entry = self.remote.fetch(shared_name(step, key), self._store, key, self._progress, label)
        if entry is not None:
            self._progress.note(f"{label}: downloaded from {self.remote.url}")
        return entry

    def share(self, step: Step, key: str, label: str, *, is_new: bool) -> None:
        """Upload the result of a stage if this run made it; the others are uploaded by `finish`."""
        if self.remote is not None:
            self._used.append((step, key, label))
            if is_new:
                self.remote.share(shared_name(step, key), self._store, key, self._progress, label)

    def finish(self) -> None:
        """Upload what the remote store still lacks of this run; one that failed before is tried once more."""
        if self.remote is None:
            return
        self.remote.retry()
        for step, key, label in self._used:
            if not self.remote.share(shared_name(step, key), self._store, key, self._progress, label):
                return


def find_remote_entry(remote: "Remote | None", step: Step, key: str) -> str | None:
    """Return the digest of a stage's result in a remote store; None if it is not there, or there is no store."""
    record = None if remote is None else remote.record(shared_name(step, key))
    digest = None if record is None else record.get("digest")
    return digest if isinstance(digest, str) else None


def shared_name(step: Step, key: str) -> str:
    """Return the name of a stage's result in a remote store."""
    return digest_value([key, _machine()]) if step.entry.produces == VERDICT else key


def _machine() -> dict[str, object]:
    """Return the description of this machine that milliseconds depend on."""
    return {**asdict(present_conditions("", "", 0, 0)), "system": platform.system(), "gpus": list(_gpu_models())}


def _gpu_models() -> Iterator[str]:
    for path in sorted(_GPUS.glob("*/information")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        yield from (line.partition(":")[2].strip() for line in lines if line.startswith("Model:"))
