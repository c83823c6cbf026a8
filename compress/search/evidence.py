"""Evidence for criteria: gradients, gradient flow and contributions of channels, collected on calibration images."""

import copy
import math
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compress.checkpoint.rebuild import example_input
from compress.config.schema.prune import PruneConfig
from compress.data.batches import Batch, evaluation_batches
from compress.data.splits import Split
from compress.errors import DataError
from compress.model.artifacts import TorchModel
from compress.model.modes import eval_mode
from compress.progress import Task
from compress.pruning.criteria.base import Criterion, collect_gradients
from compress.pruning.criteria.gradient_flow import collect_gradient_flow
from compress.pruning.criteria.pfp import collect_contributions
from compress.pruning.groups import BATCH_NORMS
from compress.pruning.ranking.elimination import ReaderPass
from compress.pruning.ranking.selection import Groups
from compress.search.context import StageContext
from compress.search.repairs import batch_norm_repair
from compress.tasks.imitation import Imitation
from compress.training.evaluate import evaluate_loss, run

SCORE_BATCH, SCORE_PIXELS = 64, 2**18
FLOW_BATCH, SHARE_BATCH = 32, 8
UNTRAINED_TEMPERATURE = 200.0
UNTRAINED = 0.9  # of the loss of a guess
IMITATED = 1e-6  # loss below which a network equals the baseline


@dataclass(frozen=True)
class EvidenceCollector:
    """Collector of the evidence that a criterion needs.

    Attributes:
        model: The network.
        groups: Its groups that are scored.
        config: Settings of the stage, with the numbers of images.
        ctx: Context of the stage, with the calibration split.
    """

    model: TorchModel
    groups: Groups
    config: PruneConfig
    ctx: StageContext

    def collect(self, criterion: Criterion, shared: ReaderPass | None = None) -> Any:
        """Return the evidence for a criterion; None for a criterion that needs only weights.

        Args:
            criterion: The criterion.
            shared: Pass over the same images for the statistics of readers, which goes along with that of gradients.

        Raises:
            DataError: The loss has no gradients: images have no labels, and the network is the baseline.
        """
        ctx, module, kind = self.ctx, self.model.module, criterion.evidence
        split = ctx.data.calibration.first(self.config.score_images)
        if kind == "weights":
            return None
        if kind == "contributions":
            with ctx.progress.task("shares of channels", len(split)) as task:
                batches = _counted(evaluation_batches(split, SHARE_BATCH, "nothing"), task)
                return collect_contributions(module, self.groups.values(), batches)
        _require_gradients(module, split, criterion.name)
        if kind == "parameter_gradients":
            from compress.pruning.criteria.parameter_gradients import collect_parameter_gradients

            with ctx.progress.task("gradients of weights", len(split)) as task:
                batches = _counted(evaluation_batches(split, 1), task)
                return collect_parameter_gradients(module, batches, split.objective.image_losses)
        module = self.with_statistics(module)
        if kind == "gradient_flow":
            return self._gradient_flow(module, split)
        with ctx.progress.task("score channels", len(split)) as task:
            size, each = score_batch(self.model, self.config.images_per_gradient), self.config.images_per_gradient
            batches = _counted(evaluation_batches(split, size), task)
            if shared is not None and module is self.model.module:
                batches = shared.along(batches)
            with closing(batches):
                return collect_gradients(module, self.groups.values(), batches, each, split.objective.image_losses)

    def with_statistics(self, module: nn.Module) -> nn.Module:
        """Return the network, or a copy with measured statistics if its batch norms have seen no image yet."""
        norms = [part for part in module.modules() if isinstance(part, BATCH_NORMS) and part.running_mean is not None]
        is_new = bool(norms) and all(
            not norm.running_mean.any() and bool((norm.running_var == 1).all())  # type: ignore[union-attr]
            for norm in norms
        )
        if not is_new:
            return module
        measured = copy.deepcopy(module)
        batch_norm_repair(self.ctx)[1](measured)
        return measured

    def is_trained(self, module: nn.Module, split: Split) -> bool:
        """Return whether a network has a clearly lower loss than a constant output."""
        example = example_input(self.model.signature)
        with torch.no_grad(), eval_mode(module):
            guess = split.objective.guess(run(module, example))
        return evaluate_loss(module, split, progress=self.ctx.progress) < UNTRAINED * guess

    def _gradient_flow(self, module: nn.Module, split: Split) -> Any:
        is_trained, progress = self.is_trained(module, split), self.ctx.progress
        temperature = 1.0 if is_trained or not split.objective.chooses else UNTRAINED_TEMPERATURE
        with progress.task("gradient flow", len(split)) as task:
            images = list(_counted(evaluation_batches(split, FLOW_BATCH), task))
            losses = split.objective.image_losses
            stats = collect_gradient_flow(module, self.groups.values(), images, losses, temperature)
        progress.note(f"gradient flow of {'a trained' if is_trained else 'an untrained'} network")
        return replace(stats, is_signed=not is_trained)


def score_batch(model: TorchModel, each: int) -> int:
    """Return the batch size for scoring, smaller for larger images, as all activations stay in memory.

    Args:
        model: The network.
        each: Number of images per gradient; the batch size is a multiple of it.
    """
    pixels = math.prod(int(size) for size in model.signature.inputs[0].shape[2:])
    fitting = min(SCORE_BATCH, SCORE_PIXELS // max(1, pixels))
    return max(1, fitting // each) * each


def _require_gradients(module: nn.Module, split: Split, criterion: str) -> None:
    """Check that the loss has gradients. Without labels it is the distance to the baseline, least at the baseline.

    Raises:
        DataError: The network is the baseline, and images have no labels.
    """
    if isinstance(split.objective, Imitation) and evaluate_loss(module, split) < IMITATED:
        raise DataError(
            f"Criterion '{criterion}' needs gradients of a loss. These images have no labels, and the loss is the "
            "distance to the baseline, which the network still equals: all gradients are 0.",
            hint="Label the calibration images, or choose a criterion without gradients, such as greedy, lasso or "
            "tp_magnitude.",
        )


def _counted(batches: Iterator[Batch], task: Task) -> Generator[Batch]:
    """Yield batches and advance the task by their images."""
    for images, targets in batches:
        yield images, targets
        task.advance(len(images))
