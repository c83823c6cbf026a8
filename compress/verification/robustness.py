"""Does a network that is as accurate as before also stand as much? Compared with the baseline where images are harder.

The same noise and the same spoilt images go into both networks. What is reported, and why top-1 alone does not show it:
Liebenwein et al. 2021, "Lost in Pruning", arXiv:2103.03014.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from compress.catalog import CORRUPTIONS, NOMINAL
from compress.data.splits import Split
from compress.progress import Progress, SilentProgress
from compress.verification.corruptions import add_noise, corrupt
from compress.verification.metrics import Estimate, Predictions, estimate_changes
from compress.verification.quality import Change, predict_each
from compress.verification.runtimes.base import Runtime


@dataclass(frozen=True, slots=True)
class Robustness:
    """What is looked at.

    Attributes:
        images: Of the evaluation split, spread evenly; all of a smaller one.
        noise: "uniform" or "gaussian".
        noise_levels: In units of the network's input, after normalisation.
        corruptions: Names in `catalog.CORRUPTIONS`.
        severities: 1 to 5.
        seed: Decides everything random.
    """

    images: int = 1000
    noise: str = "uniform"
    noise_levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    corruptions: tuple[str, ...] = CORRUPTIONS
    severities: tuple[int, ...] = (3,)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Distribution:
    """Images of one kind.

    Attributes:
        name: Such as "uniform noise 0.1" or "jpeg 3".
        kind: "nominal", "noise", "corruption" or "shifted".
        spoil: Changes uint8 images, given the place of the first one in the split; None leaves them.
        disturb: The same for network inputs.
        split: Whose images; None for the evaluation split.
    """

    name: str
    kind: str
    spoil: Change | None = None
    disturb: Change | None = None
    split: Split | None = None


def distributions(wanted: Robustness, shifted: Mapping[str, Split] | None = None) -> list[Distribution]:
    """Return what is looked at, the images as they are first, the user's own data sets last."""
    found = [Distribution(NOMINAL, NOMINAL)]
    for level in wanted.noise_levels:
        disturb = partial(_disturb, wanted.noise, level, wanted.seed)
        found.append(Distribution(f"{wanted.noise} noise {level:g}", "noise", disturb=disturb))
    for name in wanted.corruptions:
        for severity in wanted.severities:
            spoil = partial(_spoil, name, severity, wanted.seed)
            found.append(Distribution(f"{name} {severity}", "corruption", spoil=spoil))
    return found + [Distribution(name, "shifted", split=split) for name, split in (shifted or {}).items()]


def _disturb(kind: str, level: float, seed: int, inputs: np.ndarray, start: int) -> np.ndarray:
    """Add noise that depends on the place of each image alone, not on how many go in at once."""
    each = [add_noise(one[None], kind, level, (seed, start + place)) for place, one in enumerate(inputs)]
    return np.concatenate(each)


def _spoil(name: str, severity: int, seed: int, images: np.ndarray, start: int) -> np.ndarray:
    """Corrupt each image by what depends on its place alone."""
    each = [corrupt(name, one[None], severity, (seed, start + place)) for place, one in enumerate(images)]
    return np.concatenate(each)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a network stands on one distribution.

    Attributes:
        name: Of the distribution.
        kind: Of the distribution.
        top1: Of the file.
        baseline_top1: Of the baseline; None without one.
        changes: "drop.top1", "churn" and "softmax_distance" against the baseline there; empty without one.
    """

    name: str
    kind: str
    top1: float
    baseline_top1: float | None = None
    changes: Mapping[str, Estimate] = field(default_factory=dict)


def standings(
    session: Runtime,
    baseline: Runtime | None,
    split: Split,
    wanted: Robustness,
    batch_size: int,
    progress: Progress | None = None,
    shifted: Mapping[str, Split] | None = None,
) -> list[Standing]:
    """Let a file and its baseline predict on every distribution.

    Args:
        session: The file, open.
        baseline: The untouched network, open; None when there is none.
        split: At least one image.
        wanted: What is looked at.
        batch_size: Images at once where the batch axis is open.
        progress: Told about each distribution.
        shifted: Data sets from elsewhere by their names.

    Raises:
        As `compress.verification.quality.predict`.
    """
    found, every = [], distributions(wanted, shifted)
    with (progress or SilentProgress()).task("robustness", len(every)) as task:
        for one in every:
            chosen = (one.split or split).first(wanted.images)
            sessions = (session,) if baseline is None else (session, baseline)
            after, *before = predict_each(sessions, chosen, batch_size, spoil=one.spoil, disturb=one.disturb)
            found.append(_standing(one, before[0] if before else None, after))
            task.advance()
    return found


def _standing(one: Distribution, before: Predictions | None, after: Predictions) -> Standing:
    top1 = float(after.hits.mean())
    if before is None:
        return Standing(one.name, one.kind, top1)
    changes = estimate_changes(before, after)
    kept = {name: changes[name] for name in ("drop.top1", "churn", "softmax_distance")}
    return Standing(one.name, one.kind, top1, float(before.hits.mean()), kept)


def summarize(found: Sequence[Standing]) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Return what gates are held to: of the file alone, and against the baseline.

    Returns:
        "noise", "corruptions" and "shifted": mean top-1 there. Against the baseline "drop.noise" and so on: mean loss
        of top-1; "drop.worst_distribution": the largest loss; "rise.excess_error": by how much more the file loses from
        the nominal images to the corrupted ones than the baseline does.
    """
    own, changes = {}, {}
    kinds = {"noise": "noise", "corruptions": "corruption", "shifted": "shifted"}
    for name, kind in kinds.items():
        those = [one for one in found if one.kind == kind]
        if not those:
            continue
        detail = f"mean over {len(those)} distributions"
        own[name] = Estimate(float(np.mean([one.top1 for one in those])), detail=detail)
        drops = [one.changes["drop.top1"].value for one in those if one.changes]
        if drops:
            changes[f"drop.{name}"] = Estimate(float(np.mean(drops)), detail=detail)
    compared = [one for one in found if one.changes]
    if compared:
        worst = max(compared, key=lambda one: one.changes["drop.top1"].value)
        drop = worst.changes["drop.top1"]
        changes["drop.worst_distribution"] = Estimate(drop.value, drop.low, drop.high, f"{worst.name}; {drop.detail}")
        nominal = next(one for one in compared if one.kind == NOMINAL)
        if "drop.corruptions" in changes:
            excess = changes["drop.corruptions"].value - nominal.changes["drop.top1"].value
            changes["rise.excess_error"] = Estimate(excess, detail=changes["drop.corruptions"].detail)
    return own, changes


def stated(found: Sequence[Standing]) -> list[dict[str, Any]]:
    """Return plain values for the report."""
    return [asdict(one) for one in found]
