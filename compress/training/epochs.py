"""Validation after each epoch of a training run, and the choice of the epoch whose weights are returned."""

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.splits import Split
from compress.model.stage_records import EpochRecord
from compress.progress import Progress
from compress.tasks.base import is_shown_worse
from compress.tasks.classification import Classification
from compress.training.distributed import Ranks
from compress.training.evaluate import measure_quality


class EpochLog:
    """Records of the epochs so far, and the weights of the best one.

    Args:
        validation: Images that epochs are compared on; their task has the primary metric.
        batch_size: Number of images in one call; None for a fast number.
        keeps_best: False keeps no weights, for a training that returns the last epoch.
        ranks: The ranks, which share the images of a classifier.
        progress: Receives progress by measurement.

    Attributes:
        records: Record of each epoch.
        best: Epoch to return and its weights: the best one, or a later one that is not shown to be worse. None before
            the first epoch, or if no weights are kept.
    """

    def __init__(
        self, validation: Split, batch_size: int | None, keeps_best: bool, ranks: Ranks, progress: Progress
    ) -> None:
        self.records: list[EpochRecord] = []
        self.best: tuple[int, dict[str, Tensor]] | None = None
        self.metric = validation.task.main
        self._validation, self._batch_size, self._keeps_best = validation, batch_size, keeps_best
        self._ranks, self._progress = ranks, progress
        self._best_right: Tensor | None = None  # (N,) bool: images that the epoch of the best metric gets right

    def close(self, module: nn.Module, loss: float, rate: float, speed: float) -> EpochRecord:
        """Measure the network after an epoch and add a record.

        Args:
            module: The network.
            loss: Mean training loss of the epoch.
            rate: Learning rate at the end of the epoch.
            speed: Images per second.
        """
        reached, right = self.measure(module)
        known = [record.validation for record in self.records]
        record = EpochRecord(len(self.records) + 1, loss, reached, rate, speed)
        self.records.append(record)
        is_best = not any(self.metric.is_better(one, reached) for one in known)
        if self._keeps_best and (is_best or self._is_as_good(right)):
            self.best = (record.epoch, copy.deepcopy(module.state_dict()))
        if is_best:
            self._best_right = right
        return record

    def measure(self, module: nn.Module) -> tuple[float, Tensor | None]:
        """Return the primary metric on validation, and (N,) bool the images classified right; None in other tasks.

        For a classifier, each rank measures a part of the images.
        """
        ranks, is_shared = self._ranks, self._ranks.size > 1 and isinstance(self._validation.task, Classification)
        part = self._validation.part(ranks.rank, ranks.size) if is_shared else self._validation
        value, found = measure_quality(module, part, self._batch_size, self._progress)
        if not is_shared or found is None:
            return value, None if found is None else torch.from_numpy(found)
        right = torch.zeros(len(self._validation))
        right[ranks.rank :: ranks.size] = torch.from_numpy(found).float()
        right = torch.tensor(ranks.total(right.tolist()))
        return float(right.sum()) / len(right), right > 0

    def show(self, value: float) -> str:
        """Return a value of the primary metric with its name, such as "top-1 91.20%"."""
        return f"{self.metric.words} {self.metric.show(value)}"

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` resumes from."""
        return {
            "records": [asdict(record) for record in self.records],
            "best": None if self.best is None else {"epoch": self.best[0], "weights": self.best[1]},
            "best_right": self._best_right,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state; entries of other classes in it are ignored."""
        self.records = [EpochRecord(**record) for record in state["records"]]
        if state["best"] is not None:
            self.best = (state["best"]["epoch"], state["best"]["weights"])
            self._best_right = state.get("best_right")

    def _is_as_good(self, right: Tensor | None) -> bool:
        """Return True if an epoch that gets these images right is not shown to be worse than the best epoch."""
        if right is None or self._best_right is None:
            return False
        return not is_shown_worse(self._best_right.numpy(), right.numpy())
