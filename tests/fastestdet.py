"""What a user would bring for FastestDet on COCO128: how pictures are resized, and how boxes follow from its outputs.

Both as its author has them: plain resizing to 352 x 352, one box for each of 22 x 22 cells.
"""

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms

SIDE, CELLS = 352, 22


class Coco128:
    """Pictures and boxes out of the archive."""

    def __init__(self, archive: str) -> None:
        self.archive = archive
        with zipfile.ZipFile(archive) as content:
            self.names = sorted(name for name in content.namelist() if name.endswith(".jpg"))
            self.files = {name: content.read(name) for name in content.namelist()}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        name = self.names[place]
        with Image.open(io.BytesIO(self.files[name])) as picture:
            image = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        text = self.files.get(name.replace(".jpg", ".txt"), b"").decode()
        rows = np.array([line.split() for line in text.splitlines() if line.strip()], np.float32).reshape(-1, 5)
        middle, size = rows[:, 1:3] * SIDE, rows[:, 3:5] * SIDE
        boxes = np.concatenate([middle - size / 2, middle + size / 2], 1)
        return image, {"boxes": boxes, "labels": rows[:, 0].astype(np.int64)}


def decode(outputs: Mapping[str, Tensor], image_size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return at most 100 boxes of each image, those of one class apart by 0.45."""
    (maps,) = outputs.values()
    height, width = image_size
    rows, columns = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
    found = []
    for one in maps:
        chance, labels = one[5:].max(0)
        scores = one[0] ** 0.6 * chance**0.4
        x, y = (torch.tanh(one[1]) + columns) / CELLS * width, (torch.tanh(one[2]) + rows) / CELLS * height
        w, h = torch.sigmoid(one[3]) * width, torch.sigmoid(one[4]) * height
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).reshape(-1, 4)
        scores, labels = scores.flatten(), labels.flatten()
        kept = scores > 0.001
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        chosen = batched_nms(boxes, scores, labels, 0.45)[:100]
        found.append({"boxes": boxes[chosen], "scores": scores[chosen], "labels": labels[chosen]})
    return found
