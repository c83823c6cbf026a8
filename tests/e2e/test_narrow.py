"""A network that another tool slimmed is loaded narrow, cut again, trained, exported, verified, reloaded, inspected."""

import copy
import json
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnxruntime
import pytest
import smallrun
import steady
import torch
from safetensors.torch import load_file, save_file
from smallrun import World

import compress
from compress.bundle.write import write_bundle
from compress.config.load import load_pipeline
from compress.cost.macs import count_macs
from compress.inspection.targets import open_target
from compress.model.recipe import Narrow, Recipe, RemoveChannels
from compress.onnx_file.counting import count_onnx
from compress.pruning.surgery import cut_copy

GONE = {"body.0.0": (1, 5), "body.1.0": (0, 3, 4, 9), "body.2.0": (2, 7, 8)}
TRAINING = {**smallrun.MIDDLE[1], "distillation": {"weight": 0.5, "features": 1.0}}


@pytest.fixture
def narrow_world(world: World) -> World:
    """The small world, whose weights lack channels in the middle of every layer."""
    whole = nets.build("chain")
    whole.load_state_dict(load_file(world.folder / "chain.safetensors"))
    save_file(cut_copy(whole, GONE, nets.EXAMPLE).state_dict(), world.folder / "slim.safetensors")
    return world


def _values(world: World, target: dict[str, float], **deploy: Any) -> dict[str, Any]:
    prune = {**smallrun.MIDDLE[0], "target": target}
    values = copy.deepcopy(world.values(middle=(prune, TRAINING)))
    values["name"] = "narrow"
    values["stages"][0] |= {"weights": "slim.safetensors", "narrow": True}
    return values | ({"deploy": deploy} if deploy else {})


def _recipe(folder: Path) -> Recipe:
    return Recipe.from_json((folder / "slim" / "recipe.json").read_text(encoding="utf-8"))


def test_a_narrow_network_is_the_baseline_of_everything_after_it(narrow_world: World, tmp_path: Path) -> None:
    progress = smallrun.Notes()
    outcome = narrow_world.run(_values(narrow_world, {"macs": 0.6}), progress=progress)
    assert any("narrow: 'slim.safetensors' lacks 9 channels in 3 channel groups" in note for note in progress.notes)
    first, second = _recipe(outcome.folder).edits
    assert isinstance(first, Narrow)
    assert {name: len(gone) for name, gone in first.removed.items()} == {n: len(gone) for n, gone in GONE.items()}
    assert type(second) is RemoveChannels
    load = outcome.report["stages"][0]["record"]
    assert load["narrow"] == {"body.0.0": 2, "body.1.0": 4, "body.2.0": 3}
    narrow = cut_copy(nets.build("chain"), GONE, nets.EXAMPLE)
    assert load["macs"] == count_macs(narrow, nets.EXAMPLE)
    slim = compress.load(outcome.folder)
    assert 0.5 < count_macs(slim, nets.EXAMPLE) / load["macs"] <= 0.6
    images = nets.images()
    session = onnxruntime.InferenceSession(outcome.folder / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, slim(images).numpy(), atol=1e-4)
        by_callable = compress.load(outcome.folder, nets.build)
        assert torch.equal(by_callable(images), slim(images))
    assert "Narrower than the factory" in (outcome.folder / "report.html").read_text(encoding="utf-8")
    assert write_bundle(outcome.folder, tmp_path / "model.zip").is_file()
    assert count_onnx(outcome.folder / "model.onnx").macs == count_macs(slim, nets.EXAMPLE)


def test_a_narrow_network_is_cut_to_a_share_of_its_own_time(narrow_world: World, monkeypatch: Any) -> None:
    steady.profile_by_macs(monkeypatch)
    values = _values(narrow_world, {"latency": 0.7}, threads=1, batch_size=64)
    outcome = narrow_world.run(values)
    load = outcome.report["stages"][0]["record"]
    assert count_macs(compress.load(outcome.folder), nets.EXAMPLE) <= 0.72 * load["macs"]


def test_inspect_shows_a_pipeline_at_its_narrow_widths(narrow_world: World) -> None:
    path = narrow_world.write(_values(narrow_world, {"macs": 0.6}))
    network = open_target(str(path), None)
    assert [tuple(network.module.body[n][0].weight.shape[:2]) for n in range(3)] == [(6, 3), (12, 6), (13, 12)]


def test_a_state_dict_that_fits_no_widths_ends_with_exit_code_4(narrow_world: World) -> None:
    state = load_file(narrow_world.folder / "slim.safetensors")
    save_file({**state, "body.1.0.weight": torch.ones(12, 7, 3, 3)}, narrow_world.folder / "slim.safetensors")
    done = narrow_world.call("run", _values(narrow_world, {"macs": 0.6}))
    assert done.exit_code == 4
    assert "body.1.0.weight is (12, 7, 3, 3) in the file and (16, 8, 3, 3) in the network" in done.output


def test_narrow_is_part_of_the_key(narrow_world: World) -> None:
    from compress.engine.keys import build_steps

    keys = [
        json.dumps(build_steps(load_pipeline(narrow_world.write(values), environ={}))[0].fixed, sort_keys=True)
        for values in (_values(narrow_world, {"macs": 0.6}), _values(narrow_world, {"macs": 0.6}))
    ]
    assert keys[0] == keys[1]
    values = _values(narrow_world, {"macs": 0.6})
    values["stages"][0]["narrow"] = False
    path = narrow_world.write(values)
    assert json.dumps(build_steps(load_pipeline(path, environ={}))[0].fixed, sort_keys=True) != keys[0]
