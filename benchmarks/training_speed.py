"""How fast does the training loop train, next to a bare PyTorch loop that has nothing else to do?

    python benchmarks/training_speed.py pipelines/resnet20_cifar10.yaml --set data.array_folder=FOLDER
    ... --device cuda              on the GPU; the ratio is the share of the time in which the GPU need not wait
    ... --steps 30 --rounds 7      batches in each part, and how often both loops take their turn

The bare loop steps over batches that lie in memory, augmented and normalised before the clock runs: forward, loss,
backward, SGD with Nesterov's correction, nothing else. Ours reads, augments, checks, counts and reports as it does in
a pipeline, without distillation. Both train the network of the pipeline's load stage, from its weights, with the same
batches, threads and memory format. A round times both, one first, then the other; the figure is the median over
rounds of the ratio of their images per second. Nothing else should run on the machine.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from results import write_between_markers
from torch import Tensor, nn

from compress.checkpoint.rebuild import build_module, load_strict, read_weights
from compress.cli.console import Console
from compress.config.load import load_pipeline
from compress.config.schema.model import LoadConfig
from compress.data.batches import Augmentation, training_batches
from compress.data.from_config import Splits
from compress.stages.load import factory_spec
from compress.training.device import flushed_denormals, training_device
from compress.training.loop import fit
from compress.training.memory_format import fastest_memory_format
from compress.training.settings import FitSettings, TrainingData

HEADER = (
    "| network | batch | threads | bare loop | ours | ratio, median | lowest to highest |",
    "|---|---|---|---|---|---|---|",
)


def measure(pipeline: Path, overrides: Sequence[str], steps: int, rounds: int, batch_size: int, device: str) -> str:
    """Return one row of the table."""
    loaded = load_pipeline(pipeline, overrides)
    load = loaded.config.stages[0]
    if not isinstance(load, LoadConfig):
        raise SystemExit(f"{pipeline}: the first stage must be load.")
    torch.set_num_threads(loaded.config.threads or torch.get_num_threads())
    module = build_module(factory_spec(load.model))
    load_strict(module, read_weights(Path(load.weights)), load.weights)
    data = Splits(loaded.config.data)
    augmentation = Augmentation(crop_padding=4, flip=True)
    settings = FitSettings(steps=steps, batch_size=batch_size, augmentation=augmentation, keep="last", device=device)
    there = training_device(device)
    memory_format = fastest_memory_format(module, data.train)
    batches = [
        (images.contiguous(memory_format=memory_format).to(there), labels.to(there))
        for (images, labels), _ in zip(
            training_batches(data.train, batch_size, settings.augmentation, 0, 0), range(steps), strict=False
        )
    ]
    console = Console()
    bare, ours = [], []
    for number in range(rounds + 1):
        speeds = {}
        for name in ("bare", "ours") if number % 2 else ("ours", "bare"):
            network = copy.deepcopy(module)
            if name == "bare":
                speeds[name] = bare_loop(network.to(there, memory_format=memory_format), batches, settings)
            else:
                result = fit(network, TrainingData(data.train, data.validation.first(1)), settings)
                speeds[name] = result.epochs[-1].images_per_second
        if number == 0:  # what is done once only, such as choosing algorithms
            continue
        bare.append(speeds["bare"])
        ours.append(speeds["ours"])
        console.note(f"{loaded.config.name}, round {number}: bare {bare[-1]:.0f}, ours {ours[-1]:.0f} images/s")
    ratios = [mine / other for mine, other in zip(ours, bare, strict=True)]
    return (
        f"| {loaded.config.name} | {batch_size} | {torch.get_num_threads()} | {statistics.median(bare):.0f} images/s | "
        f"{statistics.median(ours):.0f} images/s | **{statistics.median(ratios):.3f}** | "
        f"{min(ratios):.3f} to {max(ratios):.3f} |"
    )


def bare_loop(module: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], settings: FitSettings) -> float:
    """Take a step on each batch, and return images per second."""
    module.train()
    optimizer = torch.optim.SGD(
        module.parameters(), 0.001, settings.momentum, weight_decay=settings.weight_decay, nesterov=True
    )
    started = time.perf_counter()
    with flushed_denormals():
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            optimizer.step()
        if batches[0][0].is_cuda:
            torch.cuda.synchronize()
    return sum(len(labels) for _, labels in batches) / (time.perf_counter() - started)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", type=Path, help="Markdown file with the markers")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    lines = [
        measure(
            pipeline, arguments.overrides, arguments.steps, arguments.rounds, arguments.batch_size, arguments.device
        )
        for pipeline in arguments.pipelines
    ]
    text = "\n".join([*HEADER, *lines])
    if arguments.write is not None:
        write_between_markers(arguments.write, text, "speed")
    print(text)


if __name__ == "__main__":
    main()
