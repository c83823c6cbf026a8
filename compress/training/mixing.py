"""Mixup and CutMix: pairs of images of a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.data.batches import Augmentation


def mixed(images: Tensor, augmentation: Augmentation, layout: str = "NCHW") -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour in the batch; if both ways are on, each batch draws one of them.

    Args:
        images: (N, C, H, W) or (N, H, W, C).
        augmentation: Settings with the alphas of `mixup` and `cutmix`; 0 is off.
        layout: "NCHW" or "NHWC".

    Returns:
        The images, and (N,) the shares of the neighbours in them, on the CPU; all 0 if nothing is mixed.

    Source: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412, with a share for each
        pair; Yun et al. 2019, "CutMix", arXiv:1905.04899.
    """
    alphas = {"mixup": augmentation.mixup, "cutmix": augmentation.cutmix}
    ways = [name for name, alpha in alphas.items() if alpha]
    if not ways:
        return images, torch.zeros(len(images))
    way = ways[0] if len(ways) == 1 else ways[int(torch.randint(2, ()))]
    shares = torch.distributions.Beta(alphas[way], alphas[way])
    if way == "mixup":
        share = shares.sample((len(images),))
        weights = share.reshape(-1, *[1] * (images.ndim - 1)).to(images.device, non_blocking=True)
        return images.lerp(images.roll(1, 0), weights), share
    return _with_rectangles(images, float(shares.sample()), 2 if layout == "NCHW" else 1)


def mixed_loss(outputs: Tensor, labels: Tensor, share: Tensor, smoothing: float) -> Tensor:
    """Return the mean cross-entropy of a mixed batch.

    Args:
        outputs: (N, K) logits.
        labels: (N,) labels of the images before mixing.
        share: (N,) share of the neighbour in each image, and so the weight of the neighbour's label.
        smoothing: Label smoothing, in [0, 1).
    """
    own, other = (
        F.cross_entropy(outputs, wanted, label_smoothing=smoothing, reduction="none")
        for wanted in (labels, labels.roll(1, 0))
    )
    return own.lerp(other, share.to(own.device, non_blocking=True)).mean()


def _with_rectangles(images: Tensor, area: float, down: int) -> tuple[Tensor, Tensor]:
    """Put a rectangle of the neighbour into each image, at the same position in the complete batch.

    Args:
        images: The batch.
        area: Share of the image that the rectangle covers, before clipping at the borders.
        down: Axis of the height; the axis of the width follows it.
    """
    where, share = [slice(None)] * images.ndim, 1.0
    for axis in (down, down + 1):
        size = images.shape[axis]
        half, centre = round(area**0.5 * size) // 2, int(torch.randint(size, ()))
        where[axis] = slice(max(0, centre - half), min(size, centre + half))
        share *= (where[axis].stop - where[axis].start) / size
    result = images.clone()
    result[tuple(where)] = images.roll(1, 0)[tuple(where)]
    return result, torch.full((len(images),), share)
