"""Saved state of a training run: one file with a digest, which is complete or absent.

STATE_MARK    SHA-256 of the rest    a dictionary, written by `torch.save`
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.errors import ArtifactError, attempt
from compress.storage.files import write_atomic
from compress.training.hooks import TrainingHooks
from compress.training.settings import Distillation, FitSettings, TrainingData, plan_steps

STATE_MARK = b"compress training state\n"

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StateFile:
    """File that an interrupted training run resumes from.

    Attributes:
        path: Path of the file.
        is_kept: True keeps the file when the run is done, so that a repeated call ends at once. False removes it.
    """

    path: Path
    is_kept: bool = False

    def write(self, state: State) -> None:
        """Replace the file.

        Args:
            state: Tensors and plain values, with the run's settings under "identity".

        Raises:
            OSError: The file cannot be written.
        """
        content = io.BytesIO()  # torch's own writer hides the file system's message behind an error of another kind
        torch.save(state, content)
        write_atomic(self.path, STATE_MARK + hashlib.sha256(content.getbuffer()).digest() + content.getbuffer())

    def read(self, identity: State, warn: Callable[[str], None]) -> State | None:
        """Return the saved state; None if the file is missing or damaged.

        Args:
            identity: Settings of this run, which the saved run must share.
            warn: Function called with a message if the file is damaged.

        Raises:
            ArtifactError: The state belongs to another run; the message names the differences.
        """
        if not self.path.is_file():
            return None

        def unreadable(error: Exception) -> None:
            warn(f"The saved training state is unreadable, training starts again: {error}")

        state = attempt(lambda: _load(self.path), unreadable)
        if state is not None and (differing := _differences(state["identity"], identity)):
            raise ArtifactError(
                f"The training state in '{self.path}' must be of this run, it is of one with {', '.join(differing)}.",
                hint="Remove the file to start again.",
            )
        return state

    def finish(self) -> None:
        """Remove the file, unless it is to be kept."""
        if not self.is_kept:
            self.path.unlink(missing_ok=True)


def identify(
    module: nn.Module,
    data: TrainingData,
    settings: FitSettings,
    distillation: Distillation | None,
    hooks: TrainingHooks | None,
) -> State:
    """Return the settings that a saved state must share to be resumed, as plain values by name."""
    free = ("compiled", "device", "save_minutes")  # may change from one start to the next
    values = {key: value for key, value in asdict(settings).items() if key not in free}
    taught = distillation
    if not settings.schedule_start:
        del values["schedule_start"]  # states of older versions do not know it
    if settings.rounding is None:
        del values["rounding"], values["rounded_ratio"]
    return {
        **values,
        "total steps": plan_steps(data.train, settings).total,
        "training images": len(data.train),
        "validation images": len(data.validation),
        "distillation": None if taught is None else [taught.weight, taught.temperature, taught.features],
        "hooks": None if hooks is None else type(hooks).__name__,
        "task": f"{data.train.objective.name}, {data.validation.task.main.name}",
        **{f"shape of {name}": list(value.shape) for name, value in module.state_dict().items()},
    }


def read_state(path: Path) -> io.BytesIO:
    """Return the content of a saved state for `torch.load`, which does not notice changed bits by itself.

    Raises:
        ValueError: The content differs from its digest.
    """
    content = path.read_bytes()
    if not content.startswith(STATE_MARK):  # of an older version, which wrote no digest
        return io.BytesIO(content)
    start = len(STATE_MARK) + hashlib.sha256().digest_size
    if hashlib.sha256(content[start:]).digest() != content[len(STATE_MARK) : start]:
        raise ValueError("it differs from its digest")
    return io.BytesIO(content[start:])


def _load(path: Path) -> State:
    state: State = torch.load(read_state(path), weights_only=True, map_location="cpu")
    if "identity" not in state:
        raise ValueError("it does not say which run it is of")
    return state


def _differences(saved: State, own: State) -> list[str]:
    """Return the settings that differ, as text; at most four of them by name."""
    names = [name for name in {**own, **saved} if saved.get(name) != own.get(name)]
    named = [f"{name} {saved.get(name)} instead of {own.get(name)}" for name in names[:4]]
    return [*named, f"{len(names) - 4} more"] if len(names) > 4 else named
