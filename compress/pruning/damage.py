"""How much does the loss rise when a residual block is skipped?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.cost.macs import eval_mode
from compress.data.batches import Split, evaluation_batches
from compress.progress import Progress

_BATCH = 128


def block_damage(module: nn.Module, blocks: Sequence[str], split: Split, progress: Progress) -> dict[str, float]:
    """Return for each block the mean loss with it skipped, less the mean loss with it in place.

    Args:
        module: Classifier; left as it is.
        blocks: Module paths of removable blocks.
        split: Labelled images to measure on; not the evaluation split.
        progress: Told about each block.
    """
    with torch.no_grad(), eval_mode(module), progress.task("loss without each block", len(blocks) + 1) as task:
        intact = _mean_loss(module, split)
        task.advance()
        damage = {}
        for name in blocks:
            with _skipped(module.get_submodule(name)):
                damage[name] = _mean_loss(module, split) - intact
            task.advance()
    return damage


def _mean_loss(module: nn.Module, split: Split) -> float:
    total = sum(
        float(F.cross_entropy(module(images), labels, reduction="sum"))
        for images, labels in evaluation_batches(split, _BATCH)
    )
    return total / len(split)


@contextmanager
def _skipped(block: nn.Module) -> Iterator[None]:
    """Let a block return its input."""

    def pass_on(_block: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> Tensor:
        unchanged: Tensor = inputs[0]
        return unchanged

    handle = block.register_forward_hook(pass_on)
    try:
        yield
    finally:
        handle.remove()
