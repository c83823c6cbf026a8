"""Small worlds for every task: images with known answers, a network trained on them in a second, a pipeline file.

The networks, the data set, the task and the functions of detection are what a user's own file would hold, so that
pipelines name them by "taskworld.py:NAME".
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from smallrun import World
from torch import Tensor, nn

import compress
from compress.data.from_config import Splits
from compress.tasks.from_config import open_task
from compress.training.loop import fit
from compress.training.settings import FitSettings, TrainingData

HERE = Path(__file__)
COLOURS = np.array([[40, 40, 40], [220, 60, 60], [60, 60, 220]])
MIDDLE = (
    {"stage": "prune", "target": {"macs": 0.7}, "multiple_of": 1, "score_images": 32},
    {"stage": "finetune", "steps": 12, "batch_size": 32, "learning_rate": 0.02},
)


def squares(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return noisy (N, 16, 16, 3) images of one red or blue square each, their masks, boxes, and classes (0 or 1)."""
    random = np.random.default_rng(seed)
    masks, boxes, classes = np.zeros((count, 16, 16), np.int64), np.zeros((count, 4), np.float32), np.arange(count) % 2
    for place in range(count):
        size = random.integers(4, 9)
        top, left = random.integers(0, 16 - size, 2)
        masks[place, top : top + size, left : left + size] = 1 + classes[place]
        boxes[place] = [left, top, left + size, top + size]
    images = COLOURS[masks] + random.normal(0, 12, (count, 16, 16, 3))
    return images.clip(0, 255).astype(np.uint8), masks, boxes, classes


class Segmenter(nn.Module):
    """Three classes at each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Reader(nn.Module):
    """Some numbers of each image."""

    def __init__(self, numbers: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        )  # fmt: skip
        self.head = nn.Linear(16 * 16, numbers)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


def detector() -> nn.Module:
    """Return a network of one box, (N, 4), and two classes, (N, 2), in one output."""
    return Reader(6)


def find_boxes(outputs: Mapping[str, Tensor], image_size: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Make one box of each image's numbers, which are shares of the image."""
    (values,) = outputs.values()
    height, width = image_size
    boxes = values[:, :4] * torch.tensor([width, height, width, height])
    scores, labels = values[:, 4:].softmax(1).max(1)
    return [
        {"boxes": box[None], "scores": score[None], "labels": label[None]}
        for box, score, label in zip(boxes, scores, labels, strict=True)
    ]


def box_loss(outputs: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return how far the box is from the first one there, and how unlikely its class is."""
    boxes = torch.stack([one["boxes"][0] for one in targets]).to(outputs.dtype) / 16
    labels = torch.stack([one["labels"][0] for one in targets])
    return F.l1_loss(outputs[:, :4], boxes) + F.cross_entropy(outputs[:, 4:], labels)


class Squares:
    """A data set of squares: prepared images (3, 16, 16), and the share of the image that each one takes."""

    def __init__(self, count: int, seed: int, kind: str = "share") -> None:
        self.images, self.masks, self.boxes, self.classes = squares(count, seed)
        self.kind = kind

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Any, Any]:
        prepared = torch.from_numpy(self.images[place]).permute(2, 0, 1) / 128 - 1
        if self.kind == "boxes":
            labels = self.classes[place : place + 1].astype(np.int64)
            return self.images[place], {"boxes": self.boxes[place : place + 1], "labels": labels}
        return prepared, float((self.masks[place] > 0).mean())


class Share(compress.Task):
    """How large is the square? Judged by the share of images that are within a tenth."""

    metric = "within_a_tenth"
    label = "within a tenth"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.smooth_l1_loss(outputs[:, 0], targets)

    def metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        errors = np.abs(outputs[:, 0] - targets)
        return {"within_a_tenth": float((errors < 0.1).mean()), "mean_error": float(errors.mean())}


class Pointed(nn.Module):
    """Is the square of the colour that is asked for? (N, 3, 16, 16) images and (N, 1) numbers of colours."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU()
        )
        self.asked, self.head = nn.Embedding(2, 16), nn.Linear(16, 2)

    def forward(self, image: Tensor, asked: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(image).mean((2, 3)) * self.asked(asked).squeeze(1))}


class Questions:
    """An image, the number of a colour, and whether they fit; `swapped` gives them in the other order."""

    def __init__(self, count: int, seed: int, swapped: bool = False) -> None:
        images, _, _, self.classes_of = squares(count, seed)
        self.images, self.swapped = (images.transpose(0, 3, 1, 2) / 128 - 1).astype(np.float32), swapped
        self.asked = np.random.default_rng(seed).integers(0, 2, (count, 1))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        sample = {"image": self.images[index], "asked": self.asked[index]}
        found = dict(reversed(sample.items())) if self.swapped else sample
        return found, int(self.asked[index, 0] == self.classes_of[index])


def values(task: Any, data: dict[str, Any], factory: str, gates: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Return the values of a pipeline file."""
    return copy.deepcopy(
        {
            "name": "tasked",
            "threads": 1,
            "task": task,
            "data": {**data, "calibration": 32, "validation": 32},
            "stages": [
                {
                    "stage": "load",
                    "model": {"factory": f"{HERE}:{factory}", "kwargs": kwargs},
                    "weights": "weights.safetensors",
                },
                *MIDDLE,
                {"stage": "export"},
                {"stage": "verify", "warmup": 2, "repeats": 20, "resources": None, "gates": {"parity": 0.001, **gates}},
            ],
        }
    )


def make_task_world(
    folder: Path, module: nn.Module, pipeline: dict[str, Any], labelled: dict[str, Any] | None = None, epochs: int = 8
) -> World:
    """Train a network on the pipeline's data, or on others, and write its weights."""
    world = World(folder)
    save_file(module.state_dict(), folder / "weights.safetensors")
    trained_on = {**pipeline, **(labelled or {})}
    config = world.load(trained_on).config
    splits = Splits(config.data, open_task(config.task))
    data = TrainingData(splits.train, splits.validation)
    fit(module, data, FitSettings(epochs=epochs, batch_size=32, learning_rate=0.05))
    save_file(module.state_dict(), folder / "weights.safetensors")
    return world


PREPROCESSING = {"preprocessing": {"mean": [0.5], "std": [0.25]}}


def seeded(module_of: Any, seed: int = 0) -> nn.Module:
    """Build a network whose first weights are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return module_of().eval()
