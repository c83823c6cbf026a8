"""Estimate of the time and disk space of a run, from a few timed steps of the network: `compress plan --estimate`."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.config.load import Pipeline
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.prune import CutConfig, PruneConfig
from compress.config.schema.training import FinetuneConfig, TrainingConfig
from compress.config.schema.verify import VerifyConfig
from compress.cost.macs import count_params
from compress.data.batches import evaluation_batches, fast_batch_size
from compress.data.from_config import Splits
from compress.model.modes import eval_mode
from compress.progress import Progress, SilentProgress
from compress.search.context import StageContext
from compress.stages.load import LoadStage
from compress.tasks.from_config import open_task

_TRIES = 3
_EXPORT_S, _LATENCY_S, _TABLE_S = 6.0, 45.0, 90.0  # seconds on small networks
_PASSES_OF_A_CUT = 6  # forward passes over the scoring and refitting images
_VALIDATIONS_OF_A_CUT, _BLOCK_NUMBERS = 6, 8
_FILES = 3  # copies of the weights for each stage: the network, its baseline, the ONNX file


@dataclass(frozen=True)
class Estimate:
    """Expected cost of one stage.

    Attributes:
        stage: Name of the stage.
        seconds: Expected time on this machine, accurate to a factor of about two.
        megabytes: Expected size of the stored files.
    """

    stage: str
    seconds: float
    megabytes: float


@dataclass(frozen=True)
class _Pace:
    """Seconds for one image, and number of images in each split."""

    inference: float
    training: float
    train: int
    validation: int
    evaluation: int


def estimate_run(pipeline: Pipeline, progress: Progress | None = None) -> list[Estimate]:
    """Build the network, time some batches, and return the expected cost of each stage.

    Args:
        pipeline: The pipeline, already validated.
        progress: Receives progress by part.

    Raises:
        CompressError: Data or network cannot be opened, as in a run.
    """
    progress = progress or SilentProgress()
    config = pipeline.config
    data = Splits(config.data, open_task(config.task))
    load: Any = config.stages[0]
    with tempfile.TemporaryDirectory() as folder, progress.task("time some batches", 2) as task:
        module = (
            LoadStage(load).open(StageContext(Path(folder), config.seed, data, SilentProgress(), config.deploy)).module
        )
        task.advance()
        pace = _measure(module, data)
        task.advance()
    stored = 4 * count_params(module) * _FILES / 1e6
    return [Estimate(stage.stage, _seconds(stage, pace), stored) for stage in config.stages]


def _measure(module: nn.Module, data: Splits) -> _Pace:
    size = fast_batch_size(data.calibration)
    images, _ = next(evaluation_batches(data.calibration.first(size), size, "nothing"))
    with eval_mode(module), torch.no_grad():
        inference = _timed(lambda: module(images)) / len(images)
    return _Pace(inference, _time_training(module, images), len(data.train), len(data.validation), len(data.evaluation))


def _time_training(module: nn.Module, images: Tensor) -> float:
    """Return the seconds of a forward and backward pass for one image; the network is left unchanged."""
    trained = copy.deepcopy(module).train()

    def step() -> None:
        outputs = trained(images)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        first.float().square().mean().backward()

    return _timed(step) / len(images)


def _timed(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(1 + _TRIES):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _seconds(stage: Any, pace: _Pace) -> float:
    if stage.stage == "load":
        return 2 * _EXPORT_S + 2 * pace.evaluation * pace.inference
    if isinstance(stage, VerifyConfig):
        perturbed = 0 if stage.robustness is None else 12
        return _LATENCY_S + (2 + 2 * perturbed) * pace.evaluation * pace.inference
    if isinstance(stage, CutConfig):
        images = stage.score_images + stage.refit_images
        once = (_PASSES_OF_A_CUT * images + _VALIDATIONS_OF_A_CUT * pace.validation) * pace.inference
        is_searched = isinstance(stage, PruneConfig) and stage.blocks in ("auto", "joint")
        table = _TABLE_S if stage.target.needs_latency else 0.0
        return once * (_BLOCK_NUMBERS if is_searched else 1) + table + _training(getattr(stage, "training", None), pace)
    if isinstance(stage, LowRankConfig):
        return 4 * pace.validation * pace.inference + _training(stage.training, pace)
    if isinstance(stage, FinetuneConfig):
        return 0.0 if stage.own is not None or stage.trained is not None else _training(stage, pace)
    return _EXPORT_S


def _training(config: TrainingConfig | None, pace: _Pace) -> float:
    if config is None:
        return 0.0
    images = config.steps * config.batch_size if config.steps is not None else (config.epochs or 0.0) * pace.train
    epochs = images / max(1, pace.train)
    teacher = pace.inference if config.distillation is not None else 0.0
    return images * (pace.training + teacher) + max(1.0, epochs) * pace.validation * pace.inference
