"""Coverage of the 95 % interval of the calibration error, for calibrated and miscalibrated networks.

    python benchmarks/calibration_interval.py [--times 1000] [--counts 90 300 1000 10000]

Networks are made up: confidences from one of three distributions, and right answers as often as the confidence says at
another temperature and offset. The true error is that of 400,000 images. "rise" compares two networks on the same
images, the first of which is calibrated. A minute on one core.
"""

import argparse
import math
from typing import NamedTuple

import numpy as np

from compress.cli.console import Console
from compress.verification.statistics import Bounds, calibration_bounds, difference_bounds

IMAGES_FOR_TRUTH = 400_000


class Network(NamedTuple):
    """A made-up network.

    Attributes:
        name: Row of the table.
        confidence: "middling", "high" or "very high".
        temperature: Factor of the logit of the confidence that gives the logit of the accuracy; 1 is calibrated.
        offset: Added to that logit; 0 is calibrated.
    """

    name: str
    confidence: str
    temperature: float = 1.0
    offset: float = 0.0


NETWORKS = (
    *(Network(f"calibrated, {kind} confidence", kind) for kind in ("middling", "high", "very high")),
    *(Network(f"too sure, {kind} confidence", kind, 0.6) for kind in ("middling", "high", "very high")),
    Network("too sure everywhere", "middling", offset=-0.3),
    Network("not sure enough", "high", offset=0.6),
)


def draw_confidence(random: np.random.Generator, kind: str, count: int) -> np.ndarray:
    """Return (N,) confidences in (0, 1)."""
    if kind == "middling":
        found = 0.3 + 0.7 * random.beta(3, 2, count)
    else:
        found = 1 - 0.5 * random.beta(0.5 if kind == "high" else 0.15, 6, count)
    return np.clip(found, 1e-12, 1 - 1e-12)


def accuracy(network: Network, confidence: np.ndarray) -> np.ndarray:
    """Return (N,) probabilities of right answers at given confidences."""
    logit = np.log(confidence / (1 - confidence))
    found: np.ndarray = 1 / (1 + np.exp(-(network.temperature * logit + network.offset)))
    return found


def true_error(network: Network) -> float:
    """Return the root mean squared difference between confidence and accuracy."""
    confidence = draw_confidence(np.random.default_rng(1), network.confidence, IMAGES_FOR_TRUTH)
    return math.sqrt(np.mean((accuracy(network, confidence) - confidence) ** 2))


def coverage(network: Network, count: int, times: int) -> dict[str, float]:
    """Return the shares of simulations in which an interval holds the truth, and its own estimate.

    Args:
        network: Simulated network.
        count: Images.
        times: Simulations.
    """
    random, truth = np.random.default_rng(0), true_error(network)
    held = {"error": 0, "rise": 0, "own": 0}
    for _ in range(times):
        confidence = draw_confidence(random, network.confidence, count)
        chance = random.random(count)
        found = calibration_bounds(confidence, chance < accuracy(network, confidence))
        rise = difference_bounds(found, calibration_bounds(confidence, chance < confidence))
        held["error"] += _holds(found, truth)
        held["rise"] += _holds(rise, truth)
        held["own"] += _holds(found, found.value)
    return {name: number / times for name, number in held.items()}


def _holds(found: Bounds, value: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= value <= found.high


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--counts", type=int, nargs="+", default=[90, 300, 1000, 10_000])
    arguments = parser.parse_args()
    console, least = Console(), 1.0
    console.say("| network | true error | images | interval holds it | interval of the rise holds it | holds its own |")
    console.say("|---|---|---|---|---|---|")
    for network in NETWORKS:
        for count in arguments.counts:
            found = coverage(network, count, arguments.times)
            least = min(least, found["error"], found["rise"])
            shown = " | ".join(f"{found[name]:.1%}" for name in ("error", "rise", "own"))
            console.say(f"| {network.name} | {true_error(network):.3f} | {count:,} | {shown} |")
    console.say(f"\nleast coverage: {least:.1%}")


if __name__ == "__main__":
    main()
