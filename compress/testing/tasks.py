"""Contract suite of tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import CompressError
from compress.tasks.base import Task, joined
from compress.tasks.outputs import arrays, changed, each, first, picked
from compress.testing.checks import hold


@dataclass(frozen=True)
class TaskCase:
    """A task with outputs and targets of a few images.

    Attributes:
        name: Name in the titles of tests.
        task: Task under test.
        outputs: Tensor, or name -> tensor, for N images, at least 4.
        targets: Tensor or list of N entries.
        best: Best possible outputs, of the same form; None if the task has none.
    """

    name: str
    task: Task
    outputs: Any
    targets: Any
    best: Any = None

    @property
    def count(self) -> int:
        """Number of images."""
        return len(first(self.outputs))


class TaskContract:
    """Contract of every task. A subclass offers a fixture `task_case`."""

    def test_main_metric_is_among_the_metrics(self, task_case: TaskCase) -> None:
        """The primary metric is measured, and every metric is a finite number."""
        metrics = _metrics(task_case, task_case.outputs)
        hold(task_case.task.main.name in metrics, f"metrics are {', '.join(metrics)}")
        hold(all(math.isfinite(value) for value in metrics.values()), f"metrics are {metrics}")

    def test_shares_lie_between_0_and_1(self, task_case: TaskCase) -> None:
        """A metric that is shown in percent is a share."""
        value = _metrics(task_case, task_case.outputs)[task_case.task.main.name]
        hold(not task_case.task.main.is_share or 0 <= value <= 1, f"{task_case.task.main.name} is {value}")

    def test_facts_have_an_entry_for_each_image(self, task_case: TaskCase) -> None:
        """Each fact has one entry per image, as resampling needs."""
        for name, values in _facts(task_case, task_case.outputs).items():
            hold(
                len(values) == task_case.count, f"fact '{name}' has {len(values)} entries for {task_case.count} images"
            )

    def test_facts_of_parts_are_those_of_the_whole(self, task_case: TaskCase) -> None:
        """Metrics do not depend on the batch size."""
        halves = [slice(0, 2), slice(2, task_case.count)]
        parts = [
            task_case.task.facts(arrays(picked(task_case.outputs, one)), _plain(task_case.targets[one]))
            for one in halves
        ]
        together = task_case.task.aggregate(joined(parts))
        whole = _metrics(task_case, task_case.outputs)
        close = all(math.isclose(together[name], whole[name], rel_tol=1e-6, abs_tol=1e-9) for name in whole)
        hold(close, f"metrics are {together} in parts, {whole} together")

    def test_loss_is_a_finite_scalar_with_a_gradient(self, task_case: TaskCase) -> None:
        """The loss is a finite scalar with a gradient, as training needs."""
        if not task_case.task.needs_targets or not _has_loss(task_case):
            return
        outputs = changed(task_case.outputs, lambda one: one.detach().clone().requires_grad_(True))
        loss = task_case.task.loss(outputs, task_case.targets)
        hold(loss.ndim == 0 and bool(loss.isfinite()), f"loss is {loss}")
        gradients = torch.autograd.grad(loss, each(outputs), allow_unused=True)
        hold(any(one is not None and bool(one.abs().sum() > 0) for one in gradients), "loss has no gradient")

    def test_losses_of_images_average_to_the_loss(self, task_case: TaskCase) -> None:
        """The mean of the losses of images is the loss that training minimises."""
        if not _has_loss(task_case):
            return
        losses = task_case.task.image_losses(task_case.outputs, task_case.targets)
        hold(tuple(losses.shape) == (task_case.count,), f"losses have shape {tuple(losses.shape)}")
        mean, loss = float(losses.mean()), float(task_case.task.loss(task_case.outputs, task_case.targets))
        hold(math.isclose(mean, loss, rel_tol=1e-4, abs_tol=1e-6), f"mean of losses is {mean}, loss is {loss}")

    def test_distance_is_0_of_equal_outputs_alone(self, task_case: TaskCase) -> None:
        """The distance is 0 for equal outputs, and positive for other outputs."""
        outputs = task_case.outputs
        other = changed(outputs, lambda one: one.flip(0) * 1.5)
        hold(abs(float(task_case.task.distance(outputs, outputs))) < 1e-6, "distance of equal outputs is not 0")
        hold(float(task_case.task.distance(other, outputs)) > 1e-3, "distance of other outputs is 0")
        shape = tuple(task_case.task.distances(outputs, outputs).shape)
        hold(shape == (task_case.count,), f"distances have shape {shape}")

    def test_best_outputs_are_no_worse(self, task_case: TaskCase) -> None:
        """Best outputs are better by `higher_is_better` of the primary metric."""
        if task_case.best is None:
            return
        name = task_case.task.main.name
        best, some = (_metrics(task_case, outputs)[name] for outputs in (task_case.best, task_case.outputs))
        hold(task_case.task.main.is_better(best, some), f"{name} is {best} at best, {some} of other outputs")

    def test_outputs_of_the_wrong_shape_are_refused(self, task_case: TaskCase) -> None:
        """Outputs of a wrong shape raise an error of this package."""
        if type(task_case.task).check is Task.check:
            return
        task_case.task.check(task_case.outputs, task_case.targets)
        wrong = changed(task_case.outputs, lambda one: one.flatten()[:, None, None, None, None])
        try:
            task_case.task.check(wrong, task_case.targets)
        except CompressError:
            return
        raise AssertionError("outputs of a wrong shape were accepted")


def _facts(case: TaskCase, outputs: Any) -> dict[str, np.ndarray]:
    return case.task.facts(arrays(outputs), _plain(case.targets))


def _metrics(case: TaskCase, outputs: Any) -> dict[str, float]:
    return case.task.aggregate(_facts(case, outputs))


def _has_loss(case: TaskCase) -> bool:
    return not (case.task.learns_from_original and case.task.needs_targets)


def _plain(targets: Any) -> Any:
    """Return targets with tensors converted to arrays."""
    if isinstance(targets, Tensor):
        return targets.numpy()
    if isinstance(targets, dict):
        return {name: _plain(value) for name, value in targets.items()}
    return [_plain(value) for value in targets] if isinstance(targets, list) else targets
