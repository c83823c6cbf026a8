"""Train a reference network the way its card says, and write its weights.

    python models/train.py models/cifar_resnet/card.yaml --data TRAIN.npz
    python models/train.py models/mnist_resnet/card.yaml

It learns from the part of the training source that is left when the pipelines' calibration and validation splits are
taken out, keeps the last epoch (nothing is selected) and never sees the evaluation split. A card may list phases of
training: each starts from the weights of the one before, with a schedule of its own. A killed run goes on from its last
epoch when the same command is given again.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from compress.data.batches import Augmentation
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource, read_arrays, read_idx
from compress.data.splits import Split, carve
from compress.progress import SilentProgress
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


def build(card: dict[str, Any], folder: Path) -> torch.nn.Module:
    """Call the factory that the card names."""
    file_name, function = card["factory"].split(":")
    spec = importlib.util.spec_from_file_location("reference_model", folder / file_name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: torch.nn.Module = getattr(module, function)(**card["kwargs"])
    return network


def read_source(card: dict[str, Any], folder: Path, data: Path | None) -> ArraySource:
    """Read the training source: the path given, or the files beside the card."""
    if data is not None:
        return read_arrays(data, None)
    files = card["data"]["train"]
    return read_idx(folder / files["images"], folder / files["labels"])


def write(module: torch.nn.Module, path: Path) -> None:
    """Write a network's weights whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, partial)
    partial.chmod(0o644)
    partial.replace(path)


def main() -> None:
    """Parse the command line, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", type=Path)
    parser.add_argument("--data", type=Path, help="an .npz with x (uint8 NHWC) and y, where the card embeds no data")
    parser.add_argument("--out", type=Path, help="weights file; the card's `weights` by default")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    arguments = parser.parse_args()

    card = yaml.safe_load(arguments.card.read_text(encoding="utf-8"))
    folder = arguments.card.parent
    phases = card["training"] if isinstance(card["training"], list) else [card["training"]]
    out = arguments.out or folder / card["weights"]
    source = read_source(card, folder, arguments.data)
    parts = carve(source.labels, card["data"]["carve"], card["data"]["carve_seed"])
    preprocessing = Preprocessing.from_dict(card["input"]["preprocessing"])
    data = TrainingData(*(Split(name, source, parts[name], preprocessing) for name in ("train", "validation")))
    sizes = f"training on {len(data.train)} images, watching {len(data.validation)}"
    print(f"{sizes}; {torch.get_num_threads()} threads", flush=True)

    torch.manual_seed(phases[0]["seed"])
    module = build(card, folder)
    for number, phase in enumerate(phases, start=1):
        recipe, done = dict(phase), out.with_suffix(f".phase{number}.tmp")
        if not done.exists():
            augmentation = Augmentation(**recipe.pop("augmentation"))
            settings = FitSettings(augmentation=augmentation, keep="last", compiled=arguments.compile, **recipe)
            state = out.with_suffix(f".state{number}.tmp")
            fit(module, data, settings, state_file=StateFile(state), progress=PrintedProgress())
            write(module, done)
        module.load_state_dict(load_file(done))
        print(f"phase {number} of {len(phases)} is done", flush=True)
    write(module, out)
    for number in range(1, len(phases) + 1):
        out.with_suffix(f".phase{number}.tmp").unlink()
    print(f"wrote {out}", flush=True)


if __name__ == "__main__":
    main()
