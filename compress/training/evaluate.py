"""Evaluation of a torch network: metrics and loss."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.data.batches import Wanted, evaluation_batches, fast_batch_size
from compress.data.splits import Split
from compress.errors import DataError
from compress.model.modes import eval_mode
from compress.progress import Progress, SilentProgress
from compress.tasks.base import Facts, joined, require_finite
from compress.tasks.classification import Classification
from compress.tasks.imitation import Imitation
from compress.tasks.outputs import arrays, plain


def run(module: nn.Module, images: Tensor) -> Any:
    """Run a network on a batch and return its output; several outputs as name -> tensor."""
    return plain(module(images), getattr(module, "output_names", ()))


def evaluate_quality(
    module: nn.Module, split: Split, batch_size: int | None = None, progress: Progress | None = None
) -> float:
    """Return the primary metric: for a classifier the share of images, in [0, 1], that it gets right.

    Args:
        module: The network; its training flags are restored.
        split: At least one image, with the task.
        batch_size: Number of images in one call; None for a fast number.
        progress: Receives progress by batch.

    Raises:
        DataError: The split is empty, or its targets do not fit the outputs.
        ModelError: The outputs do not fit the task.
        NonFinite: A metric is NaN or infinite.
    """
    return measure_quality(module, split, batch_size, progress)[0]


def measure_quality(
    module: nn.Module, split: Split, batch_size: int | None = None, progress: Progress | None = None
) -> tuple[float, np.ndarray | None]:
    """Return the primary metric, and (N,) bool the images classified right; None in other tasks.

    Raises:
        As `evaluate_quality`.
    """
    task, facts = split.task, quality_facts(module, split, batch_size, progress)
    metrics = task.aggregate(facts)
    require_finite(metrics)
    return metrics[task.metric], facts["right"] if isinstance(task, Classification) else None


@torch.no_grad()
def quality_facts(
    module: nn.Module, split: Split, batch_size: int | None = None, progress: Progress | None = None
) -> Facts:
    """Return the facts of each image from which the task computes its metrics; otherwise as `evaluate_quality`."""
    task = split.task
    wanted: Wanted = "objective" if isinstance(task, Imitation) else "task"
    every = _outputs(module, split, batch_size, progress, task.main.words, wanted)
    parts = [task.facts(arrays(outputs), _as_arrays(targets)) for outputs, targets in every]
    return joined(parts)


def evaluate_loss(
    module: nn.Module, split: Split, batch_size: int | None = None, progress: Progress | None = None
) -> float:
    """Return the mean loss; for a classifier the cross-entropy in nats.

    Args:
        module: The network; its training flags are restored.
        split: At least one image.
        batch_size: Number of images in one call; None for a fast number.
        progress: Receives progress by batch.

    Raises:
        As `evaluate_quality`.
    """
    return float(image_losses(module, split, batch_size, progress).mean())


@torch.no_grad()
def image_losses(
    module: nn.Module, split: Split, batch_size: int | None = None, progress: Progress | None = None
) -> Tensor:
    """Return (N,) float64 the loss of each image; for a classifier the cross-entropy in nats.

    Args:
        module: The network; its training flags are restored.
        split: At least one image.
        batch_size: Number of images in one call; None for a fast number.
        progress: Receives progress by batch.

    Raises:
        As `evaluate_quality`.
    """
    objective = split.objective
    every = _outputs(module, split, batch_size, progress, "loss", "objective")
    is_exact = isinstance(objective, Classification)
    losses = [
        objective.image_losses(outputs.double() if is_exact else outputs, targets).double().cpu()
        for outputs, targets in every
    ]
    return torch.cat(losses)


def _outputs(
    module: nn.Module, split: Split, batch_size: int | None, progress: Progress | None, what: str, wanted: Wanted
) -> Iterator[tuple[Any, Any]]:
    """Yield checked outputs and targets, batch by batch."""
    if len(split) == 0:
        raise DataError(f"Split '{split.name}' must hold at least one image to measure {what} on, it holds none.")
    task = split.objective if wanted == "objective" else split.task
    with eval_mode(module), (progress or SilentProgress()).task(f"{what} on {split.name}", len(split)) as shown:
        for images, targets in evaluation_batches(split, batch_size or fast_batch_size(split), wanted):
            outputs = run(module, images)
            task.check(outputs, targets)
            yield outputs, targets
            shown.advance(len(images))


def _as_arrays(targets: Any) -> Any:
    """Return targets with arrays in place of tensors."""
    if isinstance(targets, Tensor):
        return targets.detach().cpu().numpy()
    if isinstance(targets, dict):
        return {name: _as_arrays(value) for name, value in targets.items()}
    if isinstance(targets, list | tuple):
        return type(targets)(_as_arrays(value) for value in targets)
    return targets
