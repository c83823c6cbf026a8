"""Transforms of torchvision in training batches: seeds, masks, boxes, refusals."""

import pytest
import torch

from compress.data.batches import Augmentation, varied
from compress.errors import DataError

SIZE = 32


def _generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(count: int = 6, channels: int = 3) -> torch.Tensor:
    return torch.randint(1, 256, (count, SIZE, SIZE, channels), generator=_generator(0), dtype=torch.uint8)


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(resized_crop=0.3),
        Augmentation(policy="rand_augment", magnitude=12),
        Augmentation(policy="trivial_augment"),
        Augmentation(policy="auto_augment"),
        Augmentation(erasing=1.0),
        Augmentation(2, True, resized_crop=0.5, policy="rand_augment", erasing=0.5),
    ],
    ids=lambda one: f"{one.resized_crop} {one.policy} {one.erasing}",
)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_transformed_by_their_seeds_alone(augmentation: Augmentation, channels: int) -> None:
    images = _images(channels=channels)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = varied(images, augmentation, _generator()).of_images(images)
    assert torch.equal(torch.random.get_rng_state(), before), "the random numbers of the network stay as they are"
    again = varied(images, augmentation, _generator()).of_images(images)
    other = varied(images, augmentation, _generator(4)).of_images(images)
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, images)


def test_a_part_of_a_batch_is_transformed_as_in_the_whole_batch() -> None:
    images, augmentation = _images(), Augmentation(resized_crop=0.3, policy="rand_augment", erasing=0.5)
    whole = varied(images, augmentation, _generator()).of_images(images)
    for rank in range(2):
        part = slice(rank, None, 2)
        own = varied(images[part], augmentation, _generator(), len(images), part).of_images(images[part])
        assert torch.equal(own, whole[part])


def _squares(count: int) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Return images with one white square each, the same as masks, and its boxes."""
    images = torch.zeros(count, SIZE, SIZE, 3, dtype=torch.uint8)
    boxes = []
    for place in range(count):
        left, top = 4 + place, 20 - place
        images[place, top : top + 8, left : left + 10] = 255
        box = torch.tensor([[left, top, left + 10, top + 8]], dtype=torch.float32)
        boxes.append({"boxes": box, "labels": torch.tensor([place])})
    return images, (images[..., 0] > 0).long(), boxes


def test_masks_follow_their_images() -> None:
    images, masks, _ = _squares(12)
    variation = varied(images, Augmentation(2, True, resized_crop=0.3), _generator())
    moved, followed = variation.of_images(images)[..., 0] > 127, variation.of_maps(masks, 255)
    assert followed.dtype == masks.dtype
    assert set(followed.unique().tolist()) <= {0, 1, 255}
    differing = (moved != (followed == 1)) & (followed != 255)
    assert differing.float().mean() < 0.03, "only pixels on the edges differ: images are interpolated, masks are not"
    assert (followed == 1).sum() > 500


def test_boxes_follow_their_images_and_vanish_with_them() -> None:
    images, _, boxes = _squares(12)
    variation = varied(images, Augmentation(2, True, resized_crop=0.1), _generator())
    moved, followed = variation.of_images(images)[..., 0] > 127, variation.of_boxes(boxes)
    lost = 0
    for mask, target, given in zip(moved, followed, boxes, strict=True):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if len(rows) == 0:
            lost += 1
            assert len(target["labels"]) == 0 or float(target["boxes"].diff().abs().min()) < 4
            continue
        seen = [float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1]
        assert target["boxes"][0].tolist() == pytest.approx(seen, abs=2.5)
        assert target["labels"].tolist() == given["labels"].tolist()
    assert 0 < lost < 12


def test_erasing_sets_a_rectangle_to_zeros() -> None:
    images = _images()
    erased = varied(images, Augmentation(erasing=1.0), _generator()).of_images(images)
    gone = (erased == 0).all(-1)
    assert torch.equal(erased[~gone], images[~gone])
    for one in gone:
        rows, columns = one.any(1), one.any(0)
        assert int(one.sum()) == int(rows.sum()) * int(columns.sum()) > 0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 8, 8, 3), r"needs uint8 images of 1 or 3 channels, got float32 of shape \(8, 8, 3\)"),
        (torch.zeros(2, 8, 8, 4, dtype=torch.uint8), r"got uint8 of shape \(8, 8, 4\)"),
        (torch.zeros(2, 9), "Samples of several inputs cannot be cropped, mirrored or transformed"),
    ],
)
def test_what_torchvision_cannot_transform_is_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        varied(images, Augmentation(policy="trivial_augment"), _generator())
