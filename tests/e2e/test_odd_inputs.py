"""Inputs as strangers have them, through whole pipelines: right, or refused with a sentence that says what to do."""

from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import smallrun
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from smallrun import Finished, World

import compress

NETWORKS = '''
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class First(nn.Module):
    """The commonest first network: one channel and a view."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 5), nn.Linear(8 * 36, 4)

    def forward(self, x):
        features = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.head(features.view(x.size(0), -1))


class Signal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv1d(1, 16, 5, padding=2), nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x)))).amax(2))


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3, 4)))


class Divided(nn.Module):
    """Its divisor is lost by torch's exporter."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(1, 8, 3), nn.AvgPool2d(2, divisor_override=7), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.pool(F.relu(self.conv(x))).mean((2, 3)))


class Samples:
    def __init__(self, count, shape, named=False):
        random = np.random.default_rng(count)
        self.targets = np.arange(count) % 4
        self.values = random.normal(size=(count, *shape)).astype(np.float32)
        self.named = named

    def __len__(self):
        return len(self.values)

    def __getitem__(self, place):
        value = self.values[place]
        return ({"x": value} if self.named else value), int(self.targets[place])
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A folder with networks, their weights and grey images."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "net.py").write_text(NETWORKS, encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(NETWORKS, scope)
    for name in ("First", "Signal", "Clip", "Divided"):
        torch.manual_seed(0)
        save_file(scope[name]().state_dict(), folder / f"{name}.safetensors")
    for half, count in (("train", 72), ("test", 24)):
        images = smallrun.pictures(count, seed=count)
        np.savez(folder / f"{half}.npz", x=images["x"][..., :1], y=images["y"])
    return World(folder)


def pipeline(place: World, name: str, **data: Any) -> dict[str, Any]:
    values = place.values(middle=({"stage": "prune", "target": {"macs": 0.7}, "score_images": 8, "multiple_of": 1},))
    values["name"] = name.lower()
    values["data"].update({"calibration": 8, "validation": 8, **data})
    values["stages"][0] = {"stage": "load", "model": {"factory": f"net.py:{name}"}, "weights": f"{name}.safetensors"}
    del values["stages"][-1]["gates"]
    return values


def test_one_channel_and_a_view_are_pruned_trained_and_exported(place: World) -> None:
    values = pipeline(place, "First")
    values["stages"].insert(2, {"stage": "finetune", "steps": 2, "batch_size": 8})
    progress = smallrun.Notes()
    outcome = place.run(values, progress=progress)
    assert outcome.verdict.passed
    warned = [text for text in progress.warnings if "chance level" in text]
    assert len(warned) == 1  # its weights were never trained
    assert warned[0] in outcome.report["stages"][0]["record"]["warnings"]
    assert "chance level" in (outcome.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "shape", "named", "inputs"),
    [("Signal", (1, 32), False, None), ("Signal", (1, 32), True, [1, 32]), ("Clip", (3, 4, 6, 6), False, None)],
)
def test_signals_and_clips_are_single_inputs(
    place: World, name: str, shape: tuple[int, ...], named: bool, inputs: list[int] | None
) -> None:
    own = {"own": "net.py:Samples", "kwargs": {"count": 60, "shape": list(shape), "named": named}}
    values = pipeline(place, name, train=own, evaluation={**own, "kwargs": {**own["kwargs"], "count": 20}})
    del values["data"]["preprocessing"]
    values["name"] = f"{name.lower()}{int(named)}"
    if inputs is not None:
        values["stages"][0]["model"]["inputs"] = {"x": inputs}
    assert place.run(values).verdict.passed
    module = compress.load(place.runs / values["name"])
    assert module(torch.zeros(2, *shape)).shape == (2, 4)


def test_samples_of_another_shape_than_declared_are_refused(place: World) -> None:
    own = {"own": "net.py:Samples", "kwargs": {"count": 60, "shape": [32, 1], "named": True}}
    values = pipeline(place, "Signal", train=own, evaluation=own)
    del values["data"]["preprocessing"]
    values["stages"][0]["model"]["inputs"] = {"x": [1, 32]}
    done = place.call("run", values, "-q")
    assert done.exit_code == 3
    assert "must be the shapes that the network takes (x (1, 32)), got (32, 1) for 'x'" in done.stderr


def test_what_the_exporter_loses_is_refused_by_load_with_the_layer(place: World) -> None:
    done = place.call("run", pipeline(place, "Divided"), "-q")
    assert done.exit_code == 3
    assert "Stage 'load'" in done.stderr
    assert "the first layer whose values differ is 'pool' (AvgPool2d(" in done.stderr


def test_open_axes_behind_a_fixed_flatten_are_refused_by_export(place: World) -> None:
    values = pipeline(place, "First")
    values["stages"][-2]["dynamic"] = ["height", "width"]
    done = place.call("run", values, "-q")
    assert done.exit_code == 3
    assert "Stage 'export'" in done.stderr
    assert "it fails in layer 'head'" in done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: {name: value.to(torch.int64) for name, value in state.items()}, "int64 instead of float32"),
        (lambda state: {name: value.to(torch.float8_e5m2) for name, value in state.items()}, "float8_e5m2 instead of"),
        (lambda state: {**{f"model.{n}": v for n, v in state.items()}, "loss.weight": torch.ones(4)}, "loss.weight"),
    ],
    ids=["int64", "fp8", "lightning"],
)
def test_weights_that_are_none_end_with_exit_4(finished: Finished, tmp_path: Path, change: Any, said: str) -> None:
    state = load_file(finished.world.folder / "chain.safetensors")
    torch.save({"state_dict": change(state)}, tmp_path / "w.pt")
    values = finished.world.values()
    values["stages"][0]["weights"] = str(tmp_path / "w.pt")
    values["stages"][0]["model"]["factory"] = f"{nets.__file__}:build"
    for half, file in (("train", "train.npz"), ("evaluation", "test.npz")):
        values["data"][half] = {"arrays": str(finished.world.folder / file)}
    done = World(tmp_path).call("run", values, "-q")
    assert done.exit_code == 4
    assert said in done.stderr
    assert "Traceback" not in done.output


def test_class_folders_with_numbers_are_told_and_their_order_can_be_given(place: World) -> None:
    for half in ("train", "test"):
        images = np.load(place.folder / f"{half}.npz")
        for number, (image, label) in enumerate(zip(images["x"], images["y"], strict=True)):
            path = place.folder / half / ("1", "2", "3", "10")[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
    data: dict[str, Any] = {"train": {"folder": "train"}, "evaluation": {"folder": "test"}}
    values = pipeline(place, "First", **data)
    values["data"]["preprocessing"]["channels"] = "L"
    values["stages"] = [values["stages"][0], *values["stages"][-2:]]
    progress = smallrun.Notes()
    place.run(values, progress=progress)
    assert any("class 1 is '10', by their numbers it would be '2'" in text for text in progress.warnings)
    for half in data.values():
        half["classes"] = [1, 2, 3, 10]
    progress = smallrun.Notes()
    place.run(values, progress=progress)
    assert not any("text order" in text for text in progress.warnings)
