"""How are images turned into batches of tensors?

uint8 images stay uint8 until they are a batch; shuffling, cropping, flipping and normalising then run on the whole
batch at once. The order of an epoch depends on (seed, epoch) alone and the augmentation of a batch on (seed, epoch,
batch), so a run that is resumed at any batch sees the same as an undisturbed one.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.data.splits import Split

Batch = tuple[Tensor, Tensor]
RandomPurpose = Literal["order", "augmentation", "step", "weights"]

CPU = torch.device("cpu")
_PIXELS, _FEWEST_IMAGES, _MOST_IMAGES = 2**17, 4, 256


@dataclass(frozen=True)
class PlacedSplit(Split):
    """A split whose batches are made on some device.

    Attributes:
        device: Where batches are made.
        resident: All images of the source, uint8 (N, H, W, C), on that device; None where they are read each time.
    """

    device: torch.device = CPU
    resident: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Standard augmentation for classification.

    Attributes:
        crop_padding: Pixels of zero padding on each side before a random crop back to the size; 0 is off.
        flip: Whether half of the images are mirrored left to right.
        mixup: Alpha of the Beta distribution of the shares in which pairs of images are mixed; 0 is off.
        cutmix: Alpha of that of the share of a rectangle of its neighbour in each image; 0 is off.
    """

    crop_padding: int = 0
    flip: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0


def evaluation_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Yield (float32 network input, int64 labels) in order, every image once; the last batch may be smaller."""
    starts = range(0, len(split), batch_size)
    positions = (np.arange(start, min(start + batch_size, len(split))) for start in starts)
    labels = split.labels
    for chosen, images in _read_ahead(split, positions):
        yield _to_input(split, images), _there(split, labels[chosen])


def fast_batch_size(split: Split) -> int:
    """Return how many images run fastest at once: on a CPU few large ones, whose feature maps stay in its caches."""
    if len(split) == 0 or _device(split) != CPU:
        return _MOST_IMAGES
    pixels = math.prod(split.read(np.zeros(1, np.int64)).shape[1:-1])
    return min(max(_FEWEST_IMAGES, _PIXELS // pixels), _MOST_IMAGES)


def training_batches(
    split: Split,
    batch_size: int,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Yield one epoch of shuffled, augmented batches of equal size; a remainder smaller than a batch is left out.

    Args:
        split: At least one image; a split smaller than a batch gives one batch of all of it.
        batch_size: Images a batch.
        augmentation: What is varied.
        seed: Together with `epoch` decides order and augmentation.
        epoch: Counted from 0.
        start: Batches to leave out at the beginning; those behind them are the same as without.
        part: (rank, size): of every batch only each size-th image, from the rank-th on, varied as in the whole batch.
    """
    rank, size = part
    order = torch.randperm(len(split), generator=_generator(seed, "order", epoch)).numpy()
    labels = split.labels
    numbers = range(start, batches_per_epoch(split, batch_size))
    whole = min(batch_size, len(split))
    positions = (order[number * batch_size : (number + 1) * batch_size][rank::size] for number in numbers)
    for number, (chosen, images) in zip(numbers, _read_ahead(split, positions), strict=True):
        generator = _generator(seed, "augmentation", epoch, number)
        augmented = augment(images, augmentation, generator, whole, slice(rank, None, size))
        yield _to_input(split, augmented), _there(split, labels[chosen])


def random_seed(seed: int, purpose: RandomPurpose, *parts: int) -> int:
    """Return what seeds everything random in one part of a run, in [0, 2^63).

    Args:
        seed: Of the run.
        purpose: What is drawn.
        parts: Which part of the run: epoch, batch, step.
    """
    entropy = [seed % 2**63, get_args(RandomPurpose).index(purpose), *parts]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _generator(seed: int, purpose: RandomPurpose, *parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(random_seed(seed, purpose, *parts))


def batches_per_epoch(split: Split, batch_size: int) -> int:
    """Return how many batches `training_batches` yields."""
    return max(1, len(split) // batch_size)


def augment(
    images: Tensor,
    augmentation: Augmentation,
    generator: torch.Generator,
    whole: int | None = None,
    part: slice = slice(None),
) -> Tensor:
    """Vary a batch of uint8 (N, H, W, C) images; the shape stays.

    Args:
        images: The batch, or a part of one.
        augmentation: What is varied.
        generator: Draws for the whole batch, on the CPU.
        whole: How many images that has; None where `images` is all of it.
        part: Which of them `images` are.
    """
    count, height, width, _ = images.shape
    device = images.device
    drawn = count if whole is None else whole
    if augmentation.crop_padding:
        pad = augmentation.crop_padding
        padded = F.pad(images, (0, 0, pad, pad, pad, pad))
        top = torch.randint(0, 2 * pad + 1, (drawn, 1), generator=generator)[part]
        left = torch.randint(0, 2 * pad + 1, (drawn, 1), generator=generator)[part]
        rows = (top + torch.arange(height))[:, :, None].to(device, non_blocking=True)
        columns = (left + torch.arange(width))[:, None, :].to(device, non_blocking=True)
        images = padded[torch.arange(count, device=device)[:, None, None], rows, columns]
    if augmentation.flip:
        mirrored = (torch.rand(drawn, generator=generator)[part] < 0.5).to(device, non_blocking=True)
        images = torch.where(mirrored[:, None, None, None], images.flip(2), images)
    return images


def _read_ahead(split: Split, positions: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Read the next batch in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as reader:
        pending = None
        for chosen in positions:
            following = (chosen, reader.submit(_read_tensor, split, chosen))
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = following
        if pending is not None:
            yield pending[0], pending[1].result()


def _read_tensor(split: Split, positions: np.ndarray) -> Tensor:
    """Return uint8 (n, H, W, C) images by their positions in a split, on its device."""
    if isinstance(split, PlacedSplit) and split.resident is not None:
        return split.resident[_there(split, split.indices[positions])]
    return _there(split, split.read(positions))


def _there(split: Split, values: np.ndarray) -> Tensor:
    """Return an array as a tensor on a split's device; nothing waits for it to arrive."""
    return torch.from_numpy(values).to(_device(split), non_blocking=True)


def _device(split: Split) -> torch.device:
    return split.device if isinstance(split, PlacedSplit) else CPU


def _to_input(split: Split, images: Tensor) -> Tensor:
    """Normalise (N, H, W, C) uint8 to the network's float32 input, contiguous."""
    wanted = split.preprocessing
    if wanted.channels == "BGR":
        images = images.flip(-1)
    x = images.to(torch.float32) * wanted.scale
    x = (x - _constants(wanted.mean, x.device)) / _constants(wanted.std, x.device)
    return x.permute(0, 3, 1, 2).contiguous() if wanted.layout == "NCHW" else x


@cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
