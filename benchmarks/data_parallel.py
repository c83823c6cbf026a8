"""Throughput of a joint training under DistributedDataParallel, next to averaging after the backward pass.

    TORCH_CPP_LOG_LEVEL=ERROR torchrun --standalone --nproc-per-node=2 benchmarks/data_parallel.py
    ... --networks small resnet18 mobilenet_v2 --accumulation 1 --steps 20 --rounds 8 --batch-size 128

The earlier way averages all gradients by one call after the backward pass, and adds up the loss, the loss read back and
a vote in every step. Both ways train the same network on the same random images, in the same processes. A round times
both, one first, then the other; the value is the median over rounds of the ratio of their images per second. The same
processes also compare the earlier way with itself, which shows the noise of the machine.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torchvision
from torch import nn

from compress.data.batches import Batch, training_batches
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.progress import SilentProgress
from compress.training.device import flushed_denormals
from compress.training.distributed import close_group, open_group, together, wait_for_all
from compress.training.loop import VOTE_STEPS, TrainingRun
from compress.training.settings import FitSettings, TrainingData, learning_rate

SIDE = 32
HEADER = (
    "| network | params | earlier way | DistributedDataParallel | ratio, median | lowest to highest | A/A, median |",
    "|---|---|---|---|---|---|---|",
)


class AveragedAfterwards(TrainingRun):
    """Training whose gradients are averaged by one call after the backward pass, as before decision 123."""

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Wrap nothing."""
        yield

    def train_step(self, batches: Sequence[Batch]) -> None:
        """Take one step, with the calls between processes that the earlier way had."""
        learner, ranks = self.learner, self.ranks
        learner.begin_step(self.step, learning_rate(self.settings, self.step, self.plan.total))
        value = torch.zeros(())
        for images, targets in batches:
            loss = self.loss(images, targets, is_first=self.step == 0) / len(batches)
            value = value + loss.detach()
            ranks.total([value.item()])
            learner.backward(loss)
        gradients = [parameter.grad for parameter in learner.module.parameters() if parameter.grad is not None]
        ranks.average([*gradients, *(one for one in learner.module.buffers() if one.is_floating_point())])
        learner.end_step(self.step, is_in_tail=False)
        self.step += 1
        self.losses.add(torch.tensor(ranks.total([value.item()])[0] / ranks.size), self.step)
        ranks.total([0.0, 0.0])


class Voting(TrainingRun):
    """Training as in `compress run`, with its votes."""

    def train_step(self, batches: Sequence[Batch]) -> None:
        """Take one step, and vote on saving in every `VOTE_STEPS`-th."""
        super().train_step(batches)
        if self.step % VOTE_STEPS == 0:
            self.ranks.total([0.0, 0.0])


def small() -> nn.Module:
    """Return a network of five small layers, whose steps consist of little but calls."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)
    )


def network(name: str) -> nn.Module:
    """Return a network with random weights."""
    torch.manual_seed(0)
    return small() if name == "small" else torchvision.models.get_model(name, num_classes=10)


def images_per_second(run: TrainingRun, batches: Sequence[Sequence[Batch]]) -> float:
    """Take one step on each group of batches, once all processes are ready."""
    wait_for_all()
    started = time.perf_counter()
    for several in batches:
        run.train_step(several)
    wait_for_all()
    return (
        run.ranks.size
        * sum(len(images) for several in batches for images, _ in several)
        / (time.perf_counter() - started)
    )


def measure(name: str, steps: int, rounds: int, settings: FitSettings) -> str:
    """Return one row of the table."""
    random = np.random.default_rng(0)
    count = settings.batch_size * settings.accumulation * steps
    images = random.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    source = ArraySource(images, random.integers(0, 10, count))
    split = Split("train", source, np.arange(count), Preprocessing(mean=(0.5,), std=(0.25,)))
    data = TrainingData(split, split.first(2))
    kinds = {"earlier": AveragedAfterwards, "again": AveragedAfterwards, "ddp": Voting}
    runs = {key: kind(network(name), data, settings, None, None, SilentProgress()) for key, kind in kinds.items()}
    part = runs["ddp"].ranks.rank, runs["ddp"].ranks.size
    every = list(training_batches(split, settings.batch_size, settings.augmentation, 0, 0, 0, part))
    each = settings.accumulation
    batches = [every[start : start + each] for start in range(0, len(every), each)]
    speeds: dict[str, list[float]] = {key: [] for key in runs}
    with flushed_denormals(), runs["earlier"].surroundings(), runs["ddp"].surroundings():
        for run in runs.values():
            run.learner.module.train()
            images_per_second(run, batches[:2])
        for number in range(rounds):
            for key in list(runs) if number % 2 else reversed(runs):
                speeds[key].append(images_per_second(runs[key], batches))
    earlier = speeds["earlier"]
    ratios, same = (
        [mine / other for mine, other in zip(speeds[key], earlier, strict=True)] for key in ("ddp", "again")
    )
    params = sum(parameter.numel() for parameter in network(name).parameters())
    return (
        f"| {name} | {params:,} | {statistics.median(earlier):.0f} images/s | {statistics.median(speeds['ddp']):.0f} "
        f"images/s | **{statistics.median(ratios):.3f}** | {min(ratios):.3f} to {max(ratios):.3f} | "
        f"{statistics.median(same):.3f} |"
    )


def main() -> None:
    """Parse the command line and print the table, on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["small", "resnet18", "mobilenet_v2"])
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ranks = open_group()
    settings = FitSettings(
        batch_size=arguments.batch_size, accumulation=arguments.accumulation, device="cpu", steps=10**6, keep="last"
    )
    with together():
        lines = [measure(name, arguments.steps, arguments.rounds, settings) for name in arguments.networks]
    if ranks.rank == 0:
        print("\n".join([*HEADER, *lines]))
    close_group(is_done=True)


if __name__ == "__main__":
    main()
