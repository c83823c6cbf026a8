"""Train the network that a pipeline file loads, from random weights, and write them to where the pipeline expects them.

    python models/shapes/train.py pipelines/segmentation_shapes.yaml
    python models/shapes/train.py pipelines/detection_shapes.yaml --epochs 40

It learns from the pipeline's training split by its task's loss, keeps the epoch that is best on the validation split,
and never sees the evaluation split. A run that was killed goes on from its last epoch when the same command is given
again.
"""

import argparse
from pathlib import Path

from torch import nn

from compress.checkpoint.rebuild import build_module, with_one_array, write_weights
from compress.config.load import load_pipeline
from compress.config.schema.model import LoadConfig
from compress.data.batches import Augmentation, evaluation_batches
from compress.data.from_config import Splits
from compress.progress import SilentProgress
from compress.stages.load import factory_spec
from compress.tasks.from_config import open_task
from compress.training.loop import fit
from compress.training.settings import FitSettings, TrainingData
from compress.training.state import StateFile


class PrintedProgress(SilentProgress):
    """Prints the notes: one line an epoch."""

    def note(self, text: str) -> None:
        """Print at once."""
        print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print at once."""
        print(f"warning: {text}", flush=True)


def train(pipeline: Path, settings: FitSettings) -> Path:
    """Train what a pipeline file loads and return where its weights are.

    Args:
        pipeline: Its first stage names the network and the file; its data and its task say what is learned.
        settings: How.
    """
    config = load_pipeline(pipeline).config
    load = config.stages[0]
    assert isinstance(load, LoadConfig)
    assert load.weights is not None
    spec, out = factory_spec(load.model), Path(load.weights)
    data = Splits(config.data, open_task(config.task))
    examples, _ = next(evaluation_batches(data.validation.first(2), 2, "nothing"))
    module = with_one_array(build_module(spec), spec, examples)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.1  # MobileNetV3's own 0.01 lags: after 250 steps eval mode still saw only ground
    print(f"training on {len(data.train)} images, choosing by {len(data.validation)}", flush=True)
    state = out.with_suffix(".state.tmp")
    images = TrainingData(data.train, data.validation)
    fit(module, images, settings, state_file=StateFile(state), progress=PrintedProgress())
    partial = out.with_suffix(".tmp")
    write_weights(module, partial)
    partial.replace(out)
    return out


def main() -> None:
    """Parse the command line, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--epochs", type=float, default=20.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=0.002)
    arguments = parser.parse_args()
    settings = FitSettings(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        optimizer="adamw",
        augmentation=Augmentation(crop_padding=8, flip=True),
    )
    print(f"wrote {train(arguments.pipeline, settings)}", flush=True)


if __name__ == "__main__":
    main()
