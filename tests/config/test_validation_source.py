"""Validation images of their own: read, part of the key, compared with evaluation, and never those of the verdict."""

import shutil

import numpy as np
import pytest
import smallrun
from smallrun import Notes

from compress.config.load import parse_pipeline
from compress.config.rules.gates import require_known_metrics
from compress.data.from_config import Splits
from compress.engine.keys import build_steps
from compress.engine.runner import run
from compress.errors import ConfigError, ConfigValueError
from compress.search.validation import is_far_better
from compress.tasks.base import Metric


@pytest.fixture
def world(tmp_path):
    return smallrun.make_world(tmp_path)


def with_validation(world, source, **changes):
    values = world.values() | changes
    values["data"] = values["data"] | {"validation": source}
    return values


def write_held_out(world, count=24):
    arrays = np.load(world.folder / "test.npz")
    path = world.folder / "held_out.npz"
    np.savez(path, x=arrays["x"][:count][::-1], y=arrays["y"][:count][::-1])
    return path


def test_images_of_their_own_are_validated_on_and_none_is_taken_out_of_train(world):
    taken = Splits(world.load(world.values()).config.data)
    own = Splits(world.load(with_validation(world, {"arrays": str(write_held_out(world))})).config.data)
    assert (own.validation.name, len(own.validation)) == ("validation", 24)
    assert len(own.train) == len(taken.train) + len(taken.validation)
    assert own.validation.labels.tolist() == np.load(world.folder / "held_out.npz")["y"].tolist()
    assert own.validation.original is None


def test_a_path_is_relative_to_the_pipeline_and_the_content_is_part_of_the_key(world):
    write_held_out(world)
    pipeline = world.load(with_validation(world, {"arrays": "held_out.npz"}))
    assert pipeline.resolved["data"]["validation"]["arrays"] == str(world.folder / "held_out.npz")
    first = build_steps(pipeline)[0].fixed["data"]["validation"]
    write_held_out(world, 20)
    assert build_steps(pipeline)[0].fixed["data"]["validation"] != first
    assert build_steps(world.load(world.values()))[0].fixed["data"]["validation"] == 32


@pytest.mark.parametrize(
    ("given", "wording"),
    [
        (0, r"data\.validation must be at least 1, got 0"),
        ("many", r"data\.validation must be a whole number, got 'many'"),
        ({"array": "x.npz"}, r"data\.validation must be a number of images, or hold exactly one of the keys"),
        ({"arrays": 3}, r"data\.validation\.arrays must be text, got 3"),
        ({"arrays": "x.npz", "label": "y"}, r"data\.validation\.label is not a known key"),
    ],
)
def test_what_is_neither_a_number_nor_a_source_is_refused_by_its_place(world, given, wording):
    with pytest.raises(ConfigError, match=wording):
        world.load(with_validation(world, given))


def test_a_run_warns_where_validation_is_the_evaluation_or_far_easier_than_it(world):
    shutil.copy(world.folder / "test.npz", world.folder / "same.npz")
    notes = Notes()
    outcome = run(world.load(with_validation(world, {"arrays": "same.npz"}, name="same")), world.runs, notes)
    assert any("Validation and evaluation are the same images" in text for text in notes.warnings)
    record = outcome.report["stages"][0]["record"]
    assert record["validation_top1"] == record["top1"]
    assert record["warnings"] == []
    arrays = np.load(world.folder / "test.npz")
    harder = np.where(np.arange(len(arrays["y"])) % 2, arrays["y"], (arrays["y"] + 1) % 4)
    np.savez(world.folder / "test.npz", x=arrays["x"], y=harder)
    values = with_validation(world, {"arrays": "same.npz"}, name="harder")
    values["stages"][-1]["gates"] = {"max_drop": {"top1": 0.5}}
    notes = Notes()
    outcome = run(world.load(values), world.runs, notes)
    (warning,) = [text for text in notes.warnings if "far better on validation" in text]
    assert warning in outcome.report["stages"][0]["record"]["warnings"]
    assert "data.validation" in warning
    assert "far better on validation" in (world.runs / "harder" / "report.html").read_text()


@pytest.mark.parametrize(
    ("values", "noise", "metric", "wanted"),
    [
        ((0.9985, 0.917), 0.006, Metric("top1"), True),
        ((0.9985, 0.917), 0.09, Metric("top1"), False),
        ((0.935, 0.917), 0.001, Metric("top1"), False),
        ((0.917, 0.9985), 0.006, Metric("top1"), False),
        ((1.0, 1.2), 0.1, Metric("rmse", higher_is_better=False, is_share=False), True),
        ((1.2, 1.0), 0.1, Metric("rmse", higher_is_better=False, is_share=False), False),
        ((1.0, 1.04), 0.01, Metric("rmse", higher_is_better=False, is_share=False), False),
    ],
)
def test_far_better_is_beyond_noise_and_enough_to_matter(values, noise, metric, wanted):
    assert is_far_better(*values, noise, metric) is wanted


def test_gates_that_name_no_metric_of_a_task_of_the_users_are_refused_after_load(world):
    (world.folder / "mine.py").write_text(
        "from compress.tasks.classification import Classification\nclass Mine(Classification):\n    name = 'mine'\n"
    )
    values = world.values() | {"task": {"own": f"{world.folder / 'mine.py'}:Mine"}}
    values["stages"][-1]["gates"] = {"max_drop": {"top2": 0.1}}
    config = world.load(values).config
    with pytest.raises(
        ConfigValueError, match=r"gates\.max_drop must name metrics of the task \(top1\), got 'top2'"
    ) as one:
        require_known_metrics(config, {"metrics": ["top1"]})
    assert one.value.hint == "did you mean 'top1'?"
    require_known_metrics(config, {"metrics": ["top1", "top2"]})
    require_known_metrics(config, {})
    require_known_metrics(world.load(world.values()).config, {"metrics": ["top1", "top5"]})
    done = world.call("run", values, "--quiet")
    assert done.exit_code == 2
    assert "got 'top2'" in done.stderr


@pytest.mark.parametrize(
    ("gates", "metrics", "message"),
    [
        ({"max": {"churn": 0.05}}, ["distance", "cosine", "agreement"], "images without labels"),
        ({"max_drop": {"top1": 0.05}}, ["distance", "cosine", "agreement"], "images without labels"),
        ({"min": {"agreement": 0.9}}, ["top1", "top5"], "metrics of the task"),
        ({"max_drop": {"noise": 0.1, "worst_class": 0.1}}, ["top1", "top5"], None),
        ({"min": {"agreement": 0.9}, "max_drop": {"noise": 0.1}}, ["distance", "cosine", "agreement"], None),
    ],
)
def test_gates_must_fit_evaluation_images_with_or_without_labels(world, gates, metrics, message):
    values = world.values()
    values["stages"][-1]["gates"] = gates
    config = world.load(values).config
    if message is None:
        require_known_metrics(config, {"metrics": metrics})
        return
    with pytest.raises(ConfigValueError, match=message):
        require_known_metrics(config, {"metrics": metrics})


def test_gates_on_masks_need_labels_of_masks(tmp_path):
    text = """
name: it
task: {name: detection, postprocess: "a:b"}
data:
  train: {yolo: labels, images: images}
  evaluation: {yolo: labels, images: images}
stages:
  - {stage: load, model: {torchvision: ssd300_vgg16}, weights: w.pt}
  - {stage: export}
  - {stage: verify, gates: {max_drop: {mask_map50: 0.02}}}
"""
    config = parse_pipeline(text, tmp_path / "it.yaml").config
    with pytest.raises(ConfigValueError, match=r"\(map, map50\), got 'mask_map50'") as caught:
        require_known_metrics(config, {"metrics": ["map", "map50"]})
    assert caught.value.hint == "data.evaluation: {yolo or coco: ..., polygons: true} reads their labels"
    require_known_metrics(config, {"metrics": ["map", "map50", "mask_map50"]})
