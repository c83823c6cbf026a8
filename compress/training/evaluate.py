"""How good is a torch network, and are its outputs what a classifier's must be?"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.cost.macs import eval_mode
from compress.data.batches import evaluation_batches, fast_batch_size
from compress.data.splits import Split
from compress.errors import DataError, ModelError
from compress.progress import Progress, SilentProgress


@torch.no_grad()
def evaluate_top1(
    module: nn.Module, split: Split, batch_size: int | None = None, progress: Progress | None = None
) -> float:
    """Return the share of images, in [0, 1], whose largest output is their label.

    Args:
        module: Classifier with (N, K) outputs; its training flags are restored.
        split: At least one image.
        batch_size: Images at once; None for as many as are fast.
        progress: Told about each batch.

    Raises:
        DataError: The split is empty or has labels outside the outputs.
        ModelError: The outputs are not (N, K).
    """
    outputs = _outputs(module, split, batch_size, progress, "top-1")
    return sum(int((logits.argmax(1) == labels).sum()) for logits, labels in outputs) / len(split)


def evaluate_loss(
    module: nn.Module, split: Split, batch_size: int | None = None, progress: Progress | None = None
) -> float:
    """Return the mean cross-entropy in nats.

    Args:
        module: Classifier with (N, K) outputs; its training flags are restored.
        split: At least one image.
        batch_size: Images at once; None for as many as are fast.
        progress: Told about each batch.

    Raises:
        As `evaluate_top1`.
    """
    return float(image_losses(module, split, batch_size, progress).mean())


@torch.no_grad()
def image_losses(
    module: nn.Module, split: Split, batch_size: int | None = None, progress: Progress | None = None
) -> Tensor:
    """Return (N,) float64 the cross-entropy of each image, in nats.

    Args:
        module: Classifier with (N, K) outputs; its training flags are restored.
        split: At least one image.
        batch_size: Images at once; None for as many as are fast.
        progress: Told about each batch.

    Raises:
        As `evaluate_top1`.
    """
    outputs = _outputs(module, split, batch_size, progress, "loss")
    return torch.cat([F.cross_entropy(logits.double(), labels, reduction="none").cpu() for logits, labels in outputs])


def _outputs(
    module: nn.Module, split: Split, batch_size: int | None, progress: Progress | None, what: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give checked outputs, (N, K), and labels, batch by batch."""
    if len(split) == 0:
        raise DataError(f"Split '{split.name}' must hold at least one image to measure {what} on, it holds none.")
    with eval_mode(module), (progress or SilentProgress()).task(f"{what} on {split.name}", len(split)) as task:
        for images, labels in evaluation_batches(split, batch_size or fast_batch_size(split)):
            logits = module(images)
            check_outputs(logits, int(labels.max()))
            yield logits, labels
            task.advance(len(labels))


def check_outputs(outputs: object, largest_label: int) -> None:
    """Check that outputs are (N, K) and that the labels fit them.

    Raises:
        ModelError: The output is no (N, K) tensor.
        DataError: A label is K or more.
    """
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2:
        got = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ModelError(f"A classifier must return one (N, classes) tensor, got {got}.")
    if largest_label >= outputs.shape[1]:
        raise DataError(
            f"Labels must be below the number of classes the network has ({outputs.shape[1]}), "
            f"got label {largest_label}."
        )
