"""Order of channels by downdates next to plain elimination, which updates the complete inverse in float64.

    python benchmarks/elimination_order.py resnet18                                   random weights and images
    python benchmarks/elimination_order.py resnet20 --weights FILE --images FILE.npz     weights and images of CIFAR-10

Both take the same statistics of the same readers. The table has processor seconds, the share of removed units that have
the same place in both orders, and the error of refitted readers at half of each group's width: that of the new order
over that of the plain one.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from stage_cost import NETWORKS, load
from torch import Tensor, nn

from compress.checkpoint.rebuild import build_module
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.progress import SilentProgress
from compress.pruning.groups import ChannelGroup
from compress.pruning.ranking import elimination
from compress.pruning.ranking.downdates import preferred_dtype
from compress.pruning.ranking.elimination import ReaderStats, reader_statistics, removal_order, unit_inputs
from compress.pruning.trial import find_cuttable

IMAGENET = {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
REMOVED, ROUNDS = 0.9, 64


class PlainElimination:
    """Reader whose complete inverse is updated after each removal, in float64."""

    def __init__(self, stats: ReaderStats, inputs: Tensor) -> None:
        self.inputs, self.energy = inputs, max(stats.energy, 1e-12)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(stats.gram))
        self.weight = stats.weight.T.clone(memory_format=torch.contiguous_format)
        self.gone = torch.zeros(0, dtype=torch.int64)

    def losses(self) -> Tensor:
        """Return (kept units,) relative rises of the squared error."""
        blocks, rows = self.inverse[self.inputs[:, :, None], self.inputs[:, None, :]], self.weight[self.inputs]
        losses: Tensor = (torch.linalg.inv(blocks) * (rows @ rows.mT)).sum((1, 2)) / self.energy
        return losses

    def remove(self, chosen: Tensor) -> None:
        """Remove units by their positions among the kept ones."""
        leaves = torch.zeros(len(self.inputs), dtype=torch.bool)
        leaves[chosen] = True
        gone = self.inputs[leaves].flatten()
        across = self.inverse[gone]
        factor = torch.linalg.solve(across[:, gone], across)
        self.weight.addmm_(factor.T, self.weight[gone], alpha=-1)
        self.inverse.addmm_(across.T, factor, alpha=-1)
        self.inputs, self.gone = self.inputs[~leaves], torch.cat([self.gone, gone])
        if len(self.gone) > 0.25 * len(self.inverse):
            stays = torch.ones(len(self.inverse), dtype=torch.bool)
            stays[self.gone] = False
            left = stays.nonzero().flatten()
            self.weight = self.weight.index_select(0, left)
            self.inverse = self.inverse.index_select(0, left).index_select(1, left)
            self.inputs, self.gone = (torch.cumsum(stays, 0) - 1)[self.inputs], self.gone[:0]


def plain_order(group: ChannelGroup, stats: Mapping[str, ReaderStats], most: int) -> np.ndarray:
    """Return the order of removal by plain elimination."""
    readers = [PlainElimination(stats[reader.layer], unit_inputs(group, reader)) for reader in group.readers]
    alive, order, at_once = np.arange(group.width // group.parts), list[int](), max(1, most // ROUNDS)
    while len(order) < most:
        losses = sum(reader.losses().numpy() for reader in readers)
        chosen = np.argsort(losses, kind="stable")[: min(at_once, most - len(order))]
        for reader in readers:
            reader.remove(torch.from_numpy(chosen))
        order += alive[chosen].tolist()
        alive = np.delete(alive, chosen)
    return np.asarray([*order, *alive])


def float32_order(group: ChannelGroup, stats: Mapping[str, ReaderStats], most: int) -> np.ndarray:
    """Return the order of removal by downdates in float32 for readers of any size."""
    elimination.preferred_dtype = lambda _unknowns: torch.float32
    try:
        return removal_order(group, stats, most)
    finally:
        elimination.preferred_dtype = preferred_dtype


def error(group: ChannelGroup, stats: Mapping[str, ReaderStats], order: np.ndarray) -> float:
    """Return the relative error of the refitted readers at half of the width."""
    total = 0.0
    for reader in group.readers:
        one = stats[reader.layer]
        gap = one.refit(unit_inputs(group, reader)[order[: len(order) // 2]].flatten()) - one.weight
        total += float(((gap @ one.gram) * gap).sum()) / max(one.energy, 1e-12)
    return total


@dataclass
class Row:
    """Sums over the groups of one network."""

    seconds: float = 0.0
    same: int = 0
    removed: int = 0
    error: float = 0.0

    def add(self, seconds: float, found: np.ndarray, plain: np.ndarray, most: int, err: float) -> None:
        """Add one group."""
        self.seconds += seconds
        self.same += int((found[:most] == plain[:most]).sum())
        self.removed += most
        self.error += err


def compare(module: nn.Module, size: int, split: Split) -> dict[str, Row]:
    """Order the channels of all groups in each way, from the same statistics."""
    ways: dict[str, Callable[..., np.ndarray]] = {
        "plain": plain_order, "downdates": removal_order, "downdates, all in float32": float32_order
    }  # fmt: skip
    rows = {name: Row() for name in ways}
    groups, _ = find_cuttable(module, torch.zeros(1, 3, size, size))
    for names, stats in reader_statistics(module, groups, split, SilentProgress()):
        for name in names:
            group = groups[name]
            most, plain = int(REMOVED * group.width // group.parts), None
            for way, order in ways.items():
                started = time.process_time()
                found = order(group, stats, most)
                seconds = time.process_time() - started
                plain = found if plain is None else plain
                rows[way].add(seconds, found, plain, most, error(group, stats, found))
    return rows


def main() -> None:
    """Parse the command line, compare, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--weights", type=Path, help="state dict, perhaps in an entry state_dict; random by default")
    parser.add_argument("--images", type=Path, help="arrays x (N, H, W, 3) uint8 and y; random by default")
    parser.add_argument("--count", type=int, default=256, help="number of images")
    arguments = parser.parse_args()
    spec, size = NETWORKS[arguments.network]
    with tempfile.TemporaryDirectory() as folder:
        if arguments.weights is None:
            model, data = load(arguments.network, Path(folder))
            module, split = model.module, data.calibration.first(arguments.count)
        else:
            module = build_module(spec).eval()
            state = torch.load(arguments.weights, map_location="cpu", weights_only=True)
            state = {name.removeprefix("module."): value for name, value in state.get("state_dict", state).items()}
            module.load_state_dict(state)
            images = np.load(arguments.images)
            step = len(images["x"]) // arguments.count  # images may be sorted by class
            source = ArraySource(images["x"][::step], images["y"][::step])
            split = Split("calibration", source, np.arange(arguments.count), Preprocessing(**IMAGENET))
        rows = compare(module, size, split)
    plain = rows["plain"]
    print(f"| {arguments.network}, {len(split)} images | CPU seconds | same place | error at half of the width |")
    print("|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row.seconds:.1f} | {row.same / row.removed:.1%} | {row.error / plain.error:.6f} |")


if __name__ == "__main__":
    main()
