"""`compress init`: data and checkpoints of many kinds, files that validate deeply and run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from initial import CLASSES, call, checkpoint, factory, halves, tiny, write_arrays, write_folder
from torch import nn
from torchvision import models

import compress
from compress.config.load import load_pipeline
from compress.networks.architectures import find_architecture


def resnet(folder: Path) -> tuple[object, ...]:
    torch.manual_seed(0)
    return (checkpoint(folder, models.resnet18(num_classes=3), "wrapped").name,)


def onnx_file(folder: Path) -> tuple[object, ...]:
    network = tiny(folder).eval()
    compress.export(network, folder / "net.onnx", torch.zeros(1, 3, 32, 32))
    return ("net.onnx",)


CASES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], tuple[object, ...]]]] = {
    "class folders, factory": (lambda f: write_folder(f / "photos", 24), factory),
    "train and test folders, safetensors": (lambda f: halves(f / "set"), lambda f: factory(f, "safetensors")),
    "one .npz, wrapped checkpoint": (lambda f: write_arrays(f / "set.npz", 30), lambda f: factory(f, "wrapped")),
    "grey arrays": (lambda f: write_arrays(f / "grey.npz", 30, 1), lambda f: factory_of_grey(f)),
    "train.npz and test.npz": (lambda f: both_arrays(f / "arrays"), factory),
    "several sizes": (lambda f: write_folder(f / "many", 20, ((40, 48), (36, 30), (50, 50))), factory),
    "no labels": (lambda f: write_folder(f / "plain", 30, labelled=False), factory),
    "checkpoint alone": (lambda f: write_folder(f / "photos", 20), resnet),
    "train, val and test": (lambda f: three_parts(f / "set"), factory),
    "ONNX file": (lambda f: halves(f / "set"), onnx_file),
}


def factory_of_grey(folder: Path) -> tuple[object, ...]:
    reference, *rest = factory(folder, channels=1)
    text = (folder / "net.py").read_text(encoding="utf-8").replace("channels=3", "channels=1")
    (folder / "net.py").write_text(text, encoding="utf-8")
    return reference, *rest


def both_arrays(folder: Path) -> Path:
    write_arrays(folder / "train.npz", 30)
    write_arrays(folder / "test.npz", 10)
    return folder


def three_parts(folder: Path) -> Path:
    halves(folder)
    write_folder(folder / "val", 8)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_written_that_validates_deeply(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_data, make_model = CASES[case]
    data, model = make_data(tmp_path).relative_to(tmp_path), make_model(tmp_path)
    (tmp_path / "pipelines").mkdir()
    written = call("init", data, *model, "--out", "pipelines/my first.yaml", "--target-macs", "0.6")
    assert written.exit_code == 0, written.output
    text = Path("pipelines/my first.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=.compress-schema.json\n")
    schema = json.loads(Path("pipelines/.compress-schema.json").read_text(encoding="utf-8"))
    assert schema["$id"] == "urn:compress:pipeline"
    config = load_pipeline(Path("pipelines/my first.yaml"), environ={}).config
    assert config.name == "my-first"
    assert config.stages[1].target.macs == 0.6
    checked = call("validate", "--deep", "pipelines/my first.yaml")
    assert checked.exit_code == 0, checked.output
    assert "valid, load -> prune -> finetune -> export -> verify." in checked.stdout
    if case == "class folders, factory":
        assert "taken from train" in text
        ended = call("run", "pipelines/my first.yaml", "--set", "stages.verify.resources=null")
        assert ended.exit_code in (0, 1, 6), ended.output
        assert Path("runs/my-first/model.onnx").is_file()


def test_classes_and_splits_follow_from_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos", 60)
    written = call("init", "photos", *resnet(tmp_path))
    assert written.exit_code == 0, written.output
    assert "180 images (32 x 32) of 3 classes." in written.stdout
    assert "'best.pt' has the layers of torchvision's resnet18 with 3 classes." in written.stdout
    config = load_pipeline(Path("pipeline.yaml"), environ={}).config
    assert config.stages[0].model.kwargs == {"num_classes": 3}
    assert (config.data.evaluation, config.data.calibration, config.data.validation) == (45, 33, 27)
    assert config.stages[-1].gates.max_drop == {"top1": 0.1}


@pytest.mark.parametrize(
    "name", ["resnet34", "mobilenet_v2", "densenet121", "regnet_y_400mf", "efficientnet_b0", "vgg11_bn"]
)
def test_a_checkpoint_tells_its_architecture(name: str) -> None:
    state = models.get_model(name, weights=None, num_classes=7).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert find_architecture(shapes, 7) == name


class Whole(nn.Module):
    """Saved with its class, not as a state dict."""


def bad_cases(folder: Path) -> dict[str, tuple[tuple[object, ...], int, str]]:
    halves(folder / "set")
    write_folder(folder / "one", 3)
    for name in CLASSES[1:]:
        for file in (folder / "one" / name).iterdir():
            file.unlink()
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("x", encoding="utf-8")
    write_folder(folder / "other" / "train", 2)
    write_folder(folder / "other" / "test", 2)
    (folder / "other" / "test" / "disc").rename(folder / "other" / "test" / "dog")
    torch.manual_seed(0)
    torch.save(models.resnet18(num_classes=2).state_dict(), folder / "two.pt")
    torch.save(tiny(folder).state_dict(), folder / "tiny.pt")
    torch.save(Whole(), folder / "whole.pt")
    return {
        "no such data": (("nowhere", "resnet18"), 2, "DATA 'nowhere' does not exist."),
        "a text as data": (("notes.txt", "resnet18"), 2, "must be a folder or an .npz file, got the file 'notes.txt'"),
        "an empty folder": (("empty", "resnet18"), 2, "holds no images and no class folders"),
        "one class": (("one", "resnet18"), 3, "it has one folder with images: 'disc'"),
        "other classes in test": (("other", "net.py:build", "--weights", "tiny.pt"), 3, "must have the same classes"),
        "fewer classes in the network": (("set", "two.pt"), 3, "The data have 3 classes, the network 2."),
        "unknown layers": (("set", "tiny.pt"), 3, "No network of torchvision has the layers of this checkpoint"),
        "a module inside": (("set", "whole.pt"), 4, "whole.pt"),
        "no weights": (("set", "resnet18"), 2, "--weights must be given"),
        "no weights of a factory": (("set", "net.py:build"), 2, "--weights must be given"),
        "no such file of code": (("set", "nets.py:build", "--weights", "tiny.pt"), 2, "'nets.py' does not exist"),
        "no such checkpoint": (("set", "gone.pt"), 2, "'gone.pt' does not exist"),
        "two checkpoints": (("set", "two.pt", "--weights", "tiny.pt"), 2, "must name a network where --weights"),
        "a target above 1": (("set", "net.py:build", "--weights", "tiny.pt", "--target-macs", 1.5), 2, "at most 1"),
        "no such folder": (("set", "net.py:build", "--weights", "tiny.pt", "-o", "no/a.yaml"), 2, "does not exist"),
    }  # fmt: skip


def test_what_cannot_be_used_is_refused_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for case, (arguments, code, message) in bad_cases(tmp_path).items():
        done = call("init", *arguments)
        assert (done.exit_code, message in done.stderr) == (code, True), (case, done.output)
        assert "Traceback" not in done.output
        assert not Path("pipeline.yaml").exists(), case


def test_a_file_is_not_overwritten_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    halves(tmp_path / "set")
    model = factory(tmp_path)
    Path("pipeline.yaml").write_text("precious", encoding="utf-8")
    done = call("init", "set", *model)
    assert done.exit_code == 2
    assert done.stderr == "pipeline.yaml exists already and must not be overwritten.\nHint: --force replaces it.\n"
    assert call("init", "set", *model, "--force").exit_code == 0


def test_deep_validation_finds_every_problem_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    halves(tmp_path / "set")
    assert call("init", "set", *factory(tmp_path)).exit_code == 0
    values = yaml.safe_load(Path("pipeline.yaml").read_text(encoding="utf-8"))
    values["data"]["evaluation"] = {"folder": "nowhere"}
    values["stages"][0]["weights"] = "gone.pt"
    values["stages"][2] = {"stage": "finetune", "own": "loop.py:train"}
    values["stages"][-1]["provider"] = "NoSuchExecutionProvider"
    Path("broken.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    done = call("validate", "--deep", "broken.yaml")
    assert done.exit_code == 3
    for part in ("loop.py", "NoSuchExecutionProvider", "nowhere", "gone.pt"):
        assert part in done.stderr, (part, done.stderr)
    assert "broken.yaml: valid" not in done.output
    assert call("validate", "broken.yaml").exit_code == 0, "without --deep only the file itself is looked at"


def test_deep_validation_names_a_problem_of_several_splits_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos", 24)
    assert call("init", "photos", *factory(tmp_path)).exit_code == 0
    (tmp_path / "photos" / "notes").mkdir()
    done = call("validate", "--deep", "pipeline.yaml")
    assert done.exit_code == 4
    assert done.stderr.count("must hold an image, none in notes.") == 1
    assert "pipeline.yaml: data (train, calibration, validation, evaluation): Every class folder" in done.stderr


def test_deep_validation_runs_the_network_and_finds_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    halves(tmp_path / "set")
    assert call("init", "set", *factory(tmp_path)).exit_code == 0
    done = call("validate", "--deep", "pipeline.yaml", "--set", "stages.prune.exclude=[no_layer]")
    assert (done.exit_code, "'no_layer' names none" in done.stderr) == (2, True), done.output
    done = call("validate", "--deep", "pipeline.yaml", "--set", "data.preprocessing.channels=L", "--set",
                "data.preprocessing.mean=[0.5]", "--set", "data.preprocessing.std=[0.5]")  # fmt: skip
    assert (done.exit_code, "must run on images of shape" in done.stderr) == (3, True), done.output
    done = call("validate", "--deep", "pipeline.yaml", "--set", "stages.verify.gates.max_drop.top1=0.01")
    assert done.exit_code == 0
    assert "30 evaluation images tell drops of about 11.3% and more from none" in done.stderr
