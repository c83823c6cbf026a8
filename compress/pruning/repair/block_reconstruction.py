"""Block reconstruction: each block of a cut network is trained alone to return what the original block returned.

    images --> original: block 1 --> block 2 --> ...        outputs are the targets
    images --> slim:     block 1 --> block 2 --> ...        inputs come from the blocks trained before

A block is trained for a few hundred steps from the input that it gets in the cut network, so that it also compensates
the errors of the blocks before it. No labels are used, and gradients reach through one block only.

Source: Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction",
    arXiv:2102.05426, section 3.2, there for quantised weights.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.model.stage_records import RepairedBlock
from compress.progress import Progress
from compress.pruning.repair.walks import Block

HELD_OUT_PART = 8
_RETRY_FACTOR = 0.25
_LEAST_ERROR = 1e-6
_ZERO_SCALE = 0.1
_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Reconstruction:
    """Settings of the training of one block.

    Attributes:
        steps: Number of optimiser steps.
        batch_size: Images in a step.
        learning_rate: Peak learning rate of Adam relative to the root mean square of each tensor of weights; it falls
            to 0 along a half cosine.
        seed: Seed of the order of the images.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int


Trained = tuple[RepairedBlock, dict[str, Tensor]]
Keep = Callable[[str, Callable[[], Trained]], Trained]


def reconstruct_blocks(
    blocks: Iterable[Block],
    count: int,
    settings: Reconstruction,
    progress: Progress,
    keep: Keep = lambda _name, train: train(),
) -> list[RepairedBlock]:
    """Train blocks front to back and in place, each to return the outputs of the original block.

    An eighth of the images is held out of the training. A block whose error on them does not fall is trained again with
    a quarter of the learning rate, then kept unchanged.

    Args:
        blocks: Blocks in the order of their calls; a block's inputs are computed after the blocks before it are
            trained.
        count: Number of blocks, for the progress.
        settings: Steps, batch size and learning rate.
        progress: Receives progress by block.
        keep: Takes the name of a block and a function that trains it; returns the result and the block's weights,
            stored or new.

    Returns:
        The result of each block.
    """
    results = []
    with progress.task("block reconstruction", count) as task:
        for block in blocks:
            result, weights = keep(block.name, lambda block=block: _train(block, settings))  # type: ignore[misc]
            block.module.load_state_dict(weights)
            results.append(result)
            task.advance()
    return results


def _train(block: Block, settings: Reconstruction) -> Trained:
    """Train one block in eval mode, and return the result and the weights that are kept."""
    held = max(1, len(block.inputs[0]) // HELD_OUT_PART)
    scales = [float((one - one.mean(0)).square().mean().clamp_min(1e-12)) for one in block.wanted]
    first, rest = block.part(slice(0, held)), block.part(slice(held, None))
    start = _copied(block.module)
    weights, before = start, _error(first, scales)
    after = before
    parameters = [one for one in block.trainable if one.is_floating_point()]
    if before > _LEAST_ERROR and parameters and len(rest.inputs[0]):
        for learning_rate in (settings.learning_rate, settings.learning_rate * _RETRY_FACTOR):
            _descend(rest, parameters, scales, learning_rate, settings)
            error = _error(first, scales)
            if error < before:
                weights, after = _copied(block.module), error
                break
            block.module.load_state_dict(start)
    return RepairedBlock(block.name, before, after, after < before), weights


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {key: values.detach().clone() for key, values in module.state_dict().items()}


def _descend(
    block: Block,
    parameters: Sequence[nn.Parameter],
    scales: Sequence[float],
    learning_rate: float,
    settings: Reconstruction,
) -> None:
    was_trainable = [one.requires_grad for one in parameters]
    for one in block.module.parameters():
        one.requires_grad_(False)
    for one in parameters:
        one.requires_grad_(True)
    generator = torch.Generator().manual_seed(settings.seed)
    groups = [{"params": [one], "lr": learning_rate * _magnitude(one)} for one in parameters]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    count = len(block.inputs[0])
    size = min(settings.batch_size, count)
    order, at = torch.randperm(count, generator=generator), 0
    with torch.enable_grad():
        for _ in range(settings.steps):
            if at + size > count:
                order, at = torch.randperm(count, generator=generator), 0
            chosen = block.part(order[at : at + size])
            at += size
            optimizer.zero_grad()
            pairs = zip(chosen.run(), chosen.wanted, scales, strict=True)
            loss = torch.stack([(got - wanted).square().mean() / scale for got, wanted, scale in pairs]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    for one, trainable in zip(parameters, was_trainable, strict=True):
        one.requires_grad_(trainable)
        one.grad = None


@torch.no_grad()
def _magnitude(values: Tensor) -> float:
    """Return the root mean square of weights; a fixed value for weights of 0."""
    return float(values.square().mean().sqrt()) or _ZERO_SCALE


@torch.no_grad()
def _error(block: Block, scales: Sequence[float]) -> float:
    """Return the mean squared error of a block relative to the scales of its outputs, averaged over them."""
    totals = [0.0] * len(scales)
    for start in range(0, len(block.inputs[0]), _EVALUATION_BATCH):
        part = block.part(slice(start, start + _EVALUATION_BATCH))
        for index, (got, wanted) in enumerate(zip(part.run(), part.wanted, strict=True)):
            totals[index] += float((got - wanted).square().sum())
    sizes = [one.numel() for one in block.wanted]
    return sum(total / size / scale for total, size, scale in zip(totals, sizes, scales, strict=True)) / len(scales)
