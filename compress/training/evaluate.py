"""How good is a torch network, and are its outputs what a classifier's must be?"""

import torch
from torch import nn

from compress.cost.macs import eval_mode
from compress.data.batches import Split, evaluation_batches
from compress.errors import DataError, ModelError
from compress.progress import Progress, SilentProgress


@torch.no_grad()
def evaluate_top1(module: nn.Module, split: Split, batch_size: int = 256, progress: Progress | None = None) -> float:
    """Return the share of images, in [0, 1], whose largest output is their label.

    Args:
        module: Classifier with (N, K) outputs; its training flags are restored.
        split: At least one image.
        batch_size: Images at once.
        progress: Told about each batch.

    Raises:
        DataError: The split is empty or has labels outside the outputs.
        ModelError: The outputs are not (N, K).
    """
    if len(split) == 0:
        raise DataError(f"Split '{split.name}' must hold at least one image to measure top-1 on, it holds none.")
    correct = 0
    with eval_mode(module), (progress or SilentProgress()).task(f"top-1 on {split.name}", len(split)) as task:
        for images, labels in evaluation_batches(split, batch_size):
            outputs = module(images)
            check_outputs(outputs, int(labels.max()))
            correct += int((outputs.argmax(1) == labels).sum())
            task.advance(len(labels))
    return correct / len(split)


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
