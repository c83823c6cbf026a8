"""Image transforms of torchvision for training batches: resized crops, policies and erasing.

They run image by image. Every image has its own seed, so that the same transforms can be drawn again for its mask or
boxes, and on any number of processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Policy = Literal["none", "rand_augment", "trivial_augment", "auto_augment"]
_SEEDS = 2**62


@dataclass(frozen=True, slots=True)
class TransformSettings:
    """Transforms of `torchvision.transforms.v2`.

    Attributes:
        resized_crop: Least share of the area in a random crop that is resized to the full size; 0 is off. The aspect
            ratio lies in [3/4, 4/3].
        policy: Random photometric and geometric operations on images; "none" is off.
        magnitude: Strength of the operations of "rand_augment", 0 to 30.
        erasing: Probability that a random rectangle of an image becomes zeros.

    Source: Szegedy et al. 2015, arXiv:1409.4842 (resized crops); Cubuk et al. 2019, arXiv:1909.13719 (RandAugment);
        Müller and Hutter 2021, arXiv:2103.10158 (TrivialAugment); Cubuk et al. 2018, arXiv:1805.09501 (AutoAugment);
        Zhong et al. 2017, arXiv:1708.04896 (random erasing).
    """

    resized_crop: float = 0.0
    policy: Policy = "none"
    magnitude: int = 9
    erasing: float = 0.0

    @property
    def is_off(self) -> bool:
        """True if images stay unchanged."""
        return not self.resized_crop and self.policy == "none" and not self.erasing


@dataclass(frozen=True)
class DrawnTransforms:
    """Transforms drawn for a batch.

    Attributes:
        settings: The transforms.
        seeds: Seed of each image.
        size: (height, width) of the images.
    """

    settings: TransformSettings
    seeds: tuple[int, ...]
    size: tuple[int, int]

    def of_images(self, images: Tensor) -> Tensor:
        """Return transformed (N, H, W, C) uint8 images of the same shape."""
        from torchvision import tv_tensors

        def transformed(image: Tensor, seed: int) -> Tensor:
            drawn = self._apply(tv_tensors.Image(image.permute(2, 0, 1)), seed, with_values=True)
            plain: Tensor = drawn.as_subclass(Tensor).permute(1, 2, 0)
            return plain

        device = images.device
        pairs = zip(images.cpu(), self.seeds, strict=True)
        return torch.stack([transformed(image, seed) for image, seed in pairs]).to(device)

    def of_maps(self, maps: Tensor) -> Tensor:
        """Return (N, H, W) maps with the transforms of the images; crops lie inside of the maps, so need no fill."""
        from torchvision import tv_tensors

        device = maps.device
        pairs = zip(maps.cpu(), self.seeds, strict=True)
        moved = [self._apply(tv_tensors.Mask(one), seed).as_subclass(Tensor) for one, seed in pairs]
        return torch.stack(moved).to(device)

    def of_boxes(self, targets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return boxes with the transforms of the images; boxes outside of the crop are dropped.

        Polygons and key points are left out.

        Args:
            targets: For each image `boxes` (M, 4) [x0, y0, x1, y1] and `labels` (M,).
        """
        return [self._boxes(target, seed) for target, seed in zip(targets, self.seeds, strict=True)]

    def _boxes(self, target: dict[str, Any], seed: int) -> dict[str, Any]:
        from torchvision import tv_tensors

        boxes = target["boxes"]
        given = tv_tensors.BoundingBoxes(boxes.cpu(), format="XYXY", canvas_size=self.size)
        moved = self._apply(given, seed).as_subclass(Tensor).to(boxes.device)
        height, width = self.size
        moved = moved.clamp(min=moved.new_zeros(4), max=moved.new_tensor([width, height, width, height]))
        seen = (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])
        others = {key: value for key, value in target.items() if key not in ("polygons", "keypoints", "masks")}
        return {**others, "boxes": moved[seen], "labels": target["labels"][seen]}

    def _apply(self, value: Any, seed: int, with_values: bool = False) -> Any:
        """Transform one image, mask or set of boxes; only images are changed by policies and erasing."""
        with _seeded(seed):
            for transform in _build(self.settings, self.size, with_values):
                value = transform(value)
        return value


def draw_transforms(
    settings: TransformSettings, generator: torch.Generator, size: tuple[int, int], whole: int, part: slice
) -> DrawnTransforms:
    """Draw the transforms of a batch.

    Args:
        settings: Settings of the transforms.
        generator: Random generator on the CPU; draws for the complete batch.
        size: (height, width) of the images.
        whole: Number of images in the complete batch.
        part: Images of the batch that this process transforms.
    """
    seeds = torch.randint(_SEEDS, (whole,), generator=generator)[part]
    return DrawnTransforms(settings, tuple(seeds.tolist()), size)


def _build(settings: TransformSettings, size: tuple[int, int], with_values: bool) -> Iterator[Callable[[Any], Any]]:
    """Yield the transforms in order; policies and erasing only if `with_values`."""
    from torchvision.transforms import v2

    if settings.resized_crop:
        yield v2.RandomResizedCrop(size, scale=(settings.resized_crop, 1.0), antialias=True)
    if not with_values:
        return
    if settings.policy == "rand_augment":
        yield v2.RandAugment(magnitude=settings.magnitude)
    elif settings.policy == "trivial_augment":
        yield v2.TrivialAugmentWide()
    elif settings.policy == "auto_augment":
        yield v2.AutoAugment()
    if settings.erasing:
        yield v2.RandomErasing(settings.erasing)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for transforms, which accept no generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
