"""Batch-norm statistics: re-estimation, and synchronisation over several ranks."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.data.batches import evaluation_batches
from compress.data.splits import Split
from compress.errors import DataError
from compress.model.modes import eval_mode
from compress.progress import Progress
from compress.training.distributed import Ranks, add_up

_BATCH = 128


def reestimate_batch_norm(module: nn.Module, split: Split, progress: Progress) -> tuple[str, ...]:
    """Measure the running mean and variance of every batch norm again, in place, and return their module paths.

    Frozen batch norms, which always stay in eval mode, keep their statistics.

    Mean and variance are averages over batches of (almost) equal size. Each batch has images from all over the split,
    so a split that is sorted by class yields the same statistics.

    Args:
        module: The network; training flags are restored. Without batch norms nothing happens.
        split: At least two images; labels are not used.
        progress: Receives progress by batch.

    Raises:
        DataError: The split has a single image, which has no variance.
    """
    found = {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm) and _measures(part)}
    norms = tuple(found.values())
    if not norms:
        return ()
    if len(split) < 2:
        raise DataError(
            f"Batch-norm statistics need at least 2 images, '{split.name}' has {len(split)}.",
            hint="Raise data.calibration.",
        )
    momenta = [norm.momentum for norm in norms]
    count = math.ceil(len(split) / _BATCH)
    try:
        with torch.no_grad(), eval_mode(module), progress.task("batch-norm statistics", len(split)) as task:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # None makes torch average over all batches alike
                norm.train()
            size = math.ceil(len(split) / count)
            for images, _ in evaluation_batches(split.interleaved(count), size, "nothing"):
                module(images)
                task.advance(len(images))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return tuple(found)


def _measures(norm: _BatchNorm) -> bool:
    """Return whether a batch norm tracks statistics and can enter training mode, in which it measures them."""
    before = norm.training
    follows = norm.train().training
    norm.training = before
    return norm.track_running_stats and follows


@contextmanager
def synced_batch_norms(module: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Synchronise the batch statistics of a network's batch norms over all ranks, within the context.

    This affects training mode only, on any device (torch's own SyncBatchNorm needs a GPU). All ranks must run the same
    layers in the same order.

    Args:
        module: The network; its batch norms keep their class.
        ranks: The ranks of the training.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    for norm in norms:
        norm.forward = partial(_forward, norm, norm.forward, ranks)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward  # uncovers the method of the class


def _forward(norm: _BatchNorm, alone: Any, ranks: Ranks, x: Tensor) -> Tensor:
    """Normalise (N, C, ...) by mean and variance over the batch of all ranks, and update the running statistics."""
    if not norm.training:
        return alone(x)  # type: ignore[no-any-return]
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    wide = x.float()
    mean = _mean(wide.mean(axes), ranks)
    variance = _mean((wide - mean.reshape(shape)).square().mean(axes), ranks)
    count = ranks.size * x.numel() / x.shape[1]
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        with torch.no_grad():
            norm.running_mean.lerp_(mean, share)
            norm.running_var.lerp_(variance * count / (count - 1), share)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return (wide * scale.reshape(shape) + shift.reshape(shape)).to(x.dtype)


def _mean(values: Tensor, ranks: Ranks) -> Tensor:
    """Return the mean over the ranks, whose parts of the batch are equally large."""
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total / ranks.size


class _Sum(torch.autograd.Function):
    """Sum of a tensor over the ranks; the gradients of all ranks are summed as well."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        add_up(total)
        return total

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.clone()
        add_up(total)
        return total
