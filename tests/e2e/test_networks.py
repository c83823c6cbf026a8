"""A network with re-parametrised layers and a dict of outputs goes through a whole pipeline and back from disk."""

import shutil
from typing import Any

import numpy as np
import pytest
import smallrun
import torch
import wired
from smallrun import World, statuses

from compress.checkpoint.layout import load_slim
from compress.onnx_file.io import load_onnx, read_signature
from compress.verification.runtimes.onnxruntime import OnnxRuntime

MIDDLE = (
    {"stage": "prune", "target": {"macs": 0.6}, "multiple_of": 1, "score_images": 32},
    {"stage": "finetune", "steps": 6, "batch_size": 32, "distillation": {}},
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("networks"))
    np.savez(world.folder / "train.npz", **smallrun.pictures(200, seed=1))
    np.savez(world.folder / "test.npz", **smallrun.pictures(64, seed=2))
    module = wired.structured()
    torch.save({"model_state_dict": {f"net.{name}": value for name, value in module.state_dict().items()}},
               world.folder / "w.pt")  # fmt: skip
    shutil.copyfile(wired.__file__, world.folder / "wired.py")
    return world


def values(world: World, **model: Any) -> dict[str, Any]:
    found = world.values(middle=MIDDLE)
    found["name"] = "structured"
    found["stages"][0] = {
        "stage": "load",
        "model": {"factory": "wired.py:structured", "outputs": ["logits"], **model},
        "weights": "w.pt",
    }
    found["stages"][-2]["dynamic"] = ["height", "width"]
    return found


def test_whole_pipeline_with_open_image_axes(world: World) -> None:
    outcome = world.run(values(world))
    checks = {check.name: check for check in outcome.verdict.checks}
    assert outcome.verdict.passed, [check for check in checks.values() if check.status == "fail"]
    assert "size 80 x 16" in checks["parity_edges"].detail
    assert "size 16 x 80" in checks["parity_edges"].detail
    path = world.runs / "structured" / "model.onnx"
    signature = read_signature(load_onnx(path))
    assert signature.inputs[0].shape == ("batch", 3, "height", "width")
    assert [(output.name, output.shape) for output in signature.outputs] == [("logits", ("batch", 4))]
    assert outcome.report["slim"]["macs"] < 0.61 * outcome.report["baseline"]["macs"]
    slim = load_slim(world.runs / "structured")
    images = next(iter(torch.from_numpy(np.random.default_rng(0).normal(size=(1, 2, 3, 20, 24)).astype(np.float32))))
    with OnnxRuntime(path) as runtime:
        (got,) = runtime.run({"images": images.numpy()}).values()
    assert np.allclose(slim(images).detach().numpy(), got, atol=1e-5)
    assert statuses(world.run(values(world))) == [f"{name} unchanged" for name in
                                                  ("load", "prune", "finetune", "export", "verify")]  # fmt: skip


def test_several_outputs_are_refused_by_a_classifier_with_their_names(world: World) -> None:
    done = world.call("run", values(world, outputs=[]), "--quiet")
    assert done.exit_code == 3
    assert "the network returns features, logits." in done.stderr
    assert "Hint: Name the one to keep: model.outputs." in done.stderr


def test_an_output_that_is_not_there_is_refused_with_the_closest(world: World) -> None:
    done = world.call("run", values(world, outputs=["logit"]), "--quiet")
    assert done.exit_code == 3
    assert "must name outputs of the network (features, logits), got 'logit'." in done.stderr
    assert "did you mean 'logits'?" in done.stderr
