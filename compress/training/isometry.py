"""Dynamical isometry probe: mean singular value of a network's input-output Jacobian.

Pruning lowers the singular values, and training recovers them the faster the larger the learning rate is. The probe
measures the remaining singular values of a network.

    J (outputs x inputs) of one image  --P (m x outputs), orthonormal rows-->  P J  -->  mean of its singular values

With more outputs than `MAX_OUTPUTS`, J is projected on that many random directions, the same for all networks with
equally many outputs. On average, the singular values of P J have the root mean square of J's. Their mean is about that
root mean square, and so larger than the mean of J if J's singular values differ much. Values are comparable between
networks with the same outputs.

Source: Wang, Qin, Bai and Fu 2021, "Dynamical Isometry: The Missing Ingredient for Neural Network Pruning",
    arXiv:2105.05916. The projection is ours.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.data.batches import evaluation_batches
from compress.data.splits import Split
from compress.model.adapter import wiring_of
from compress.model.modes import eval_mode
from compress.progress import Progress, SilentProgress
from compress.tasks.outputs import each
from compress.training.evaluate import run

IMAGES, FEWEST_IMAGES = 32, 4
MAX_OUTPUTS = 16  # directions of the output
MAX_MACS = 1e11  # of one measurement: a few seconds on two cores
MAX_SCALARS = 2**19  # of all images: depthwise networks take longer than their MACs suggest
_MAX_PROJECTION = 2**24  # scalars of the projection
_BATCH_SCALARS = 2**18
_SEED = 0


@dataclass(frozen=True, slots=True)
class Effort:
    """Size of one measurement; the same for all networks that are compared.

    Attributes:
        images: Number of calibration images.
        directions: Largest number of output directions.
    """

    images: int
    directions: int


def affordable(macs: int, split: Split) -> Effort | None:
    """Return the size of a measurement that stays within a few seconds, or None.

    It follows from the MACs and the size of an image, not from the clock, so that records do not depend on the machine.
    An image costs one forward pass and a backward pass to the input for each direction.

    Args:
        macs: MACs of the baseline for one image.
        split: Calibration images.
    """
    passes = MAX_MACS / max(1, macs)
    images = max(FEWEST_IMAGES, min(IMAGES, int(passes / (1 + MAX_OUTPUTS)), MAX_SCALARS // _scalars(split)))
    directions = min(MAX_OUTPUTS, int(passes / images) - 1)
    return Effort(images, directions) if directions >= 1 else None


def mean_singular_value(
    module: nn.Module, split: Split, effort: Effort, progress: Progress | None = None
) -> tuple[float | None, str]:
    """Return the mean singular value of the Jacobian of all outputs by the input, over images and directions.

    The network computes in float32 and eval mode; weights and gradients do not change. An image has min(directions,
    outputs, inputs) singular values, of a matrix of (directions or outputs) x inputs.

    Args:
        module: The network, on the CPU; each image's outputs must not depend on the others of its batch.
        split: Images, of which an evenly spread part is used; targets are not used.
        effort: Number of images and of output directions.
        progress: Receives progress by batch.

    Returns:
        The value and ""; or None and the reason why there is no value.
    """
    wiring = wiring_of(module)
    if wiring is not None and any(spec.dtype != "float32" for spec in wiring.inputs):
        return None, "an input is not of float32: there is no derivative by it"
    split = split.first(effort.images)
    frozen = [parameter for parameter in module.parameters() if parameter.requires_grad]
    means: list[Tensor] = []
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with (
            eval_mode(module),
            (progress or SilentProgress()).task("Jacobian singular values", len(split)) as task,
        ):
            for images, _ in evaluation_batches(split, _batch_size(split), "nothing"):
                means.append(_image_means(module, images, effort.directions))
                task.advance(len(images))
    except (RuntimeError, NotImplementedError) as error:  # an operation without a derivative
        return None, f"there is no derivative: {str(error).strip().splitlines()[0][:200]}"
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    value = float(torch.cat(means).mean())
    return (value, "") if math.isfinite(value) else (None, "the Jacobian is not finite")


def _batch_size(split: Split) -> int:
    return max(1, min(IMAGES, _BATCH_SCALARS // _scalars(split)))


def _scalars(split: Split) -> int:
    images, _ = next(evaluation_batches(split.first(1), 1, "nothing"))
    return max(1, images.numel())


@torch.enable_grad()
def _image_means(module: nn.Module, images: Tensor, directions: int) -> Tensor:
    """Return (N,) the mean singular value of each image."""
    images = images.detach().requires_grad_(True)
    outputs = torch.cat([one.reshape(len(one), -1).float() for one in each(run(module, images))], 1)
    rows = []
    for direction in projection(outputs.shape[1], directions):
        total = (outputs @ direction).sum()  # images are independent: the gradient of a sum holds one row of each
        (row,) = torch.autograd.grad(total, images, retain_graph=True)
        rows.append(row.flatten(1))
    values: Tensor = torch.linalg.svdvals(torch.stack(rows, 1).double())
    return values.mean(1)


def projection(outputs: int, directions: int) -> Tensor:
    """Return (m, outputs) orthonormal directions of the output: the unit vectors if they suffice, else random ones.

    Args:
        outputs: Number of scalars that a network returns for one image.
        directions: Largest number of directions; fewer are returned if they would not fit into memory.
    """
    if outputs <= directions:
        return torch.eye(outputs)
    count = max(1, min(directions, _MAX_PROJECTION // outputs))
    drawn = torch.randn(outputs, count, generator=torch.Generator().manual_seed(_SEED))
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis.T.contiguous()
