"""Outputs of a distillation teacher, kept on disk from one training to the next.

Two trainings with the same images, augmentation and seed show the teacher the same batches: the runs of a sweep, the
rates of a probe, a repeated run. The second one reads what the first one computed. Every batch is known by the digest
of its values, and the first kept batch of each epoch is computed and compared. So a training ends with the same
weights, with or without kept outputs.

    folder/DIGEST OF THE TEACHER/DIGEST OF EPOCH AND SETTINGS    checksum, then safetensors with the tensors
        "batches"        (S, 32) uint8, SHA-256 of the images of each step
        "outputs"        (S, N, ...) outputs
        "channels_last"  memory format of the outputs, which sums of a loss depend on in their last bits
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from compress.model.tensors import weights_digest
from compress.storage.digest import digest_value, sealed, unsealed
from compress.storage.files import write_atomic

MOST_BYTES = 2**30  # of one training

Teach = Callable[[Tensor], Any]


class TeacherOutputs:
    """Function from images to a teacher's outputs, which reads outputs that an earlier training has kept.

    Only teachers with a single output on the CPU are read and kept, up to `MOST_BYTES` in one training. A file that
    is damaged, of other images, or of a machine with other results has no effect.

    Args:
        teach: Function from images to the outputs of the teacher, computed.
        teacher: Network behind `teach`.
        folder: Folder of all kept outputs; it need not exist.
        settings: Everything that the batches and outputs of an epoch depend on, as plain values.
        most_bytes: Largest size of the outputs of one training that are kept.
        warn: Function called with a message if outputs cannot be kept.

    Attributes:
        read: Number of batches whose outputs were read.
        computed: Number of batches whose outputs were computed.
    """

    def __init__(
        self,
        teach: Teach,
        teacher: nn.Module,
        folder: Path,
        settings: Mapping[str, Any],
        warn: Callable[[str], None],
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.read, self.computed = 0, 0
        self._teach, self._settings, self._warn, self._free = teach, dict(settings), warn, most_bytes
        self._folder = folder / digest_value([weights_digest(teacher), repr(teacher)])
        self._kept: dict[bytes, Tensor] = {}
        self._is_checked, self._has_new = False, False
        self._path: Path | None = None

    def open_epoch(self, epoch: int) -> None:
        """Read the outputs that an earlier training has kept of an epoch, counted from 0."""
        self._path = self._folder / digest_value({**self._settings, "epoch": epoch})
        self._kept, self._is_checked, self._has_new = _read(self._path), False, False
        self._free -= sum(map(_size, self._kept.values()))

    def __call__(self, images: Tensor) -> Any:
        """Return the outputs for images, (N, C, H, W) or (N, H, W, C)."""
        if self._path is None or images.device.type != "cpu":
            return self._teach(images)
        batch = _digest(images)
        kept = self._kept.get(batch)
        if kept is not None and self._is_checked:
            self.read += 1
            return kept
        outputs = self._teach(images)
        self.computed += 1
        if not isinstance(outputs, Tensor):
            return outputs
        if kept is not None:
            if not torch.equal(kept, outputs):  # another machine, thread count or library computed them
                self._free += sum(map(_size, self._kept.values()))
                self._kept = {}
            self._is_checked = True
        self._keep(batch, outputs)
        return outputs

    def close_epoch(self) -> None:
        """Write the outputs of the epoch, if some of them are new; a folder that cannot be written is warned about."""
        path, self._path = self._path, None
        if path is None or not self._has_new:
            return
        shape = next(iter(self._kept.values())).shape
        kept = {batch: outputs for batch, outputs in self._kept.items() if outputs.shape == shape}
        digests = torch.frombuffer(bytearray(b"".join(kept)), dtype=torch.uint8).reshape(len(kept), -1)
        is_last = _is_channels_last(next(iter(kept.values())))
        outputs = torch.stack([one.contiguous() for one in kept.values()])
        content = save({"batches": digests, "outputs": outputs, "channels_last": torch.tensor(is_last)})
        try:
            write_atomic(path, sealed(content), is_shared=True)
        except OSError as error:
            self._warn(f"Outputs of the teacher cannot be kept for later trainings: {error.strerror or error}.")
            self._free = 0

    def _keep(self, batch: bytes, outputs: Tensor) -> None:
        if batch not in self._kept and _size(outputs) <= self._free:
            self._kept[batch] = outputs.detach().clone()
            self._free -= _size(outputs)
            self._has_new = True


def _size(outputs: Tensor) -> int:
    return outputs.numel() * outputs.element_size()


def _digest(images: Tensor) -> bytes:
    return hashlib.sha256(images.detach().numpy().tobytes()).digest()


def _read(path: Path) -> dict[bytes, Tensor]:
    """Return digest of a batch -> its outputs; empty if the file is missing or damaged."""
    try:
        content = unsealed(path.read_bytes())
        tensors = {} if content is None else load(content)
        batches, outputs, is_last = tensors["batches"], tensors["outputs"], bool(tensors["channels_last"])
    except (OSError, SafetensorError, KeyError):
        return {}
    form = torch.channels_last if is_last else torch.contiguous_format
    pairs = zip(batches, outputs, strict=True)
    return {bytes(batch.tolist()): one.contiguous(memory_format=form) for batch, one in pairs}


def _is_channels_last(outputs: Tensor) -> bool:
    return (
        outputs.ndim == 4 and not outputs.is_contiguous() and outputs.is_contiguous(memory_format=torch.channels_last)
    )
