"""Batches of tensors from the images of a split.

uint8 images stay uint8 until they are a batch; shuffling, cropping, flipping and normalising then run on the complete
batch. The order of an epoch depends only on (seed, epoch), the augmentation of a batch only on (seed, epoch,
batch). So a run that is resumed at any batch has the same batches as an uninterrupted one.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from compress.data.augmentation import Variation, drawn
from compress.data.packing import standard_strides
from compress.data.splits import Split
from compress.data.transforms import Policy, TransformSettings, draw_transforms
from compress.errors import DataError
from compress.tasks.outputs import plain

Batch = tuple[Tensor, Any]
Wanted = Literal["objective", "task", "nothing"]
RandomPurpose = Literal["order", "augmentation", "step", "weights"]

CPU = torch.device("cpu")
_PIXELS, _FEWEST_IMAGES, _MOST_IMAGES = 2**17, 4, 256


@dataclass(frozen=True)
class PlacedSplit(Split):
    """A split whose batches are created on a given device.

    Attributes:
        device: Device of the batches.
        resident: All images of the source, uint8 (N, H, W, C), on that device; None if images are read each time.
    """

    device: torch.device = CPU
    resident: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Standard augmentation of images.

    Attributes:
        crop_padding: Pixels of zero padding on each side before a random crop back to the size; 0 is off.
        flip: Whether half of the images are mirrored left to right.
        mixup: Alpha of the Beta distribution of the mixing weights of image pairs; 0 is off.
        cutmix: Alpha of the Beta distribution of the area share that a rectangle of another image replaces; 0 is off.
        resized_crop: As in `TransformSettings`.
        policy: As in `TransformSettings`.
        magnitude: As in `TransformSettings`.
        erasing: As in `TransformSettings`.
    """

    crop_padding: int = 0
    flip: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    resized_crop: float = 0.0
    policy: Policy = "none"
    magnitude: int = 9
    erasing: float = 0.0

    @property
    def transforms(self) -> TransformSettings:
        """The transforms that run image by image."""
        return TransformSettings(self.resized_crop, self.policy, self.magnitude, self.erasing)


def evaluation_batches(split: Split, batch_size: int, targets: Wanted = "objective") -> Iterator[Batch]:
    """Yield (float32 network input, targets) in order, every image once; the last batch may be smaller.

    Args:
        split: Split to read.
        batch_size: Images per batch.
        targets: "objective" for the training targets (class indices, or outputs of the baseline), "task" for the labels
            of the images, "nothing" for None.
    """
    starts = range(0, len(split), batch_size)
    positions = (np.arange(start, min(start + batch_size, len(split))) for start in starts)
    is_read = targets == "task" or (targets == "objective" and split.original is None)
    for images, stated in _read_ahead(split, positions, is_read):
        x = _to_input(split, images)
        yield x, _learned(split, x) if targets == "objective" and not is_read else stated


def fast_batch_size(split: Split) -> int:
    """Return the fastest batch size: small on a CPU for large images, so that feature maps fit into its caches."""
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
    """Yield one epoch of shuffled, augmented batches of equal size, without a smaller last batch.

    Args:
        split: Split of at least one image; a split smaller than a batch yields one batch of all images.
        batch_size: Images per batch.
        augmentation: Augmentation of the images.
        seed: Seed of the run; with `epoch`, it determines order and augmentation.
        epoch: Number of the epoch, from 0.
        start: Number of batches to skip at the beginning; later batches do not depend on it.
        part: (rank, size): every size-th image of each batch from the rank-th on, augmented as in the complete batch.
    """
    rank, size = part
    order = torch.randperm(len(split), generator=_generator(seed, "order", epoch)).numpy()
    numbers = range(start, batches_per_epoch(split, batch_size))
    whole = min(batch_size, len(split))
    positions = (order[number * batch_size : (number + 1) * batch_size][rank::size] for number in numbers)
    read = _read_ahead(split, positions, split.original is None)
    for number, (images, stated) in zip(numbers, read, strict=True):
        generator = _generator(seed, "augmentation", epoch, number)
        variation = varied(images, augmentation, generator, whole, slice(rank, None, size))
        x = _to_input(split, variation.of_images(images))
        yield x, split.task.vary(stated, variation) if split.original is None else _learned(split, x)


@torch.no_grad()
def _learned(split: Split, images: Tensor) -> Any:
    """Return the outputs of the baseline for a batch."""
    assert split.original is not None
    network = split.original()
    return plain(network(images), getattr(network, "output_names", ()))


def random_seed(seed: int, purpose: RandomPurpose, *parts: int) -> int:
    """Return the seed of one random purpose in one part of a run, in [0, 2^63).

    Args:
        seed: Seed of the run.
        purpose: Purpose of the random numbers, such as "order".
        parts: Numbers of the part of the run, such as epoch, batch or step.
    """
    entropy = [seed % 2**63, get_args(RandomPurpose).index(purpose), *parts]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _generator(seed: int, purpose: RandomPurpose, *parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(random_seed(seed, purpose, *parts))


def batches_per_epoch(split: Split, batch_size: int) -> int:
    """Return the number of batches that `training_batches` yields."""
    return max(1, len(split) // batch_size)


def augment(
    images: Tensor,
    augmentation: Augmentation,
    generator: torch.Generator,
    whole: int | None = None,
    part: slice = slice(None),
) -> Tensor:
    """Return augmented uint8 (N, H, W, C) images of the same shape.

    Args:
        images: A batch, or a part of one.
        augmentation: Augmentation of the images.
        generator: Random generator on the CPU; draws for the complete batch.
        whole: Number of images in the complete batch; None if `images` is the complete batch.
        part: Positions of `images` in the complete batch.
    """
    return varied(images, augmentation, generator, whole, part).of_images(images)


def varied(
    images: Tensor,
    augmentation: Augmentation,
    generator: torch.Generator,
    whole: int | None = None,
    part: slice = slice(None),
) -> Variation:
    """Draw the augmentation of a batch; arguments as in `augment`."""
    if images.ndim == 2 and (augmentation.crop_padding or augmentation.flip or not augmentation.transforms.is_off):
        raise DataError(
            "Samples of several inputs cannot be cropped, mirrored or transformed, augmentation asks for it.",
            hint="Leave augmentation out; the data set can vary what it gives.",
        )
    size = (images.shape[1], images.shape[2]) if images.ndim > 2 else (0, 0)
    count = len(images) if whole is None else whole
    variation = drawn(augmentation.crop_padding, augmentation.flip, generator, size, count, part)
    if augmentation.transforms.is_off:
        return variation
    if images.dtype != torch.uint8 or images.shape[3] not in (1, 3):
        raise DataError(
            f"Augmentation by resized_crop, policy and erasing needs uint8 images of 1 or 3 channels, got "
            f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape[1:])}.",
            hint="Use crop_padding and flip, which take any image.",
        )
    return replace(variation, transforms=draw_transforms(augmentation.transforms, generator, size, count, part))


def _read_ahead(split: Split, positions: Iterator[np.ndarray], with_targets: bool) -> Iterator[tuple[Tensor, Any]]:
    """Yield batches, with targets if wanted, while a thread reads the next batch."""

    def read(chosen: np.ndarray) -> tuple[Tensor, Any]:
        return _read_tensor(split, chosen), _to_tensors(split, split.read_targets(chosen)) if with_targets else None

    with ThreadPoolExecutor(1) as reader:
        pending = None
        for chosen in positions:
            following = reader.submit(read, chosen)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _to_tensors(split: Split, targets: Any) -> Any:
    """Return targets with arrays converted to tensors on the device of a split."""
    if isinstance(targets, np.ndarray):
        return _there(split, targets)
    if isinstance(targets, dict):
        return {name: _to_tensors(split, value) for name, value in targets.items()}
    if isinstance(targets, list | tuple):
        return type(targets)(_to_tensors(split, value) for value in targets)
    return targets


def _read_tensor(split: Split, positions: np.ndarray) -> Tensor:
    """Return uint8 (n, H, W, C) images by their positions in a split, on its device."""
    if isinstance(split, PlacedSplit) and split.resident is not None:
        return split.resident[_there(split, split.indices[positions])]
    return _there(split, split.read(positions))


def _there(split: Split, values: np.ndarray) -> Tensor:
    """Return an array as a tensor on the device of a split, copied asynchronously."""
    return torch.from_numpy(values).to(_device(split), non_blocking=True)


def _device(split: Split) -> torch.device:
    return split.device if isinstance(split, PlacedSplit) else CPU


def _to_input(split: Split, images: Tensor) -> Tensor:
    """Normalise (N, H, W, C) uint8 to the network's float32 input with standard strides; (N, K) rows are unchanged."""
    wanted = split.preprocessing
    if images.ndim == 2:
        return images
    if wanted.channels == "BGR":
        images = images.flip(-1)
    x = images.to(torch.float32) * wanted.scale
    x = (x - _constants(wanted.mean, x.device)) / _constants(wanted.std, x.device)
    return standard_strides(x.permute(0, 3, 1, 2) if wanted.layout == "NCHW" else x)


@cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
