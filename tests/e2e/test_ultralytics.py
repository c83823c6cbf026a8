"""YOLO networks of ultralytics through whole pipelines, where it is installed: the example of the documentation."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from compress.bundle.check import read_content
from compress.cli.commands import app

ROOT = Path(__file__).parents[2]
SIDE = 64
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
pytest.importorskip("ultralytics", reason="ultralytics is not installed")
pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

POSTPROCESS = "compress.tasks.decoders:ultralytics"
OF_TASK: dict[str, dict[str, Any]] = {
    "detect": {"source": {"polygons": True}, "build": {"nc": 3}, "outputs": ["output_0"], "metric": "map50"},
    "segment": {
        "source": {"polygons": True},
        "build": {"nc": 3},
        "outputs": ["output_0.0", "output_0.1"],
        "metric": "mask_map50",
    },
    "pose": {
        "source": {"keypoints": 4},
        "build": {"nc": 1, "data_kpt_shape": [4, 3]},
        "task": {"kwargs": {"keypoints": [4, 3]}},
        "outputs": ["output_0"],
        "metric": "keypoint_map50",
    },
}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], prog_name="compress")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of generated pictures; not to be changed."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import yolo_shapes
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("shapes")
    for kind in ("segment", "pose"):
        yolo_shapes.write_labelled(folder / kind, kind, SIDE, share=0.06)
    yolo_shapes.write_classes(folder / "classify", SIDE, share=0.06)
    return folder


def pipeline_of(kind: str, cfg: str, shapes: Path, trains: bool) -> dict[str, Any]:
    """Return a pipeline of a detector, segmenter or pose network with random weights in `state.pt`."""
    given = OF_TASK[kind]
    place = shapes / ("segment" if kind == "detect" else kind)
    sources = [
        {"yolo": str(place / name / "labels"), "images": str(place / name / "images"), "letterbox": [SIDE, SIDE]}
        | given["source"]
        for name in ("train", "val")
    ]
    own = {"cfg": cfg, "data": str(place / "data.yaml"), **TRAINING}
    training = [{"stage": "finetune", "own": "yolo.py:train", "kwargs": own}] if trains else []
    return {
        "name": "yolo",
        "task": {"name": "detection", "postprocess": POSTPROCESS, **given.get("task", {})},
        "data": {"train": sources[0], "evaluation": sources[1], "calibration": 8, "validation": 8},
        "stages": [
            {
                "stage": "load",
                "model": {
                    "factory": "yolo.py:build",
                    "kwargs": {"cfg": cfg, **given["build"]},
                    "outputs": given["outputs"],
                },
                "weights": "state.pt",
            },
            {"stage": "prune", "target": {"macs": 0.7}, "score_images": 8, "refit_images": 8},
            *training,
            {"stage": "export"},
            {
                "stage": "verify",
                "resources": None,
                "repeats": 5,
                "gates": {"max_drop": {given["metric"]: 0.9}, "max_macs": 10**12, "parity": 1.0},
            },
        ],
    }


TRAINING = {"imgsz": SIDE, "epochs": 1, "batch": 8, "workers": 0, "plots": False, "device": "cpu"}


def ran(values: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a pipeline in a folder, bundle and check it; return the checks of the verdict."""
    monkeypatch.chdir(folder)
    shutil.copy(ROOT / "docs" / "examples" / "yolo.py", folder)
    sys.path.insert(0, str(folder))
    try:
        import yolo

        torch.manual_seed(0)
        torch.save(yolo.build(**values["stages"][0]["model"]["kwargs"]).state_dict(), "state.pt")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("yolo", None)
    (folder / "yolo.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    ended = call("run", "yolo.yaml")
    assert ended.exit_code in (0, 1, 6), ended.output
    assert sorted(path.name for path in Path("runs").iterdir() if path.name[0] != ".") == ["yolo"]
    report = json.loads(Path("runs/yolo/report.json").read_text(encoding="utf-8"))
    bundled = call("bundle", "runs/yolo", "-o", "yolo.zip", "--allow-failed")
    assert bundled.exit_code == 0, bundled.output
    checked = call("check", "yolo.zip", "--repeats", 3)
    assert checked.exit_code == 0, checked.output
    return {one["name"]: one for one in report["verdict"]["checks"]} | {"report": report}


def assert_parity(checks: dict[str, Any]) -> None:
    """Compare with the largest output: boxes of random weights are far outside of the picture."""
    parity = checks["report"]["details"]["parity"]
    assert parity["max_abs"] < 1e-4 * max(1.0, parity["largest_output"]), parity


@pytest.mark.parametrize(
    ("kind", "cfg"),
    [
        ("detect", "yolov8n.yaml"),
        ("detect", "yolo11n.yaml"),
        ("segment", "yolov8n-seg.yaml"),
        ("segment", "yolo11n-seg.yaml"),
        ("pose", "yolov8n-pose.yaml"),
        ("detect", "yolo26n.yaml"),
    ],
)
def test_a_network_is_pruned_trained_verified_and_bundled(
    kind: str, cfg: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = ran(pipeline_of(kind, cfg, shapes, trains=True), tmp_path, monkeypatch)
    assert_parity(checks)
    slim, baseline = checks["report"]["slim"], checks["report"]["baseline"]
    assert slim["macs"] < 0.72 * baseline["macs"]
    assert OF_TASK[kind]["metric"] in slim["quality"]
    assert checks[f"max_drop.{OF_TASK[kind]['metric']}"]["status"] == "pass"
    content = read_content(tmp_path / "yolo.zip")
    assert "decode.py" in content
    example = content["README.md"].decode().partition("```python\n")[2].partition("```")[0]
    folder = tmp_path / "unpacked"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    exec(compile(example, "README", "exec"), {})
    sys.modules.pop("decode", None)


@pytest.mark.parametrize(
    ("kind", "cfg"), [("detect", "yolov5nu.yaml"), ("detect", "yolo26n.yaml"), ("segment", "yolo26n-seg.yaml")]
)
def test_a_network_is_pruned_and_exported_without_training(
    kind: str, cfg: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = ran(pipeline_of(kind, cfg, shapes, trains=False), tmp_path, monkeypatch)
    assert_parity(checks)
    assert checks["report"]["slim"]["macs"] < 0.72 * checks["report"]["baseline"]["macs"]


def test_a_classifier_is_pruned_trained_verified_and_bundled(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shapes / "classify"
    values = pipeline_of("detect", "yolov8n-cls.yaml", shapes, trains=True)
    values["task"] = "classification"
    values["data"] = {
        "train": {"folder": str(place / "train")},
        "evaluation": {"folder": str(place / "val")},
        "calibration": 8,
        "validation": 8,
    }
    load, _, own, _, verify = values["stages"]
    load["model"]["outputs"] = ["output_1"]  # the logits
    own["kwargs"]["data"] = str(place)
    verify["gates"]["max_drop"] = {"top1": 0.9}
    checks = ran(values, tmp_path, monkeypatch)
    assert_parity(checks)
    assert Image.open(next((place / "val").rglob("*.png"))).size == (SIDE, SIDE)
