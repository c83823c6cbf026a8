"""Networks get tensors of the usual strides, and channels-last memory only where they compute the same in it."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor, nn

from compress.config.schema.data import DataConfig
from compress.data.batches import Augmentation, evaluation_batches, training_batches
from compress.data.from_config import Splits
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.model.adapter import unpack_rows
from compress.model.artifacts import Signature, TensorSpec
from compress.training.memory_format import fastest_memory_format
from compress.verification.runtimes.torch_eager import TorchEager

OWN = """
import numpy as np
class Grey:
    def __init__(self, kind):
        self.kind = kind
    def __len__(self):
        return 6
    def __getitem__(self, place):
        image = np.full((8, 8), 20 * place, np.uint8)
        return (image if self.kind == "uint8" else image[None].astype(np.float32)), place % 2
"""


def _arrays(folder: Path) -> dict[str, Any]:
    np.savez(folder / "a.npz", x=_pictures(), y=np.arange(6) % 2)
    return {"arrays": str(folder / "a.npz")}


def _idx(folder: Path) -> dict[str, Any]:
    for name, values in (("x", _pictures()), ("y", (np.arange(6) % 2).astype(np.uint8))):
        header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        (folder / name).write_bytes(header + values.tobytes())
    return {"idx": str(folder / "x"), "labels": str(folder / "y")}


def _folder(folder: Path) -> dict[str, Any]:
    for place, picture in enumerate(_pictures()):
        path = folder / "ab"[place % 2] / f"{place}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
    return {"folder": str(folder)}


def _unlabelled(folder: Path) -> dict[str, Any]:
    _folder(folder)
    return {"unlabelled": str(folder)}


def _own(kind: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "own.py").write_text(OWN, encoding="utf-8")
        return {"own": f"{folder / 'own.py'}:Grey", "kwargs": {"kind": kind}}

    return write


def _pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8)


SOURCES = {
    "arrays": _arrays,
    "idx": _idx,
    "folder": _folder,
    "unlabelled": _unlabelled,
    "own uint8": _own("uint8"),
    "own float": _own("float"),
}


class FirstNetwork(nn.Module):
    """The commonest first network: one channel, and a view of its feature map."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, 4, 3), nn.Linear(4 * 36, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).relu()
        return self.head(features.view(x.size(0), -1))


@pytest.mark.parametrize("name", SOURCES)
def test_one_channel_images_have_the_strides_of_a_new_tensor(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path)
    prepared = {} if name == "own float" else {"preprocessing": {"channels": "L", "mean": [0.5], "std": [0.5]}}
    config = {"train": source, "evaluation": source, "calibration": 2, "validation": 2, **prepared}
    splits = Splits(TypeAdapter(DataConfig).validate_python(config))
    for split in (splits.calibration, splits.validation, splits.evaluation):
        for images, _ in evaluation_batches(split, 2, "nothing"):
            assert images.shape[1:] == (1, 8, 8)
            assert images.stride() == torch.empty(images.shape).stride()
            FirstNetwork()(images)


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(2, True)])
def test_training_batches_have_the_strides_of_a_new_tensor(augmentation: Augmentation) -> None:
    for images, _ in training_batches(_split(1), 4, augmentation, seed=0, epoch=0):
        assert images.stride() == torch.empty(images.shape).stride()


def test_the_runtimes_get_arrays_of_the_usual_strides() -> None:
    images = Preprocessing().normalize(_pictures()[..., None])
    assert images.strides == np.empty(images.shape, np.float32).strides
    signature = Signature(
        (TensorSpec("images", ("batch", 1, 8, 8), "float32"),), (TensorSpec("logits", ("batch", 2), "float32"),)
    )
    odd = np.zeros((2, 8, 8, 1), np.float32).transpose(0, 3, 1, 2)
    with TorchEager(FirstNetwork(), signature) as runtime:
        assert runtime.run({"images": odd})["logits"].shape == (2, 2)


def test_inputs_that_travel_in_rows_can_be_viewed_over_the_batch() -> None:
    inputs = (TensorSpec("a", ("batch", 2, 3), "float32"), TensorSpec("b", ("batch", 4), "float32"))
    for part in unpack_rows(torch.zeros(3, 10), inputs):
        part.view(-1)


def _split(channels: int = 3) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, channels), np.uint8)
    return Split("train", ArraySource(images, np.arange(8) % 2), np.arange(8), Preprocessing())


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x).mean((2, 3)), self.conv(x)


class _ViewsInTraining(_Pair):
    """An auxiliary head that only runs in training views its feature map."""

    def forward(self, x: Tensor) -> Any:
        features = self.conv(x)
        return features.mean((2, 3)) if not self.training else features.view(len(x), -1)


class _ReadsMemory(_Pair):
    """Runs in channels-last memory and gives something else."""

    def forward(self, x: Tensor) -> Any:
        features = self.conv(x)
        return features.as_strided((len(x), 10), (features[0].numel(), 1))


class _Insists(_Pair):
    def forward(self, x: Tensor) -> Any:
        features = self.conv(x)
        assert features.is_contiguous()
        return features.mean((2, 3))


@pytest.mark.parametrize("make", [_ViewsInTraining, _ReadsMemory, _Insists])
def test_a_network_that_cannot_take_channels_last_memory_stays_contiguous(make: Callable[[], nn.Module]) -> None:
    module = make()
    split = _split(3)
    assert fastest_memory_format(module, split) is torch.contiguous_format
    assert all(weight.is_contiguous() for weight in module.parameters())


def test_trying_the_formats_leaves_the_network_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    drawn = torch.get_rng_state()
    assert fastest_memory_format(module, _split()) is torch.channels_last
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert fastest_memory_format(_Pair(), _split()) is torch.channels_last
