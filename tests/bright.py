"""Images whose class is told by their brightness, learned by a tiny network in a few steps; stages run on them."""

from contextlib import contextmanager

import nets
import numpy as np

from compress.config.schema.data import ArraysSource, DataConfig, PreprocessingConfig
from compress.cost.macs import count_macs, count_params
from compress.data.from_config import Splits
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, Signature, TensorSpec, TorchModel
from compress.model.recipe import Recipe
from compress.progress import SilentProgress
from compress.search.context import StageContext

SIGNATURE = Signature((TensorSpec("images", ("batch", 3, 16, 16)),), (TensorSpec("logits", ("batch", 4)),))


class Listener(SilentProgress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    @contextmanager
    def task(self, label, total):
        with super().task(label, total) as task:
            yield task

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def splits(folder) -> Splits:
    """Return splits of 96 images of 4 classes in an .npz file."""
    path, random, labels = folder / "images.npz", np.random.default_rng(0), np.arange(96) % 4
    images = random.integers(0, 64, (96, 16, 16, 3)) + 60 * labels[:, None, None, None]
    np.savez(path, x=images.astype(np.uint8), y=labels)
    source = ArraysSource(arrays=str(path))
    preprocessing = PreprocessingConfig(mean=(0.5,), std=(0.25,))
    return Splits(
        DataConfig(train=source, evaluation=source, calibration=48, validation=16, preprocessing=preprocessing)
    )


def artifact(name: str, folder) -> TorchModel:
    """Return a tiny network as `load` gives it, without the files of its baseline."""
    module = nets.build(name)
    figures = ModelMetrics(count_macs(module, nets.EXAMPLE), count_params(module), 0, {}, {})
    baseline = Baseline(figures, folder / "baseline.onnx", folder / "baseline.safetensors")
    spec = FactorySpec("factory", "nets:build", {"name": name})
    return TorchModel(module, spec, Recipe(), SIGNATURE, None, (), baseline)  # type: ignore[arg-type]


def context(folder, data: Splits) -> tuple[StageContext, Listener]:
    """Return the surroundings of a stage with a folder of its own, and what listens to it."""
    folder.mkdir(exist_ok=True)
    listener = Listener()
    return StageContext(folder, 0, data, listener), listener
