"""A pipeline that runs in seconds: four kinds of 16x16 pictures, a tiny trained network, few steps of everything."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nets
import numpy as np
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import compress
from compress.cli.commands import app
from compress.config.load import Pipeline, load_pipeline
from compress.data.from_config import Splits
from compress.engine.runner import RunOutcome, run
from compress.training.loop import fit
from compress.training.settings import FitSettings, TrainingData

ROOT = Path(compress.__file__).parents[1]
NETS = ROOT / "tests" / "nets.py"
MIDDLE = (
    {"stage": "prune", "target": {"macs": 0.6}, "multiple_of": 1, "score_images": 32},
    {"stage": "finetune", "steps": 12, "batch_size": 32, "learning_rate": 0.02},
)
END = (
    {"stage": "export"},
    {
        "stage": "verify",
        "warmup": 2,
        "repeats": 20,
        "resources": None,
        "gates": {"max_drop": {"top1": 0.5}, "parity": 0.001},
    },
)


@dataclass
class Notes:
    """A `Progress` that remembers what it was told."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def task(self, label: str, total: int) -> Any:
        from compress.progress import SilentProgress

        return SilentProgress().task(label, total)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def curve(self, name: str, step: int, values: Any) -> None:
        pass


@dataclass(frozen=True)
class World:
    """A folder with images, weights and pipeline files; `runs` is where its runs go."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def store(self) -> Path:
        return self.runs / ".store"

    def values(self, net: str = "chain", middle: Sequence[dict[str, Any]] = MIDDLE) -> dict[str, Any]:
        """Return the values of a pipeline file, for the caller to change."""
        load = {
            "stage": "load",
            "model": {"factory": f"{NETS}:build", "kwargs": {"name": net}},
            "weights": f"{net}.safetensors",
        }
        return copy.deepcopy(
            {
                "name": net,
                "threads": 1,  # the same arithmetic in this process and in others
                "data": {
                    "train": {"arrays": "train.npz"},
                    "evaluation": {"arrays": "test.npz"},
                    "calibration": 32,
                    "validation": 32,
                    "preprocessing": {"mean": [0.5], "std": [0.25]},
                },
                "stages": [load, *middle, *END],
            }
        )

    def write(self, values: dict[str, Any], file: str | None = None) -> Path:
        """Write a pipeline file."""
        path = self.folder / (file or f"{values['name']}.yaml")
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    def load(self, values: dict[str, Any], *overrides: str) -> Pipeline:
        """Write and read a pipeline file."""
        return load_pipeline(self.write(values), overrides, environ={})

    def run(self, values: dict[str, Any], *overrides: str, progress: Notes | None = None) -> RunOutcome:
        """Run a pipeline in this process."""
        return run(self.load(values, *overrides), self.runs, progress)

    def call(self, command: str, values: dict[str, Any], *arguments: str) -> Result:
        """Give a command for a pipeline in this process, as on the command line."""
        return call(command, str(self.write(values)), "--runs-dir", str(self.runs), *arguments)


@dataclass(frozen=True)
class Finished:
    """A run that was never disturbed; not to be changed."""

    world: World
    outcome: RunOutcome
    progress: Notes


def call(*arguments: str) -> Result:
    """Give a command in this process, as on the command line."""
    return CliRunner().invoke(app, list(arguments), prog_name="compress")


def start(*arguments: str, code: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start a command, or code, in a process of its own."""
    command = [sys.executable, "-m", "compress", *arguments] if code is None else [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes, **options)


def statuses(outcome: RunOutcome) -> list[str]:
    """Return "stage ran" or "stage unchanged" of every stage in a report."""
    return [f"{stage['stage']} {stage['status']}" for stage in outcome.report["stages"]]


def make_world(folder: Path, net: str = "chain") -> World:
    """Write images and trained weights into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "train.npz", **pictures(264, seed=1))
    np.savez(folder / "test.npz", **pictures(64, seed=2))
    world = World(folder)
    add_weights(world, net)
    return world


def add_weights(world: World, net: str) -> None:
    """Train one of the tiny networks for a second and write its weights."""
    module = nets.build(net)
    splits = Splits(world.load(world.values(net)).config.data)
    data = TrainingData(splits.train, splits.validation)
    fit(module, data, FitSettings(epochs=6, batch_size=32, learning_rate=0.05))
    save_file(module.state_dict(), world.folder / f"{net}.safetensors")


def pictures(count: int, seed: int) -> dict[str, np.ndarray]:
    """Return noise with one of four coloured gratings in it, and which."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    rows, columns = np.mgrid[:16, :16]
    gratings = np.stack([np.sin(wave) for wave in (rows, columns, rows + columns, 1.5 * (rows - columns))])
    colours = np.array([[1, 0.3, 0.3], [0.3, 1, 0.3], [0.3, 0.3, 1], [0.8, 0.8, 0.2]])
    clean = gratings[labels][..., None] * colours[labels][:, None, None]
    noisy = 128 + 50 * clean + random.normal(0, 25, (count, 16, 16, 3))
    return {"x": noisy.clip(0, 255).astype(np.uint8), "y": labels}


def read_lock(world: World, name: str) -> list[dict[str, Any]]:
    """Return what the lock of a run says of each stage."""
    stages: list[dict[str, Any]] = json.loads((world.runs / name / "lock").read_text(encoding="utf-8"))["stages"]
    return stages
