"""What brings back accuracy after a cut without training?

batch norm      measure mean and variance again on images, as a cumulative average
least squares   refit each layer that lost inputs so that it gives, from what is left, what it gave before
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.cost.macs import eval_mode
from compress.data.batches import Split, evaluation_batches
from compress.errors import DataError, InternalError
from compress.progress import Progress

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_BATCH = 128
_POSITIONS_PER_IMAGE = 32
_REFIT_IMAGES = 512
_RIDGE = 1e-4


def reestimate_batch_norm(module: nn.Module, split: Split, progress: Progress) -> None:
    """Measure the running mean and variance of every batch norm again, in place.

    Args:
        module: The network; training flags are restored. Without batch norms nothing happens.
        split: At least two images to look at; labels are not used.
        progress: Told about each batch.

    Raises:
        DataError: There is one image only, which has no variance.
    """
    norms = [part for part in module.modules() if isinstance(part, BATCH_NORMS) and part.track_running_stats]
    if not norms:
        return
    if len(split) < 2:
        raise DataError(
            f"Batch-norm statistics need at least 2 images, '{split.name}' has {len(split)}.",
            hint="Raise data.calibration.",
        )
    momenta = [norm.momentum for norm in norms]
    # batches count alike in the average, so they must be of (almost) one size
    batch_size = math.ceil(len(split) / math.ceil(len(split) / _BATCH))
    try:
        with torch.no_grad(), eval_mode(module), progress.task("batch-norm statistics", len(split)) as task:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # None makes torch average over all batches alike
                norm.train()
            for images, labels in evaluation_batches(split, batch_size):
                module(images)
                task.advance(len(labels))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def refit_readers(
    slim: nn.Module,
    original: nn.Module,
    readers: Iterable[str],
    kept_outputs: Mapping[str, Tensor],
    split: Split,
    progress: Progress,
) -> tuple[str, ...]:
    """Refit, in place and in definition order, the layers of `slim` that lost inputs.

    Each layer's weights become the ridge least-squares solution of "original output from slim input" on positions
    sampled from the images.

    Args:
        slim: The cut network.
        original: The network before the cut, with the same layer names.
        readers: Layers that lost inputs; convolutions without groups and linear layers are refitted.
        kept_outputs: For layers that lost outputs too, the output channels of `original` that are left.
        split: Images to look at; labels are not used.
        progress: Told about each layer.

    Returns:
        The layers that were refitted.

    Source: He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv:1707.06168, section
        3.1, the reconstruction step.
    """
    wanted = set(readers)
    names = [name for name, part in slim.named_modules() if name in wanted and _is_refittable(part)]
    with torch.no_grad(), eval_mode(slim), eval_mode(original), progress.task("least squares", len(names)) as task:
        for name in names:
            _refit(name, slim, original, kept_outputs.get(name), split)
            task.advance()
    return tuple(names)


def _is_refittable(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def _refit(name: str, slim: nn.Module, original: nn.Module, kept: Tensor | None, split: Split) -> None:
    layer = slim.get_submodule(name)
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    generator = torch.Generator().manual_seed(0)
    gram, cross = None, None
    for images, _ in evaluation_batches(split.first(_REFIT_IMAGES), _BATCH):
        inputs, _ = _input_and_output(slim, name, images)
        _, outputs = _input_and_output(original, name, images)
        x, y = _regression_rows(layer, inputs, outputs, generator)
        y = y if kept is None else y[:, kept]
        gram = x.T @ x if gram is None else gram + x.T @ x
        cross = x.T @ y if cross is None else cross + x.T @ y
    assert gram is not None
    assert cross is not None
    old = _solution_of(layer)
    ridge = _RIDGE * gram.diagonal().mean()
    regularised = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(regularised, cross + ridge * old)
    if torch.isfinite(solution).all():
        _store(layer, solution)


def _regression_rows(
    layer: nn.Conv2d | nn.Linear, inputs: Tensor, outputs: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return (rows, inputs + 1) and (rows, outputs) in float64; the last input column is 1 where there is a bias."""
    if isinstance(layer, nn.Linear):
        x, y = inputs.reshape(-1, inputs.shape[-1]), outputs.reshape(-1, outputs.shape[-1])
    else:
        width = outputs.shape[3]
        chosen = torch.randperm(outputs.shape[2] * width, generator=generator)[:_POSITIONS_PER_IMAGE]
        x = _patches(layer, inputs, chosen // width, chosen % width)
        y = outputs[:, :, chosen // width, chosen % width].transpose(1, 2).flatten(0, 1)
    if layer.bias is not None:
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
    return x.double(), y.double()


def _patches(layer: nn.Conv2d, inputs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return what a convolution reads for the outputs at (rows, columns): (N * positions, inputs * kernel)."""
    vertical, horizontal = (int(padding) for padding in layer.padding)
    padded = F.pad(inputs, (horizontal, horizontal, vertical, vertical))
    offsets = [torch.arange(size) * step for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    down = (rows[:, None] * layer.stride[0] + offsets[0])[:, :, None]
    across = (columns[:, None] * layer.stride[1] + offsets[1])[:, None, :]
    return padded[:, :, down, across].transpose(1, 2).flatten(0, 1).flatten(1)


def _solution_of(layer: nn.Conv2d | nn.Linear) -> Tensor:
    weight = layer.weight.flatten(1).T
    rows = weight if layer.bias is None else torch.cat([weight, layer.bias[None]])
    return rows.double()


def _store(layer: nn.Conv2d | nn.Linear, solution: Tensor) -> None:
    if layer.bias is not None:
        layer.bias.copy_(solution[-1])
        solution = solution[:-1]
    layer.weight.copy_(solution.T.reshape(layer.weight.shape))


class _ReachedError(Exception):
    """Ends a forward pass at the layer that was waited for, with what it read and gave."""

    def __init__(self, seen: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.seen = seen


def _input_and_output(network: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the first call of a layer reads and gives; the forward pass ends there."""

    def stop(_layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        raise _ReachedError((inputs[0], output))

    handle = network.get_submodule(name).register_forward_hook(stop)
    try:
        network(images)
    except _ReachedError as reached:
        return reached.seen
    finally:
        handle.remove()
    raise InternalError(f"Layer '{name}' reads channels of a cut group, but the forward pass never calls it.")
