"""Parity of two runtimes, such as an exported file and its torch network, on real images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from compress.data.packing import is_packed
from compress.data.splits import Split
from compress.errors import ModelError, NonFinite
from compress.progress import Progress, SilentProgress
from compress.verification.quality import batch_size_of, check_not_empty, image_batches
from compress.verification.runtimes.base import Runtime
from compress.verification.samples import feed, fill_batch, fixed_batch

_MORE_PIXELS = 64  # a multiple of the total stride of usual networks


@dataclass(frozen=True, slots=True)
class ParityResult:
    """Difference between the outputs of two runtimes.

    Attributes:
        samples: Images compared.
        max_abs: Largest absolute difference of any output value.
        mean_abs: Mean absolute difference.
        quantiles: {"p50", "p99"} of the absolute differences.
        top1_agreement: Share of images, in [0, 1], with the same largest output; NaN for outputs that are not (N, K).
        smallest_tolerance: Smallest limit that would have passed, rounded up to two digits.
        largest_output: Largest absolute value of any output of the reference.
    """

    samples: int
    max_abs: float
    mean_abs: float
    quantiles: dict[str, float]
    top1_agreement: float
    smallest_tolerance: float
    largest_output: float


def parity(
    runtime: Runtime,
    reference: Runtime,
    split: Split,
    samples: int,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> ParityResult:
    """Compare all outputs of two open runtimes on images spread evenly over a split.

    Args:
        runtime: Runtime that is checked; its batch size is used where it is fixed.
        reference: Runtime with the outputs that are correct.
        split: Split of at least one image.
        samples: Number of images to compare; a smaller split is compared completely.
        batch_size: Images at once where the batch axis is open.
        progress: Receives progress by batch.

    Raises:
        DataError: The split is empty.
        ModelError: Output names or shapes differ, or one of the networks fails.
        NonFinite: An output of one of the networks is NaN or infinite.
        ConfigValueError: A runtime would take too long for so many images.
    """
    check_not_empty(split)
    chosen = split.first(samples)
    for one in (runtime, reference):
        one.check_work(len(chosen))
    size = batch_size_of(runtime, batch_size)
    differences: list[np.ndarray] = []
    agreeing: list[np.ndarray] = []
    largest = 0.0
    with (progress or SilentProgress()).task(f"parity on {split.name}", len(chosen)) as task:
        for images, _ in image_batches(chosen, size):
            filled = fill_batch(images, runtime.signature.inputs[0])
            got, wanted = runtime.run(feed(runtime, filled)), reference.run(feed(reference, filled))
            for a, b in _paired(got, wanted, len(images)):
                differences.append(np.abs(a - b).ravel())
                largest = max(largest, float(np.abs(b).max(initial=0.0)))
                if a.ndim == 2:
                    agreeing.append(a.argmax(1) == b.argmax(1))
            task.advance(len(images))
    return _summary(len(chosen), np.concatenate(differences), agreeing, largest)


def edge_parity(runtime: Runtime, reference: Runtime, split: Split, largest: int) -> dict[str, float]:
    """Compare two open runtimes on unusual inputs: black and white images, other image sizes, batches of 1, 3 and many.

    Args:
        runtime: Runtime that is checked; with a fixed batch size, no other size is run.
        reference: Runtime with the outputs that are correct.
        split: Split of at least one image; repeated where it has too few.
        largest: Images in the largest batch.

    Returns:
        Description of the input -> the largest absolute difference of any output value.

    Raises:
        As `parity`.
    """
    check_not_empty(split)
    cases = _unusual_images(runtime, split)
    for count in (1, 3, largest) if fixed_batch(runtime) is None else ():
        positions = np.arange(count) % len(split)
        cases[f"batch {count}"] = split.preprocessing.normalize(split.source.read(split.indices[positions]))
    found = {}
    for name, images in cases.items():
        filled = fill_batch(images, runtime.signature.inputs[0])
        got, wanted = runtime.run(feed(runtime, filled)), reference.run(feed(reference, filled))
        found[name] = max(float(np.abs(a - b).max()) for a, b in _paired(got, wanted, len(images)))
    return found


def _unusual_images(runtime: Runtime, split: Split) -> dict[str, np.ndarray]:
    """Return a black image, a white image, and a larger one for each open axis of height and width; none for rows."""
    inputs = runtime.signature.inputs
    if is_packed(inputs):
        return {}
    first = split.source.read(split.indices[:1])
    brightest = 255 if first.dtype == np.uint8 else 1  # of images that are prepared already
    raw = {"black image": np.zeros_like(first), "white image": np.full_like(first, brightest)}
    for axis, name in ((1, "height"), (2, "width")):
        if name in inputs[0].shape:
            more = [(0, _MORE_PIXELS if one == axis else 0) for one in range(first.ndim)]
            larger = np.pad(first, more, mode="wrap")
            raw[f"size {larger.shape[1]} x {larger.shape[2]}"] = larger
    return {name: split.preprocessing.normalize(images) for name, images in raw.items()}


def _paired(
    got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], count: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return pairs of float64 outputs for the first `count` images, after checking that they can be compared."""
    if set(got) != set(wanted) or not wanted:
        raise ModelError(f"Outputs must be named {', '.join(wanted)} as in the reference, got {', '.join(got)}.")
    pairs = []
    for name, values in wanted.items():
        if got[name].shape != values.shape:
            raise ModelError(
                f"Output '{name}' must have shape {values.shape} as in the reference, got {got[name].shape}."
            )
        for owner, array in (("file", got[name]), ("reference", values)):
            if not np.isfinite(array).all():
                raise NonFinite(f"Output '{name}' of the {owner} must be finite, got NaN or infinity.")
        pairs.append((got[name][:count].astype(np.float64), values[:count].astype(np.float64)))
    return pairs


def _summary(samples: int, differences: np.ndarray, agreeing: list[np.ndarray], largest_output: float) -> ParityResult:
    largest = float(differences.max())
    return ParityResult(
        samples=samples,
        max_abs=largest,
        mean_abs=float(differences.mean()),
        quantiles={"p50": float(np.quantile(differences, 0.5)), "p99": float(np.quantile(differences, 0.99))},
        top1_agreement=float(np.concatenate(agreeing).mean()) if agreeing else math.nan,
        smallest_tolerance=round_up(largest),
        largest_output=largest_output,
    )


def round_up(value: float, digits: int = 2) -> float:
    """Return the smallest number with `digits` significant digits that is at least `value`.

    >>> round_up(1.234e-6), round_up(0.1), round_up(0.0)
    (1.3e-06, 0.1, 0.0)
    """
    if value <= 0:
        return 0.0
    exponent = math.floor(math.log10(value)) - digits + 1
    rounded = float(f"{math.ceil(value / 10.0**exponent)}e{exponent}")
    shorter = float(f"{value:.{digits - 1}e}")
    return shorter if shorter >= value else rounded
