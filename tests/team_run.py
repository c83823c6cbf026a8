"""One process of several that train one network, and what came of it. Run by `tests/training/test_distributed.py`."""

import gc
import json
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compress.data.batches import Augmentation
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import StageError
from compress.progress import Progress, SilentProgress, SilentTask
from compress.training import distributed
from compress.training import loop as loop_module
from compress.training.distributed import Ranks, current_ranks, from_rank_0, leave, on_rank_0, tell, together
from compress.training.loop import fit
from compress.training.settings import Distillation, FitSettings, TrainingData
from compress.training.state import StateFile

SETTINGS = FitSettings(epochs=3, batch_size=16, learning_rate=0.05, augmentation=Augmentation(1, True))
KINDS = ("plain", "norm", "synced", "averaged", "accumulated", "late", "unused", "unused accumulated", "compiled")


class PartlyUsed(nn.Module):
    """A layer that few images pass, one that none passes, and an output that no loss reads."""

    output_names = ("logits",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(32, 3)
        self.few, self.none, self.unread = nn.Linear(32, 3), nn.Linear(3, 3), nn.Linear(32, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = nn.functional.adaptive_avg_pool2d(self.first(x).relu(), 2).flatten(1)
        self.unread_output = self.unread(features)
        outputs = self.last(features)
        (bright,) = torch.where(x[:, 0].mean((1, 2)) > 0.55)
        return outputs.index_add(0, bright, self.few(features[bright])) if len(bright) else outputs


def network(kind: str, seed: int = 0) -> nn.Module:
    """A network without anything that looks at several images at once, but for the kinds "norm" and "synced"."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind.startswith("unused"):
            return PartlyUsed()
        norm = nn.BatchNorm2d(8) if kind in ("norm", "synced") else nn.Identity()
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
        )


def splits() -> TrainingData:
    """Images that are brightest in the colour that their label says; 25 to validate on, which no 2 processes share."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 105)
    images = random.integers(0, 120, (105, 6, 6, 3), np.uint8)
    images[np.arange(105), :, :, labels] += 100
    source, wanted = ArraySource(images, labels), Preprocessing(mean=(0.4,), std=(0.3,))
    return TrainingData(
        Split("train", source, np.arange(80), wanted), Split("validation", source, np.arange(80, 105), wanted)
    )


def settings(kind: str) -> FitSettings:
    """How each kind is trained."""
    if kind == "averaged":
        return replace(SETTINGS, ema=0.9, average_ratio=0.4, gradient_clip=0.5)
    if kind == "late":  # saved now and then, by the clock of each process
        return replace(SETTINGS, epochs=10, save_minutes=0.0005)
    if kind == "compiled":
        return replace(SETTINGS, compiled=True)
    if kind == "synced":
        return replace(SETTINGS, sync_batch_norm=True)
    return replace(SETTINGS, accumulation=2) if "accumulated" in kind else SETTINGS


def train(
    kind: str, state: Path | None = None, progress: Progress | None = None
) -> tuple[nn.Module, list[float], list[float]]:
    """Return the network, the loss of each epoch and the top-1 of each."""
    module = network(kind)
    teacher = Distillation(network(kind, 1).eval(), 0.5, 2.0)
    file = None if state is None else StateFile(state)
    result = fit(module, splits(), settings(kind), teacher, file, progress)
    return module, [one.loss for one in result.epochs], [one.validation for one in result.epochs]


class Ends(SilentProgress):
    """Ends the training where its second epoch begins; the state is saved by then."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[SilentTask]:
        if label.startswith("epoch 2"):
            raise InterruptedError
        yield SilentTask()


class Parallel(DistributedDataParallel):
    """torch's class, whose objects are counted as long as they live, and batches whose gradients stay apart."""

    living: ClassVar[list[weakref.ref[nn.Module]]] = []
    kept: ClassVar[int] = 0

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        Parallel.living.append(weakref.ref(self))

    def no_sync(self) -> Any:
        Parallel.kept += 1
        return super().no_sync()


class Gate:
    """Hooks that learn a number of their own, whose gradient is 1 in the first process and 2 in the second."""

    def __init__(self, rank: int, ends_at: int | None = None) -> None:
        self.number, self.rank, self.seen, self.ends_at = nn.Parameter(torch.zeros(1)), rank, 0.0, ends_at

    def parameters(self) -> list[nn.Parameter]:
        return [self.number]

    def on_step_begin(self, step: int) -> None:
        if step == self.ends_at and self.rank == 1:
            os._exit(0)  # without a word, while the other one waits for its gradients
        self.number.grad = torch.full((1,), self.rank + 1.0)

    def on_gradients(self, step: int) -> None:
        assert self.number.grad is not None
        self.seen = self.number.grad.item()

    def on_step_end(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        pass


def count_votes() -> list[Sequence[float]]:
    """Return a list that every vote on Ctrl-C and saving is added to."""
    votes, total = [], Ranks.total

    def counted(ranks: Ranks, values: Sequence[float]) -> list[float]:
        if len(values) == 2:
            votes.append(values)
        return total(ranks, values)

    Ranks.total = counted
    return votes


def main() -> None:
    """Train every kind as one of a ranks."""
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size)
    figures: dict[str, object] = {"apart": current_ranks().size, "told": tell("wörd" if rank == 0 else None)}
    distributed.DistributedDataParallel = Parallel
    torch.compile = partial(torch.compile, backend="aot_eager")  # no C++ compiler
    votes = count_votes()
    with together():
        for kind in KINDS:
            votes.clear()
            Parallel.kept = 0
            loop_module.loss_sync_interval = lambda _device, kind=kind: 3 if kind == "late" else 1  # as on a GPU
            module, losses, top1 = train(kind, folder / f"{kind}.pt")
            torch.save(module.state_dict(), folder / f"{kind}-{rank}.weights")
            figures[kind], figures[f"votes of {kind}"] = [losses, top1], len(votes)
            figures[f"kept of {kind}"] = Parallel.kept
        gc.collect()
        figures["wrappers"] = [len(Parallel.living), sum(one() is not None for one in Parallel.living)]
        with suppress(InterruptedError):
            train("plain", folder / "left.pt", Ends())
        gate = Gate(rank)
        fit(network("plain"), splits(), replace(SETTINGS, steps=2), hooks=gate)
        figures["gate"] = gate.seen
        ranks = current_ranks()
        figures["sums"] = ranks.total([1.0, float(rank)])
        figures["any"] = [ranks.any(rank == 1), ranks.any(False)]
        figures["alone"] = on_rank_0(lambda: [current_ranks().size, rank])
        figures["shared"] = from_rank_0(lambda: {"rank": rank})
        leave()
        figures["stayed"] = True
    (folder / f"{rank}.json").write_text(json.dumps(figures))
    with together():
        try:
            fit(network("plain"), splits(), replace(SETTINGS, steps=8), hooks=Gate(rank, ends_at=3))
        except StageError as error:
            figures["left alone"] = error.message
    (folder / f"{rank}.json").write_text(json.dumps(figures))
    sys.stderr.flush()
    os._exit(0)  # gloo may still wait for the process that has gone, and an ordinary end then aborts at times


if __name__ == "__main__":
    main()
