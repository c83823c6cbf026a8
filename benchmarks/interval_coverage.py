"""Coverage of the 95 % intervals of other figures that are no plain means of images.

    python benchmarks/interval_coverage.py [--times 300] [--counts 30 90 300]

ModelMetrics of made-up networks: RMSE with normal, Laplace and t errors, mIoU and pixel accuracy with classes that few
images have, the least top-1 of ten classes, the largest drop of ten classes, the mean distance of probabilities. Five
minutes on one core.
"""

import argparse
from collections.abc import Callable, Iterator

import numpy as np

from compress.cli.console import Console
from compress.tasks.base import Facts, Task, chosen
from compress.tasks.regression import Regression
from compress.tasks.segmentation import Segmentation
from compress.verification.metrics import (
    Predictions,
    estimate_changes,
    estimate_quality,
    mean_distance_interval,
)
from compress.verification.statistics import jackknife_intervals

PARTS, IMAGES_FOR_TRUTH = 100, 200_000
Interval = tuple[float, float]
Simulation = tuple[str, float, Callable[[np.random.Generator, int], Interval]]
ERRORS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda random, count: random.normal(0, 1, count),
    "Laplace": lambda random, count: random.laplace(0, 1, count),
    "t of 5": lambda random, count: random.standard_t(5, count),
}


def regression_facts(random: np.random.Generator, count: int, kind: str) -> Facts:
    """Return the squared and absolute errors of made-up images."""
    errors = ERRORS[kind](random, count)
    return {"squared": errors**2, "absolute": np.abs(errors)}


def mask_facts(random: np.random.Generator, count: int) -> Facts:
    """Return the pixel counts of made-up masks: five classes, the last one in a fifth of the images."""
    there = (random.random((count, 5)) < [1.0, 0.6, 0.4, 0.3, 0.2]) * random.gamma(2, 100, (count, 5))
    right = there * np.clip(random.normal(0.8, 0.15, (count, 1)) + random.normal(0, 0.05, (count, 5)), 0.05, 1)
    return {"right": right, "predicted": right + np.roll(there - right, 1, axis=1), "there": there}


def of_task(task: Task, name: str, draw: Callable[[np.random.Generator, int], Facts], label: str) -> Simulation:
    """Return the simulation of one figure of a task."""
    truth = task.aggregate(draw(np.random.default_rng(1), IMAGES_FOR_TRUTH))[name]

    def simulate(random: np.random.Generator, count: int) -> Interval:
        facts = draw(random, count)
        return jackknife_intervals(lambda places: task.aggregate(chosen(facts, places)), count, PARTS)[name]

    return label, truth, simulate


def least_class(random: np.random.Generator, count: int) -> Interval:
    """Return the interval of the least top-1 of ten classes that are all right in 90 % of the images."""
    found = estimate_quality(_answers(random, count, 0.9))["worst_class"]
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def largest_drop(random: np.random.Generator, count: int) -> Interval:
    """Return the interval of the largest drop of ten classes between two networks that are as good."""
    found = estimate_changes(_answers(random, count, 0.9), _answers(random, count, 0.9))["drop.worst_class"]
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def _answers(random: np.random.Generator, count: int, share: float) -> Predictions:
    labels = np.arange(count) % 10
    answers = np.where(random.random(count) < share, labels, (labels + 1) % 10)
    return Predictions(np.eye(10, dtype=np.float32)[answers], labels)


def distance(random: np.random.Generator, count: int) -> Interval:
    """Return the interval of the mean distance where 3 % of the images have large ones."""
    small, large = random.exponential(0.005, count), random.uniform(0.2, 1.3, count)
    return mean_distance_interval(np.where(random.random(count) < 0.97, small, large))


def simulations() -> Iterator[Simulation]:
    """Yield label, true value, and what draws images and returns an interval."""
    for kind in ERRORS:
        yield of_task(
            Regression(),
            "rmse",
            lambda random, count, kind=kind: regression_facts(random, count, kind),
            f"RMSE, {kind}",
        )
    for name in ("miou", "pixel_accuracy"):
        yield of_task(Segmentation(), name, mask_facts, name)
    yield "least class", 0.9, least_class
    yield "largest drop of a class", 0.0, largest_drop
    yield "mean distance", 0.97 * 0.005 + 0.03 * 0.75, distance


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=300)
    parser.add_argument("--counts", type=int, nargs="+", default=[30, 90, 300])
    arguments = parser.parse_args()
    console = Console()
    console.say("| figure | images | interval holds the truth |\n|---|---|---|")
    for label, truth, simulate in simulations():
        for count in arguments.counts:
            random = np.random.default_rng(0)
            ends = [simulate(random, count) for _ in range(arguments.times)]
            console.say(f"| {label} | {count} | {np.mean([low <= truth <= high for low, high in ends]):.1%} |")


if __name__ == "__main__":
    main()
