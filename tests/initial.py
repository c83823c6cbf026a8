"""Small data sets and checkpoints for `compress init`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from compress.cli.commands import app

CLASSES = ("disc", "square", "stripes")
BUILD = """
from torch import nn

def build(classes=3, channels=3):
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )
"""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], prog_name="compress")


def picture(kind: int, random: np.random.Generator, size: tuple[int, int], channels: int) -> np.ndarray:
    rows, columns = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    shape = [rows**2 + columns**2 < 0.4, np.maximum(abs(rows), abs(columns)) < 0.6, np.sin(9 * rows) > 0][kind]
    pixels = 90 + 90 * shape[..., None] + random.normal(0, 20, (*size, channels))
    return pixels.clip(0, 255).astype(np.uint8)


def write_folder(
    folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((32, 32),), channels: int = 3, labelled: bool = True
) -> Path:
    random = np.random.default_rng(count)
    for kind, name in enumerate(CLASSES):
        place = folder / name if labelled else folder
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = picture(kind, random, sizes[number % len(sizes)], channels)
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(place / f"{name}{number}.png")
    return folder


def write_arrays(path: Path, count: int, channels: int = 3) -> Path:
    random, labels = np.random.default_rng(0), np.arange(3 * count) % 3
    images = np.stack([picture(kind, random, (16, 16), channels) for kind in labels])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x=images[..., 0] if channels == 1 else images, y=labels)
    return path


def halves(folder: Path, **options: object) -> Path:
    write_folder(folder / "train", 24, **options)
    write_folder(folder / "test", 10, **options)
    return folder


def tiny(folder: Path, channels: int = 3) -> nn.Module:
    (folder / "net.py").write_text(BUILD, encoding="utf-8")
    names: dict[str, Callable[..., nn.Module]] = {}
    exec(BUILD, names)
    torch.manual_seed(0)
    return names["build"](3, channels)


def checkpoint(folder: Path, network: nn.Module, kind: str = "plain") -> Path:
    state = network.state_dict()
    if kind == "safetensors":
        save_file(state, folder / "best.safetensors")
        return folder / "best.safetensors"
    path = folder / "best.pt"
    wrapped = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(wrapped if kind == "wrapped" else state, path)
    return path


def factory(folder: Path, kind: str = "plain", channels: int = 3) -> tuple[object, ...]:
    return "net.py:build", "--weights", checkpoint(folder, tiny(folder, channels), kind).name
