"""Trainers of other libraries inside of finetune, where they are installed: the examples of the documentation."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from smallrun import make_world
from typer.testing import CliRunner, Result

from compress.cli.commands import app

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], prog_name="compress")


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLES / "lightning_loop.py", tmp_path)
    world = make_world(tmp_path / "world")
    (tmp_path / "killed.py").write_text(
        "import lightning_loop\n"
        "def train(model, context, **kwargs):\n"
        "    marker = context.folder / 'killed'\n"
        "    if not marker.exists():\n"
        "        marker.touch()\n"
        "        lightning_loop.train(model, context, epochs=1)\n"
        "        raise SystemExit('killed')\n"
        "    assert (context.folder / 'last.ckpt').exists()\n"
        "    return lightning_loop.train(model, context, epochs=2, **kwargs)\n",
        encoding="utf-8",
    )
    values = world.values()
    values["stages"][2] = {"stage": "finetune", "own": str(tmp_path / "killed.py:train"), "kwargs": {"rate": 0.005}}
    path = world.write(values)
    stopped = call("run", path, "--runs-dir", world.runs)
    assert stopped.exit_code == 3, stopped.output
    ended = call("run", path, "--runs-dir", world.runs)
    assert ended.exit_code in (0, 6), ended.output
    assert "prune: unchanged" in ended.stdout


def _pictures(folder: Path, count: int) -> None:
    """Write YOLO pictures with one square each."""
    random = np.random.default_rng(count)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        pixels = random.integers(0, 90, (64, 64, 3), dtype=np.uint8)
        left, top = random.integers(0, 36, 2)
        pixels[top : top + 24, left : left + 24] = 240
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        centre = f"{(left + 12) / 64} {(top + 12) / 64}"
        (folder / "labels" / f"{number}.txt").write_text(f"0 {centre} 0.375 0.375\n", encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cfg", ["yolov8n.yaml", "yolo11n.yaml"])
def test_ultralytics_trains_a_slim_detector(cfg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    from ultralytics.nn.tasks import DetectionModel

    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLES / "yolo.py", tmp_path)
    for name, count in (("train", 40), ("val", 12)):
        _pictures(tmp_path / "set" / name, count)
    (tmp_path / "set" / "data.yaml").write_text(
        f"path: {tmp_path / 'set'}\ntrain: train/images\nval: val/images\nnames: [square]\n", encoding="utf-8"
    )
    torch.manual_seed(0)
    torch.save(DetectionModel(cfg, nc=1, verbose=False).state_dict(), tmp_path / "state.pt")
    options = "imgsz: 64, epochs: 1, batch: 8, workers: 0, plots: false, device: cpu"
    settings = f"{{data: {tmp_path / 'set' / 'data.yaml'}, {options}}}"
    sources = [
        f"{{yolo: set/{name}/labels, images: set/{name}/images, letterbox: [64, 64]}}" for name in ("train", "val")
    ]
    (tmp_path / "yolo.yaml").write_text(
        "name: yolo\n"
        'task: {name: detection, postprocess: "compress.tasks.decoders:ultralytics"}\n'
        f"data: {{train: {sources[0]}, evaluation: {sources[1]}, calibration: 8, validation: 8}}\n"
        "stages:\n"
        "  - stage: load\n"
        f'    model: {{factory: "yolo.py:build", kwargs: {{cfg: {cfg}, classes: 1}}, outputs: [output_0]}}\n'
        "    weights: state.pt\n"
        "  - {stage: prune, target: {macs: 0.7}, residual: cut, score_images: 8, refit_images: 8}\n"
        f'  - {{stage: finetune, own: "yolo.py:train", kwargs: {settings}}}\n'
        "  - {stage: export}\n"
        "  - {stage: verify, resources: null, repeats: 5, gates: {max_macs: 1000000000000}}\n",
        encoding="utf-8",
    )
    checked = call("validate", "--deep", "yolo.yaml")
    assert checked.exit_code == 0, checked.output
    ended = call("run", "yolo.yaml")
    assert ended.exit_code in (0, 1, 6), ended.output
    assert Path("runs/yolo/model.onnx").is_file()
    assert Path("runs/yolo/slim/recipe.json").is_file()
