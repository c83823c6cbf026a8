"""Finished parts of a stage, stored in its work folder: a kill loses only the part in progress.

    FOLDER/parts/KEY    SHA-256 of the rest, then a safetensors file: the tensors, and the record in its metadata

The key of a part is the digest of everything it depends on within the stage. The name of the work folder covers the
inputs of the stage itself. The folder is removed when the stage is done. A damaged part is computed again.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from compress.progress import Progress
from compress.storage.digest import digest_value, sealed, unsealed
from compress.storage.files import write_atomic
from compress.training.distributed import current_ranks

FOLDER = "parts"
_RECORD, _RANDOM = "record", "/random"  # no tensor of a network has a slash in its name


@dataclass(frozen=True)
class Part:
    """Result of a part of a stage.

    Attributes:
        record: Plain values, JSON-ready.
        tensors: Name -> tensor, on the CPU.
    """

    record: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Parts:
    """Store of the finished parts of one stage.

    Args:
        folder: The stage's work folder.
        progress: Receives one message if an interrupted run left finished parts.
    """

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder, self.progress = folder / FOLDER, progress
        self.has_told = False

    def keep(self, key: Mapping[str, Any], make: Callable[[], Part]) -> Part:
        """Return a finished part, or compute and store it.

        Args:
            key: Everything that the part depends on within the stage, as plain values.
            make: Function that computes the part.
        """
        return self.find(key) or self.add(key, make())

    def find(self, key: Mapping[str, Any]) -> Part | None:
        """Return a finished part; None if it must be computed.

        A found part restores the state of torch's random numbers from the time when it was stored.
        """
        if current_ranks().size > 1:  # one rank may find a part that another does not: they would diverge
            return None
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        part = _unpack(content)
        if part is None:
            self.progress.warn("A part of an interrupted run is damaged and is made again.")
            return None
        if not self.has_told:
            self.has_told = True
            self.progress.note("Parts that an interrupted run has finished are not done again.")
        torch.set_rng_state(part.tensors.pop(_RANDOM))
        return part

    def add(self, key: Mapping[str, Any], part: Part) -> Part:
        """Store a part, and return it.

        Raises:
            OSError: The part cannot be written.
        """
        if current_ranks().size == 1:
            write_atomic(self._path(key), _pack(part))
        return part

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self.folder / digest_value(key)


def _pack(part: Part) -> bytes:
    tensors = {name: values.detach().cpu().contiguous().clone() for name, values in part.tensors.items()}
    tensors[_RANDOM] = torch.get_rng_state()
    content = save(tensors, metadata={_RECORD: json.dumps(part.record)})
    return sealed(content)


def _unpack(content: bytes) -> Part | None:
    """Return a part, or None if the content is damaged."""
    whole = unsealed(content)
    if whole is None:
        return None
    try:
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        return Part(json.loads(header["__metadata__"][_RECORD]), dict(load(whole)))
    except (SafetensorError, ValueError, KeyError):
        return None
