"""Fixtures for tests of stages: tiny networks in the form that `load` returns, splits, a listener, a context."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
from exported import PREPROCESSING, SIGNATURE, exported
from torch import nn

from compress.checkpoint.rebuild import write_weights
from compress.config.schema.data import ArraysSource, DataConfig, PreprocessingConfig
from compress.config.schema.pipeline import QuantizeConfig
from compress.config.schema.verify import DeployConfig
from compress.cost.macs import count_macs, count_params
from compress.data.from_config import Splits
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, TorchModel
from compress.model.recipe import Recipe
from compress.progress import SilentProgress, SilentTask
from compress.search.context import StageContext

CLASSES = 4


class Killed(Exception):
    """Stands for the end of the process."""


class RecordingProgress(SilentProgress):
    """Keeps what it is told.

    Args:
        kill_at: First words of a task at whose beginning the run ends.
    """

    def __init__(self, kill_at: str | None = None) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.tasks: list[str] = []
        self.kill_at = kill_at

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[SilentTask]:
        if self.kill_at is not None and label.startswith(self.kill_at):
            raise Killed
        self.tasks.append(label)
        yield SilentTask()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def make_arrays(folder: Path, count: int = 96, *, bright: bool = False) -> Path:
    """Write images (N, 16, 16, 3) of 4 classes as .npz; `bright` makes the class visible in the brightness."""
    path, random, labels = folder / "images.npz", np.random.default_rng(0), np.arange(count) % CLASSES
    shape = (count, 16, 16, 3)
    if bright:
        images = (random.integers(0, 64, shape) + 60 * labels[:, None, None, None]).astype(np.uint8)
    else:
        images = random.integers(0, 256, shape, np.uint8)
    np.savez(path, x=images, y=labels)
    return path


def make_splits(folder: Path, count: int = 96, calibration: int = 32, *, bright: bool = False) -> Splits:
    """Return splits of `make_arrays`: 16 images of validation, the rest for training, all for evaluation."""
    source = ArraysSource(arrays=str(make_arrays(folder, count, bright=bright)))
    preprocessing = PreprocessingConfig(mean=(0.5,), std=(0.25,))
    config = DataConfig(
        train=source, evaluation=source, calibration=calibration, validation=16, preprocessing=preprocessing
    )
    return Splits(config)


def make_saved_model(name: str, folder: Path, module: nn.Module | None = None) -> TorchModel:
    """Return a network of `nets` in the form that `load` returns, with the files of its baseline."""
    model = make_model(name, folder, module)
    folder.mkdir(exist_ok=True)
    shutil.copy(exported(name), model.baseline.onnx_path)
    write_weights(model.module, model.baseline.weights_path)
    metrics = replace(model.baseline.metrics, size_bytes=model.baseline.onnx_path.stat().st_size)
    return replace(model, baseline=replace(model.baseline, metrics=metrics))


def make_model(name: str, folder: Path, module: nn.Module | None = None) -> TorchModel:
    """Return a network of `nets` in the form that `load` returns, without the files of its baseline."""
    module = nets.build(name) if module is None else module
    path, weights = folder / "baseline.onnx", folder / "baseline.safetensors"
    figures = ModelMetrics(count_macs(module, nets.EXAMPLE), count_params(module), 0, {}, {})
    spec = FactorySpec("factory", "nets:build", {"name": name})
    return TorchModel(module, spec, Recipe(), SIGNATURE, PREPROCESSING, (), Baseline(figures, path, weights))


def make_context(
    folder: Path, data: Splits, int8: QuantizeConfig | None = None
) -> tuple[StageContext, RecordingProgress]:
    """Return a context with a folder of its own, and its listener."""
    folder.mkdir(exist_ok=True)
    progress = RecordingProgress()
    deploy = None if int8 is None else DeployConfig(precision="int8")
    return StageContext(folder, 0, data, progress, deploy, quantize=int8), progress
