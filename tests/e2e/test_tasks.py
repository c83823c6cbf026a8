"""Every task goes through a whole pipeline, and is judged by its own figure on the file itself."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smallrun
import taskworld
from PIL import Image
from safetensors.torch import save_file
from smallrun import Notes, World
from taskworld import HERE, PREPROCESSING, make_task_world, seeded, values

from compress.bundle.check import read_content
from compress.errors import ConfigValueError, DataError
from compress.onnx_file.io import load_onnx, read_signature

pytestmark = pytest.mark.timeout(300)


def _report(world: World, pipeline: dict[str, Any]) -> tuple[dict[str, Any], Notes]:
    progress = Notes()
    outcome = world.run(pipeline, progress=progress)
    assert outcome.verdict.passed, [check for check in outcome.verdict.checks if check.status != "pass"]
    page = (outcome.folder / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    report = json.loads((outcome.folder / "report.json").read_text(encoding="utf-8"))
    return report, progress


def _against(world: World, pipeline: dict[str, Any]) -> list[str]:
    """Return the arguments that hold a run's file to its own pipeline, beside its own baseline."""
    baseline = next(world.store.rglob("baseline.onnx"))
    return ["--pipeline", str(world.write(pipeline)), "--against", str(baseline)]


def _stage(report: dict[str, Any], name: str) -> dict[str, Any]:
    (record,) = (stage["record"] for stage in report["stages"] if stage["stage"] == name)
    return record


def _checks(report: dict[str, Any]) -> dict[str, Any]:
    return {check["name"]: check for check in report["verdict"]["checks"]}


def test_segmentation_from_pictures_and_masks(tmp_path: Path) -> None:
    for half, count, seed in (("train", 200, 1), ("test", 48, 2)):
        images, masks, *_ = taskworld.squares(count, seed)
        for kind in ("images", "masks"):
            (tmp_path / half / kind).mkdir(parents=True)
        for place in range(count):
            masks[place, 0] = 255  # the first row does not count
            Image.fromarray(images[place]).save(tmp_path / half / "images" / f"{place:03}.png")
            Image.fromarray(masks[place].astype(np.uint8)).save(tmp_path / half / "masks" / f"{place:03}.png")
    data = {
        "train": {"images": "train/images", "masks": "train/masks"},
        "evaluation": {"images": "test/images", "masks": "test/masks"},
        **PREPROCESSING,
    }
    gates = {"max_drop": {"miou": 0.2}, "min": {"miou": 0.5, "pixel_accuracy": 0.8, "corruptions": 0.1}}
    pipeline = values("segmentation", data, "Segmenter", gates)
    pipeline["stages"][2]["augmentation"] = {"flip": True, "crop_padding": 1}
    pipeline["stages"][2]["distillation"] = {"weight": 0.5}
    pipeline["stages"][-1]["robustness"] = {"images": 16, "noise_levels": [0.1], "corruptions": ["elastic", "contrast"]}
    world = make_task_world(tmp_path, seeded(taskworld.Segmenter), pipeline)
    report, progress = _report(world, pipeline)
    page = (world.runs / "tasked" / "report.html").read_text(encoding="utf-8")
    assert "mIoU" in page
    assert "top-1" not in page.lower()
    quality = report["details"]["quality"]
    assert report["slim"]["quality"]["miou"] == quality["slim"]["miou"]["value"] > 0.5
    assert quality["slim"]["miou"]["low"] < quality["slim"]["miou"]["value"] < quality["slim"]["miou"]["high"]
    assert _stage(report, "finetune")["epochs"][0]["validation_miou"] > 0.5
    assert _stage(report, "load")["miou"] == report["baseline"]["quality"]["miou"]
    names = [one["name"] for one in report["details"]["robustness"]["distributions"]]
    assert names == ["nominal", "uniform noise 0.1", "contrast 3"]  # elastic would move pixels from their masks
    assert any("validation mIoU" in note for note in progress.notes)
    assert not any("top-1" in note for note in progress.notes)
    _require_bundle(world, tmp_path / "m.zip", "A segmentation network in ONNX")
    again = world.run(pipeline)
    assert set(smallrun.statuses(again)) == {f"{s['stage']} unchanged" for s in pipeline["stages"]}


def _require_bundle(world: smallrun.World, packed: Path, kind: str) -> None:
    """Check that a run without one value for each class is bundled, and that its outputs are judged by value."""
    bundled = smallrun.call("bundle", str(world.runs / "tasked"), "-o", str(packed))
    assert bundled.exit_code == 0, bundled.output
    checked = smallrun.call("check", str(packed), "--repeats", "3")
    assert checked.exit_code == 0, checked.output
    assert re.search(r"pass +parity +largest difference 0 in '\w+' \(tolerance [0-9.e-]+\), 16 images", checked.output)
    content = read_content(packed)
    readme = content["README.md"].decode()
    assert kind in readme
    assert "top-1" not in readme
    with np.load(io.BytesIO(content["samples.npz"])) as arrays:
        expected = np.array(arrays["expected"])
    for change, code in ((0.0, 0), (float(np.abs(expected).max()), 1)):
        np.save(packed.with_suffix(".npy"), expected + np.float32(change))
        assert smallrun.call("check", str(packed), "--outputs", str(packed.with_suffix(".npy"))).exit_code == code


def test_detection_by_a_postprocess_and_a_loss_of_the_users_own(tmp_path: Path) -> None:
    task = {
        "name": "detection",
        "postprocess": f"{HERE}:find_boxes",
        "loss": f"{HERE}:box_loss",
    }
    own = f"{HERE}:Squares"
    data = {
        "train": {"own": own, "kwargs": {"count": 264, "seed": 1, "kind": "boxes"}},
        "evaluation": {"own": own, "kwargs": {"count": 64, "seed": 2, "kind": "boxes"}},
        **PREPROCESSING,
    }
    pipeline = values(task, data, "detector", {"max_drop": {"map50": 0.9}})
    world = make_task_world(tmp_path, seeded(taskworld.detector), pipeline, epochs=25)
    report, _ = _report(world, pipeline)
    assert 0.3 < report["baseline"]["quality"]["map50"] <= 1
    assert set(report["slim"]["quality"]) == {"map", "map50", "map75"}
    _require_bundle(world, tmp_path / "detector.zip", "An object detector in ONNX")


def test_a_task_and_a_data_set_of_the_users_own(tmp_path: Path) -> None:
    own = f"{HERE}:Squares"
    data = {
        "train": {"own": own, "kwargs": {"count": 264, "seed": 1}},
        "evaluation": {"own": own, "kwargs": {"count": 64, "seed": 2}},
    }
    pipeline = values({"own": f"{HERE}:Share"}, data, "Reader", {"max_drop": {"within_a_tenth": 0.5}})
    world = make_task_world(tmp_path, seeded(taskworld.Reader), pipeline)
    report, _ = _report(world, pipeline)
    assert report["baseline"]["quality"]["within_a_tenth"] > 0.7
    assert 0 < report["slim"]["quality"]["mean_error"] < 0.2
    assert _checks(report)["task"]["status"] == "pass"
    assert report["details"]["quality"]["metric"]["label"] == "within a tenth"
    refused = smallrun.call("bundle", str(world.runs / "tasked"), "-o", str(tmp_path / "m.zip"))
    assert refused.exit_code == 2
    tasks = "classification, detection, segmentation, regression"
    assert f"must be of one of the tasks {tasks} with labelled images, this run's task is own" in refused.stderr
    shutil.copytree(world.runs / "tasked", world.runs / "other")
    compared = smallrun.call(
        "report", *(str(world.runs / name) for name in ("tasked", "other")), "-o", str(tmp_path / "c")
    )
    assert compared.exit_code == 0, compared.stderr
    assert "within a tenth" in (tmp_path / "c" / "comparison.html").read_text(encoding="utf-8").lower()


def test_regression_where_less_is_better(tmp_path: Path) -> None:
    for half, count, seed in (("train", 264, 1), ("test", 64, 2)):
        images, masks, *_ = taskworld.squares(count, seed)
        np.savez(tmp_path / f"{half}.npz", x=images, y=(masks > 0).mean((1, 2)).astype(np.float32))
    data = {"train": {"arrays": "train.npz"}, "evaluation": {"arrays": "test.npz"}, **PREPROCESSING}
    pipeline = values("regression", data, "Reader", {"max_rise": {"rmse": 0.2}, "max": {"mae": 0.3}})
    pipeline["stages"][2]["steps"] = 28
    world = make_task_world(tmp_path, seeded(taskworld.Reader), pipeline)
    report, _ = _report(world, pipeline)
    epochs = [epoch["validation_rmse"] for epoch in _stage(report, "finetune")["epochs"]]
    assert _stage(report, "finetune")["chosen_epoch"] == 1 + int(np.argmin(epochs))
    said = smallrun.call("verify", str(world.runs / "tasked" / "model.onnx"), *_against(world, pipeline)).stdout
    assert re.search(r"rmse +0\.\d+ +0\.\d+ +[+-]", said)
    _require_bundle(world, tmp_path / "m.zip", "A regression network in ONNX")
    check = _checks(report)["max_rise.rmse"]
    assert check["value"] == pytest.approx(report["slim"]["quality"]["rmse"] - report["baseline"]["quality"]["rmse"])


@pytest.mark.parametrize("is_labelled", [True, False], ids=["evaluated with labels", "no labels at all"])
def test_classification_learned_without_labels(tmp_path: Path, is_labelled: bool) -> None:
    world = smallrun.make_world(tmp_path)
    for half in ("train", "test"):
        np.save(tmp_path / f"{half}.npy", np.load(tmp_path / f"{half}.npz")["x"])
    pipeline = world.values()
    pipeline["data"]["train"] = {"unlabelled": "train.npy"}
    gates = {"max_drop": {"top1": 0.5}}
    if not is_labelled:
        pipeline["data"]["evaluation"] = {"unlabelled": "test.npy"}
        gates = {"min": {"agreement": 0.5}, "max": {"distance": 0.9}}
    pipeline["stages"][-1]["gates"] = {**gates, "parity": 0.001}
    report, progress = _report(world, pipeline)
    metric = "top1" if is_labelled else "agreement"
    assert report["slim"]["quality"][metric] >= 0.5
    assert report["baseline"]["quality"][metric] > 0.9
    assert _stage(report, "prune")["validation_agreement_before"] == 1.0
    assert _stage(report, "finetune")["epochs"][-1]["validation_agreement"] > 0.5
    assert any("agreement with the original" in note for note in progress.notes)


def test_an_embedding_stays_where_it_was(tmp_path: Path) -> None:
    images, *_ = taskworld.squares(264, 1)
    np.save(tmp_path / "train.npy", images)
    np.save(tmp_path / "test.npy", images[:40])
    data = {"train": {"unlabelled": "train.npy"}, "evaluation": {"unlabelled": "test.npy"}, **PREPROCESSING}
    pipeline = values("embedding", data, "Reader", {"max": {"distance": 0.9}}, numbers=5)
    pipeline["stages"][2] |= {"learning_rate": 0.005, "gradient_clip": 1.0}
    world = World(tmp_path)
    save_file(seeded(lambda: taskworld.Reader(5)).state_dict(), tmp_path / "weights.safetensors")
    report, _ = _report(world, pipeline)
    assert report["baseline"]["quality"]["distance"] == 0.0
    assert 0 < report["slim"]["quality"]["distance"] < 0.9
    assert report["slim"]["quality"]["cosine"] > 0.5


def test_mixing_images_is_refused_where_targets_are_no_classes(tmp_path: Path) -> None:
    own = f"{HERE}:Squares"
    source = {"own": own, "kwargs": {"count": 100, "seed": 1}}
    pipeline = values({"own": f"{HERE}:Share"}, {"train": source, "evaluation": source}, "Reader", {})
    pipeline["stages"][2]["augmentation"] = {"mixup": 0.2}
    world = make_task_world(tmp_path, seeded(taskworld.Reader), pipeline, epochs=1)
    with pytest.raises(ConfigValueError, match="must be 0 where targets are no class indices"):
        world.run(pipeline)


def _asked(swapped: bool = False) -> dict[str, Any]:
    own = f"{HERE}:Questions"
    data = {
        "train": {"own": own, "kwargs": {"count": 264, "seed": 1, "swapped": swapped}},
        "evaluation": {"own": own, "kwargs": {"count": 64, "seed": 2, "swapped": swapped}},
    }
    pipeline = values("classification", data, "Pointed", {"max_drop": {"top1": 0.9}})
    pipeline["stages"][0]["model"]["inputs"] = {
        "image": [3, 16, 16],
        "asked": {"shape": [1], "dtype": "int64", "high": 2},
    }
    return pipeline


def test_a_network_of_two_inputs_goes_all_the_way(tmp_path: Path) -> None:
    world = World(tmp_path)
    save_file(seeded(taskworld.Pointed).state_dict(), tmp_path / "weights.safetensors")
    report, _ = _report(world, _asked())
    assert _stage(report, "prune")["macs_after"] <= 0.71 * _stage(report, "prune")["macs_before"]
    inputs = read_signature(load_onnx(world.runs / "tasked" / "model.onnx")).inputs
    assert [(one.name, one.shape, one.dtype) for one in inputs] == [
        ("image", ("batch", 3, 16, 16), "float32"),
        ("asked", ("batch", 1), "int64"),
    ]


def test_inputs_in_another_order_than_declared_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    save_file(seeded(taskworld.Pointed).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match=r"must have the inputs .* in their order \(image, asked\), got asked, image"):
        world.run(_asked(swapped=True))
