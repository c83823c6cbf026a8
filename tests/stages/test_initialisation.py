"""Pruning at initialisation: seeded weights, what follows from an untrained baseline, and pipelines from end to end."""

import hashlib
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smallrun
import torch
from safetensors.torch import load_file, save_file
from smallrun import Notes, World
from steady import profile_by_macs
from torch import nn

from compress.checkpoint.rebuild import initialized
from compress.config.load import load_pipeline
from compress.errors import ModelError, NonFinite
from compress.model.artifacts import FactorySpec
from compress.stages.load import UNTRAINED_NOTE

FACTORY = """
import random
import numpy as np
import torch
from torch import nn

def conv(a, b, stride=1):
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())

def build():
    layers = [conv(3, 8), conv(8, 16, 2), conv(16, 16)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    with torch.no_grad():
        net[-1].bias[0] = random.random()
        net[-1].bias[1] = float(np.random.random())
    return net

def unseeded():
    net = build()
    torch.seed()
    nn.init.normal_(net[-1].weight)
    return net

def fixed():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    return build()

def empty():
    net = build()
    net[-1].bias.data.fill_(float("nan"))
    return net
"""
DIGEST = """
import hashlib, sys, torch
from compress.model.artifacts import FactorySpec
from compress.checkpoint.rebuild import initialized
torch.rand(7)
module, _ = initialized(FactorySpec("factory", sys.argv[1]), 11)
print(hashlib.sha256(b"".join(v.numpy().tobytes() for v in module.state_dict().values())).hexdigest())
"""


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = smallrun.make_world(tmp_path_factory.mktemp("untrained") / "world")
    (world.folder / "factory.py").write_text(FACTORY, encoding="utf-8")
    return world


@pytest.fixture
def world(origin: World, tmp_path: Path) -> World:
    shutil.copytree(origin.folder, tmp_path / "world")
    return World(tmp_path / "world")


def spec(world: World, name: str = "build") -> FactorySpec:
    return FactorySpec("factory", f"{world.folder / 'factory.py'}:{name}")


def digest(module: nn.Module) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in module.state_dict().values())).hexdigest()


def test_the_seed_alone_decides_the_weights_in_any_process(origin: World) -> None:
    first, is_seeded = initialized(spec(origin), 11)
    assert is_seeded
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    again, _ = initialized(spec(origin), 11)
    assert digest(again) == digest(first) != digest(initialized(spec(origin), 12)[0])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    process = smallrun.start(code=f"import sys; sys.argv = ['', {spec(origin).reference!r}]\n{DIGEST}")
    out, err = process.communicate(timeout=120)
    assert out.strip() == digest(first), err


def test_initialisations_that_no_seed_decides_are_said_or_refused(origin: World) -> None:
    assert initialized(spec(origin, "fixed"), 1)[1] is False
    with pytest.raises(ModelError, match=r"must build the same weights from the same seed, these differ: 5\.weight"):
        initialized(spec(origin, "unseeded"), 1)
    with pytest.raises(NonFinite, match=r"must be finite, NaN or infinity in 5\.bias"):
        initialized(spec(origin, "empty"), 1)


def test_networks_of_libraries_are_initialised_by_the_seed() -> None:
    named = FactorySpec("torchvision", "squeezenet1_1", {"num_classes": 3})
    module, is_seeded = initialized(named, 1)
    assert is_seeded
    assert digest(module) == digest(initialized(named, 1)[0])


def values(world: World, *middle: dict[str, Any], name: str = "build") -> dict[str, Any]:
    made = world.values(middle=middle)
    made["stages"][0] = {"stage": "load", "model": {"factory": spec(world, name).reference}, "weights": "none"}
    made["stages"][-1]["gates"] = {"min": {"top1": 0.4}, "parity": 0.001}
    return made


PRUNE = {"stage": "prune", "target": {"macs": 0.6}, "multiple_of": 1, "score_images": 32, "criterion": "taylor"}
TRAIN = {"stage": "finetune", "steps": 48, "batch_size": 32, "learning_rate": 0.1}


def test_defaults_before_the_first_training_are_those_of_an_untrained_network(world: World) -> None:
    later = {**PRUNE, "target": {"macs": 0.4}}
    given = {**PRUNE, "repair": ["least_squares"], "residual": "keep", "target": {"macs": 0.8}}
    config = world.load(values(world, PRUNE, given, TRAIN, later)).config
    cuts = [(stage.repair, stage.residual) for stage in config.stages if stage.stage == "prune"]
    usual = ("scaling", "least_squares", "bias_folding", "batch_norm")
    assert cuts == [(("batch_norm",), "cut"), (("least_squares",), "keep"), (usual, "auto")]
    assert load_pipeline(world.write(config.model_dump(mode="json"), "again.yaml"), environ={}).config == config
    trained = world.load(world.values(middle=[PRUNE])).config
    assert [(stage.repair, stage.residual) for stage in trained.stages if stage.stage == "prune"] == [(usual, "auto")]


def test_pruning_at_initialisation_meets_its_macs_and_learns(world: World) -> None:
    told = Notes()
    outcome = world.run(values(world, {**PRUNE, "order": "random"}, TRAIN), progress=told)
    load, prune, training = (stage["record"] for stage in outcome.report["stages"][:3])
    assert outcome.verdict.passed
    assert load["is_untrained"]
    assert UNTRAINED_NOTE in told.notes
    assert UNTRAINED_NOTE in load["warnings"]
    assert not any("chance level" in text or "far better on validation" in text for text in told.warnings)
    assert prune["reached"]["macs"] <= 0.6
    assert {one["repair"] for one in prune["repairs"]} <= {"batch_norm"}
    assert set(prune["isometry"]) == {"before", "after_cut", "after_repair", "images", "directions"}
    assert 0 < prune["isometry"]["after_cut"] != prune["isometry"]["before"]
    assert training["validation_top1_after"] > 0.4
    page = (world.runs / "chain" / "report.html").read_text(encoding="utf-8")
    assert "mean singular value of the Jacobian, before, after the cut" in page
    assert "mean singular value of the Jacobian, baseline, before training, after training" in page
    assert "The network is untrained" in page


def test_batch_norm_statistics_of_an_untrained_network_are_measured(world: World) -> None:
    outcome = world.run(values(world, TRAIN))
    baseline = load_file(next(world.store.rglob("baseline.safetensors")))
    assert outcome.verdict.passed
    assert baseline["0.1.running_mean"].abs().max() > 0
    state = initialized(spec(world), 0)[0].state_dict()
    assert state["0.1.running_mean"].abs().max() == 0


def test_pruning_at_initialisation_meets_a_latency(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    profile_by_macs(monkeypatch)
    told = Notes()
    made = values(world, {**PRUNE, "target": {"latency": 0.7}, "order": "shuffled"}, TRAIN, name="fixed")
    outcome = world.run({**made, "deploy": {"threads": 1, "repeats": 5}}, progress=told)
    assert outcome.report["stages"][1]["record"]["reached"]["latency"] == pytest.approx(0.7, rel=0.05)
    assert any("the same for every seed" in text for text in told.warnings)


def test_a_rewound_pipeline_runs_and_a_wrong_checkpoint_is_refused_before_anything_is_cut(world: World) -> None:
    rewound = {**TRAIN, "weights": "rewound", "rewind_to": "chain.safetensors", "rewind_epoch": 3, "steps": 12}
    made = world.values(middle=[{**PRUNE, "target": {"macs": 0.6}}, rewound])
    outcome = world.run(made)
    record = outcome.report["stages"][2]["record"]
    assert record["weights"] == "rewound"
    assert outcome.report["stages"][1]["record"]["reached"]["macs"] <= 0.6
    assert "rewound to epoch 3" in (world.runs / "chain" / "report.html").read_text(encoding="utf-8")
    moved = world.folder / "elsewhere.safetensors"
    shutil.copy(world.folder / "chain.safetensors", moved)
    made["stages"][2]["rewind_to"] = moved.name
    assert [stage["status"] for stage in world.run(made).report["stages"]] == ["unchanged"] * 5, "counts by content"
    save_file(initialized(spec(world), 0)[0].state_dict(), moved)
    made["seed"] = 1  # everything is to run
    done = world.call("run", made, "--quiet")
    assert done.exit_code == 4
    assert f"Checkpoint '{moved}' of rewind_to must fit the network exactly; missing: body.0.0.weight" in done.stderr
    assert "Hint: A checkpoint to rewind to is of the complete network" in done.stderr
    assert "Stage" not in done.stderr
    made["stages"][2]["rewind_to"] = "nowhere.pt"
    done = world.call("run", made, "--quiet")
    assert (done.exit_code, done.stderr) == (4, f"Checkpoint '{world.folder / 'nowhere.pt'}' does not exist.\n")
