"""Jacobian singular values in the records of `prune` and `finetune`, and their conclusion on the learning rate."""

from collections.abc import Callable, Mapping

from torch import nn

from compress.model.artifacts import TorchModel
from compress.model.stage_records import Isometry
from compress.search.context import StageContext
from compress.training.isometry import affordable, mean_singular_value

LOW_RATIO = 0.5  # of the baseline's mean singular value
LOW_RATE = 0.1  # of the reference rate
SOURCE = "arXiv:2105.05916"


def measure_isometry(
    artifact: TorchModel, networks: Mapping[str, Callable[[], nn.Module] | None], ctx: StageContext
) -> Isometry:
    """Return the mean singular value of each network's input-output Jacobian.

    Args:
        artifact: Model of the pipeline; the MACs of its baseline limit the effort of the measurement.
        networks: Name -> function that returns the network, or None for no network.
        ctx: Context of the stage, with the calibration images.

    Returns:
        Mean singular value by name, None without a network; or the reason why nothing was measured.
    """
    effort = affordable(artifact.baseline.metrics.macs, ctx.data.calibration)
    if effort is None:
        return Isometry(skipped=f"{artifact.baseline.metrics.macs:,} MACs an image would take too long")
    values: dict[str, float | None] = {}
    for name, make in networks.items():
        values[name] = None
        if make is not None:
            values[name], reason = mean_singular_value(make(), ctx.data.calibration, effort, ctx.progress)
            if reason:
                return Isometry(skipped=reason)
    images = min(effort.images, len(ctx.data.calibration))
    return Isometry(values=values, images=images, directions=effort.directions)


def conclusion(isometry: Isometry, rate: float, reference: float, reference_name: str) -> tuple[str, bool]:
    """Return advice on the learning rate by the singular values before training, and whether it is a warning.

    Args:
        isometry: Measurement with the values "baseline" and "before".
        rate: Peak learning rate of this training.
        reference: Peak learning rate to compare with.
        reference_name: Description of the reference, as in "of the original training".

    Returns:
        A sentence or two, and whether to warn; "" and False without a baseline to compare with.
    """
    baseline, before = isometry.values.get("baseline"), isometry.values.get("before")
    if not baseline or before is None:
        return "", False
    ratio, share = before / baseline, rate / reference
    facts = f"Mean Jacobian singular value: {ratio:.0%} of the baseline's. "
    peak = f"The peak is {rate:g}, {share:.3g} times that {reference_name} ({reference:g})."
    if ratio >= LOW_RATIO:
        return f"{facts}{peak}", False
    advice = f"A large peak learning rate helps it recover ({SOURCE}). "
    if share >= LOW_RATE:
        return f"{facts}{advice}{peak}", False
    return f"{facts}{advice}{peak} Raise learning_rate, or give original; probe: true compares three rates.", True
